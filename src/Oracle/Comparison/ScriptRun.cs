// Running scripts on a test bed.
using System.Runtime.CompilerServices;
using XenSharp.Guests.Probe;
using XenSharp.Oracle.Beds;

namespace XenSharp.Oracle.Comparison;

/// <summary>A script and what came of it on a bed.</summary>
/// <param name="Script">The script.</param>
/// <param name="Transcript">Its transcript.</param>
/// <param name="Run">The run behind it.</param>
public sealed record ScriptRun(AbiScript Script, Transcript Transcript, GuestRun Run)
{
    /// <summary>Memory of a script's domain in MiB.</summary>
    private const int MemoryMiB = 32;

    /// <summary>What a script may take where nothing slows it down.</summary>
    private static readonly TimeSpan DefaultTimeout = TimeSpan.FromSeconds(30);

    /// <summary>Runs scripts, each in a domain of its own.</summary>
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
        BedGuest[] guests =
        [
            .. scripts.Select(script => new BedGuest(script.Name, script.Build())
            {
                MemoryMiB = MemoryMiB,
                Vcpus = script.Vcpus,
                Timeout = timeout ?? DefaultTimeout,
            }),
        ];
        int index = 0;
        await foreach (GuestRun run in bed.RunAsync(guests, cancellation).ConfigureAwait(false))
        {
            AbiScript script = scripts[index++];
            yield return new ScriptRun(script, script.Read(run.Console, Words(run.Ending)), run);
        }
    }

    private static string Words(GuestEnding ending) => ending switch
    {
        GuestEnding.PowerOff => "power off",
        GuestEnding.SoftReset => "soft reset",
        GuestEnding.TimedOut => "timed out",
        _ => ending.ToString().ToLowerInvariant(),
    };
}
