// One vCPU's timers, on times of the test's own.
namespace XenSharp.Domains.Tests.Runtime;

public sealed class VcpuTimersTests
{
    private readonly VcpuTimers _timers = new();

    [SetUp]
    public void SetUp()
    {
        _timers.Singleshot = long.MaxValue;
        _timers.Poll = long.MaxValue;
        _timers.SetPeriodic(0, 0);
    }

    [Test]
    public void Singleshot_fires_once_and_not_before()
    {
        _timers.Singleshot = 100;
        Assert.That(_timers.Next, Is.EqualTo(100));
        Assert.That(_timers.Expire(99), Is.False);
        Assert.That(_timers.Expire(100), Is.True);
        Assert.That(_timers.Next, Is.EqualTo(long.MaxValue));
        Assert.That(_timers.Expire(1000), Is.False);
    }

    [TestCase(0)]
    [TestCase(-5)]
    public void What_is_past_fires_at_once(long deadline)
    {
        _timers.Singleshot = deadline;
        Assert.That(_timers.Expire(50), Is.True);
    }

    [Test]
    public void Periodic_ticks_at_once_and_does_not_make_up_for_what_was_missed()
    {
        var timers = new VcpuTimers();
        timers.SetPeriodic(100, 1000);
        Assert.That(timers.Next, Is.EqualTo(1000));
        Assert.That(timers.Expire(1000), Is.True);
        Assert.That(timers.Next, Is.EqualTo(1100));
        Assert.That(timers.Expire(1099), Is.False);
        Assert.That(timers.Expire(1570), Is.True);
        Assert.That(timers.Next, Is.EqualTo(1670));

        // Set anew within a period of the last tick, the next is a period after that.
        timers.SetPeriodic(200, 1600);
        Assert.That(timers.Next, Is.EqualTo(1770));
        timers.SetPeriodic(0, 1600);
        Assert.That(timers.Next, Is.EqualTo(long.MaxValue));
    }

    [Test]
    public void Periodic_rests_while_its_vCPU_waits()
    {
        _timers.SetPeriodic(100, 1000);
        Assert.That(_timers.NextWhileWaiting, Is.EqualTo(long.MaxValue));
        _timers.Poll = 3000;
        Assert.That(_timers.NextWhileWaiting, Is.EqualTo(3000));
        _timers.Singleshot = 2000;
        Assert.That(_timers.NextWhileWaiting, Is.EqualTo(2000));
    }

    [Test]
    public void The_longest_period_does_not_overflow()
    {
        var timers = new VcpuTimers();
        timers.SetPeriodic(long.MaxValue >> 1, 1000);
        Assert.That(timers.Expire(1000), Is.True);
        Assert.That(timers.Next, Is.EqualTo((long.MaxValue >> 1) + 1000));
    }

    [Test]
    public void Poll_raises_no_interrupt()
    {
        _timers.Poll = 70;
        _timers.Singleshot = 90;
        Assert.That(_timers.Next, Is.EqualTo(70));
        Assert.That(_timers.Expire(80), Is.False);
        Assert.That(_timers.PollExpired, Is.True);
        Assert.That(_timers.Next, Is.EqualTo(90));
        _timers.Poll = 200;
        Assert.That(_timers.PollExpired, Is.False);
    }
}
