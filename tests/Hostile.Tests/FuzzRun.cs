// One run of the fuzz guest in this process, and what is found when it has ended.

using System.Runtime.CompilerServices;
using XenSharp.Cli.Hosting;
using XenSharp.Devices.Console;
using XenSharp.Domains;
using XenSharp.Domains.Builder;
using XenSharp.Guests.Fuzz;

namespace XenSharp.Hostile.Tests;

/// <summary>The end of a run.</summary>
/// <param name="Seed">Of the guest's random numbers.</param>
/// <param name="Calls">Calls that it was to make.</param>
/// <param name="Figures">What it printed last.</param>
/// <param name="Trouble">What is wrong, as sentences; null when nothing is.</param>
internal sealed record FuzzRun(ulong Seed, ulong Calls, FuzzFigures Figures, string? Trouble)
{
    private const int MemoryMiB = 16;

    /// <summary>Runs a seed to its end, however it comes, and recounts the domain's frames.</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static async Task<FuzzRun> RunAsync(KvmHost host, ulong seed, ulong calls, CancellationToken cancellation)
    {
        using var output = new MemoryStream();
        var specification = new DomainSpecification
        {
            Name = $"fuzz-{seed}",
            MemoryMiB = MemoryMiB,
            Image = new DomainImage(KernelImage.Parse(FuzzGuest.Build(seed, calls))),
        };
        await using RunningDomain domain = RunningDomain.Create(host, specification, new StreamSink(output));
        domain.Start();
        DomainExit exit;
        using (cancellation.Register(() => domain.Domain.Crash("The test's time is up.")))
            exit = await domain.Completion;
        List<string> troubles = [];
        if (exit.Reason != ShutdownReason.PowerOff)
            troubles.Add($"The guest ended by {exit.Reason}. {exit.Report}");
        if (domain.Domain.AuditFrames() is { } counts)
            troubles.Add($"The counts do not agree: {counts}.");
        FuzzFigures figures = FuzzGuest.Read(output.ToArray()) ?? FuzzFigures.None;
        return new FuzzRun(seed, calls, figures, troubles.Count == 0 ? null : string.Join(Environment.NewLine, troubles));
    }

    /// <summary>Finds out by when a run that went wrong had done so: the least number of calls after which it shows.</summary>
    public async Task<FuzzRun> NarrowAsync(KvmHost host, CancellationToken cancellation)
    {
        ulong good = 0;
        FuzzRun bad = this;
        while (bad.Calls - good > 1 && !cancellation.IsCancellationRequested)
        {
            FuzzRun run = await RunAsync(host, Seed, good + ((bad.Calls - good) / 2), cancellation);
            if (run.Trouble is null)
                good = run.Calls;
            else
                bad = run;
        }

        return bad;
    }
}
