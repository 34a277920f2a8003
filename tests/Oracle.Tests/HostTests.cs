// Hosts that lack what beds need, guests that no bed takes, and results that come damaged: without booting anything.
using System.Text;
using XenSharp.Guests.Fetching;
using XenSharp.Oracle.Beds;
using XenSharp.Oracle.Dom0;

namespace XenSharp.Oracle.Tests;

public sealed class HostTests
{
    [Test]
    public void AHostWithoutQemuAndAptIsToldWhatToInstall()
    {
        string folder = Directory.CreateTempSubdirectory("xensharp-oracle-test-").FullName;
        try
        {
            GuestCache cache = new(Path.Combine(folder, "cache"), BedTest.EmptyHost);
            foreach (IGuestBed bed in (IGuestBed[])[new XenDomUBed(cache, null, BedTest.EmptyHost), new XenDom0Bed(cache, null, BedTest.EmptyHost)])
            {
                Assert.That(() => BedTest.RunAsync(bed, BedTest.Tiny("never")),
                    Throws.InstanceOf<OracleException>().With.Message.Contains("apt-get install qemu-system-x86 seabios"));
                Assert.That(bed.Name, Does.StartWith("Xen 4.17 ("));
            }
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    static IEnumerable<TestCaseData> BadGuests()
    {
        BedGuest good = BedTest.Tiny("good");
        yield return new TestCaseData(good with { Name = "" }, "name");
        yield return new TestCaseData(good with { Name = new string('a', 41) }, "name");
        yield return new TestCaseData(good with { Name = "a b" }, "name");
        yield return new TestCaseData(good with { Name = "a\"" }, "name");
        yield return new TestCaseData(good with { Name = "twice" }, "another");
        yield return new TestCaseData(good with { Kernel = default }, "kernel");
        yield return new TestCaseData(good with { MemoryMiB = 0 }, "memory");
        yield return new TestCaseData(good with { Vcpus = 0 }, "vCPU");
        yield return new TestCaseData(good with { Timeout = TimeSpan.Zero }, "time");
        yield return new TestCaseData(good with { CommandLine = "a\nb" }, "command line");
        yield return new TestCaseData(good with { WithNext = true }, "a pair");
    }

    [TestCaseSource(nameof(BadGuests))]
    public void AGuestThatCannotBeRunIsNamed(BedGuest guest, string why)
    {
        foreach (IGuestBed bed in (IGuestBed[])[new XenDomUBed(BedTest.Cache), new XenDom0Bed(BedTest.Cache)])
            Assert.That(() => BedTest.RunAsync(bed, BedTest.Tiny("twice"), guest),
                Throws.ArgumentException.With.Message.Contains($"\"{guest.Name}\"").And.Message.Contains(why));
    }

    [Test]
    public void APairIsTwo()
    {
        BedGuest first = BedTest.Tiny("first") with { WithNext = true };
        BedGuest second = BedTest.Tiny("second") with { WithNext = true };
        Assert.That(() => BedTest.RunAsync(new XenDomUBed(BedTest.Cache), first, second, BedTest.Tiny("third")),
            Throws.ArgumentException.With.Message.Contains("\"second\"").And.Message.Contains("a pair"));
    }

    [Test]
    public void ABedOfOneDomainRefusesPairs()
    {
        BedGuest first = BedTest.Tiny("first") with { WithNext = true };
        foreach (IGuestBed bed in (IGuestBed[])[new XenDom0Bed(BedTest.Cache), new NestedKvmBed(BedTest.Cache, "xensharp", nestedPaging: true)])
        {
            Assert.That(() => BedTest.RunAsync(bed, first, BedTest.Tiny("second")),
                Throws.ArgumentException.With.Message.Contains("\"first\"").And.Message.Contains("one domain at a time"));
        }
    }

    [TestCase("guest 1 - 0 0\n\n")]
    [TestCase("guest 0 - 3 0\nabcd\n")]
    [TestCase("guest 0 - -1 0\n\n")]
    [TestCase("guest 0 - 99999999999 0\n\n")]
    [TestCase("guest 0 long 0 0\n\n")]
    [TestCase("done\n")]
    [TestCase("nonsense\n")]
    public void ADamagedResultIsAnError(string sent) =>
        Assert.That(() => Reader(sent).ReadAsync(), Throws.InstanceOf<OracleException>().With.Message.Contains("try again"));

    [TestCase("")]
    [TestCase("ready\n")]
    [TestCase("ready\nguest 0 - 3")]
    [TestCase("guest 0 - 3 0\nab")]
    [TestCase("guest 0 - 3 0\nabc")]
    [TestCase("failed 100\nabc")]
    public async Task AChannelThatEndsIsNotDone(string sent)
    {
        ResultReader reader = Reader(sent);
        Assert.That(await reader.ReadAsync(), Is.Null);
        Assert.That(reader.IsDone, Is.False);
    }

    [Test]
    public async Task BytesComeThroughAsTheyAre()
    {
        ResultReader reader = Reader("ready\nguest 0 w 4 17\n\r\n\0\u00ff(XEN) a\r\n(XEN) b\n\ndone\n");
        Assert.That(await reader.ReadAsync(), Is.EqualTo(new GuestRun("only", "\r\n\0\u00ff", GuestEnding.Watchdog, "a\nb\n")));
        Assert.That(await reader.ReadAsync(), Is.Null);
        Assert.That(reader.IsDone, Is.True);
    }

    [Test]
    public void WhatDom0SaysOfItsFailureIsPassedOn() =>
        Assert.That(() => Reader("failed 13\nxl is unwell\n").ReadAsync(), Throws.InstanceOf<OracleException>().With.Message.EndsWith("xl is unwell"));

    [Test]
    public void Dom0sLinesAndXensAreToldApart()
    {
        bool started = false;
        XenDom0Bed.Dom0Log log = new(() => started = true, () => { });
        foreach (string line in (string[])["(XEN) Xen version 4.17.7", "(XEN) Freed 664kB init memory", "hello", "half(XEN) d0v0 a complaint",
            " and half", "(XEN) Hardware Dom0 crashed: rebooting machine in 5 seconds.", "(XEN) more"])
            log.Add(line);
        Assert.Multiple(() =>
        {
            Assert.That(started, Is.True);
            Assert.That(log.Console, Is.EqualTo("hello\nhalf and half\n"));
            Assert.That(log.Report, Is.EqualTo("d0v0 a complaint\nHardware Dom0 crashed: rebooting machine in 5 seconds.\n"));
            Assert.That(log.Ending, Is.EqualTo(GuestEnding.Crash));
        });
    }

    [Test]
    public void APanicOfXensIsNoEndOfTheGuests()
    {
        int ends = 0;
        XenDom0Bed.Dom0Log log = new(() => { }, () => ends++);
        foreach (string line in (string[])["(XEN) Freed 664kB init memory", "(XEN) Panic on CPU 0:", "(XEN) FATAL TRAP", "(XEN) Reboot in five seconds..."])
            log.Add(line);
        Assert.That((log.HasPanicked, log.Ending, ends), Is.EqualTo((true, (GuestEnding?)null, 1)));
    }

    static ResultReader Reader(string sent) => new(new MemoryStream(Encoding.Latin1.GetBytes(sent)), [BedTest.Tiny("only")]);
}
