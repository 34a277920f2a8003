// Scripts for two domains: who does what, in which order, and how a transcript says so.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Tests.Probe;

public class PairScriptTests
{
    [Test]
    public void StepsOfBothAreInOneTranscriptInTheirOrder()
    {
        AbiScript script = AbiScript.OfPair("s", "s", s => s.Case("one", (a, b) =>
        {
            a.Show(1);
            b.Show(2);
            b.Show(3);
            a.Show(4);
        }));
        Assert.That(script.BuildAll(), Has.Count.EqualTo(2));

        // Steps 0, 2, 5 and 7 are changes of turns, of which only what came with them is told; nothing is of the first, before all cases.
        Assert.That(script.Read([("@0\n@1 v=1\n@5 u=10001,1,8,\n@6 v=4\n.\n", "power off"), ("@2\n@3 v=2\n@4 v=3\n", "crash")]).ToText(), Is.EqualTo(
            "== one\na: 1 = 1\nb: turn = done\nb: 2 = 2\nb: 3 = 3\na: turn = upcall{ports 3, selector 0x1, mask 0->1}\na: 4 = 4\n"
            + "-- ended: a: power off; b: crash, before the script's end\n"));
    }

    [Test]
    public void ADomainThatWasEndedByItsScriptHasNoOtherEnd()
    {
        AbiScript script = AbiScript.OfPair("s", "s", s => s.Case("one", (a, b) =>
        {
            b.Shutdown(GuestShutdownReason.Reboot);
            a.Show(1);
        }));
        Assert.That(script.Read([(".\n", "power off"), ("", "reboot")]).Ending, Is.EqualTo("a: power off; b: reboot"));
    }

    [Test]
    public void AScriptHasAsManySidesAsDomains()
    {
        Assert.That(
            () => AbiScript.OfPair("s", "s", s => s.Case("one", c => c.Show(1))), Throws.InvalidOperationException.With.Message.Contains("two sides"));
        Assert.That(
            () => new AbiScript("s", "s", s => s.Case("one", (a, _) => a.Show(1))), Throws.InvalidOperationException.With.Message.Contains("one side"));
        AbiScript pair = AbiScript.OfPair("s", "s", s => s.Case("one", (a, _) => a.Show(1)));
        Assert.That(() => pair.Read("", "power off"), Throws.InstanceOf<ArgumentException>());
    }

    [Test]
    public void NothingFollowsTheEndOfADomain() => Assert.That(
        () => AbiScript.OfPair("s", "s", s => s.Case("one", (a, b) =>
        {
            a.Shutdown(GuestShutdownReason.PowerOff);
            b.Show(1);
            a.Show(2);
        })),
        Throws.InvalidOperationException.With.Message.Contains("after its end"));

    [Test]
    public void ValuesForTheOtherAreAPagesWordsButForTheTurnAndTheLast()
    {
        int values = 0;
        Assert.That(
            () => AbiScript.OfPair("s", "s", s => s.Case("one", (a, b) =>
            {
                for (; ; values++)
                    (values % 2 == 0 ? a : b).Tell(values, "n");
            })),
            Throws.InvalidOperationException.With.Message.Contains("values for the other"));
        Assert.That(values, Is.EqualTo((ProbeLayout.PageSize / 8) - 2));
    }
}
