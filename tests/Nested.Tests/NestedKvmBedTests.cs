// XenSharp on hardware-style KVM, with nested paging and with shadow paging: one boot of the emulated machine each, and every
// test looks at something that happened in it.

using System.Globalization;
using System.Security.Cryptography;
using System.Text;
using System.Text.Json;
using System.Text.RegularExpressions;
using XenSharp.Domains.Builder;
using XenSharp.Guests;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Oracle.Beds;

namespace XenSharp.Nested.Tests;

/// <summary>Needs QEMU and a C compiler, and at its first run the network, for some 70 MB.</summary>
[TestFixture(true)]
[TestFixture(false)]
[Category("Nested")]
[Parallelizable(ParallelScope.Self)]
[CancelAfter(900_000)]
public sealed class NestedKvmBedTests(bool nestedPaging)
{
    private const string Hello = "hello\n";
    private const string Silent = "silent";
    private const string Waiting = "waiting";
    private const string Debian = "debian";
    private const string Flood = "flood";
    private const int Forks = 20;
    private const int FloodLength = 200_000;

    /// <summary>What in a kernel's log says that something went wrong in it, for grep -E.</summary>
    internal const string Trouble = "WARNING|BUG|Call Trace|Oops|general protection|nable to handle|soft lockup|detected stall";

    private readonly Dictionary<string, GuestRun> _runs = [];
    private NestedKvmBed _bed = null!;
    private DateTimeOffset _started;

    /// <summary>Each way to end that a guest can choose, and some that it cannot. One waits for input, and there is none, not even an end.</summary>
    private static (string Name, TinyGuestOptions Options, GuestEnding Ending)[] TinyGuests { get; } =
    [
        ("poweroff", new() { Message = Hello }, GuestEnding.PowerOff),
        ("spin", new() { Message = Hello, Behaviour = TinyGuestBehaviour.SpinForever }, GuestEnding.TimedOut),
        (Waiting, new() { Message = "", Behaviour = TinyGuestBehaviour.EchoInput }, GuestEnding.TimedOut),
        ("reboot", new() { Message = Hello, Behaviour = TinyGuestBehaviour.Reboot }, GuestEnding.Reboot),
        ("crash", new() { Message = Hello, Behaviour = TinyGuestBehaviour.Crash }, GuestEnding.Crash),
        ("suspend", new() { Message = Hello, Behaviour = TinyGuestBehaviour.Suspend }, GuestEnding.Suspend),
        ("watchdog", new() { Message = Hello, Behaviour = TinyGuestBehaviour.Watchdog }, GuestEnding.Watchdog),
        ("soft-reset", new() { Message = Hello, Behaviour = TinyGuestBehaviour.SoftReset }, GuestEnding.SoftReset),
        (Silent, new() { Message = "" }, GuestEnding.PowerOff),
        ("undefined", new() { Message = Hello, Behaviour = TinyGuestBehaviour.UndefinedInstruction }, GuestEnding.Crash),
        ("monitor-write", new() { Message = Hello, Behaviour = TinyGuestBehaviour.WriteTo, Address = 0xffff_8100_0000_0000 }, GuestEnding.Crash),
        ("monitor-jump", new() { Message = Hello, Behaviour = TinyGuestBehaviour.JumpTo, Address = 0xffff_8100_0000_0000 }, GuestEnding.Crash),
        ("page", new() { Message = Hello, HypercallStyle = HypercallStyle.Page }, GuestEnding.PowerOff),
    ];

    private static IEnumerable<string> TinyGuestNames => TinyGuests.Select(static guest => guest.Name);

    [OneTimeSetUp]
    public async Task RunAllAsync()
    {
        string command = await NativeCommand.GetAsync();
        var cache = new GuestCache(GuestCache.DefaultRoot());
        BedGuest debian;
        try
        {
            debian = await DebianGuestAsync(cache);
        }
        catch (GuestFetchException missing)
        {
            Assert.Ignore(missing.Message);
            throw;
        }
        List<BedGuest> guests = [.. TinyGuests.Select(static guest => new BedGuest(guest.Name, TinyGuest.Build(guest.Options))
        {
            Timeout = TimeSpan.FromSeconds(guest.Name == Waiting ? 6 : guest.Ending == GuestEnding.TimedOut ? 15 : 60),
        })];
        guests.Add(new(Flood, TinyGuest.Build(new() { Message = "", Behaviour = TinyGuestBehaviour.ConsoleFlood, FloodBytes = FloodLength }))
        {
            Timeout = TimeSpan.FromSeconds(120),
        });
        guests.Insert(TinyGuests.Length / 2, debian);

        _bed = new NestedKvmBed(cache, command, nestedPaging);
        _started = DateTimeOffset.UtcNow;
        await foreach (GuestRun run in _bed.RunAsync(guests))
        {
            Assert.That(run.Name, Is.EqualTo(guests[_runs.Count].Name), "in the order given");
            _runs.Add(run.Name, run);
            TestContext.Progress.WriteLine($"npt={(nestedPaging ? 1 : 0)}: {run.Name} after {(DateTimeOffset.UtcNow - _started).TotalSeconds:0.0} s");
        }
        Assert.That(_runs, Has.Count.EqualTo(guests.Count));
    }

    [Test]
    public void The_host_is_of_the_kind_that_the_bed_is_for()
    {
        using JsonDocument report = JsonDocument.Parse(_bed.HostReport!);
        JsonElement kvm = report.RootElement.GetProperty("kvm");
        Assert.Multiple(() =>
        {
            Assert.That(report.RootElement.GetProperty("kvmError").ValueKind, Is.EqualTo(JsonValueKind.Null));
            Assert.That(kvm.GetProperty("syscallEntryLevel").GetInt32(), Is.Zero, "SYSCALL enters the monitor in ring 0");
            Assert.That(kvm.GetProperty("shadowPageTables").GetBoolean(), Is.EqualTo(!nestedPaging), "the direct page-table writer");
            Assert.That(kvm.GetProperty("storesNeedFlush").GetBoolean(), Is.EqualTo(!nestedPaging));
            Assert.That(kvm.GetProperty("slot256Usable").GetBoolean());
            Assert.That(kvm.GetProperty("cpuidPolicyApplies").GetBoolean());
            Assert.That(kvm.GetProperty("softwareInterruptVector").GetString(), Is.EqualTo("GeneralProtection"));
            Assert.That(kvm.GetProperty("flatSegmentLoads").GetBoolean());
            foreach (string name in (string[])["compatibilitySyscallAstray", "interpretsCompatibilityMode", "hostDescriptorTable"])
                Assert.That(kvm.GetProperty(name).GetBoolean(), Is.False, name);
            Assert.That(kvm.GetProperty("taskSwitchedTraps").GetBoolean());

            // kvm_amd gives a new vCPU a counter that begins at 0; that XenSharp has set it back to the host's shows here.
            Assert.That(kvm.GetProperty("tscOffset").GetInt64(), Is.Zero);
            Assert.That(kvm.GetProperty("tscKiloHertz").GetUInt32(), Is.GreaterThan(100_000u));
        });
    }

    [TestCaseSource(nameof(TinyGuestNames))]
    public void A_tiny_guest_ends_as_it_should(string name)
    {
        (_, TinyGuestOptions options, GuestEnding ending) = TinyGuests.Single(guest => guest.Name == name);
        GuestRun run = _runs[name];
        Assert.Multiple(() =>
        {
            Assert.That(run.Ending, Is.EqualTo(ending), run.Report);
            Assert.That(run.Console, Is.EqualTo(options.Message));
            Assert.That(run.Report, Does.Not.Contain("XenSharp failed").And.Not.Contain("   at "));
            if (ending is GuestEnding.PowerOff or GuestEnding.TimedOut)
                Assert.That(run.Report, Is.Empty);
            else
                Assert.That(run.Report, Is.Not.Empty);
        });
    }

    [Test]
    public void Debian_boots_works_and_powers_off()
    {
        GuestRun run = _runs[Debian];
        Assert.That(run.Ending, Is.EqualTo(GuestEnding.PowerOff), run.Report + run.Console);
        string hash = Convert.ToHexStringLower(MD5.HashData(Encoding.ASCII.GetBytes(string.Concat(Enumerable.Range(1, 5000).Select(i => $"{i}\n")))));
        Assert.Multiple(() =>
        {
            Assert.That(run.Console, Does.Contain("hypervisor: xen\r\n"));
            Assert.That(run.Console, Does.Contain($"forks: {Forks}\r\n"));
            Assert.That(run.Console, Does.Contain($"pipe: {8 << 20}\r\n"));
            Assert.That(run.Console, Does.Contain($"hash: {hash}  -\r\n"));
            Assert.That(run.Console, Does.Contain($"sorted: {hash}  -\r\n"));
            Assert.That(run.Console, Does.Contain("mapped: 33554432\r\n"));
            Assert.That(run.Console, Does.Contain("killed: 139\r\n"), "128 + SIGSEGV");
        });
    }

    [Test]
    public void Debian_finds_nothing_wrong()
    {
        string console = _runs[Debian].Console;
        Assert.That(console, Does.Contain("Hypervisor detected: Xen PV"));
        Assert.That(console, Does.Contain("[trouble]\r\n[end]\r\n"));
    }

    [Test]
    public void A_flood_comes_out_byte_for_byte()
    {
        GuestRun run = _runs[Flood];
        Assert.That(run.Ending, Is.EqualTo(GuestEnding.PowerOff), run.Report);
        Assert.That(run.Console, Has.Length.EqualTo(FloodLength));
        Assert.That(Enumerable.Range(0, FloodLength).Where(i => run.Console[i] != TinyGuest.FloodByte(i)), Is.Empty);
    }

    [Test]
    public void Time_passes_in_Debian_as_it_does_outside()
    {
        Match times = Regex.Match(_runs[Debian].Console, @"times: (\d+\.\d+) (\d+\.\d+) (\d+)\r\n");
        Assert.That(times.Success, _runs[Debian].Console);
        double before = double.Parse(times.Groups[1].Value, CultureInfo.InvariantCulture);
        double after = double.Parse(times.Groups[2].Value, CultureInfo.InvariantCulture);
        Assert.That(after - before, Is.InRange(1.99, 60.0), "two seconds of sleep, by the guest's clock");

        // The wall clock comes from the emulated machine's, which is this host's.
        DateTimeOffset guest = DateTimeOffset.FromUnixTimeSeconds(long.Parse(times.Groups[3].Value, CultureInfo.InvariantCulture));
        Assert.That(guest, Is.InRange(_started - TimeSpan.FromSeconds(5), DateTimeOffset.UtcNow + TimeSpan.FromSeconds(5)));
    }

    /// <summary>Debian's kernel, already unpacked, with a shell script that forks, pipes, maps, signals and sleeps.</summary>
    private static async Task<BedGuest> DebianGuestAsync(GuestCache cache)
    {
        DebianKernel kernel = await cache.GetKernelAsync(DebianKernelFlavour.Amd64);
        string script = $"""
            #!/bin/sh
            echo "hypervisor: $(cat /sys/hypervisor/type)"
            i=0; while [ $i -lt {Forks} ]; do /bin/busybox true && i=$((i+1)); done; echo "forks: $i"
            echo "pipe: $(dd if=/dev/zero bs=64k count=128 2>/dev/null | cat | wc -c)"
            echo "hash: $(seq 1 5000 | md5sum)"
            echo "sorted: $(seq 1 5000 | sort -r | sort -n | md5sum)"
            dd if=/dev/zero of=/run/mapped bs=32M count=1 2>/dev/null; echo "mapped: $(stat -c %s /run/mapped)"
            /bin/busybox sh -c 'kill -SEGV $$' 2>/dev/null; echo "killed: $?"
            read before idle </proc/uptime; sleep 2; read after idle </proc/uptime; echo "times: $before $after $(date +%s)"
            dmesg >/run/log
            grep "Hypervisor detected" /run/log
            echo "[trouble]"; grep -E '{Trouble}' /run/log; echo "[end]"
            """;
        return new BedGuest(Debian, KernelImage.Unpack(await File.ReadAllBytesAsync(kernel.Image)))
        {
            Ramdisk = await BusyboxInitramfs.BuildAsync(
                await cache.GetBusyboxAsync(), new BusyboxInitramfsOptions { Banner = "", InitScript = script }),
            CommandLine = "console=hvc0 quiet",
            MemoryMiB = 256,
            Timeout = TimeSpan.FromMinutes(8),
        };
    }
}
