// Memory that a guest gives up goes back to the host, at once or before the vCPU sleeps; and what a domain may own.
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Tests.Runtime;

public sealed class ScrubbingTests : ScriptedGuest
{
    private const ulong Decrease = 1;
    private const ulong Populate = 6;
    private const ulong MaximumReservation = 4;

    private const ulong FirstPfn = 0x500;

    private FakeMachine Machine => Fake.Machine;

    private static Mfn FrameOf(ulong pfn) => new(FakeMachine.FirstFrame + pfn);

    /// <summary>memory_op on neighbouring pages; the extents lie behind the structure.</summary>
    private VcpuExit Reservation(FakeVcpu cpu, ulong command, ulong first, ulong count)
    {
        Fake.WriteAll(Data, Data + 64, count, 0, 0x7ff0);
        for (ulong i = 0; i < count; i++)
            Fake.WriteAll(Data + 64 + (i * 8), first + i);
        return cpu.Hypercall(HypercallNumber.MemoryOp, command, Data);
    }

    private void Fill(ulong pfn, byte value) => Fake.Write(FakeDomain.Base + (pfn << 12), value);

    private byte Byte(ulong pfn) => Fake.Read<byte>(FakeDomain.Base + (pfn << 12));

    [Test]
    public void Many_frames_go_before_the_guest_runs_on()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            Fill(FirstPfn, 0x77);
            yield return Reservation(cpu, Decrease, FrameOf(FirstPfn).Value, 200);
            Assert.That(cpu.Result, Is.EqualTo(200));
            Assert.That(Machine.Discarded, Is.EqualTo(Enumerable.Range(0, 200).Select(static i => FrameOf(FirstPfn + (ulong)i))));
            Assert.That(Byte(FirstPfn), Is.Zero);
            yield return Reservation(cpu, Populate, 0x500, 1);
            Assert.That((cpu.Result, Fake.Read<ulong>(Data + 64)), Is.EqualTo((1, FrameOf(FirstPfn).Value)));
        }

        _ = Fake.Run(Guest);
        Assert.That(Fake.Domain.OwnedPages, Is.EqualTo((8 << 8) - 199));
        Assert.That(Machine.Discarded, Has.Count.EqualTo(200));
    }

    [Test]
    public void Few_frames_go_when_the_vCPU_sleeps()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetMask(1);
            yield return Reservation(cpu, Decrease, FrameOf(FirstPfn).Value, 3);
            Assert.That(Machine.Discarded, Is.Empty);
            yield return Reservation(cpu, Populate, 0x500, 1);
            Fake.WriteAll(Data + 0x100, 0, 0, (ulong)(Now + 2_000_000));
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 3, Data + 0x100);
            Assert.That(Machine.Discarded, Is.EqualTo(new[] { FrameOf(FirstPfn + 1), FrameOf(FirstPfn + 2) }), "but for the one that was taken");
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void The_rings_of_back_ends_stay()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            foreach (Mfn ring in (Mfn[])[Fake.Domain.Layout.Console, Fake.Domain.Layout.Store])
            {
                // Mapped from the start; the kernel unmaps it and gives it up.
                ulong address = FakeDomain.Base + ((ring.Value - FakeMachine.FirstFrame) << 12);
                yield return cpu.Hypercall(HypercallNumber.UpdateVaMapping, address, 0, 0);
                Assert.That(cpu.Result, Is.Zero);
                yield return Reservation(cpu, Decrease, ring.Value, 1);
                Assert.That(cpu.Result, Is.EqualTo(1));
            }

            yield return Reservation(cpu, Decrease, FrameOf(FirstPfn).Value, 128);
            Assert.That(Machine.Discarded, Has.Count.EqualTo(128));
            yield return Reservation(cpu, Populate, 0x500, 130);
            Assert.That(cpu.Result, Is.EqualTo(130));
            Assert.That(Enumerable.Range(0, 130).Select(i => Fake.Read<ulong>(Data + 64 + ((ulong)i * 8))),
                Has.None.EqualTo(Fake.Domain.Layout.Console.Value).And.None.EqualTo(Fake.Domain.Layout.Store.Value));
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void The_maximum_is_what_the_manager_says()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            Fake.WriteAll(Data + 0x800, 0x7ff0);
            yield return cpu.Hypercall(HypercallNumber.MemoryOp, MaximumReservation, Data + 0x800);
            Assert.That(cpu.Result, Is.EqualTo((8 << 8) + 256), "its memory and libxl's spare MiB");
            yield return Reservation(cpu, Decrease, FrameOf(FirstPfn).Value, 200);
            Fake.Domain.MaxPages = DomainOptions.MaxPages(6);
            yield return cpu.Hypercall(HypercallNumber.MemoryOp, MaximumReservation, Data + 0x800);
            Assert.That(cpu.Result, Is.EqualTo((6 << 8) + 256));
            yield return Reservation(cpu, Populate, 0x500, 10);
            Assert.That(cpu.Result, Is.Zero, "it has more than it may have");
            Fake.Domain.MaxPages = Fake.Domain.OwnedPages + 4;
            yield return Reservation(cpu, Populate, 0x500, 10);
            Assert.That(cpu.Result, Is.EqualTo(4));
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void Books_that_do_not_agree_crash_a_domain_that_is_audited()
    {
        using var audited = new FakeDomain(change: static options => options with { AuditInterval = 3 });

        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            for (int i = 0; i < 3; i++)
                yield return cpu.Hypercall(HypercallNumber.XenVersion, 0);
            Assert.That(audited.Domain.AuditCount, Is.EqualTo(1));
            MarkForScrubbing(audited, FirstPfn);
            for (int i = 0; i < 2; i++)
                yield return cpu.Hypercall(HypercallNumber.XenVersion, 0);
            Assert.That(audited.Domain.AuditCount, Is.EqualTo(1));
            yield return cpu.Hypercall(HypercallNumber.XenVersion, 0);
            Assert.Fail("The guest runs on.");
        }

        DomainExit exit = audited.Run(Guest);
        Assert.That(exit.Reason, Is.EqualTo(ShutdownReason.Crash));
        Assert.That(exit.Report, Does.Contain($"The domain's books do not agree: {FrameOf(FirstPfn)} is to be scrubbed, and in use."));
    }

    private static unsafe void MarkForScrubbing(FakeDomain domain, ulong index) => FrameTable.Of(domain.Context->Domain)->Scrub.Mark(index);
}
