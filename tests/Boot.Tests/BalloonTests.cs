// The stock Linux balloon driver: a Debian domain shrinks and grows as its owner says, and the host has the memory meanwhile.

using System.Security.Cryptography;
using XenSharp.Domains;
using XenSharp.Domains.Builder;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

/// <summary>Needs the network at its first run, for some 70 MB.</summary>
[TestFixture]
[Parallelizable(ParallelScope.Self)]
[Category("Debian")]
[CancelAfter(1_800_000)]
public sealed class BalloonTests : KvmFixture
{
    private const int MiB = 1 << 20;
    private const int BlockSize = MiB;
    private const string Block = "block";

    /// <summary>
    /// Waits for the driver to get the domain to a size, as the driver counts it: current_until -le KIB. A load, which forks and
    /// writes files all the time, is started and ended by the other two.
    /// </summary>
    private const string Functions = """
        memory=/sys/devices/system/xen_memory/xen_memory0
        current_until() {
            i=0
            until [ $(cat $memory/info/current_kb) $1 $2 ]; do
                i=$((i + 1))
                if [ $i -gt 3000 ]; then echo "@stuck at $(cat $memory/info/current_kb) KiB"; poweroff -f; fi
                usleep 100000
            done
        }
        start_load() {
            while :; do
                cp /block /mnt/load && cmp /block /mnt/load || echo "@load failed"
                rm /mnt/load
                usleep 50000
            done &
            load=$!
        }
        end_load() {
            kill $load
            wait $load
        }
        write_blocks() {
            i=0
            while [ $i -lt $1 ]; do cat /block || echo "@write failed" >&2; i=$((i + 1)); done >/mnt/all
            echo "@sum $(md5sum </mnt/all)"
        }
        mkdir -p /mnt
        mount -t tmpfs -o size=1g tmpfs /mnt

        """;

    private string _kernel = null!;
    private string _busybox = null!;

    [OneTimeSetUp]
    public async Task FetchAsync()
    {
        var cache = new GuestCache(GuestCache.DefaultRoot());
        try
        {
            _kernel = (await cache.GetKernelAsync(DebianKernelFlavour.Amd64)).Image;
            _busybox = await cache.GetBusyboxAsync();
        }
        catch (GuestFetchException missing)
        {
            Assert.Ignore(missing.Message);
        }
    }

    [Test]
    public async Task A_domain_of_a_GiB_shrinks_to_a_quarter_under_load_and_grows_again(CancellationToken cancellation)
    {
        const int Large = 1024;
        const int Small = 256;
        const int Blocks = 700;
        if (Large > HostMachine.MemoryMiB / 2)
            Assert.Ignore($"this machine has too little memory for a domain of {Large} MiB.");
        byte[] block = new byte[BlockSize];
        new Random(1).NextBytes(block);
        string script = Functions + $$"""
            dd if=/dev/zero of=/mnt/all bs=1M count=850 2>/dev/null
            rm /mnt/all
            start_load
            echo "@used"
            current_until -le {{Small << 10}}
            echo "@shrunk"
            current_until -ge {{Large << 10}}
            end_load
            echo "@grown"
            write_blocks {{Blocks}}
            echo "[dmesg]"; dmesg; echo "[end]"
            """;
        var console = new ConsoleLines();
        await using RunningDomain domain = await BootAsync(script, block, console, memory: Large, most: Large);
        await console.WaitForAsync("@used", domain.Stopped, cancellation);
        Assert.That(ResidentMiB(domain), Is.InRange(850, Large + 2), "MiB, all of it used once");

        domain.SetMemoryTarget(Small);
        await console.WaitForAsync("@shrunk", domain.Stopped, cancellation);
        _ = SpinWait.SpinUntil(() => ResidentMiB(domain) <= Small + 2, TimeSpan.FromSeconds(60));
        Assert.That(ResidentMiB(domain), Is.LessThanOrEqualTo(Small + 2), "MiB, after it gave the rest up");
        Assert.That(MappedMiB(domain), Is.LessThanOrEqualTo(Small + 2), "MiB of the mapping, as proc(5) has it");
        Assert.That(OwnedMiB(domain), Is.InRange(Small - 1, Small + 1));
        Assert.That((int)(domain.Domain.MaxPages >> 8), Is.EqualTo(Small + 1));

        domain.SetMemoryTarget(Large);
        await console.WaitForAsync("@grown", domain.Stopped, cancellation);
        Assert.That(OwnedMiB(domain), Is.InRange(Large - 1, Large + 1));
        string sum = await console.WaitForAsync("@sum", domain.Stopped, cancellation);
        Assert.That(sum, Does.StartWith(SumOf(block, Blocks)));
        Assert.That(ResidentMiB(domain), Is.InRange(Blocks, Large + 2), "MiB, used again");
        await ExpectCleanEndAsync(domain, console, cancellation);
    }

    [Test]
    public async Task A_domain_boots_with_less_than_it_may_grow_to(CancellationToken cancellation)
    {
        const int First = 192;
        const int Most = 384;
        const int Blocks = 240;
        byte[] block = new byte[BlockSize];
        new Random(2).NextBytes(block);
        string script = Functions + $$"""
            echo "@first $(cat $memory/info/current_kb)"
            start_load
            current_until -ge {{Most << 10}}
            end_load
            write_blocks {{Blocks}}
            echo "[dmesg]"; dmesg; echo "[end]"
            """;
        var console = new ConsoleLines();
        await using RunningDomain domain = await BootAsync(script, block, console, memory: First, most: Most);
        Assert.That(await console.WaitForAsync("@first", domain.Stopped, cancellation), Is.EqualTo($"{First << 10}"));
        Assert.That(() => domain.SetMemoryTarget(Most + 1), Throws.InstanceOf<ArgumentOutOfRangeException>());
        domain.SetMemoryTarget(Most);
        Assert.That(await console.WaitForAsync("@sum", domain.Stopped, cancellation), Does.StartWith(SumOf(block, Blocks)));
        Assert.That(OwnedMiB(domain), Is.InRange(Most - 1, Most + 1));
        await ExpectCleanEndAsync(domain, console, cancellation);
        Assert.That(() => domain.SetMemoryTarget(First), Throws.Nothing, "to no effect");
    }

    private static int ResidentMiB(RunningDomain domain) => (int)(domain.ResidentMemory / MiB);

    private static int OwnedMiB(RunningDomain domain) => (int)(domain.Domain.OwnedPages >> 8);

    private static string SumOf(byte[] block, int count)
    {
        using var md5 = IncrementalHash.CreateHash(HashAlgorithmName.MD5);
        for (int i = 0; i < count; i++)
            md5.AppendData(block);
        return Convert.ToHexStringLower(md5.GetCurrentHash());
    }

    /// <summary>Resident MiB of this process's mapping of a domain's memory, which its console's page is in.</summary>
    private static unsafe int MappedMiB(RunningDomain domain)
    {
        ulong page = (ulong)domain.Domain.ConsolePage;
        int total = 0;
        bool counts = false;
        foreach (string line in File.ReadLines("/proc/self/smaps"))
        {
            // A mapping begins with its address range in lower-case hexadecimal; its fields with a capital.
            if (char.IsAsciiHexDigitLower(line[0]))
            {
                ulong[] ends = [.. line[..line.IndexOf(' ', StringComparison.Ordinal)].Split('-').Select(static end => Convert.ToUInt64(end, 16))];
                counts = page >= ends[0] && page < ends[1];
                Assert.That(!counts || line.Contains("memfd:xensharp-ram", StringComparison.Ordinal), line);
            }
            else if (counts && line.StartsWith("Rss:", StringComparison.Ordinal))
                total += int.Parse(line.AsSpan(4).Trim()[..^3]) >> 10;
        }

        return total;
    }

    private static async Task ExpectCleanEndAsync(RunningDomain domain, ConsoleLines console, CancellationToken cancellation)
    {
        DomainExit exit = await domain.Completion.WaitAsync(cancellation);
        Assert.That(exit.Reason, Is.EqualTo(ShutdownReason.PowerOff), exit.Report);
        Assert.That(console.Text, Does.Not.Contain("@load failed").And.Not.Contain("@write failed").And.Not.Contain("exit status"));
        Assert.That(KernelLog.TroubleIn(KernelLog.Section(console.Text, "[dmesg]", "[end]")), Is.Empty);
    }

    private async Task<RunningDomain> BootAsync(string script, byte[] block, ConsoleLines console, int memory, int most)
    {
        byte[] ramdisk = await BusyboxInitramfs.BuildAsync(
            _busybox, new BusyboxInitramfsOptions { Banner = string.Empty, InitScript = script, Files = [new InitramfsFile(Block, block)] });
        RunningDomain domain = RunningDomain.Create(
            Host,
            new DomainSpecification
            {
                Name = "balloon",
                Image = new DomainImage(KernelImage.Parse(await File.ReadAllBytesAsync(_kernel)), ramdisk) { Reusable = false },
                MemoryMiB = memory,
                MaxMemoryMiB = most,
                CommandLine = "console=hvc0 quiet",
            },
            console);
        domain.Start();
        return domain;
    }
}
