// What a domain takes of a processor that has nothing to do, beside the same wake-ups of a thread that makes one bare exit each.
using XenSharp.Domains;
using XenSharp.Guests.Initramfs;
using XenSharp.Kvm;
using XenSharp.Toolstack;

namespace XenSharp.Cli.Bench;

/// <summary>What a sleeping domain takes.</summary>
/// <param name="Name">Which.</param>
/// <param name="WakeUps">Hypercalls of the domain's a second: an idle guest makes one when it sleeps again.</param>
/// <param name="ProcessorNanoseconds">Of its vCPU's thread, a wake-up.</param>
/// <param name="Bare">What a wake-up takes at the least: of a thread that is woken as often, as a vCPU's is.</param>
public sealed record IdleFigure(string Name, double WakeUps, double ProcessorNanoseconds, WakeUpCost Bare)
{
    private const double PercentANanosecond = 100 / 1e9;

    /// <summary>Percent of a processor that the domain takes.</summary>
    public double Percent => ProcessorNanoseconds * WakeUps * PercentANanosecond;

    /// <summary>Percent of a processor that as many wake-ups with a bare exit take.</summary>
    public double BarePercent => Bare.EntryNanoseconds * WakeUps * PercentANanosecond;
}

/// <summary>
/// Boots a Debian guest that sleeps, with a tick of 250 Hz and without one, and takes the processor time of its vCPU's thread; before and
/// after, that of <see cref="RawWakeUpLoop"/> at the same rate.
/// </summary>
/// <param name="host">Where the guests run.</param>
/// <param name="seconds">For how long each is measured.</param>
/// <param name="load">Makes a domain's image of a ramdisk.</param>
internal sealed class IdleBenchmark(KvmHost host, int seconds, Func<byte[], DomainImage> load)
{
    private const int MemoryMiB = 128;
    private const string Idle = "@idle";
    private static readonly TimeSpan Settling = TimeSpan.FromSeconds(3);

    private static readonly (string Name, string CommandLine)[] Kinds = [("tick of 250 Hz (nohz=off)", "nohz=off"), ("no tick", string.Empty)];

    /// <summary>Boots the guests one after the other.</summary>
    /// <param name="busybox">A static busybox.</param>
    /// <param name="cancellation">Ends it.</param>
    internal async Task<IReadOnlyList<IdleFigure>> RunAsync(string busybox, CancellationToken cancellation)
    {
        byte[] ramdisk = await BusyboxInitramfs.BuildAsync(
            busybox,
            new BusyboxInitramfsOptions { Banner = string.Empty, InitScript = $"#!/bin/sh\nsleep 3\necho {Idle}\nexec sleep 100000\n" },
            cancellation).ConfigureAwait(false);
        List<IdleFigure> figures = [];
        foreach ((string name, string commandLine) in Kinds)
            figures.Add(await MeasureAsync(name, commandLine, load(ramdisk), cancellation).ConfigureAwait(false));
        return figures;
    }

    private async Task<IdleFigure> MeasureAsync(string name, string commandLine, DomainImage image, CancellationToken cancellation)
    {
        using var marks = new MarkWaiter();
        await using RunningDomain running = RunningDomain.Create(
            host,
            new DomainSpecification { Name = "idle", Image = image, MemoryMiB = MemoryMiB, CommandLine = $"console=hvc0 quiet {commandLine}" },
            marks.Sink);
        running.Start();
        _ = await marks.WaitAsync(Idle, running, cancellation).ConfigureAwait(false);

        // Not its first moments: what the kernel does a while after the boot is not idleness.
        await Task.Delay(Settling, cancellation).ConfigureAwait(false);
        (double rate, _) = await WatchAsync(running.Domain, seconds / 4.0, cancellation).ConfigureAwait(false);
        WakeUpCost before = await MeasureBareAsync(rate).ConfigureAwait(false);
        (rate, double time) = await WatchAsync(running.Domain, seconds, cancellation).ConfigureAwait(false);
        WakeUpCost after = await MeasureBareAsync(rate).ConfigureAwait(false);
        running.Destroy();
        _ = await running.Completion.WaitAsync(cancellation).ConfigureAwait(false);
        return new IdleFigure(
            name, rate, time,
            new WakeUpCost((before.SleepNanoseconds + after.SleepNanoseconds) / 2, (before.EntryNanoseconds + after.EntryNanoseconds) / 2));
    }

    /// <summary>Lets the domain sleep.</summary>
    /// <returns>Hypercalls a second, and nanoseconds of processor time for each.</returns>
    private static async Task<(double Rate, double Nanoseconds)> WatchAsync(Domain domain, double seconds, CancellationToken cancellation)
    {
        (TimeSpan Time, ulong Calls) Look() => (domain.Activity[0].ProcessorTime, domain.HypercallCount);
        long start = System.Diagnostics.Stopwatch.GetTimestamp();
        (TimeSpan Time, ulong Calls) before = Look();
        await Task.Delay(TimeSpan.FromSeconds(seconds), cancellation).ConfigureAwait(false);
        (TimeSpan Time, ulong Calls) after = Look();
        double calls = Math.Max(1, after.Calls - before.Calls);
        return (calls / System.Diagnostics.Stopwatch.GetElapsedTime(start).TotalSeconds, (after.Time - before.Time).TotalNanoseconds / calls);
    }

    /// <summary>Half the time for each kind of bare wake-up, a quarter of it before the domain's turn and a quarter after.</summary>
    private Task<WakeUpCost> MeasureBareAsync(double rate) => Task.Run(() => RawWakeUpLoop.Measure(
        host.Kvm, host.Capabilities, TimeSpan.FromSeconds(1 / rate), Math.Max(1, (int)(rate * seconds / 4))));
}
