// What a benchmark run found, as people and programs get to see it.
using System.Text.Json.Serialization;

namespace XenSharp.Cli.Bench;

/// <summary>One figure.</summary>
/// <param name="Name">What was measured.</param>
/// <param name="Nanoseconds">The median of all rounds, for one operation.</param>
/// <param name="Ratio">The median of the rounds' ratios to the floor taken around each of them.</param>
/// <param name="LowestRatio">The lowest of them.</param>
/// <param name="HighestRatio">The highest of them.</param>
/// <param name="Required">The ratio that is promised not to be exceeded, if there is one.</param>
public sealed record BenchFigure(string Name, double Nanoseconds, double Ratio, double LowestRatio, double HighestRatio, double? Required = null)
{
    /// <summary>Whether the promise holds; true where there is none.</summary>
    public bool IsMet => Required is not { } limit || Ratio <= limit;
}

/// <summary>A count or size that is not a time.</summary>
/// <param name="Name">What was counted.</param>
/// <param name="Value">The number.</param>
/// <param name="Unit">Its unit.</param>
/// <param name="Required">The number that is promised not to be exceeded, if there is one.</param>
public sealed record BenchCount(string Name, double Value, string Unit, double? Required = null)
{
    /// <summary>Whether the promise holds; true where there is none.</summary>
    public bool IsMet => Required is not { } limit || Value <= limit;
}

/// <summary>A whole run.</summary>
/// <param name="FloorNanoseconds">The median of the bare exit loop over the run.</param>
/// <param name="Figures">Times, as ratios to the floor.</param>
/// <param name="Counts">The rest.</param>
/// <param name="Disks">Transfers of a guest's disks, beside the host's.</param>
/// <param name="Idle">Domains that sleep, beside threads that do.</param>
public sealed record BenchResult(
    double FloorNanoseconds, IReadOnlyList<BenchFigure> Figures, IReadOnlyList<BenchCount> Counts, IReadOnlyList<DiskFigure> Disks, IReadOnlyList<IdleFigure> Idle);

/// <summary>One figure of several hypervisors.</summary>
/// <param name="Name">What was measured.</param>
/// <param name="Nanoseconds">The lowest of all runs, for one operation; in the order of <see cref="NestedBenchResult.Beds"/>.</param>
public sealed record NestedBenchFigure(string Name, IReadOnlyList<double> Nanoseconds);

/// <summary>A run on emulated machines.</summary>
/// <param name="Beds">The hypervisors; the first is real Xen.</param>
/// <param name="FloorNanoseconds">The lowest mean of a bare KVM exit on each; null for real Xen, which has none.</param>
/// <param name="Figures">The times.</param>
public sealed record NestedBenchResult(IReadOnlyList<string> Beds, IReadOnlyList<double?> FloorNanoseconds, IReadOnlyList<NestedBenchFigure> Figures);

/// <summary>JSON without reflection.</summary>
[JsonSerializable(typeof(BenchResult))]
[JsonSerializable(typeof(NestedBenchResult))]
[JsonSourceGenerationOptions(WriteIndented = true, PropertyNamingPolicy = JsonKnownNamingPolicy.CamelCase)]
internal sealed partial class BenchJson : JsonSerializerContext;
