// Real Xen with the guest as its dom0: boots of every ending, with the host's QEMU and with the cache's.
using XenSharp.Guests;
using XenSharp.Oracle.Beds;

namespace XenSharp.Oracle.Tests;

[Category("Oracle")]
[NonParallelizable]
public sealed class XenDom0BedTests
{
    [Test]
    public async Task GuestsRunAsDom0()
    {
        using WatchedQemu qemu = await WatchedQemu.MakeAsync();
        List<GuestRun> runs = await BedTest.RunAsync(
            new XenDom0Bed(BedTest.Cache, null, qemu.Host),
            BedTest.Tiny("spin", TinyGuestBehaviour.SpinForever) with { Timeout = TimeSpan.FromSeconds(5) },
            BedTest.Tiny("power-off") with { Ramdisk = new byte[5000], Vcpus = 2 },
            BedTest.Repeat("repeat", "one two,three"),
            BedTest.Tiny("reboot", TinyGuestBehaviour.Reboot),
            BedTest.Tiny("crash", TinyGuestBehaviour.Crash),
            BedTest.Tiny("ud2", TinyGuestBehaviour.UndefinedInstruction),
            BedTest.ShutDown("watchdog", 4),
            BedTest.ShutDown("soft-reset", 5),
            BedTest.ShutDown("suspend", 2),
            BedTest.Tiny("flood", TinyGuestBehaviour.ConsoleFlood));
        Assert.Multiple(() =>
        {
            Assert.That(runs.Select(run => (run.Name, run.Ending)), Is.EqualTo(new[]
            {
                ("spin", GuestEnding.TimedOut), ("power-off", GuestEnding.PowerOff), ("repeat", GuestEnding.PowerOff), ("reboot", GuestEnding.Reboot),
                ("crash", GuestEnding.Crash), ("ud2", GuestEnding.Crash), ("watchdog", GuestEnding.Watchdog),
                ("soft-reset", GuestEnding.SoftReset), ("suspend", GuestEnding.Suspend), ("flood", GuestEnding.PowerOff),
            }));
            foreach (GuestRun run in runs.Where(run => run.Name is "spin" or "power-off" or "reboot" or "crash" or "ud2"))
                Assert.That(run.Console, Is.EqualTo($"I am {run.Name}\n"));
            // Xen's next line ends the guest's, which has no end of its own.
            Assert.That(runs[2].Console, Is.EqualTo("one two,three"));
            Assert.That(runs.Single(run => run.Name == "ud2").Report, Does.Contain("#UD"));
            Assert.That(runs[^1].Console == "I am flood\n" + BedTest.Flood(1 << 20), Is.True, "a mebibyte comes through to the byte");
        });
        qemu.AssertNothingLeft();
    }

    [Test]
    public async Task AHostWithoutQemuGetsOneFromTheCache()
    {
        XenDom0Bed bed = new(BedTest.Cache, null, BedTest.EmptyHost);
        List<GuestRun> runs = await BedTest.RunAsync(bed, BedTest.Tiny("power-off"));
        Assert.That(runs.Single(), Has.Property("Console").EqualTo("I am power-off\n").And.Property("Ending").EqualTo(GuestEnding.PowerOff));
        Assert.That(bed.Name, Does.Match(@"^Xen 4\.17\.\d+ \(dom0\)$"));
    }

    [Test]
    public async Task AXenThatDoesNotComeUpIsAnError()
    {
        // A kernel that Xen cannot build a dom0 from makes it panic.
        using WatchedQemu qemu = await WatchedQemu.MakeAsync();
        BedGuest bad = new("bad", new byte[5000]);
        Assert.That(() => BedTest.RunAsync(new XenDom0Bed(BedTest.Cache, null, qemu.Host), bad),
            Throws.InstanceOf<OracleException>().With.Message.Contains("Xen panicked").And.Message.Contains("Could not construct domain 0"));
        qemu.AssertNothingLeft();
    }
}
