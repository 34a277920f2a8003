// Debian saved and restored while it writes to a disk and a connection goes through two network interfaces.

using System.Security.Cryptography;
using System.Text;
using System.Text.RegularExpressions;
using XenSharp.Configuration;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Toolstack;
using XenSharp.Toolstack.Management;

namespace XenSharp.Boot.Tests;

/// <summary>Needs the network at its first run, for some 20 MB.</summary>
[TestFixture]
[Category("Debian")]
[CancelAfter(180_000)]
public sealed partial class SavedDevicesTests : KvmFixture
{
    private const int BlockKiB = 64;
    private const int Blocks = 64;

    /// <summary>
    /// The second interface is in a network namespace of its own, where somebody listens; numbered lines go there through the switch, in one
    /// connection. Meanwhile blocks are written to the disk, flushed, and read back without the cache. "@N DISK LINES" tells how often that
    /// went, whether it did well, and how many lines have come. Processes are frozen for a save as if by a signal, which cuts short a read of
    /// urandom: so that is made to fill its block.
    /// </summary>
    private const string Script = """
        insmod /xen-blkfront.ko
        insmod /xen-netfront.ko
        mkdir -p /devices && cd /devices
        until [ -b /dev/xvda ] && [ -e /sys/class/net/eth0 ] && [ -e /sys/class/net/eth1 ]; do usleep 20000; done
        unshare -n sh -c ': >/devices/ns; until ip link show eth1 >/dev/null 2>&1; do usleep 20000; done
            ip addr add 10.0.0.2/24 dev eth1; ip link set eth1 up; : >/devices/up; sleep 86400 | nc -l -p 9000 >/devices/got' &
        listener=$!
        until [ -e ns ]; do usleep 20000; done
        ip link set eth1 netns $listener
        ip addr add 10.0.0.1/24 dev eth0; ip link set eth0 up
        until [ -e up ]; do usleep 20000; done
        until ping -c 1 -W 1 10.0.0.2 >/dev/null 2>&1; do usleep 20000; done
        (i=0; until [ -e off ]; do i=$((i+1)); echo $i; usleep 10000; done; echo $i >sent) | nc 10.0.0.2 9000 >/dev/null 2>&1 &
        n=0 disk=good
        until [ -e off ]; do
            dd if=/dev/urandom of=block bs=64k count=1 iflag=fullblock 2>/dev/null
            dd if=block of=/dev/xvda bs=64k seek=$((n % 64)) conv=notrunc,fsync 2>/dev/null || disk=unwritten
            echo 3 >/proc/sys/vm/drop_caches
            dd if=/dev/xvda bs=64k skip=$((n % 64)) count=1 2>/dev/null | cmp - block || disk=other
            n=$((n+1))
            echo "@$n $disk $(wc -l <got)"
        done
        tries=0
        until [ -s sent ] && [ "$(wc -l <got)" -ge "$(cat sent)" ] || [ $tries -ge 200 ]; do tries=$((tries+1)); usleep 50000; done
        seq 1 "$(cat sent)" | cmp - got && echo "@stream whole $(cat sent)" || echo "@stream broken $(tail -1 got) of $(cat sent)"
        echo "@last $(((n - 1) % 64)) $(md5sum <block)"
        echo "[dmesg]"; dmesg; echo "[end]"
        """;

    private string _folder = null!;

    [SetUp]
    public void MakeFolder() => _folder = Directory.CreateTempSubdirectory("xensharp-saved-devices-").FullName;

    [TearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public async Task Disk_and_network_go_on_in_a_restored_guest(CancellationToken cancellation)
    {
        string disk = InFolder("disk.img");
        await using (FileStream file = File.Create(disk))
            file.SetLength(Blocks * BlockKiB << 10);
        await using var context = new ToolstackContext(Host);
        await using var toolstack = new DomainToolstack(context, new ToolstackOptions { StateFolder = InFolder("state") }, new ManagerLog());
        ManagedDomain source = await toolstack.CreateAsync(await ConfigureAsync(disk, cancellation), cancellation: cancellation);
        Progress before = await GoesOnAsync(source, default, cancellation);
        string image = InFolder("image");
        await toolstack.SaveAsync(source, image, keep: false, paused: false, source.Configuration with { Name = "another" }, cancellation: cancellation);
        Assert.That(toolstack.Domains, Is.Empty);

        ManagedDomain target = await toolstack.RestoreAsync(image, cancellation: cancellation);
        Progress after = await GoesOnAsync(target, before, cancellation);
        Assert.That(after.Lines, Is.GreaterThan(before.Lines), "the connection is the same");
        Assert.That((target.Name, target.Uuid), Is.EqualTo(("another", source.Uuid)), "as the configuration says that was given to be saved");
        Assert.That(target.DescribeDisks(), Has.Count.EqualTo(1));
        Assert.That(target.DescribeInterfaces(), Has.Count.EqualTo(2));

        target.RequestShutdown(reboot: false);
        string console = await WaitAsync(target, static text => text.Contains("[end]\r\n", StringComparison.Ordinal), cancellation);
        while (toolstack.Domains.Count != 0)
            await Task.Delay(20, cancellation);
        Assert.That(console, Does.Match(@"@stream whole \d+\r\n"));
        Assert.That(KernelLog.TroubleIn(KernelLog.Section(console, "[dmesg]", "[end]")), Is.Empty);

        // What it wrote last is in the file.
        Match last = LastPattern().Match(console);
        Assert.That(last.Success, console);
        byte[] block = new byte[BlockKiB << 10];
        await using FileStream written = File.OpenRead(disk);
        written.Position = long.Parse(last.Groups[1].Value) * block.Length;
        await written.ReadExactlyAsync(block, cancellation);
        Assert.That(Convert.ToHexStringLower(MD5.HashData(block)), Is.EqualTo(last.Groups[2].Value));
    }

    /// <summary>How far the guest is.</summary>
    private readonly record struct Progress(int Count, int Lines);

    private string InFolder(string name) => Path.Combine(_folder, name);

    /// <summary>A configuration with the kernel, an initramfs with both front ends, a disk and two interfaces at a switch of XenSharp's own.</summary>
    private async Task<DomainConfiguration> ConfigureAsync(string disk, CancellationToken cancellation)
    {
        var cache = new GuestCache(GuestCache.DefaultRoot());
        try
        {
            DebianKernel kernel = await cache.GetKernelAsync(DebianKernelFlavour.CloudAmd64, null, cancellation);
            InitramfsFile Module(string path) => new(
                Path.GetFileName(path), File.ReadAllBytes(Path.Combine(kernel.Modules!, "kernel/drivers", path)));
            await File.WriteAllBytesAsync(
                InFolder("initrd"),
                await BusyboxInitramfs.BuildAsync(
                    await cache.GetBusyboxAsync(null, cancellation),
                    new BusyboxInitramfsOptions
                    {
                        Banner = "",
                        InitScript = Script.ReplaceLineEndings("\n"),
                        Files =
                        [
                            Module("block/xen-blkfront.ko"), Module("net/xen-netfront.ko"),
                            new InitramfsFile("sbin/poweroff", "#!/bin/sh\n: >/devices/off\n"u8.ToArray(), Executable: true),
                        ],
                    },
                    cancellation),
                cancellation);
            return DomainConfigurationReader.Read(
                $"""
                name = "devices"
                kernel = "{kernel.Image}"
                ramdisk = "{InFolder("initrd")}"
                memory = 128
                cmdline = "console=hvc0 quiet"
                disk = [ '{disk},raw,xvda,w' ]
                vif = [ 'bridge=own', 'bridge=own' ]
                """,
                "devices.cfg", []).Configuration;
        }
        catch (GuestFetchException missing)
        {
            Assert.Ignore(missing.Message);
            throw;
        }
    }

    /// <summary>Waits until the guest has come some steps further, and lines have come through.</summary>
    private static async Task<Progress> GoesOnAsync(ManagedDomain domain, Progress from, CancellationToken cancellation)
    {
        const int steps = 5;
        string console = await WaitAsync(
            domain, text => Last(text) is var now && now.Count >= from.Count + steps && now.Lines > from.Lines, cancellation);
        Assert.That(StepPattern().Matches(console).Select(static step => step.Groups[2].Value), Is.All.EqualTo("good"), console);
        return Last(console);
    }

    private static Progress Last(string console)
        => StepPattern().Matches(console) is [.., Match last] ? new Progress(int.Parse(last.Groups[1].Value), int.Parse(last.Groups[3].Value)) : default;

    private static async Task<string> WaitAsync(ManagedDomain domain, Func<string, bool> isThere, CancellationToken cancellation)
    {
        while (true)
        {
            string text = Encoding.Latin1.GetString(domain.Console.ReadHistory());
            if (isThere(text))
                return text;
            if (cancellation.IsCancellationRequested)
                Assert.Fail($"The guest does not come that far:\n{text}");
            await Task.Delay(50, CancellationToken.None);
        }
    }

    [GeneratedRegex(@"^@(\d+) (\w+) (\d+)\r$", RegexOptions.Multiline)]
    private static partial Regex StepPattern();

    [GeneratedRegex(@"^@last (\d+) (\w+)", RegexOptions.Multiline)]
    private static partial Regex LastPattern();
}
