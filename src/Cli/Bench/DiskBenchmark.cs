// Reads of a Debian guest's disk beside the same reads made by a process of the host.
using System.Diagnostics;
using XenSharp.Core;
using XenSharp.Devices.Block;
using XenSharp.Devices.Block.Images;
using XenSharp.Domains;
using XenSharp.Domains.Builder;
using XenSharp.Guests.Benchmark;
using XenSharp.Guests.Initramfs;
using XenSharp.Toolstack;

namespace XenSharp.Cli.Bench;

/// <summary>What reads of one kind took.</summary>
/// <param name="Name">In which order.</param>
/// <param name="GuestNanoseconds">A read by the guest.</param>
/// <param name="HostNanoseconds">A read by the host's process.</param>
/// <param name="Hypercalls">Hypercalls of the guest's for each read.</param>
internal sealed record DiskFigure(string Name, double GuestNanoseconds, double HostNanoseconds, double Hypercalls);

/// <summary>
/// One program reads a raw file in the host's page cache, 4 KiB at a time and 32 at once: as a process of the host, and in a guest whose
/// disk the file is, past the guest's own cache. So it is the way to the host's cache that is compared.
/// </summary>
internal sealed class DiskBenchmark(KvmHost host, Func<byte[], DomainImage> load)
{
    private const int Depth = 32;
    private const int HostReads = 6400 * Depth;
    private const int GuestReads = 640 * Depth;
    private const int Blocks = 1 << 14;
    private const int BlockSize = 4096;
    private const int MemoryMiB = 256;
    private const int Vcpus = 2;
    private static readonly string[] Orders = ["random", "sequential"];

    /// <summary>Boots a guest and measures.</summary>
    /// <param name="busybox">A static busybox.</param>
    /// <param name="modules">The folder of the kernel's modules.</param>
    /// <param name="cancellation">Ends it.</param>
    internal async Task<IReadOnlyList<DiskFigure>> RunAsync(string busybox, string modules, CancellationToken cancellation)
    {
        DirectoryInfo folder = Directory.CreateTempSubdirectory("xensharp-bench-");
        try
        {
            string disk = Path.Combine(folder.FullName, "disk.img");
            await using (FileStream file = File.Create(disk))
            {
                byte[] chunk = new byte[1 << 20];
                Random.Shared.NextBytes(chunk);
                for (int i = 0; i < Blocks * BlockSize / chunk.Length; i++)
                    await file.WriteAsync(chunk, cancellation).ConfigureAwait(false);
            }

            var hostTimes = new List<double>();
            foreach (string order in Orders)
                hostTimes.Add(await MeasureHostAsync(folder.FullName, disk, order == Orders[0], cancellation).ConfigureAwait(false));
            return await MeasureGuestAsync(disk, busybox, modules, hostTimes, cancellation).ConfigureAwait(false);
        }
        finally
        {
            folder.Delete(recursive: true);
        }
    }

    private static async Task<double> MeasureHostAsync(string folder, string disk, bool random, CancellationToken cancellation)
    {
        string program = Path.Combine(folder, random ? "random" : "sequential");
        await File.WriteAllBytesAsync(program, QueuedReads.Build(Depth, HostReads, Blocks, random, direct: false), cancellation).ConfigureAwait(false);
        File.SetUnixFileMode(program, UnixFileMode.UserRead | UnixFileMode.UserExecute);
        long start = Stopwatch.GetTimestamp();
        using Process process = Process.Start(program, [disk]);
        await process.WaitForExitAsync(cancellation).ConfigureAwait(false);
        return process.ExitCode == 0
            ? Stopwatch.GetElapsedTime(start).TotalNanoseconds / HostReads
            : throw new InvalidOperationException("The benchmark's program could not read its file: has this host's kernel no asynchronous I/O (CONFIG_AIO)?");
    }

    private async Task<IReadOnlyList<DiskFigure>> MeasureGuestAsync(
        string disk, string busybox, string modules, List<double> hostTimes, CancellationToken cancellation)
    {
        var hypercalls = new Dictionary<string, ulong>();
        Domain? domain = null;
        var sink = new MarkerSink
        {
            Seen = marker =>
            {
                lock (hypercalls)
                    hypercalls[marker] = Volatile.Read(ref domain)?.HypercallCount ?? 0;
            },
        };
        string script = "insmod /xen-blkfront.ko\nuntil [ -b /dev/xvda ]; do usleep 10000; done\n"
            + string.Concat(Orders.Select(static order => $"echo @{order}\n/bin/read-{order} /dev/xvda && echo @{order}-end\n"));
        byte[] ramdisk = await BusyboxInitramfs.BuildAsync(
            busybox,
            new BusyboxInitramfsOptions
            {
                Banner = string.Empty,
                InitScript = script,
                Files =
                [
                    new InitramfsFile("xen-blkfront.ko", await File.ReadAllBytesAsync(
                        Path.Combine(modules, "kernel/drivers/block/xen-blkfront.ko"), cancellation).ConfigureAwait(false)),
                    .. Orders.Select(static order => new InitramfsFile(
                        $"bin/read-{order}", QueuedReads.Build(Depth, GuestReads, Blocks, order == Orders[0], direct: true), Executable: true)),
                ],
            },
            cancellation).ConfigureAwait(false);
        await using RunningDomain running = RunningDomain.Create(
            host,
            new DomainSpecification { Name = "benchmark", Image = load(ramdisk), MemoryMiB = MemoryMiB, Vcpus = Vcpus, CommandLine = "console=hvc0 quiet" },
            sink);
        await using BlockBackend backend = BlockBackend.Create(
            running.Domain, running.Store.Domain0,
            new BlockDeviceOptions { Device = VirtualDevice.Parse("xvda"), Image = RawImage.Open(disk, readOnly: true) });
        Volatile.Write(ref domain, running.Domain);
        running.Start();
        DomainExit exit = await running.Completion.WaitAsync(cancellation).ConfigureAwait(false);
        if (exit.Reason != ShutdownReason.PowerOff)
            throw new InvalidOperationException($"The disk benchmark's guest ended by {exit.Reason}. {exit.Report}");
        return
        [
            .. Orders.Zip(hostTimes, (order, hostTime) =>
            {
                string end = $"@{order}-end";
                if (sink.TimeOf($"@{order}") is not { } from || sink.TimeOf(end) is not { } to)
                    throw new InvalidOperationException("The disk benchmark's guest did not get as far as it should have.");
                return new DiskFigure(
                    order, Stopwatch.GetElapsedTime(from, to).TotalNanoseconds / GuestReads, hostTime,
                    (hypercalls[end] - hypercalls[$"@{order}"]) / (double)GuestReads);
            }),
        ];
    }
}
