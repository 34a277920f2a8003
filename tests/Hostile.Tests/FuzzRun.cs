// One run of the fuzz guest in this process, and what is found when it has ended.

using System.Runtime.CompilerServices;
using XenSharp.Devices.Console;
using XenSharp.Domains;
using XenSharp.Domains.Builder;
using XenSharp.Guests.Fuzz;
using XenSharp.Toolstack;

namespace XenSharp.Hostile.Tests;

/// <summary>The end of a run.</summary>
/// <param name="Seed">Of the guest's random numbers.</param>
/// <param name="Calls">Calls that it was to make.</param>
/// <param name="Vcpus">vCPUs that made them.</param>
/// <param name="Figures">What it printed last.</param>
/// <param name="Lost">How the guest ended, where it did not end by itself; null where it did.</param>
/// <param name="Trouble">What is wrong with the manager, as sentences; null when nothing is.</param>
internal sealed record FuzzRun(ulong Seed, ulong Calls, int Vcpus, FuzzFigures Figures, string? Lost, string? Trouble)
{
    internal const int MemoryMiB = 16;

    /// <summary>With several vCPUs, where a seed does not repeat itself, the books are also checked on the way, every so many exits.</summary>
    private const int AuditInterval = 2_000;

    /// <summary>A vCPU that is up and makes no hypercall for so long hangs.</summary>
    internal static readonly TimeSpan Patience = TimeSpan.FromSeconds(60);

    /// <summary>Runs a seed to its end, however it comes, and recounts the domain's frames.</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static async Task<FuzzRun> RunAsync(KvmHost host, ulong seed, ulong calls, CancellationToken cancellation, int vcpus = 1)
    {
        using var output = new MemoryStream();
        var specification = new DomainSpecification
        {
            Name = $"fuzz-{seed}",
            MemoryMiB = MemoryMiB,
            Vcpus = FuzzGuest.DomainVcpus(vcpus),
            AuditInterval = vcpus == 1 ? 0 : AuditInterval,
            Image = new DomainImage(KernelImage.Parse(FuzzGuest.Build(seed, calls, vcpus))),
        };
        RunningDomain domain = RunningDomain.Create(host, specification, new StreamSink(output));
        domain.Start();
        string? hang = await WatchAsync(domain, cancellation);
        if (hang != null)
        {
            domain.Domain.Crash(hang);

            // Its memory cannot be given up while a thread of it runs on.
            if (await Task.WhenAny(domain.Completion, Task.Delay(Patience, CancellationToken.None)) != domain.Completion)
                return new FuzzRun(seed, calls, vcpus, FuzzFigures.None, null, $"A thread of the manager hangs. {hang}");
        }

        await using (domain)
        {
            DomainExit exit = await domain.Completion;
            string? lost = hang == null && exit.Reason != ShutdownReason.PowerOff ? $"The guest ended by {exit.Reason}. {exit.Report}" : null;
            string? counts = domain.Domain.AuditFrames() is { } wrong ? $"The counts do not agree: {wrong}." : null;
            FuzzFigures figures = FuzzGuest.Read(output.ToArray(), vcpus) ?? FuzzFigures.None;
            string trouble = string.Join(Environment.NewLine, new[] { hang, exit.Report is { } report && IsOurs(report) ? report : null, counts }.OfType<string>());
            return new FuzzRun(seed, calls, vcpus, figures, lost, trouble.Length == 0 ? null : trouble);
        }
    }

    /// <summary>Finds out by when a run that went wrong had done so: the least number of calls after which it shows.</summary>
    public async Task<FuzzRun> NarrowAsync(KvmHost host, CancellationToken cancellation)
    {
        ulong good = 0;
        FuzzRun bad = this;
        while (bad.Calls - good > 1 && !cancellation.IsCancellationRequested)
        {
            FuzzRun run = await RunAsync(host, Seed, good + ((bad.Calls - good) / 2), cancellation);
            if ((run.Trouble ?? run.Lost) is null)
                good = run.Calls;
            else
                bad = run;
        }

        return bad;
    }

    /// <summary>Whether a crash is the manager's own doing.</summary>
    internal static bool IsOurs(string report)
        => report.Contains("XenSharp failed", StringComparison.Ordinal) || report.Contains("books do not agree", StringComparison.Ordinal);

    /// <summary>Waits for the guest's end.</summary>
    /// <returns>Null when it came; else where the vCPUs hang, or were when the time was up.</returns>
    internal static async Task<string?> WatchAsync(RunningDomain domain, CancellationToken cancellation)
    {
        Dictionary<int, (ulong Hypercalls, long Since)> seen = [];
        while (await Task.WhenAny(domain.Completion, Task.Delay(500, CancellationToken.None)) != domain.Completion)
        {
            IReadOnlyList<VcpuActivity> activity = domain.Domain.Activity;
            long now = Environment.TickCount64;
            foreach (VcpuActivity vcpu in activity)
            {
                if (!vcpu.IsUp || !seen.TryGetValue(vcpu.Id, out (ulong Hypercalls, long Since) last) || last.Hypercalls != vcpu.Hypercalls)
                    seen[vcpu.Id] = (vcpu.Hypercalls, now);
                else if (now - last.Since > Patience.TotalMilliseconds)
                    return $"vCPU {vcpu.Id} hangs:{Environment.NewLine}{string.Join(Environment.NewLine, activity)}";
            }

            // It has closed its console's port by what it did at random, and waits for ever for room in the ring.
            if (domain.Domain.ConsoleChannel.GuestPort.Value == 0)
                domain.Destroy();
            if (cancellation.IsCancellationRequested)
                return $"The test's time is up:{Environment.NewLine}{string.Join(Environment.NewLine, activity)}";
        }

        return null;
    }
}
