// Disks of a Debian guest with its own blkfront: raw files and qcow2, read-only ones, discards, file systems, attaching and detaching.

using System.Security.Cryptography;
using System.Text;
using XenSharp.Core;
using XenSharp.Devices.Block;
using XenSharp.Devices.Block.Images;
using XenSharp.Domains;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

/// <summary>Needs the network at its first run, for some 100 MB.</summary>
[TestFixture]
[Parallelizable(ParallelScope.Self)]
[Category("Debian")]
[CancelAfter(600_000)]
public sealed class BlockTests : KvmFixture
{
    private const int MiB = 1 << 20;

    /// <summary>The front end, and what ext4 needs, in the order in which they are loaded.</summary>
    private static readonly string[] Modules =
        ["drivers/block/xen-blkfront", "lib/crc16", "crypto/crc32c_generic", "lib/libcrc32c", "fs/mbcache", "fs/jbd2/jbd2", "fs/ext4/ext4"];

    private static readonly TimeSpan DetachTime = TimeSpan.FromSeconds(60);

    /// <summary>
    /// check DEVICE: writes /block to it in the middle, makes sure that it is on the disk, and reads it back without the cache. tail: sums
    /// all of a device.
    /// </summary>
    private const string Functions = """
        insmod /modules/0.ko max_ring_page_order=2 || echo "@failed insmod xen-blkfront"
        for module in /modules/[1-9].ko; do insmod $module || echo "@failed insmod $module"; done
        appear() {
            i=0
            until [ -b /dev/$1 ]; do
                i=$((i + 1))
                if [ $i -gt 600 ]; then echo "@failed /dev/$1"; poweroff -f; fi
                usleep 50000
            done
        }
        vanish() {
            i=0
            while [ -b /dev/$1 ]; do
                i=$((i + 1))
                if [ $i -gt 600 ]; then echo "@failed /dev/$1 stays"; poweroff -f; fi
                usleep 50000
            done
        }
        sum() { echo 3 >/proc/sys/vm/drop_caches; md5sum <$1 | cut -d' ' -f1; }
        check() {
            appear $1
            dd if=/block of=/dev/$1 bs=1M seek=8 conv=fsync 2>/dev/null || echo "@failed write $1"
            echo 3 >/proc/sys/vm/drop_caches
            dd if=/dev/$1 bs=1M skip=8 count=4 2>/dev/null | cmp - /block || echo "@failed compare $1"
        }

        """;

    private string _folder = null!;

    [SetUp]
    public void MakeFolder() => _folder = Directory.CreateTempSubdirectory("xensharp-block-test-").FullName;

    [TearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public async Task A_guest_uses_its_disks(CancellationToken cancellation)
    {
        (byte[] block, byte[] contents) = (new byte[4 * MiB], new byte[32 * MiB]);
        new Random(1).NextBytes(block);
        new Random(2).NextBytes(contents);
        string raw = Path.Combine(_folder, "raw.img");
        string readOnly = Path.Combine(_folder, "read-only.img");
        string ext4 = Path.Combine(_folder, "ext4.img");
        await File.WriteAllBytesAsync(raw, contents, cancellation);
        await File.WriteAllBytesAsync(readOnly, contents, cancellation);
        await MakeExt4Async(ext4, cancellation);

        string script = Functions + """
            appear xvda
            echo "@first $(sum /dev/xvda)"
            echo "@features $(dmesg | grep "blkfront: xvda:" | tail -1)"
            check xvda
            blkdiscard -o 1048576 -l 2097152 /dev/xvda || echo "@failed blkdiscard"
            echo "@hole $(dd if=/dev/xvda bs=1M skip=1 count=2 2>/dev/null | tr -d '\0' | wc -c)"
            appear xvdb
            echo "@ro $(cat /sys/block/xvdb/ro)"
            dd if=/block of=/dev/xvdb bs=1M 2>/dev/null && echo "@failed write to a read-only disk"
            echo "@second $(sum /dev/xvdb)"
            appear xvdc
            mkdir /mnt
            mount -t ext4 /dev/xvdc /mnt || echo "@failed mount"
            for i in 1 2 3 4 5 6; do cp /block /mnt/$i; done
            rm /mnt/2 /mnt/4
            sync
            umount /mnt
            mount -t ext4 /dev/xvdc /mnt
            for i in 1 3 5 6; do cmp /block /mnt/$i || echo "@failed file $i"; done
            fstrim /mnt || echo "@failed fstrim"
            umount /mnt
            echo "@attach"
            check xvdd
            echo "@detach"
            vanish xvdd
            echo "@again"
            appear xvdd
            dd if=/dev/xvdd bs=1M skip=8 count=4 2>/dev/null | cmp - /block || echo "@failed compare after attaching again"
            echo "[dmesg]"; dmesg; echo "[end]"
            """;
        var console = new ConsoleLines();
        await using RunningDomain domain = await BootAsync(script, block, console, cancellation);
        var reports = new StringBuilder();
        await using BlockBackend first = Attach(domain, "xvda", RawImage.Open(raw, readOnly: false), reports, persistentGrants: 1056);
        await using BlockBackend second = Attach(domain, "xvdb", RawImage.Open(readOnly, readOnly: true), reports, persistentGrants: 1056);
        await using BlockBackend third = Attach(domain, "xvdc", RawImage.Open(ext4, readOnly: false), reports);
        domain.Start();

        Assert.That(await console.WaitForAsync("@first", domain.Stopped, cancellation), Is.EqualTo(SumOf(contents)));
        string features = await console.WaitForAsync("@features", domain.Stopped, cancellation);
        Assert.That(features, Does.Contain("flush diskcache: enabled").Or.Contain("barrier or flush"));
        Assert.That(features, Does.Contain("persistent grants: enabled").And.Contain("indirect descriptors: enabled"));
        string nodes = first.Address.FrontEnd;
        Assert.That(domain.Store.Domain0.Read(nodes + "/ring-page-order"), Is.EqualTo("2"));
        Assert.That(domain.Store.Domain0.Read(nodes + "/multi-queue-num-queues"), Is.EqualTo(Environment.ProcessorCount > 1 ? "2" : null));
        Assert.That(await console.WaitForAsync("@hole", domain.Stopped, cancellation), Is.EqualTo("0"));
        Assert.That(await console.WaitForAsync("@ro", domain.Stopped, cancellation), Is.EqualTo("1"));
        Assert.That(await console.WaitForAsync("@second", domain.Stopped, cancellation), Is.EqualTo(SumOf(contents)));

        string hot = Path.Combine(_folder, "hot.img");
        await using (FileStream file = File.Create(hot))
            file.SetLength(16 * MiB);
        await console.WaitForAsync("@attach", domain.Stopped, cancellation);
        BlockBackend attached = Attach(domain, "xvdd", OpenDirect(hot), reports);
        await console.WaitForAsync("@detach", domain.Stopped, cancellation);
        Assert.That(await attached.RemoveAsync(DetachTime, cancellation: cancellation), Is.True);
        await console.WaitForAsync("@again", domain.Stopped, cancellation);
        await using BlockBackend again = Attach(domain, "xvdd", RawImage.Open(hot, readOnly: false), reports);
        await ExpectCleanEndAsync(domain, console, reports, cancellation);

        BlockStatistics statistics = first.Statistics;
        Assert.That(statistics.WrittenBytes, Is.EqualTo(block.Length));
        Assert.That((statistics.FlushRequests, statistics.DiscardRequests, statistics.Errors), Is.EqualTo((statistics.FlushRequests, 1, 0)));
        Assert.That(statistics.FlushRequests, Is.GreaterThan(0));
        await first.DisposeAsync();
        await third.DisposeAsync();

        block.CopyTo(contents.AsSpan(8 * MiB));
        contents.AsSpan(MiB, 2 * MiB).Clear();
        Assert.That((await File.ReadAllBytesAsync(raw, cancellation)).AsSpan().SequenceEqual(contents), Is.True);
        CommandResult fsck = await new CommandRunner().RunAsync(new Command("e2fsck", "-fn", ext4), cancellation);
        Assert.That(fsck.ExitCode, Is.Zero, fsck.Output + fsck.Error);
        Assert.That(await UsedAsync(raw, cancellation), Is.LessThanOrEqualTo(30 * MiB), "what was discarded is a hole");
        Assert.That(await UsedAsync(ext4, cancellation), Is.LessThanOrEqualTo(24 * MiB), "the host has what fstrim gave back");
    }

    /// <summary>And an empty CD-ROM drive beside it; and what becomes of all of them when the qemu-nbd is killed under the guest.</summary>
    [Test]
    public async Task A_guest_uses_a_qcow2_image(CancellationToken cancellation)
    {
        byte[] block = new byte[4 * MiB];
        new Random(3).NextBytes(block);
        string image = Path.Combine(_folder, "disk.qcow2");
        QemuUtils qemu = await GetQemuAsync(cancellation);
        await qemu.CreateAsync(image, "qcow2", "32M", cancellation);
        string script = Functions + """
            check xvda
            blkdiscard -o 4194304 -l 1048576 /dev/xvda || echo "@failed blkdiscard"
            appear xvdc
            echo "@empty $(cat /sys/block/xvdc/size) $(cat /sys/block/xvdc/ro) $(cat /sys/block/xvdc/removable) $(dd if=/dev/xvdc 2>/dev/null | wc -c)"
            echo "[dmesg]"; dmesg; echo "[end]"
            echo "@kill"
            read answer
            dd if=/dev/xvda of=/dev/null bs=1M skip=8 count=1 iflag=direct 2>/dev/null && echo "@dead done" || echo "@dead error"
            dd if=/block of=/dev/xvda bs=1M oflag=direct 2>/dev/null && echo "@failed write to a dead disk"
            check xvdb
            echo "@detach"
            vanish xvda
            check xvdb
            """;
        var console = new ConsoleLines();
        var reports = new StringBuilder();
        await using (RunningDomain domain = await BootAsync(script, block, console, cancellation))
        {
            (string path, IReadOnlyList<string> arguments) = qemu.Command("qemu-nbd");
            QemuImage opened = await QemuImage.OpenAsync(
                image, BlockImageFormat.Qcow2, readOnly: false, new QemuNbdProgram(path) { Arguments = arguments }, cancellation: cancellation);
            string other = Path.Combine(_folder, "other.img");
            await using (FileStream file = File.Create(other))
                file.SetLength(16 * MiB);
            await using BlockBackend disk = Attach(domain, "xvda", opened, reports);
            await using BlockBackend second = Attach(domain, "xvdb", RawImage.Open(other, readOnly: false), reports);
            await using var drive = BlockBackend.Create(
                domain.Domain, domain.Store.Domain0,
                new BlockDeviceOptions { Device = VirtualDevice.Parse("xvdc"), Image = new EmptyImage(), IsCdRom = true, IsRemovable = true });
            domain.Start();
            Assert.That(await console.WaitForAsync("@empty", domain.Stopped, cancellation), Is.EqualTo("0 1 1 0"), "an empty drive, that can be read from to no avail");
            await console.WaitForAsync("@kill", domain.Stopped, cancellation);
            Assert.That(disk.Statistics.WrittenBytes, Is.EqualTo(block.Length));
            lock (reports)
                Assert.That(reports.ToString(), Is.Empty);
            using (var server = System.Diagnostics.Process.GetProcessById(opened.ProcessId))
                server.Kill();
            await domain.WriteInputAsync("\n"u8.ToArray(), cancellation);
            Assert.That(await console.WaitForAsync("@dead", domain.Stopped, cancellation), Is.EqualTo("error"));
            await console.WaitForAsync("@detach", domain.Stopped, cancellation);
            lock (reports)
            {
                string said = $"{image} is lost: the qemu-nbd that served it (process {opened.ProcessId}) has ended; ";
                Assert.That(reports.ToString().TrimEnd().Split('\n'), Has.Length.EqualTo(1).And.All.Contains(said), "once, whatever the guest tries");
                reports.Clear();
            }

            Assert.That(await disk.RemoveAsync(DetachTime, cancellation: cancellation), Is.True);
            await ExpectCleanEndAsync(domain, console, reports, cancellation);
            Assert.That((second.Statistics.WrittenBytes, second.Statistics.Errors), Is.EqualTo((2 * block.Length, 0)));
        }

        string raw = Path.Combine(_folder, "converted.img");
        (string img, IReadOnlyList<string> first) = qemu.Command("qemu-img");
        CommandResult converted = await new CommandRunner().RunAsync(
            new Command(img, [.. first, "convert", "-O", "raw", image, raw]), cancellation);
        Assert.That(converted.ExitCode, Is.Zero, converted.Error);
        byte[] contents = await File.ReadAllBytesAsync(raw, cancellation);
        Assert.That(contents.AsSpan(8 * MiB, block.Length).SequenceEqual(block), Is.True);
        Assert.That(contents.AsSpan(0, 8 * MiB).ContainsAnyExcept((byte)0), Is.False);
    }

    /// <summary>What happens to files under a guest: no room, cut short, deleted, and their file system taken away.</summary>
    [Test]
    public async Task Faults_of_the_host_reach_a_guest_and_people_and_no_other_disk(CancellationToken cancellation)
    {
        byte[] block = new byte[4 * MiB];
        new Random(4).NextBytes(block);
        string small = Path.Combine(_folder, "small");
        string full = Path.Combine(small, "full.img");
        string ballast = Path.Combine(small, "ballast");
        string cut = Path.Combine(_folder, "cut.img");
        string good = Path.Combine(_folder, "good.img");
        if (!Environment.IsPrivilegedProcess)
            Assert.Ignore("Mounting a small file system takes root.");
        Directory.CreateDirectory(small);
        await RunAsync(cancellation, "mount", "-t", "tmpfs", "-o", "size=8m", "none", small);
        bool isMounted = true;
        try
        {
            await File.WriteAllBytesAsync(ballast, new byte[6 * MiB], cancellation);
            foreach (string path in (string[])[full, cut, good])
            {
                await using FileStream file = File.Create(path);
                file.SetLength(16 * MiB);
            }

            string script = Functions + """
                write() { dd if=/block of=/dev/$1 bs=1M seek=8 oflag=direct 2>/dev/null && echo "$2 done" || echo "$2 error"; }
                wait_for_host() { echo "$1"; read answer; }
                appear xvda; appear xvdb; appear xvdc
                write xvda "@full"
                write xvdc "@meanwhile"
                wait_for_host "@room"
                check xvda
                wait_for_host "@cut"
                dd if=/dev/xvdb of=/dev/null bs=1M skip=8 count=1 iflag=direct 2>/dev/null && echo "@behind done" || echo "@behind error"
                dd if=/dev/xvdb of=/dev/null bs=1M count=1 iflag=direct 2>/dev/null && echo "@before done" || echo "@before error"
                wait_for_host "@vanish"
                check xvda
                check xvdc
                echo "@last"
                """;
            var console = new ConsoleLines();
            var reports = new StringBuilder();
            await using (RunningDomain domain = await BootAsync(script, block, console, cancellation))
            {
                await using BlockBackend first = Attach(domain, "xvda", RawImage.Open(full, readOnly: false), reports);
                await using BlockBackend second = Attach(domain, "xvdb", RawImage.Open(cut, readOnly: false), reports);
                await using BlockBackend third = Attach(domain, "xvdc", RawImage.Open(good, readOnly: false), reports);
                domain.Start();
                Assert.That(await console.WaitForAsync("@full", domain.Stopped, cancellation), Is.EqualTo("error"));
                Assert.That(await console.WaitForAsync("@meanwhile", domain.Stopped, cancellation), Is.EqualTo("done"), "another disk");
                await console.WaitForAsync("@room", domain.Stopped, cancellation);
                lock (reports)
                    Assert.That(reports.ToString(), Does.Contain(full).And.Contain("there is no room left where it is; make some"));
                File.Delete(ballast);
                await domain.WriteInputAsync("\n"u8.ToArray(), cancellation);

                // By another program, as .NET respects the image's lock.
                await console.WaitForAsync("@cut", domain.Stopped, cancellation);
                await RunAsync(cancellation, "truncate", "--size=8M", cut);
                await domain.WriteInputAsync("\n"u8.ToArray(), cancellation);
                Assert.That(await console.WaitForAsync("@behind", domain.Stopped, cancellation), Is.EqualTo("error"));
                Assert.That(await console.WaitForAsync("@before", domain.Stopped, cancellation), Is.EqualTo("done"), "what is left");
                lock (reports)
                    Assert.That(reports.ToString(), Does.Contain(cut).And.Contain("as long as it was"));

                // A file is there as long as it is open, wherever its names and its file system's have gone.
                await console.WaitForAsync("@vanish", domain.Stopped, cancellation);
                await RunAsync(cancellation, "umount", "-l", small);
                isMounted = false;
                File.Delete(good);
                await domain.WriteInputAsync("\n"u8.ToArray(), cancellation);
                await console.WaitForAsync("@last", domain.Stopped, cancellation);
                Assert.That(third.Statistics.Errors, Is.Zero);
                DomainExit exit = await domain.Completion.WaitAsync(cancellation);
                Assert.That(exit.Reason, Is.EqualTo(ShutdownReason.PowerOff), exit.Report);
                Assert.That(console.Text, Does.Not.Contain("@failed"));
            }
        }
        finally
        {
            if (isMounted)
                await RunAsync(CancellationToken.None, "umount", "-l", small);
        }
    }

    private static async Task RunAsync(CancellationToken cancellation, string program, params string[] arguments)
    {
        CommandResult result = await new CommandRunner(CommandRunner.SystemSearchPath).RunAsync(new Command(program, arguments), cancellation);
        Assert.That(result.ExitCode, Is.Zero, $"{program} {string.Join(' ', arguments)}: {result.Error}");
    }

    private static BlockBackend Attach(RunningDomain domain, string device, IBlockImage image, StringBuilder reports, int persistentGrants = 0)
        => BlockBackend.Create(
        domain.Domain, domain.Store.Domain0,
        new BlockDeviceOptions { Device = VirtualDevice.Parse(device), Image = image, MaxPersistentGrants = persistentGrants },
        sentence =>
        {
            lock (reports)
                _ = reports.AppendLine(sentence);
        });

    /// <summary>Opens an image past the page cache, where its file system allows that.</summary>
    private static RawImage OpenDirect(string path)
    {
        try
        {
            return RawImage.Open(path, readOnly: false, direct: true);
        }
        catch (BlockImageException)
        {
            return RawImage.Open(path, readOnly: false);
        }
    }

    private static async Task<QemuUtils> GetQemuAsync(CancellationToken cancellation)
    {
        try
        {
            return await QemuUtils.GetAsync(new GuestCache(GuestCache.DefaultRoot()), null, cancellation);
        }
        catch (GuestFetchException missing)
        {
            Assert.Ignore(missing.Message);
            throw;
        }
    }

    private static async Task MakeExt4Async(string path, CancellationToken cancellation)
    {
        await using (FileStream file = File.Create(path))
            file.SetLength(48 * MiB);
        try
        {
            CommandResult made = await new CommandRunner().RunAsync(new Command("mkfs.ext4", "-q", "-F", path), cancellation);
            Assert.That(made.ExitCode, Is.Zero, made.Error);
        }
        catch (CommandNotFoundException missing)
        {
            Assert.Ignore($"{missing.Message} It is in the package e2fsprogs.");
        }
    }

    private static string SumOf(ReadOnlySpan<byte> contents) => Convert.ToHexStringLower(MD5.HashData(contents));

    private static async Task<long> UsedAsync(string path, CancellationToken cancellation)
    {
        CommandResult used = await new CommandRunner().RunAsync(new Command("du", "-B1", path), cancellation);
        return long.Parse(used.Output.AsSpan(0, used.Output.IndexOf('\t', StringComparison.Ordinal)));
    }

    private static async Task ExpectCleanEndAsync(RunningDomain domain, ConsoleLines console, StringBuilder reports, CancellationToken cancellation)
    {
        DomainExit exit = await domain.Completion.WaitAsync(cancellation);
        Assert.That(exit.Reason, Is.EqualTo(ShutdownReason.PowerOff), exit.Report);
        Assert.That(console.Text, Does.Not.Contain("@failed").And.Not.Contain("exit status"));
        Assert.That(KernelLog.TroubleIn(KernelLog.Section(console.Text, "[dmesg]", "[end]")), Is.Empty);
        lock (reports)
            Assert.That(reports.ToString(), Is.Empty);
    }

    private async Task<RunningDomain> BootAsync(string script, byte[] block, ConsoleLines console, CancellationToken cancellation)
    {
        DomainImage image = await DebianGuest.ImageAsync(
            DebianKernelFlavour.Amd64,
            async cache =>
            {
                DebianKernel kernel = await cache.GetKernelAsync(DebianKernelFlavour.Amd64, null, cancellation);
                return new BusyboxInitramfsOptions
                {
                    Banner = string.Empty,
                    InitScript = script,
                    Files =
                    [
                        new InitramfsFile("block", block),
                        .. Modules.Select((module, i) => new InitramfsFile(
                            $"modules/{i}.ko", File.ReadAllBytes(Path.Combine(kernel.Modules!, "kernel", module + ".ko")))),
                    ],
                };
            },
            reusable: false, cancellation);
        return RunningDomain.Create(
            Host,
            new DomainSpecification { Name = "disks", Image = image, MemoryMiB = 256, Vcpus = 2, CommandLine = "console=hvc0 quiet" },
            console);
    }
}
