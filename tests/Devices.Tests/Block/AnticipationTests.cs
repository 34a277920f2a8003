using XenSharp.Devices.Block;

namespace XenSharp.Devices.Tests.Block;

public sealed class AnticipationTests
{
    /// <summary>A front end that has one request at a time pays for a try now and then.</summary>
    [Test]
    public void A_front_end_that_waits_for_each_answer_is_seldom_kept_waiting()
    {
        var anticipation = new Anticipation();
        int waits = 0;
        for (int i = 0; i < 6400; i++)
            waits += Occasion(anticipation, asks: false) ? 1 : 0;
        Assert.That(waits, Is.EqualTo(6400 / 61));
    }

    /// <summary>Bursts: all but the last request of each are followed by another.</summary>
    [Test]
    public void A_front_end_that_goes_on_to_ask_is_found_and_waited_for()
    {
        var anticipation = new Anticipation();
        int missed = 0;
        bool found = false;
        for (int i = 0; i < 3200; i++)
        {
            bool waited = Occasion(anticipation, asks: i % 32 != 31);
            found |= waited;
            missed += found && !waited ? 1 : 0;
        }

        Assert.That((found, missed), Is.EqualTo((true, 0)));
    }

    /// <summary>To wait in vain half of the times is more than it is worth.</summary>
    [Test]
    public void A_front_end_with_two_requests_at_a_time_is_not()
    {
        var anticipation = new Anticipation();
        for (int i = 0; i < 100; i++)
            _ = Occasion(anticipation, asks: true);
        int waits = 0;
        for (int i = 0; i < 640; i++)
            waits += Occasion(anticipation, asks: i % 2 == 0) ? 1 : 0;
        Assert.That(waits, Is.LessThan(640 / 4));
    }

    private static bool Occasion(Anticipation anticipation, bool asks)
    {
        if (!anticipation.Begin())
            return false;
        anticipation.End(asks);
        return true;
    }
}
