// Real Xen with unprivileged domains: one boot with guests that end in every way there is, and boots that break down.
using System.Diagnostics;
using XenSharp.Guests;
using XenSharp.Oracle.Beds;

namespace XenSharp.Oracle.Tests;

[Category("Oracle")]
[NonParallelizable]
public sealed class XenDomUBedTests
{
    const string CommandLine = "a \"quoted\" back\\slash and 'more', with commas";

    static readonly BedGuest[] Guests =
    [
        BedTest.Tiny("power-off"),
        BedTest.Tiny("crash", TinyGuestBehaviour.Crash),
        BedTest.Tiny("spin", TinyGuestBehaviour.SpinForever) with { Timeout = TimeSpan.FromSeconds(5) },
        BedTest.Tiny("flood", TinyGuestBehaviour.ConsoleFlood),
        BedTest.Tiny("123", TinyGuestBehaviour.Reboot),
        BedTest.Tiny("ud2", TinyGuestBehaviour.UndefinedInstruction),
        BedTest.ShutDown("suspend", 2),
        BedTest.ShutDown("watchdog", 4),
        BedTest.ShutDown("soft-reset", 5),
        BedTest.ShutDown("no-such-reason", 77),
        BedTest.Tiny("large") with { MemoryMiB = 200, Vcpus = 3, Ramdisk = new byte[5000] },
        BedTest.Repeat("repeat", CommandLine),
        BedTest.Tiny("crash-of-two", TinyGuestBehaviour.Crash) with { Timeout = TimeSpan.FromSeconds(5), WithNext = true },
        BedTest.Tiny("spin-of-two", TinyGuestBehaviour.SpinForever),
        BedTest.ShutDown("no-such-reason-of-two", 77) with { WithNext = true },
        BedTest.Tiny("reboot-of-two", TinyGuestBehaviour.Reboot),
        BedTest.Tiny("after-two"),
    ];

    Dictionary<string, GuestRun> runs = [];
    List<GuestRun> inOrder = [];
    string name = "";

    [OneTimeSetUp]
    public async Task RunAllInOneBoot()
    {
        using WatchedQemu qemu = await WatchedQemu.MakeAsync();
        XenDomUBed bed = new(BedTest.Cache, null, qemu.Host);
        inOrder = await BedTest.RunAsync(bed, Guests);
        runs = inOrder.ToDictionary(run => run.Name);
        name = bed.Name;
        Assert.That(qemu.Processes, Has.Length.EqualTo(1), "all guests share one boot");
        qemu.AssertNothingLeft();
    }

    [Test]
    public void TheBedIsNamedAfterXensVersion() => Assert.That(name, Does.Match(@"^Xen 4\.17\.\d+ \(domU\)$"));

    [Test]
    public void ResultsComeInTheGuestsOrder() =>
        Assert.That(inOrder.Select(run => run.Name), Is.EqualTo(Guests.Select(guest => guest.Name)));

    [TestCase("power-off", GuestEnding.PowerOff)]
    [TestCase("crash", GuestEnding.Crash)]
    [TestCase("spin", GuestEnding.TimedOut)]
    [TestCase("flood", GuestEnding.PowerOff)]
    [TestCase("123", GuestEnding.Reboot)]
    [TestCase("ud2", GuestEnding.Crash)]
    [TestCase("suspend", GuestEnding.Suspend)]
    [TestCase("watchdog", GuestEnding.Watchdog)]
    [TestCase("soft-reset", GuestEnding.SoftReset)]
    [TestCase("no-such-reason", GuestEnding.Crash)]
    [TestCase("large", GuestEnding.PowerOff)]
    [TestCase("crash-of-two", GuestEnding.Crash)]
    [TestCase("spin-of-two", GuestEnding.TimedOut)]
    [TestCase("no-such-reason-of-two", GuestEnding.Crash)]
    [TestCase("reboot-of-two", GuestEnding.Reboot)]
    [TestCase("after-two", GuestEnding.PowerOff)]
    public void EveryWayToEndIsToldApart(string guest, GuestEnding ending) => Assert.That(runs[guest].Ending, Is.EqualTo(ending));

    [TestCase("power-off", "I am power-off\n")]
    [TestCase("crash", "I am crash\n")]
    [TestCase("spin", "I am spin\n")]
    [TestCase("123", "I am 123\n")]
    [TestCase("ud2", "I am ud2\n")]
    [TestCase("suspend", "reason 2\n")]
    [TestCase("large", "I am large\n")]
    [TestCase("repeat", CommandLine)]
    [TestCase("crash-of-two", "I am crash-of-two\n")]
    [TestCase("spin-of-two", "I am spin-of-two\n")]
    [TestCase("reboot-of-two", "I am reboot-of-two\n")]
    [TestCase("after-two", "I am after-two\n")]
    public void TheConsoleIsWhatThisGuestPrintedAndNoMore(string guest, string console) =>
        Assert.That(runs[guest].Console, Is.EqualTo(console));

    [Test]
    public void AMebibyteComesThroughToTheByte() =>
        Assert.That(runs["flood"].Console == "I am flood\n" + BedTest.Flood(1 << 20), Is.True);

    [Test]
    public void TheReportIsOfThisGuestAlone()
    {
        Assert.Multiple(() =>
        {
            Assert.That(runs["ud2"].Report, Does.Contain("Unhandled: vec 6, #UD").And.Contain("RIP:").And.Not.Contain("(XEN)"));
            Assert.That(runs["123"].Report, Does.Not.Contain("RIP:"));
            Assert.That(runs["suspend"].Report, Does.Not.Contain("RIP:"));
            Assert.That(runs["no-such-reason"].Report, Does.Contain("a reason for its shutdown that Xen's interface does not know"));
        });
    }

    [Test]
    public void AKernelThatXenRefusesIsAnErrorAfterTheResultsBeforeIt()
    {
        List<GuestRun> before = [];
        OracleException error = Assert.ThrowsAsync<OracleException>(async () =>
        {
            await foreach (GuestRun run in new XenDomUBed(BedTest.Cache).RunAsync([BedTest.Tiny("good"), new("bad", new byte[5000])]))
                before.Add(run);
        })!;
        Assert.That(error.Message, Does.Contain("Xen's tools cannot run").And.Contain("/guests/1.cfg failed in dom0"));
        Assert.That(before.Select(run => (run.Name, run.Ending)), Is.EqualTo(new[] { ("good", GuestEnding.PowerOff) }));
    }

    [Test]
    public async Task AQemuThatIsKilledIsAnErrorWithTheLastLines()
    {
        using WatchedQemu qemu = await WatchedQemu.MakeAsync();
        XenDomUBed bed = new(BedTest.Cache, null, qemu.Host);
        OracleException error = Assert.ThrowsAsync<OracleException>(async () =>
        {
            await foreach (GuestRun run in bed.RunAsync([BedTest.Tiny("first"), BedTest.Tiny("spin", TinyGuestBehaviour.SpinForever)]))
            {
                Assert.That(run.Name, Is.EqualTo("first"));
                using Process process = Process.GetProcessById(qemu.Processes.Single());
                process.Kill();
            }
        })!;
        Assert.That(error.Message, Does.Contain("QEMU ended with status 137").And.Contain("(XEN) "));
        qemu.AssertNothingLeft();
    }

    [Test]
    public async Task ACallerThatStopsAskingLeavesNothingBehind()
    {
        using WatchedQemu qemu = await WatchedQemu.MakeAsync();
        XenDomUBed bed = new(BedTest.Cache, null, qemu.Host);
        await foreach (GuestRun run in bed.RunAsync([BedTest.Tiny("first"), BedTest.Tiny("spin", TinyGuestBehaviour.SpinForever)]))
        {
            Assert.That(run.Name, Is.EqualTo("first"));
            break;
        }
        qemu.AssertNothingLeft();
    }

    [Test]
    public async Task ACancelledRunLeavesNothingBehind()
    {
        using WatchedQemu qemu = await WatchedQemu.MakeAsync();
        using CancellationTokenSource cancel = new();
        XenDomUBed bed = new(BedTest.Cache, null, qemu.Host);
        Task running = Task.Run(async () =>
        {
            await foreach (GuestRun _ in bed.RunAsync([BedTest.Tiny("spin", TinyGuestBehaviour.SpinForever)], cancel.Token))
                Assert.Fail("This one does not end.");
        });
        Assert.That(SpinWait.SpinUntil(() => qemu.HasStarted || running.IsCompleted, TimeSpan.FromMinutes(2)), Is.True);
        await cancel.CancelAsync();
        Assert.That(async () => await running, Throws.InstanceOf<OperationCanceledException>());
        qemu.AssertNothingLeft();
    }

    [Test]
    public async Task AQemuThatRefusesItsArgumentsIsQuoted()
    {
        using WatchedQemu qemu = await WatchedQemu.MakeAsync("echo 'qemu: no such machine' >&2; exit 1");
        Assert.That(() => BedTest.RunAsync(new XenDomUBed(BedTest.Cache, null, qemu.Host), BedTest.Tiny("never")),
            Throws.InstanceOf<OracleException>().With.Message.Contains("status 1").And.Message.Contains("no such machine"));
    }

    [Test]
    public async Task NoGuestsNeedNoBoot() =>
        Assert.That(await BedTest.RunAsync(new XenDomUBed(BedTest.Cache, null, BedTest.EmptyHost)), Is.Empty);
}
