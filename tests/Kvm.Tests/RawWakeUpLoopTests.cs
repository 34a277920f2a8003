// The floor that sleeping domains are held against.
using System.Diagnostics;

namespace XenSharp.Kvm.Tests;

public sealed class RawWakeUpLoopTests : KvmTest
{
    [Test]
    public void It_sleeps_and_says_what_that_took()
    {
        const int wakeUps = 40;
        var period = TimeSpan.FromMilliseconds(1);
        long start = Stopwatch.GetTimestamp();
        WakeUpCost cost = RawWakeUpLoop.Measure(Host, Capabilities, period, wakeUps);
        TimeSpan elapsed = Stopwatch.GetElapsedTime(start);
        Assert.Multiple(() =>
        {
            Assert.That(elapsed, Is.GreaterThanOrEqualTo(2 * wakeUps * period), "it waited for each of both kinds");
            Assert.That(cost.SleepNanoseconds, Is.Positive);
            Assert.That(cost.EntryNanoseconds, Is.Positive);
            Assert.That(
                (cost.SleepNanoseconds + cost.EntryNanoseconds) * wakeUps, Is.LessThan(elapsed.TotalNanoseconds),
                "a thread has no more of a processor than there is");
        });
    }

    [TestCase(0, 1)]
    [TestCase(-1, 1)]
    [TestCase(1, 0)]
    public void It_refuses_what_cannot_be_measured(int milliseconds, int wakeUps)
        => Assert.Throws<ArgumentOutOfRangeException>(
            () => RawWakeUpLoop.Measure(Host, Capabilities, TimeSpan.FromMilliseconds(milliseconds), wakeUps));
}
