// Running scripts on a test bed.
using System.Runtime.CompilerServices;
using XenSharp.Guests.Probe;
using XenSharp.Oracle.Beds;

namespace XenSharp.Oracle.Comparison;

/// <summary>A script and what came of it on a bed.</summary>
/// <param name="Script">The script.</param>
/// <param name="Transcript">Its transcript.</param>
/// <param name="Runs">The runs behind it: one, or those of the two domains of a pair.</param>
public sealed record ScriptRun(AbiScript Script, Transcript Transcript, IReadOnlyList<GuestRun> Runs)
{
    /// <summary>Memory of a script's domain in MiB; the first of a pair has twice as much.</summary>
    private const int MemoryMiB = 32;

    /// <summary>What a script may take where nothing slows it down.</summary>
    private static readonly TimeSpan DefaultTimeout = TimeSpan.FromSeconds(30);

    /// <summary>Whether a domain ran too long and was destroyed.</summary>
    public bool TimedOut => Runs.Any(static run => run.Ending == GuestEnding.TimedOut);

    /// <summary>What the hypervisor had to say of the domains' ends, for people; empty if nothing.</summary>
    public string Report => string.Concat(Runs.Select(static run => run.Report));

    /// <summary>Runs scripts, each in a domain or a pair of domains of its own.</summary>
    /// <param name="bed">Where.</param>
    /// <param name="scripts">Fresh ones.</param>
    /// <param name="timeout">What a script may take; null for what it needs on a bed that is not emulated.</param>
    /// <param name="cancellation">Ends the run.</param>
    /// <returns>One result per script, in their order, each as soon as it is there.</returns>
    /// <exception cref="OracleException">The bed cannot be set up, or broke down.</exception>
    public static async IAsyncEnumerable<ScriptRun> RunAsync(
        IGuestBed bed, IReadOnlyList<AbiScript> scripts, TimeSpan? timeout = null,
        [EnumeratorCancellation] CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(bed);
        ArgumentNullException.ThrowIfNull(scripts);

        // Each guest's image has some megabytes, and all of them together have hundreds.
        IEnumerable<IReadOnlyList<AbiScript>> turns = bed.TakesOneByOne ? scripts.Select(static script => new[] { script }) : [scripts];
        foreach (IReadOnlyList<AbiScript> turn in turns)
        {
            await foreach (ScriptRun run in RunTurnAsync(bed, turn, timeout, cancellation).ConfigureAwait(false))
                yield return run;
        }
    }

    private static async IAsyncEnumerable<ScriptRun> RunTurnAsync(
        IGuestBed bed, IReadOnlyList<AbiScript> scripts, TimeSpan? timeout, [EnumeratorCancellation] CancellationToken cancellation)
    {
        BedGuest[] guests =
        [
            .. scripts.SelectMany(script => script.BuildAll().Select((kernel, side) => new BedGuest(NameOf(script, side), kernel)
            {
                MemoryMiB = script.IsPair && side == 0 ? 2 * MemoryMiB : MemoryMiB,
                Vcpus = script.Vcpus,
                Timeout = timeout ?? DefaultTimeout,
                WithNext = script.IsPair && side == 0,
            })),
        ];
        int index = 0;
        List<GuestRun> runs = [];
        await foreach (GuestRun run in bed.RunAsync(guests, cancellation).ConfigureAwait(false))
        {
            AbiScript script = scripts[index];
            runs.Add(run);
            if (script.IsPair && runs.Count == 1)
                continue;
            yield return new ScriptRun(script, script.Read([.. runs.Select(static run => (run.Console, Words(run.Ending)))]), runs);
            runs = [];
            index++;
        }
    }

    private static string NameOf(AbiScript script, int side) => script.IsPair ? $"{script.Name}-{"ab"[side]}" : script.Name;

    private static string Words(GuestEnding ending) => ending switch
    {
        GuestEnding.PowerOff => "power off",
        GuestEnding.SoftReset => "soft reset",
        GuestEnding.TimedOut => "timed out",
        _ => ending.ToString().ToLowerInvariant(),
    };
}
