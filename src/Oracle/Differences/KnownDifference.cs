// Where XenSharp answers other than Xen does and it is known why.
namespace XenSharp.Oracle.Differences;

/// <summary>Why there is a difference.</summary>
public enum DifferenceKind
{
    /// <summary>It is to stay: the reason says what is better or cannot be had.</summary>
    ByDesign,

    /// <summary>
    /// It depends on the processor that XenSharp runs on: its KVM cannot do what hardware does, or it does what hardware does and the
    /// software CPU under the recorded Xen did not. On other hosts it does not show, and is not stale for that.
    /// </summary>
    ByHost,

    /// <summary>What Xen does is not built yet.</summary>
    NotBuilt,
}

/// <summary>One difference that is expected. One that is expected and does not show is as wrong as one that was not expected, but for those by host.</summary>
/// <param name="Script">The script's name.</param>
/// <param name="Case">The case's name.</param>
/// <param name="Step">The step's text; null for any step of the case, which then may differ or not.</param>
/// <param name="Answer">What XenSharp answers instead; null only where <paramref name="Step"/> is.</param>
/// <param name="Kind">Whether it is to stay.</param>
/// <param name="Reason">Why, as a sentence for people.</param>
public sealed record KnownDifference(string Script, string Case, string? Step, string? Answer, DifferenceKind Kind, string Reason)
{
    /// <summary>One step answers otherwise, for good.</summary>
    public static KnownDifference ByDesign(string script, string @case, string step, string answer, string reason)
        => new(script, @case, step, answer, DifferenceKind.ByDesign, reason);

    /// <summary>One step answers otherwise until something is built.</summary>
    public static KnownDifference NotBuilt(string script, string @case, string step, string answer, string reason)
        => new(script, @case, step, answer, DifferenceKind.NotBuilt, reason);

    /// <summary>One step may answer otherwise, by what the host's processor does.</summary>
    public static KnownDifference ByHost(string script, string @case, string step, string answer, string reason)
        => new(script, @case, step, answer, DifferenceKind.ByHost, reason);

    /// <summary>Steps of a case answer otherwise until something is built; at least one.</summary>
    public static KnownDifference CaseNotBuilt(string script, string @case, string reason)
        => new(script, @case, null, null, DifferenceKind.NotBuilt, reason);
}

/// <summary>All of them.</summary>
public static class KnownDifferences
{
    public static IReadOnlyList<KnownDifference> All { get; } =
        [.. MemoryDifferences.All, .. EventDifferences.All, .. ProcessorDifferences.All, .. PairDifferences.All];
}
