// Linear page tables: a table that names one of its own level, as Xen's default build allows it.
using XenSharp.Core;
using static XenSharp.Mmu.Tests.TestMachine;

namespace XenSharp.Mmu.Tests;

public sealed unsafe class LinearTableTests
{
    private const int A = 10, B = 11, C = 12;

    [Test]
    public void A_table_may_map_itself_read_only([Range(2, 4)] int level)
    {
        using var machine = new TestMachine();
        *machine.Entry(A, 300) = new PageTableEntry(Frame(A), ReadOnly);
        Assert.That(machine.Pin(level, A), Is.Zero);
        Assert.That((machine.Info(A).ReferenceCount, machine.Info(A).TypeCount, machine.Info(A).LinearCount), Is.EqualTo((2U, 1U, 0)));
        Assert.That(machine.Update(A, 301, new PageTableEntry(Frame(A), ReadOnly)), Is.Zero);
        Assert.That(machine.Update(A, 302, new PageTableEntry(Frame(A), Branch)), Is.EqualTo(-(long)Errno.EINVAL));
        Assert.That(machine.Update(A, 300, machine.Entry(A, 300)->With(PageFlags.Writable)), Is.EqualTo(-(long)Errno.EINVAL));
        Assert.That(machine.Unpin(A), Is.Zero);
        Assert.That((machine.Info(A).ReferenceCount, machine.Info(A).TypeCount), Is.EqualTo((1U, 0U)));
    }

    [Test]
    public void An_L1_may_not_be_its_own_table()
    {
        using var machine = new TestMachine();
        *machine.Entry(A, 300) = new PageTableEntry(Frame(A), Leaf);
        Assert.That(machine.Pin(1, A), Is.EqualTo(-(long)Errno.EBUSY));
        *machine.Entry(A, 300) = new PageTableEntry(Frame(A), ReadOnly);
        Assert.That(machine.Pin(1, A), Is.Zero);
    }

    [Test]
    public void Another_table_is_held_by_its_linear_use([Range(2, 4)] int level)
    {
        using var machine = new TestMachine();
        Assert.That(machine.Pin(level, A), Is.Zero);
        Assert.That(machine.Pin(level, B), Is.Zero);
        Assert.That(machine.Update(A, 1, new PageTableEntry(Frame(B), ReadOnly)), Is.Zero);
        Assert.That(machine.Update(A, 2, new PageTableEntry(Frame(B), ReadOnly)), Is.Zero);
        Assert.That((machine.Info(A).LinearCount, machine.Info(B).LinearCount), Is.EqualTo((2, -2)));
        Assert.That((machine.Info(B).ReferenceCount, machine.Info(B).TypeCount), Is.EqualTo((4U, 3U)));
        Assert.That(machine.Unpin(B), Is.Zero);
        Assert.That(machine.Pin(1, B), Is.EqualTo(-(long)Errno.EINVAL), "still in use as a table of its level");
        Assert.That(machine.Update(A, 1, default), Is.Zero);
        Assert.That(machine.Unpin(A), Is.Zero);
        Assert.That((machine.Info(B).ReferenceCount, machine.Info(B).TypeCount, machine.Info(B).LinearCount), Is.EqualTo((1U, 0U, 0)));
        Assert.That(machine.Info(A).LinearCount, Is.Zero);
    }

    [Test]
    public void Linear_uses_do_not_chain()
    {
        using var machine = new TestMachine();
        foreach (int table in (int[])[A, B, C])
            Assert.That(machine.Pin(4, table), Is.Zero);
        Assert.That(machine.Update(A, 1, new PageTableEntry(Frame(B), ReadOnly)), Is.Zero);
        Assert.That(machine.Update(B, 1, new PageTableEntry(Frame(C), ReadOnly)), Is.EqualTo(-(long)Errno.EINVAL), "B is used by A");
        Assert.That(machine.Update(C, 1, new PageTableEntry(Frame(A), ReadOnly)), Is.EqualTo(-(long)Errno.EINVAL), "A uses B");
        Assert.That(machine.Update(C, 1, new PageTableEntry(Frame(B), ReadOnly)), Is.Zero, "B may be used twice");
        Assert.That(machine.Update(B, 2, new PageTableEntry(Frame(B), ReadOnly)), Is.Zero, "itself counts for nothing");
    }

    [Test]
    public void Only_a_table_that_is_validated_already()
    {
        using var machine = new TestMachine();
        Assert.That(machine.Pin(4, A), Is.Zero);
        Assert.That(machine.Update(A, 1, new PageTableEntry(Frame(B), ReadOnly)), Is.Zero, "an empty page becomes an L3");
        Assert.That(machine.Info(B).Type, Is.EqualTo(PageType.L3PageTable));
        *machine.Entry(C, 7) = new PageTableEntry(0x1000_0000 | 0x81);
        Assert.That(machine.Update(A, 2, new PageTableEntry(Frame(C), ReadOnly)), Is.EqualTo(-(long)Errno.EINVAL));
        Assert.That(machine.Info(C).TypeCount, Is.Zero);
    }

    [Test]
    public void The_guest_reads_its_tables_and_writes_its_L1s_through_them()
    {
        using var machine = new TestMachine();
        Assert.That(machine.Update(0, 300, new PageTableEntry(Frame(0), ReadOnly)), Is.Zero);
        ulong linear = 0xffff_0000_0000_0000 | (300UL << 39);
        ulong entryOfData = linear + (DataAddress >> 12 << 3);
        Assert.That(GuestAccess.Read(machine.Vcpu, entryOfData, out ulong entry), Is.True);
        Assert.That(entry, Is.EqualTo(machine.Entry(3, 0)->Value));
        Assert.That(GuestAccess.Write(machine.Vcpu, entryOfData, 0UL), Is.False);

        // Of the L4 itself, seen through the same window, no entry can be had by update_va_mapping.
        Assert.That(machine.UpdateVa(linear, new PageTableEntry(Frame(20), Leaf)), Is.EqualTo(-(long)Errno.EINVAL));
    }
}
