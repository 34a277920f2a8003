using XenSharp.Devices.Block;

namespace XenSharp.Devices.Tests.Block;

public sealed class AnswerHoldTests
{
    /// <summary>A front end that has one request at a time pays for a try now and then.</summary>
    [Test]
    public void A_front_end_that_waits_for_each_answer_is_seldom_kept_waiting()
    {
        var hold = new AnswerHold();
        int held = 0;
        for (int i = 0; i < 6400; i++)
            held += Occasion(hold, asks: false) ? 1 : 0;
        Assert.That(held, Is.EqualTo(6400 / 61));
    }

    /// <summary>Bursts: all but the last request of each are followed by another.</summary>
    [Test]
    public void A_front_end_that_goes_on_to_ask_is_found_and_waited_for()
    {
        var hold = new AnswerHold();
        int missed = 0;
        bool found = false;
        for (int i = 0; i < 3200; i++)
        {
            bool held = Occasion(hold, asks: i % 32 != 31);
            found |= held;
            missed += found && !held ? 1 : 0;
        }

        Assert.That((found, missed), Is.EqualTo((true, 0)));
    }

    /// <summary>Half of the answers kept back for nothing is more than it is worth.</summary>
    [Test]
    public void A_front_end_with_two_requests_at_a_time_is_not()
    {
        var hold = new AnswerHold();
        for (int i = 0; i < 100; i++)
            _ = Occasion(hold, asks: true);
        int held = 0;
        for (int i = 0; i < 640; i++)
            held += Occasion(hold, asks: i % 2 == 0) ? 1 : 0;
        Assert.That(held, Is.LessThan(640 / 4));
    }

    private static bool Occasion(AnswerHold hold, bool asks)
    {
        if (!hold.Begin())
            return false;
        hold.End(asks);
        return true;
    }
}
