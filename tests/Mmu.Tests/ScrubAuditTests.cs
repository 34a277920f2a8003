// What the audit of the map of frames to be scrubbed finds.
using XenSharp.Core;
using static XenSharp.Mmu.Tests.TestMachine;

namespace XenSharp.Mmu.Tests;

public sealed unsafe class ScrubAuditTests
{
    [Test]
    public void A_frame_in_use_is_not_to_be_scrubbed()
    {
        using var machine = new TestMachine();
        Assert.That(machine.Reservation(1, [Frame(20).Value, Frame(40).Value]), Is.EqualTo(2));
        Assert.That(ScrubAudit.Check(machine.Context), Is.Null);
        machine.Frames->Scrub.Mark(21);
        Assert.That(ScrubAudit.Check(machine.Context), Is.EqualTo($"{Frame(21)} is to be scrubbed, and in use."));
    }

    [Test]
    public void As_many_are_to_be_scrubbed_as_are_said_to_be()
    {
        using var machine = new TestMachine();
        Assert.That(machine.Reservation(1, [Frame(20).Value, Frame(40).Value]), Is.EqualTo(2));

        // A run that ends with fewer frames than it had leaves the count wrong: here a bit is cleared that was not set.
        Assert.That(machine.Frames->Scrub.TryBeginRun(1, out ulong first, out _), Is.True);
        machine.Frames->Scrub.EndRun(first, 2);
        Assert.That(ScrubAudit.Check(machine.Context), Is.EqualTo("0 frames are said to be waiting to be scrubbed, and 1 are."));
    }
}
