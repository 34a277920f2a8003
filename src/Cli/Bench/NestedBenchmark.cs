// The measurements of xensharp bench --nested: real Xen and XenSharp side by side on the same emulated machine.
using System.Globalization;
using System.Runtime.InteropServices;
using System.Text;
using System.Text.Json;
using System.Text.RegularExpressions;
using XenSharp.Domains.Builder;
using XenSharp.Guests.Benchmark;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Oracle;
using XenSharp.Oracle.Beds;

namespace XenSharp.Cli.Bench;

/// <summary>How long to measure.</summary>
/// <param name="Rounds">Times that each bed is booted.</param>
/// <param name="Iterations">Operations of a figure in one run of the probe guest.</param>
internal sealed record NestedBenchmarkPlan(int Rounds, int Iterations);

/// <summary>
/// Runs the same guests, unprivileged domains of the same size, on Xen and on XenSharp with kvm_amd, each on one processor of
/// QEMU's TCG, and lets them take the time inside, by the time-stamp counter and the guest kernel's clock.
/// </summary>
/// <remarks>
/// Not under QEMU's instruction counting: it would make entering and leaving a virtual machine as cheap as any other instruction,
/// and that is most of what XenSharp costs. Without it the emulator's work counts, which for such a switch is dearer than a
/// processor's. Other load on the host only ever adds to a time, so the lowest of all runs is what is shown.
/// </remarks>
/// <param name="command">Path of the native command.</param>
/// <param name="plan">How long to measure.</param>
/// <param name="progress">Told what is done.</param>
internal sealed partial class NestedBenchmark(string command, NestedBenchmarkPlan plan, Action<string> progress)
{
    private const int Processors = 1;
    private const int ProbesABoot = 3;
    private const int Forks = 100;
    private const int PipeRounds = 2000;
    private const string Debian = "debian";
    private const string PingPong = "bin/pipe-ping-pong";
    private const string Boot = "Debian: boot to init, 256 MiB";
    private const string ForkExec = "Debian: fork + exec of busybox";
    private const string ContextSwitch = "Debian: context switch through a pipe";

    /// <summary>What says what a bare exit costs in the emulated machine; the rest of what it measures is left.</summary>
    private const string FloorCommand = "bench --no-debian --rounds 2 --iterations 64 --hypercalls 64 --json";

    private readonly Dictionary<string, Dictionary<string, double>> _lowest = [];
    private readonly Dictionary<string, double> _floors = [];

    /// <summary>Runs everything.</summary>
    /// <exception cref="OracleException">A bed cannot be set up, or a guest did not do what it should.</exception>
    public async Task<NestedBenchResult> RunAsync(CancellationToken cancellation)
    {
        var cache = new GuestCache(GuestCache.DefaultRoot());
        var fetches = new Progress<FetchProgress>();
        string? stage = null;
        fetches.ProgressChanged += (_, now) =>
        {
            if (Interlocked.Exchange(ref stage, now.Stage) != now.Stage)
                progress(now.Stage);
        };
        var xen = new XenDomUBed(cache, fetches) { Processors = Processors };
        await xen.PrepareAsync(cancellation).ConfigureAwait(false);
        NestedKvmBed[] nested =
        [
            .. new[] { true, false }.Select(paging => new NestedKvmBed(cache, command, paging, fetches) { Processors = Processors, Command = FloorCommand }),
        ];
        IReadOnlyList<BedGuest> guests = await MakeGuestsAsync(cache, cancellation).ConfigureAwait(false);

        List<(string Bed, List<GuestRun> Runs)> all = [];
        IGuestBed[] beds = [xen, .. nested];
        for (int round = 1; round <= plan.Rounds; round++)
        {
            foreach (IGuestBed bed in beds)
            {
                progress($"{bed.Name}: round {round} of {plan.Rounds}");
                List<GuestRun> runs = [];
                await foreach (GuestRun run in bed.RunAsync(guests, cancellation).ConfigureAwait(false))
                {
                    if (run.Ending != GuestEnding.PowerOff)
                        throw new OracleException($"The guest {run.Name} of the benchmark ended by {run.Ending} on {bed.Name}. {run.Report}\n{run.Console}");
                    runs.Add(run);
                }
                all.Add((bed.Name, runs));
                if (bed is NestedKvmBed { CommandOutput: { } output })
                    TakeFloor(bed.Name, output);
            }
        }

        // The machine's time-stamp counter is the host's in every bed, and the guests' is the machine's.
        double kiloHertz = TscKiloHertz(nested[0]);
        foreach ((string bed, List<GuestRun> runs) in all)
        {
            foreach (GuestRun run in runs)
            {
                if (run.Name == Debian)
                    TakeDebian(bed, run.Console);
                else
                    TakeProbe(bed, run.Console, kiloHertz);
            }
        }
        return new NestedBenchResult(
            [.. beds.Select(static bed => bed.Name)],
            [.. beds.Select(bed => _floors.TryGetValue(bed.Name, out double floor) ? floor : (double?)null)],
            [.. _lowest.Select(figure => new NestedBenchFigure(figure.Key, [.. beds.Select(bed => figure.Value[bed.Name])]))]);
    }

    [GeneratedRegex(@"@(\w+) (\d+\.\d+) (\d+\.\d+)\r\n")]
    private static partial Regex Interval { get; }

    private static double TscKiloHertz(NestedKvmBed bed)
    {
        using JsonDocument report = JsonDocument.Parse(bed.HostReport!);
        return report.RootElement.GetProperty("kvm").GetProperty("tscKiloHertz").GetDouble();
    }

    private async Task<IReadOnlyList<BedGuest>> MakeGuestsAsync(GuestCache cache, CancellationToken cancellation)
    {
        DebianKernel kernel = await cache.GetKernelAsync(DebianKernelFlavour.Amd64, null, cancellation).ConfigureAwait(false);
        string busybox = await cache.GetBusyboxAsync(null, cancellation).ConfigureAwait(false);

        // The kernel's log has the time since its first instructions in C; /proc/uptime begins later.
        string script = $$"""
            #!/bin/sh
            echo "xensharp: init" >/dev/kmsg
            echo "@boot 0.0 $(dmesg | sed -n 's/^\[ *\([0-9.]*\)\] xensharp: init$/\1/p')"
            read start idle </proc/uptime
            i=0; while [ $i -lt {{Forks}} ]; do /bin/busybox true; i=$((i+1)); done
            read end idle </proc/uptime
            echo "@fork $start $end"
            read start idle </proc/uptime
            /{{PingPong}} || echo "the ping-pong failed"
            read end idle </proc/uptime
            echo "@pipe $start $end"
            """;
        byte[] ramdisk = await BusyboxInitramfs.BuildAsync(
            busybox,
            new BusyboxInitramfsOptions
            {
                Banner = string.Empty,
                InitScript = script.ReplaceLineEndings("\n"),
                Files = [new InitramfsFile(PingPong, PipePingPong.Build(PipeRounds), Executable: true)],
            },
            cancellation).ConfigureAwait(false);
        byte[] probe = BenchmarkGuest.Build(plan.Iterations);
        byte[] image = await File.ReadAllBytesAsync(kernel.Image, cancellation).ConfigureAwait(false);
        var minutes = TimeSpan.FromMinutes(10);
        return
        [
            .. Enumerable.Range(1, ProbesABoot).Select(i => new BedGuest($"probe-{i}", probe) { MemoryMiB = 64, Timeout = minutes }),
            new BedGuest(Debian, KernelImage.Unpack(image)) { Ramdisk = ramdisk, CommandLine = "console=hvc0 quiet", MemoryMiB = 256, Timeout = minutes },
        ];
    }

    private void TakeProbe(string bed, string console, double kiloHertz)
    {
        byte[] output = Encoding.Latin1.GetBytes(console);
        if (!GuestResults.TryFind(output, BenchmarkGuest.Marker, BenchmarkGuest.ResultBytes, out ReadOnlySpan<byte> results))
            throw new OracleException($"The probe guest of the benchmark printed no results on {bed}; run it again.");
        foreach (BenchmarkFigure figure in Enum.GetValues<BenchmarkFigure>())
            Take(Benchmark.NameOf(figure), bed, BenchmarkGuest.Nanoseconds(figure, results, kiloHertz, plan.Iterations));
    }

    private void TakeFloor(string bed, string output)
    {
        BenchResult result = JsonSerializer.Deserialize(output, BenchJson.Default.BenchResult)
            ?? throw new OracleException($"The bare exits on {bed} were not measured; run it again.");
        _floors[bed] = _floors.TryGetValue(bed, out double lowest) ? Math.Min(lowest, result.FloorNanoseconds) : result.FloorNanoseconds;
    }

    private void TakeDebian(string bed, string console)
    {
        Dictionary<string, double> seconds = Interval.Matches(console).ToDictionary(
            static match => match.Groups[1].Value,
            static match => double.Parse(match.Groups[3].Value, CultureInfo.InvariantCulture) - double.Parse(match.Groups[2].Value, CultureInfo.InvariantCulture));
        if (seconds.Count != 3 || console.Contains("failed", StringComparison.Ordinal))
            throw new OracleException($"The Debian guest of the benchmark did not get as far as it should have on {bed}:\n{console}");
        Take(Boot, bed, seconds["boot"] * 1e9);
        Take(ForkExec, bed, seconds["fork"] * 1e9 / Forks);
        Take(ContextSwitch, bed, seconds["pipe"] * 1e9 / (2 * PipeRounds));
    }

    private void Take(string figure, string bed, double nanoseconds)
    {
        ref Dictionary<string, double>? beds = ref CollectionsMarshal.GetValueRefOrAddDefault(_lowest, figure, out _);
        beds ??= [];
        beds[bed] = beds.TryGetValue(bed, out double lowest) ? Math.Min(lowest, nanoseconds) : nanoseconds;
    }
}
