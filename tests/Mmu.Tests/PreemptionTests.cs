// How long an operation goes on: its budget, and where it takes up again.
using XenSharp.Core;
using static XenSharp.Mmu.Tests.TestMachine;

namespace XenSharp.Mmu.Tests;

/// <summary>A clock on which every look at it takes a microsecond, so that a budget is a number of looks.</summary>
public sealed unsafe class PreemptionTests
{
    private const uint CyclesPerLook = 1000;
    private readonly NativeExecutor _native = new();

    [OneTimeTearDown]
    public void TearDown() => _native.Dispose();

    [Test]
    public void A_batch_is_cut_into_parts_of_fifty_microseconds()
    {
        using var machine = new TestMachine();
        SetBudget(machine, MmuUpdate.RequestsALook);
        const int requests = 1000;
        for (int i = 0; i < requests; i++)
        {
            ((ulong*)machine.Data)[2 * i] = EntryAddress(10 + (i % 8), i % 512).Value;
            ((ulong*)machine.Data)[(2 * i) + 1] = (ulong)i << 1;
        }

        var arguments = new HypercallArguments { A0 = DataAddress, A1 = requests, A3 = DomainId.Self.Value };
        var parts = new List<ulong>();
        while (true)
        {
            machine.Vcpu->Budget.Renew();
            Assert.That(MmuUpdate.Execute(machine.Vcpu, arguments), Is.Zero);
            if (machine.Vcpu->Continuation.Pending == 0)
                break;
            machine.Vcpu->Continuation.Pending = 0;
            parts.Add((uint)arguments.A1 - (uint)machine.Vcpu->Continuation.Arguments.A1 & ~MmuUpdate.Preempted);
            arguments = machine.Vcpu->Continuation.Arguments;
        }

        // A microsecond a request: the first look starts the clock, and the fourth after it finds the budget spent.
        Assert.That(parts, Has.Count.EqualTo(12).And.All.EqualTo(5 * MmuUpdate.RequestsALook));
        for (int i = requests - 8; i < requests; i++)
            Assert.That(machine.Entry(10 + (i % 8), i % 512)->Value, Is.EqualTo((ulong)i << 1));
    }

    [Test]
    public void A_tree_is_checked_in_parts_and_none_of_them_twice()
    {
        // An L2 full of L1 tables: one look an entry, so eleven parts.
        using var machine = new TestMachine(1024, 1024);
        for (int i = 0; i < 512; i++)
            *machine.Entry(20, i) = new PageTableEntry(Frame(100 + i), Branch);
        SetBudget(machine);
        int parts = Pin(machine, result: 0);
        Assert.That(parts, Is.EqualTo(10));
        Assert.That(machine.Info(20).Has(FrameFlags.Pinned | FrameFlags.Validated), Is.True);
        Assert.That((machine.Info(100).TypeCount, machine.Info(611).TypeCount), Is.EqualTo((1U, 1U)));

        // And dropped in parts, the call's own among them.
        Assert.That(Call(machine, 4, 20, result: 0), Is.EqualTo(10));
        Assert.That((machine.Info(20).TypeCount, machine.Info(100).TypeCount, machine.Info(611).TypeCount), Is.EqualTo((0U, 0U, 0U)));
        Assert.That(FrameTableAudit.Check(machine.Context), Is.Null);
    }

    [Test]
    public void A_refusal_at_the_end_undoes_all_before_it_is_told()
    {
        using var machine = new TestMachine(1024, 1024);
        for (int i = 0; i < 512; i++)
            *machine.Entry(20, i) = new PageTableEntry(i == 511 ? new Mfn(0x77) : Frame(100 + i), Branch);
        SetBudget(machine);
        Assert.That(Pin(machine, result: -(long)Errno.EINVAL), Is.GreaterThan(15));
        Assert.That((machine.Info(20).TypeCount, machine.Info(100).TypeCount, machine.Info(610).TypeCount), Is.EqualTo((0U, 0U, 0U)));
        Assert.That(FrameTableAudit.Check(machine.Context), Is.Null);
    }

    [Test]
    public void What_a_guest_does_not_come_back_to_can_be_taken_up_by_anything_that_wants_it()
    {
        using var machine = new TestMachine(1024, 1024);
        for (int i = 0; i < 512; i++)
            *machine.Entry(20, i) = new PageTableEntry(Frame(100 + i), Branch);
        SetBudget(machine);
        machine.Vcpu->Budget.Renew();
        Assert.That(machine.Pin(2, 20), Is.Zero);
        machine.Vcpu->Continuation.Pending = 0;
        FrameInfo partial = machine.Info(20);
        Assert.That((partial.Has(FrameFlags.Partial), partial.TypeCount, partial.Has(FrameFlags.Pinned)), Is.EqualTo((true, 1U, false)));
        Assert.That(FrameTableAudit.Check(machine.Context), Is.Null);

        // It is no table that could be written through, and nothing else either.
        machine.Vcpu->Budget.Renew();
        Assert.That(machine.Update(20, 3, default), Is.EqualTo(-(long)Errno.EINVAL));
        Assert.That(machine.Extended(16, Frame(20).Value), Is.EqualTo(-(long)Errno.EINVAL));
        Assert.That(machine.Pin(1, 20), Is.EqualTo(-(long)Errno.EINVAL));

        // An L3 entry that names it goes on where the pin stopped.
        machine.Vcpu->Budget = default;
        *machine.Entry(21, 0) = new PageTableEntry(Frame(20), Branch);
        Assert.That(machine.Pin(3, 21), Is.Zero);
        Assert.That(machine.Unpin(21), Is.Zero);
        Assert.That((machine.Info(20).TypeCount, machine.Info(100).TypeCount), Is.EqualTo((0U, 0U)));
        Assert.That(FrameTableAudit.Check(machine.Context), Is.Null);
    }

    /// <summary>A clock that goes on by some microseconds with every look.</summary>
    private void SetBudget(TestMachine machine, ulong microsecondsPerLook = 1)
    {
        machine.Vcpu->Budget.ReadTimeStampCounter = _native.Clock(CyclesPerLook);
        machine.Vcpu->Budget.Cycles = PreemptionBudget.Microseconds * CyclesPerLook / microsecondsPerLook;
    }

    private static int Pin(TestMachine machine, long result) => Call(machine, 1, 20, result);

    /// <summary>Makes an mmuext_op, in as many parts as it takes.</summary>
    /// <returns>How often it was continued.</returns>
    private static int Call(TestMachine machine, uint command, int frame, long result)
    {
        ((ulong*)machine.Data)[0] = command;
        ((ulong*)machine.Data)[1] = Frame(frame).Value;
        var arguments = new HypercallArguments { A0 = DataAddress, A1 = 1, A3 = DomainId.Self.Value };
        for (int continued = 0; ; continued++)
        {
            machine.Vcpu->Budget.Renew();
            long answer = MmuextOp.Execute(machine.Vcpu, arguments);
            Assert.That(FrameTableAudit.Check(machine.Context), Is.Null);
            if (machine.Vcpu->Continuation.Pending == 0)
            {
                Assert.That(answer, Is.EqualTo(result));
                return continued;
            }

            machine.Vcpu->Continuation.Pending = 0;
            arguments = machine.Vcpu->Continuation.Arguments;
        }
    }
}
