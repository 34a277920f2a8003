// The measurements of xensharp bench.
using System.Diagnostics;
using System.Runtime.CompilerServices;
using XenSharp.Cli.Hosting;
using XenSharp.Domains;
using XenSharp.Domains.Builder;
using XenSharp.Guests.Benchmark;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Kvm;
using XenSharp.Toolstack;

namespace XenSharp.Cli.Bench;

/// <summary>How long to measure.</summary>
/// <param name="Rounds">Times that each figure is taken.</param>
/// <param name="Iterations">Operations of a figure in one round.</param>
/// <param name="Hypercalls">Hypercalls over which allocations are counted.</param>
/// <param name="Debian">Whether the Debian guest is measured as well.</param>
/// <param name="DisksOnly">Whether nothing but the Debian guest's disks is.</param>
/// <param name="IdleOnly">Whether nothing but Debian guests that sleep is.</param>
/// <param name="DiskKinds">Words of which the name of a kind of disk transfer has to have one; none for all of them.</param>
internal sealed record BenchmarkPlan(
    int Rounds, int Iterations, int Hypercalls, bool Debian, bool DisksOnly = false, bool IdleOnly = false, IReadOnlyList<string>? DiskKinds = null);

/// <summary>
/// Measures the ABI and puts every time in proportion to the floor, a bare KVM exit, which is taken before and after each
/// measurement: hosts are noisy, and their speed changes from minute to minute.
/// </summary>
internal sealed class Benchmark(KvmHost host, BenchmarkPlan plan, Action<string> progress)
{
    private const int FloorExits = 4000;
    private const int GuestMemoryMiB = 64;
    private const int DebianMemoryMiB = 512;
    private const int IdleSeconds = 8;
    private const int Forks = 200;
    private const string Init = "@init";
    private const string ForkStart = "@fork";
    private const string ForkEnd = "@forked";
    private const string PipeEnd = "@piped";
    private const string MapEnd = "@mapped";
    private const string MapTool = "bin/map-touch-unmap";
    private const int MappedBytes = 64 << 20;

    private readonly List<double> _floors = [];
    private readonly Dictionary<string, List<(double Nanoseconds, double Ratio)>> _samples = [];
    private readonly Dictionary<string, double> _required = new()
    {
        [NameOf(BenchmarkFigure.NullHypercall)] = 1.15,
        [DebianBoot] = 220_000,
        [NameOf(PingPongWait.Running)] = 2.5,
        [NameOf(PingPongWait.Sleeping)] = 4,
        [NameOf(PingPongWait.Answering)] = 2.5,
    };

    private const string DomainCreate = "domain create to first guest instruction";
    private const string TinyKernel = "tiny guest";
    private const string DebianKernelName = "Debian";
    private const string DebianBoot = "Debian boot to init, 512 MiB";
    private const string ForkExec = "Debian: fork + exec of busybox";
    private const string Pipe = "Debian: 64 MiB through a pipe";
    private const string Map = "Debian: mmap, touch, munmap 64 MiB";

    private readonly List<BenchCount> _counts = [];
    private readonly List<DiskFigure> _disks = [];
    private readonly List<IdleFigure> _idle = [];

    /// <summary>Runs everything.</summary>
    public async Task<BenchResult> RunAsync(CancellationToken cancellation)
    {
        using var floor = new RawExitLoop(host.Kvm, host.Capabilities);
        _ = floor.Measure(FloorExits);
        if (plan.DisksOnly || plan.IdleOnly)
        {
            (DebianKernel kernel, string busybox) = await FetchAsync(cancellation).ConfigureAwait(false);
            if (plan.DisksOnly)
                await MeasureDiskAsync(floor, kernel, busybox, cancellation).ConfigureAwait(false);
            if (plan.IdleOnly)
                await MeasureIdleAsync(floor, kernel, busybox, cancellation).ConfigureAwait(false);
            return Result();
        }

        KernelImage guest = KernelImage.Parse(BenchmarkGuest.Build(plan.Iterations));
        for (int round = 1; round <= plan.Rounds; round++)
        {
            progress($"hypercalls, faults and events: round {round} of {plan.Rounds}");
            await MeasureGuestAsync(floor, guest, cancellation).ConfigureAwait(false);
            await MeasurePingPongAsync(floor, cancellation).ConfigureAwait(false);
        }

        await using var create = new CreateBenchmark();
        await create.StartAsync(cancellation).ConfigureAwait(false);
        await MeasureCreateAsync(floor, create, TinyKernel, create.Prepare(null, [], GuestMemoryMiB), cancellation).ConfigureAwait(false);
        progress($"allocations over {plan.Hypercalls:N0} hypercalls");
        await CountAllocationsAsync(cancellation).ConfigureAwait(false);
        if (plan.Debian)
            await MeasureDebianAsync(floor, create, cancellation).ConfigureAwait(false);
        return Result();
    }

    private BenchResult Result() => new(
        Median(_floors),
        [.. _samples.Select(pair => Summarise(pair.Key, pair.Value))],
        _counts,
        _disks,
        _idle);

    internal static string NameOf(BenchmarkFigure figure) => figure switch
    {
        BenchmarkFigure.NullHypercall => "null hypercall (xen_version)",
        BenchmarkFigure.UserSystemCall => "user system call, bounced, and iret",
        BenchmarkFigure.PageFault => "page fault, bounced, and iret",
        BenchmarkFigure.MmuUpdate1 => "mmu_update, batch of 1, an entry",
        BenchmarkFigure.MmuUpdate32 => "mmu_update, batch of 32, an entry",
        BenchmarkFigure.MmuUpdate512 => "mmu_update, batch of 512, an entry",
        BenchmarkFigure.MmuUpdateUnused32 => "mmu_update, batch of 32, an unused entry",
        BenchmarkFigure.PageTableExchange => "xchg with a page-table entry, emulated",
        BenchmarkFigure.EventToSelf => "event to self, upcall, and iret",
        BenchmarkFigure.TickDuringLongBatch => "timer tick's wait in an mmu_update of a million",
        _ => figure.ToString(),
    };

    private static string NameOf(PingPongWait wait) => wait switch
    {
        PingPongWait.Running => "event to another domain, both running",
        PingPongWait.Sleeping => "event to another domain that sleeps",
        PingPongWait.Answering => "event to another domain, answered by its handler",
        _ => wait.ToString(),
    };

    private static double Median(List<double> values)
    {
        double[] sorted = [.. values.Order()];
        int middle = sorted.Length / 2;
        return sorted.Length % 2 == 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
    }

    private BenchFigure Summarise(string name, List<(double Nanoseconds, double Ratio)> samples) => new(
        name,
        Median([.. samples.Select(static sample => sample.Nanoseconds)]),
        Median([.. samples.Select(static sample => sample.Ratio)]),
        samples.Min(static sample => sample.Ratio),
        samples.Max(static sample => sample.Ratio),
        _required.TryGetValue(name, out double limit) ? limit : null);

    private double MeasureFloor(RawExitLoop floor)
    {
        double nanoseconds = floor.Measure(FloorExits);
        _floors.Add(nanoseconds);
        return nanoseconds;
    }

    private void Add(string name, double nanoseconds, double floor)
    {
        if (!_samples.TryGetValue(name, out List<(double, double)>? samples))
            _samples[name] = samples = [];
        samples.Add((nanoseconds, nanoseconds / floor));
    }

    private async Task MeasureGuestAsync(RawExitLoop floor, KernelImage guest, CancellationToken cancellation)
    {
        double before = MeasureFloor(floor);
        var sink = new MarkerSink();
        double created = await RunToEndAsync(guest, sink, cancellation).ConfigureAwait(false);
        double mean = (before + MeasureFloor(floor)) / 2;
        Add(DomainCreate, created, mean);
        ReadOnlySpan<byte> results = GuestResults.Find(sink.Bytes, BenchmarkGuest.Marker, BenchmarkGuest.ResultBytes);
        double kiloHertz = host.Capabilities.TimeStampCounter.KiloHertz;
        foreach (BenchmarkFigure figure in Enum.GetValues<BenchmarkFigure>())
        {
            double nanoseconds = BenchmarkGuest.Nanoseconds(figure, results, kiloHertz, plan.Iterations);
            Add(NameOf(figure), nanoseconds, mean);
        }
    }

    private async Task MeasurePingPongAsync(RawExitLoop floor, CancellationToken cancellation)
    {
        const ushort first = 1, second = 2;
        double before = MeasureFloor(floor);
        await using var toolstack = new ToolstackContext(host);
        var sink = new MarkerSink();
        await using RunningDomain pinger = CreatePingPong(toolstack, first, second, sink);
        await using RunningDomain ponger = CreatePingPong(toolstack, second, first, new MarkerSink());
        pinger.Start();
        ponger.Start();
        Expect(await pinger.Completion.WaitAsync(cancellation).ConfigureAwait(false));
        Expect(await ponger.Completion.WaitAsync(cancellation).ConfigureAwait(false));
        double mean = (before + MeasureFloor(floor)) / 2;
        ReadOnlySpan<byte> results = GuestResults.Find(sink.Bytes, EventPingPong.Marker, EventPingPong.ResultBytes);
        double kiloHertz = host.Capabilities.TimeStampCounter.KiloHertz;
        foreach (PingPongWait wait in Enum.GetValues<PingPongWait>())
            Add(NameOf(wait), EventPingPong.Nanoseconds(wait, results, kiloHertz, plan.Iterations), mean);
    }

    private RunningDomain CreatePingPong(ToolstackContext toolstack, ushort id, ushort peer, MarkerSink sink)
    {
        KernelImage kernel = KernelImage.Parse(EventPingPong.Build(peer, isFirst: id < peer, plan.Iterations));
        RunningDomain domain = RunningDomain.Create(
            toolstack, new DomainSpecification { Name = $"ping-pong-{id}", Image = new DomainImage(kernel), MemoryMiB = GuestMemoryMiB }, sink);
        return domain.Domain.Id.Value == id
            ? domain
            : throw new InvalidOperationException($"A domain of the benchmark has the id {domain.Domain.Id.Value}, and its kernel expects {id}.");
    }

    /// <summary>Runs a guest until it powers off.</summary>
    /// <returns>Nanoseconds from the start of making the domain to its first instruction.</returns>
    private async Task<double> RunToEndAsync(KernelImage kernel, MarkerSink sink, CancellationToken cancellation)
    {
        long first = 0;
        long start = Stopwatch.GetTimestamp();
        await using RunningDomain running = RunningDomain.Create(
            host, new DomainSpecification { Name = "benchmark", Image = new DomainImage(kernel), MemoryMiB = GuestMemoryMiB }, sink);
        running.Domain.BeforeFirstEntry = () => first = Stopwatch.GetTimestamp();
        running.Start();
        Expect(await running.Completion.WaitAsync(cancellation).ConfigureAwait(false));
        return Stopwatch.GetElapsedTime(start, first).TotalNanoseconds;
    }

    private static void Expect(DomainExit exit)
    {
        if (exit.Reason != ShutdownReason.PowerOff)
            throw new InvalidOperationException($"A guest of the benchmark ended by {exit.Reason}. {exit.Report}");
    }

    private async Task CountAllocationsAsync(CancellationToken cancellation)
    {
        KernelImage kernel = KernelImage.Parse(BenchmarkGuest.BuildHypercallLoop(plan.Hypercalls));
        await using RunningDomain running = RunningDomain.Create(
            host, new DomainSpecification { Name = "benchmark", Image = new DomainImage(kernel), MemoryMiB = GuestMemoryMiB }, new MarkerSink());
        int collectionsBefore = GC.CollectionCount(0);
        running.Start();
        Expect(await running.Completion.WaitAsync(cancellation).ConfigureAwait(false));
        _counts.Add(new BenchCount($"managed bytes allocated on the vCPU thread over {plan.Hypercalls:N0} hypercalls", running.Domain.AllocatedBytes, "bytes"));
        _counts.Add(new BenchCount("garbage collections meanwhile", GC.CollectionCount(0) - collectionsBefore, "collections", 0));
    }

    /// <summary>From being asked for to the first instruction, in both ways; as a number of milliseconds it is promised of the native command.</summary>
    private async Task MeasureCreateAsync(
        RawExitLoop floor, CreateBenchmark create, string kernel, string configuration, CancellationToken cancellation)
    {
        progress($"create, {kernel}");
        foreach (CreateWay way in Enum.GetValues<CreateWay>())
        {
            string name = $"create, {kernel}: {(way == CreateWay.Request ? "request" : "command")} to first guest instruction";
            for (int round = 1; round <= plan.Rounds; round++)
            {
                double before = MeasureFloor(floor);
                double nanoseconds = await create.MeasureAsync(configuration, way, cancellation).ConfigureAwait(false);
                Add(name, nanoseconds, (before + MeasureFloor(floor)) / 2);
            }

            double median = Median([.. _samples[name].Select(static sample => sample.Nanoseconds)]);
            _counts.Add(new BenchCount(name, Math.Round(median / 1e6, 1), "ms", IsNative ? CreateLimit : null));
        }
    }

    private async Task MeasureDebianAsync(RawExitLoop floor, CreateBenchmark create, CancellationToken cancellation)
    {
        (DebianKernel kernel, string busybox) = await FetchAsync(cancellation).ConfigureAwait(false);
        string script = $"""
            #!/bin/sh
            echo {Init}
            echo {ForkStart}
            i=0; while [ $i -lt {Forks} ]; do /bin/busybox true; i=$((i+1)); done
            echo {ForkEnd}
            dd if=/dev/zero bs=64k count=1024 2>/dev/null | cat >/dev/null
            echo {PipeEnd}
            /{MapTool} && echo {MapEnd}
            poweroff -f
            """;
        byte[] ramdisk = await BusyboxInitramfs.BuildAsync(
            busybox,
            new BusyboxInitramfsOptions
            {
                Banner = string.Empty,
                InitScript = script.ReplaceLineEndings("\n"),
                Files = [new InitramfsFile(MapTool, MapTouchUnmap.Build(MappedBytes, rounds: 1), Executable: true)],
            },
            cancellation).ConfigureAwait(false);
        for (int round = 1; round <= Math.Min(3, plan.Rounds); round++)
        {
            progress($"Debian: boot {round} of {Math.Min(3, plan.Rounds)}");
            await MeasureDebianBootAsync(floor, kernel.Image, ramdisk, round == 1, cancellation).ConfigureAwait(false);
        }

        string configuration = create.Prepare(kernel.Image, ramdisk, DebianMemoryMiB);
        double beforeFirst = MeasureFloor(floor);
        double first = await create.MeasureAsync(configuration, CreateWay.Command, cancellation).ConfigureAwait(false);
        Add($"create, {DebianKernelName}, never unpacked before: command to first guest instruction", first, (beforeFirst + MeasureFloor(floor)) / 2);
        await create.AwaitUnpackedAsync(cancellation).ConfigureAwait(false);
        await MeasureCreateAsync(floor, create, DebianKernelName, configuration, cancellation).ConfigureAwait(false);
        await MeasureIdleAsync(floor, kernel, busybox, cancellation).ConfigureAwait(false);
        await MeasureDiskAsync(floor, kernel, busybox, cancellation).ConfigureAwait(false);
    }

    private async Task MeasureIdleAsync(RawExitLoop floor, DebianKernel kernel, string busybox, CancellationToken cancellation)
    {
        progress("Debian: nothing to do");
        _ = MeasureFloor(floor);
        _idle.AddRange(await new IdleBenchmark(host, IdleSeconds, ramdisk => Load(kernel.Image, ramdisk)).RunAsync(busybox, cancellation).ConfigureAwait(false));
    }

    private async Task<(DebianKernel Kernel, string Busybox)> FetchAsync(CancellationToken cancellation)
    {
        progress("fetching the Debian guest, if it is not cached");
        var cache = new GuestCache(GuestCache.DefaultRoot());
        return (
            await cache.GetKernelAsync(DebianKernelFlavour.Amd64, null, cancellation).ConfigureAwait(false),
            await cache.GetBusyboxAsync(null, cancellation).ConfigureAwait(false));
    }

    private async Task MeasureDiskAsync(RawExitLoop floor, DebianKernel kernel, string busybox, CancellationToken cancellation)
    {
        if (kernel.Modules is not { } modules)
            return;
        progress("Debian: transfers of its disks");
        double before = MeasureFloor(floor);
        IReadOnlyList<DiskFigure> figures = await new DiskBenchmark(host, plan.DisksOnly ? plan.Rounds : Math.Min(3, plan.Rounds), plan.DiskKinds ?? [], ramdisk => Load(kernel.Image, ramdisk))
            .RunAsync(busybox, modules, cancellation).ConfigureAwait(false);
        double mean = (before + MeasureFloor(floor)) / 2;
        foreach (DiskFigure figure in figures)
            Add($"Debian: {figure.Name}", figure.GuestNanoseconds, mean);
        _disks.AddRange(figures);
    }

    private async Task MeasureDebianBootAsync(RawExitLoop floor, string kernelFile, byte[] ramdisk, bool measureMemory, CancellationToken cancellation)
    {
        double before = MeasureFloor(floor);
        long first = 0;
        long resident = 0;
        var sink = new MarkerSink
        {
            Seen = marker =>
            {
                if (marker != Init)
                    return;

                // What the benchmark itself left behind, fetching and building the ramdisk, is not the domain's.
                GC.Collect(GC.MaxGeneration, GCCollectionMode.Aggressive, blocking: true, compacting: true);
                resident = ResidentMemory.BesideGuests();
            },
        };
        await using RunningDomain running = RunningDomain.Create(
            host,
            new DomainSpecification
            {
                Name = "benchmark",
                Image = Load(kernelFile, ramdisk),
                MemoryMiB = DebianMemoryMiB,
                CommandLine = "console=hvc0 quiet",
            },
            sink);
        running.Domain.BeforeFirstEntry = () => first = Stopwatch.GetTimestamp();
        running.Start();

        // As run and the daemon do.
        ProgramPages.GiveBack();
        Expect(await running.Completion.WaitAsync(cancellation).ConfigureAwait(false));
        double mean = (before + MeasureFloor(floor)) / 2;
        Add(DebianBoot, Between(first, sink.TimeOf(Init)), mean);
        Add(ForkExec, Between(sink.TimeOf(ForkStart), sink.TimeOf(ForkEnd)) / Forks, mean);
        Add(Pipe, Between(sink.TimeOf(ForkEnd), sink.TimeOf(PipeEnd)), mean);
        Add(Map, Between(sink.TimeOf(PipeEnd), sink.TimeOf(MapEnd)), mean);
        if (measureMemory)
            _counts.Add(new BenchCount("resident memory beside guest RAM, Debian at init", Math.Round(resident / 1048576.0, 1), "MiB", RuntimeLimit));
    }

    /// <summary>In a method of its own, whose frame is gone, and with it the last reference to the kernel, when the domain runs.</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    private static DomainImage Load(string kernelFile, byte[] ramdisk)
        => new(KernelImage.Parse(File.ReadAllBytes(kernelFile)), ramdisk) { Reusable = false };

    /// <summary>What is promised of the native command, from being started to its guest's first instruction, in ms.</summary>
    private const double CreateLimit = 60;

    /// <summary>
    /// What is promised of the native binary's own memory, in MiB. Under the JIT compiler the benchmark's own compiled code is
    /// a good part of what is counted, so nothing is promised of that here.
    /// </summary>
    private static double? RuntimeLimit => IsNative ? 30 : null;

    private static bool IsNative { get; } = !File.ReadAllText("/proc/self/maps").Contains("libclrjit.so", StringComparison.Ordinal);

    private static double Between(long? start, long? end)
        => start is { } from && end is { } to
            ? Stopwatch.GetElapsedTime(from, to).TotalNanoseconds
            : throw new InvalidOperationException("The Debian guest of the benchmark did not get as far as it should have.");
}
