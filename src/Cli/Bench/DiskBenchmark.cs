// Transfers of a Debian guest's disks beside the same transfers made by a process of the host.
using System.Diagnostics;
using System.Globalization;
using System.Text;
using XenSharp.Cli.Commands;
using XenSharp.Core;
using XenSharp.Devices.Block;
using XenSharp.Devices.Block.Images;
using XenSharp.Domains;
using XenSharp.Domains.Builder;
using XenSharp.Guests.Benchmark;
using XenSharp.Guests.Initramfs;
using XenSharp.Toolstack;

namespace XenSharp.Cli.Bench;

/// <summary>Transfers of one kind.</summary>
/// <param name="Program">The name of the program that makes them.</param>
/// <param name="Name">What they are, for people.</param>
/// <param name="Plan">How they are made.</param>
/// <param name="OnDisk">Whether they go past the host's page cache, to the disk.</param>
internal sealed record DiskKind(string Program, string Name, QueuedTransferPlan Plan, bool OnDisk);

/// <summary>What transfers of one kind took; medians of the rounds.</summary>
/// <param name="Name">What they are.</param>
/// <param name="BlockSize">Bytes of one.</param>
/// <param name="GuestNanoseconds">A transfer by the guest.</param>
/// <param name="HostNanoseconds">A transfer by the host's process.</param>
/// <param name="Throughput">The guest's throughput as a part of the host's.</param>
/// <param name="ProcessorNanoseconds">Processor time of this process for each by the guest: its vCPUs' and the back end's.</param>
/// <param name="Hypercalls">Hypercalls of the guest's for each.</param>
/// <param name="Wakeups">Times that the guest woke the back end, for each.</param>
/// <param name="Notifications">Times that the back end interrupted the guest, for each.</param>
public sealed record DiskFigure(
    string Name, int BlockSize, double GuestNanoseconds, double HostNanoseconds, double Throughput, double ProcessorNanoseconds,
    double Hypercalls, double Wakeups, double Notifications);

/// <summary>
/// One program reads or writes a raw file, 32 blocks at once: as a process of the host, and in a guest whose disk the file is, past the
/// guest's own cache. The two take turns, so that what else the host does hits both.
/// </summary>
/// <param name="host">Where the guest runs.</param>
/// <param name="rounds">Times that each figure is taken.</param>
/// <param name="only">Words of which the name of a kind has to have one to be measured; none for all.</param>
/// <param name="load">Makes a domain's image of a ramdisk.</param>
internal sealed class DiskBenchmark(KvmHost host, int rounds, IReadOnlyList<string> only, Func<byte[], DomainImage> load)
{
    private const int Depth = 32;
    private const int FileSize = 64 << 20;
    private const int MemoryMiB = 384;

    /// <summary>As many as a guest has that is not said to have more.</summary>
    private const int Vcpus = 1;
    private const string Ready = "@ready";
    private const string Failed = "@failed";
    private const string CachedDisk = "xvda";
    private const string DirectDisk = "xvdb";

    private static readonly DiskKind[] Kinds =
    [
        Kind("random 4 KiB reads", 4 << 10, 640 * Depth, random: true),
        Kind("sequential 4 KiB reads", 4 << 10, 640 * Depth),
        Kind("sequential 128 KiB reads", 128 << 10, 128 * Depth),
        Kind("sequential 1 MiB reads", 1 << 20, 16 * Depth),
        Kind("random 4 KiB writes", 4 << 10, 320 * Depth, random: true, write: true),
        Kind("sequential 1 MiB writes", 1 << 20, 16 * Depth, write: true),
        Kind("random 4 KiB reads", 4 << 10, 320 * Depth, random: true, onDisk: true),
        Kind("sequential 128 KiB reads", 128 << 10, 64 * Depth, onDisk: true),
        Kind("sequential 1 MiB reads", 1 << 20, 8 * Depth, onDisk: true),
        Kind("random 4 KiB writes", 4 << 10, 320 * Depth, random: true, write: true, onDisk: true),
        Kind("sequential 1 MiB writes", 1 << 20, 8 * Depth, write: true, onDisk: true),
    ];

    /// <summary>Boots a guest and measures.</summary>
    /// <param name="busybox">A static busybox.</param>
    /// <param name="modules">The folder of the kernel's modules.</param>
    /// <param name="cancellation">Ends it.</param>
    internal async Task<IReadOnlyList<DiskFigure>> RunAsync(string busybox, string modules, CancellationToken cancellation)
    {
        DirectoryInfo folder = Directory.CreateTempSubdirectory("xensharp-bench-");
        try
        {
            string cached = Path.Combine(folder.FullName, CachedDisk);
            string direct = Path.Combine(folder.FullName, DirectDisk);
            await FillAsync(cached, cancellation).ConfigureAwait(false);
            await FillAsync(direct, cancellation).ConfigureAwait(false);
            foreach (DiskKind kind in Kinds)
            {
                string program = Path.Combine(folder.FullName, kind.Program);
                await File.WriteAllBytesAsync(program, Build(kind, kind.OnDisk), cancellation).ConfigureAwait(false);
                File.SetUnixFileMode(program, UnixFileMode.UserRead | UnixFileMode.UserExecute);
            }

            await using RawImage cachedImage = RawImage.Open(cached, readOnly: false);
            RawImage? directImage = null;
            try
            {
                directImage = RawImage.Open(direct, readOnly: false, direct: true);
            }
            catch (BlockImageException)
            {
                // A file system without it, as tmpfs was for long: only the cache is measured then.
            }

            return await MeasureAsync(folder.FullName, cachedImage, directImage, busybox, modules, cancellation).ConfigureAwait(false);
        }
        finally
        {
            folder.Delete(recursive: true);
        }
    }

    private static DiskKind Kind(string what, int blockSize, int count, bool random = false, bool write = false, bool onDisk = false) => new(
        what.Replace(' ', '-') + (onDisk ? "-disk" : "-cache"),
        what + (onDisk ? ", host's disk (O_DIRECT)" : ", host's page cache"),
        new QueuedTransferPlan
        {
            Depth = Depth, Count = count, BlockSize = blockSize, Blocks = FileSize / blockSize, IsRandom = random, IsWrite = write,
        },
        onDisk);

    private bool IsChosen(DiskKind kind)
        => only.Count == 0 || only.Any(word => kind.Name.Contains(word, StringComparison.OrdinalIgnoreCase));

    private static string StartOf(DiskKind kind) => $"@{kind.Program}";

    private static string EndOf(DiskKind kind) => $"@{kind.Program}-end";

    private static byte[] Build(DiskKind kind, bool direct) => QueuedTransfers.Build(kind.Plan with { IsDirect = direct }, StartOf(kind), EndOf(kind));

    private static async Task FillAsync(string path, CancellationToken cancellation)
    {
        await using FileStream file = File.Create(path);
        byte[] chunk = new byte[1 << 20];
        Random.Shared.NextBytes(chunk);
        for (int i = 0; i < FileSize / chunk.Length; i++)
            await file.WriteAsync(chunk, cancellation).ConfigureAwait(false);
        file.Flush(flushToDisk: true);
    }

    private async Task<double> MeasureHostAsync(string folder, DiskKind kind, CancellationToken cancellation)
    {
        var start = new ProcessStartInfo(Path.Combine(folder, kind.Program)) { RedirectStandardOutput = true };
        start.ArgumentList.Add(Path.Combine(folder, kind.OnDisk ? DirectDisk : CachedDisk));
        using Process process = Process.Start(start)!;
        _ = await process.StandardOutput.ReadLineAsync(cancellation).ConfigureAwait(false);
        string? end = await process.StandardOutput.ReadLineAsync(cancellation).ConfigureAwait(false);
        await process.WaitForExitAsync(cancellation).ConfigureAwait(false);
        return process.ExitCode == 0 && end != null
            ? TimeOf(kind, end)
            : throw new InvalidOperationException("The benchmark's program could not use its file: has this host's kernel no asynchronous I/O (CONFIG_AIO)?");
    }

    private static double Median(IEnumerable<double> values)
    {
        double[] ordered = [.. values.Order()];
        return ordered[ordered.Length / 2];
    }

    private static async Task<byte[]> BuildRamdiskAsync(string busybox, string modules, CancellationToken cancellation)
    {
        string script = $"""
            insmod /xen-blkfront.ko
            echo {Ready}
            while read program disk; do
                until [ -b /dev/$disk ]; do usleep 10000; done
                /bin/$program /dev/$disk || echo {Failed}
            done
            """;
        return await BusyboxInitramfs.BuildAsync(
            busybox,
            new BusyboxInitramfsOptions
            {
                Banner = string.Empty,
                InitScript = script.ReplaceLineEndings("\n") + "\n",
                Files =
                [
                    new InitramfsFile("xen-blkfront.ko", await File.ReadAllBytesAsync(
                        Path.Combine(modules, "kernel/drivers/block/xen-blkfront.ko"), cancellation).ConfigureAwait(false)),
                    .. Kinds.Select(static kind => new InitramfsFile($"bin/{kind.Program}", Build(kind, direct: true), Executable: true)),
                ],
            },
            cancellation).ConfigureAwait(false);
    }

    private async Task<IReadOnlyList<DiskFigure>> MeasureAsync(
        string folder, RawImage cachedImage, RawImage? directImage, string busybox, string modules, CancellationToken cancellation)
    {
        using var marks = new MarkWaiter();
        await using RunningDomain running = RunningDomain.Create(
            host,
            new DomainSpecification
            {
                Name = "benchmark", Image = load(await BuildRamdiskAsync(busybox, modules, cancellation).ConfigureAwait(false)), MemoryMiB = MemoryMiB,
                Vcpus = Vcpus, CommandLine = "console=hvc0 quiet",
            },
            marks.Sink);
        await using BlockBackend cached = Attach(running, CachedDisk, cachedImage);
        await using BlockBackend? direct = directImage is null ? null : Attach(running, DirectDisk, directImage);
        DiskKind[] kinds = [.. Kinds.Where(kind => (direct is not null || !kind.OnDisk) && IsChosen(kind))];
        if (kinds.Length == 0)
            throw new UsageException($"No kind of transfer has {string.Join(" or ", only)} in its name; there are: {string.Join("; ", Kinds.Select(static kind => kind.Name))}.");
        var samples = kinds.ToDictionary(static kind => kind.Program, static _ => new List<DiskFigure>());
        running.Start();
        await marks.WaitAsync(Ready, running, cancellation).ConfigureAwait(false);
        for (int round = 0; round < rounds; round++)
        {
            foreach (DiskKind kind in kinds)
            {
                double hostTime = await MeasureHostAsync(folder, kind, cancellation).ConfigureAwait(false);
                samples[kind.Program].Add(
                    await MeasureGuestAsync(kind, running, (kind.OnDisk ? direct : cached)!, marks, hostTime, cancellation).ConfigureAwait(false));
            }
        }

        running.Destroy();
        _ = await running.Completion.WaitAsync(cancellation).ConfigureAwait(false);
        return
        [
            .. kinds.Select(kind => new DiskFigure(
                kind.Name, kind.Plan.BlockSize, Of(kind, static one => one.GuestNanoseconds), Of(kind, static one => one.HostNanoseconds),
                Of(kind, static one => one.Throughput), Of(kind, static one => one.ProcessorNanoseconds), Of(kind, static one => one.Hypercalls), Of(kind, static one => one.Wakeups),
                Of(kind, static one => one.Notifications))),
        ];

        double Of(DiskKind kind, Func<DiskFigure, double> value) => Median(samples[kind.Program].Select(value));
    }

    private static BlockBackend Attach(RunningDomain running, string device, RawImage image) => BlockBackend.Create(
        running.Domain, running.Store.Domain0, new BlockDeviceOptions { Device = VirtualDevice.Parse(device), Image = image });

    private async Task<DiskFigure> MeasureGuestAsync(
        DiskKind kind, RunningDomain running, BlockBackend backend, MarkWaiter marks, double hostTime, CancellationToken cancellation)
    {
        string disk = kind.OnDisk ? DirectDisk : CachedDisk;
        _ = await running.WriteInputAsync(Encoding.ASCII.GetBytes($"{kind.Program} {disk}\n"), cancellation).ConfigureAwait(false);
        _ = await marks.WaitAsync(StartOf(kind), running, cancellation).ConfigureAwait(false);
        (ulong hypercalls, BlockStatistics before) = (running.Domain.HypercallCount, backend.Statistics);
        TimeSpan processor = Environment.CpuUsage.TotalTime;
        double guestTime = TimeOf(kind, await marks.WaitAsync(EndOf(kind), running, cancellation).ConfigureAwait(false));
        processor = Environment.CpuUsage.TotalTime - processor;
        BlockStatistics after = backend.Statistics;
        double count = kind.Plan.Count;
        return new DiskFigure(
            kind.Name, kind.Plan.BlockSize, guestTime, hostTime, hostTime / guestTime, processor.TotalNanoseconds / count, (running.Domain.HypercallCount - hypercalls) / count,
            (after.Wakeups - before.Wakeups) / count, (after.Notifications - before.Notifications) / count);
    }

    /// <summary>What the program's last line says of how long a transfer took, in nanoseconds.</summary>
    private double TimeOf(DiskKind kind, string line)
    {
        if (!line.StartsWith(EndOf(kind) + " ", StringComparison.Ordinal)
            || !ulong.TryParse(line.AsSpan(EndOf(kind).Length + 1), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out ulong ticks))
        {
            throw new InvalidOperationException($"The disk benchmark's program should have said how long it took, and said: {line}");
        }

        return ticks * 1e6 / host.Capabilities.TimeStampCounter.KiloHertz / kind.Plan.Count;
    }
}
