// set_gdt, update_descriptor, the LDT: which descriptors a guest may have, and what becomes of them.
using XenSharp.Core;
using static XenSharp.Mmu.Tests.TestMachine;

namespace XenSharp.Mmu.Tests;

public sealed unsafe class DescriptorTablesTests
{
    private const int Gdt = 20;
    private const ulong Code = 0x00af_9a00_0000_ffff;
    private const ulong Dpl3 = 3UL << 45;

    private const PageFlags TableFlags
        = PageFlags.Present | PageFlags.Accessed | PageFlags.Dirty | PageFlags.Writable | PageFlags.NoExecute;

    private static IEnumerable<TestCaseData> Descriptors()
    {
        static TestCaseData Case(string name, ulong descriptor, ulong? stored)
            => new TestCaseData(descriptor, stored).SetArgDisplayNames(name);
        yield return Case("null", 0, 0);
        yield return Case("not present, whatever it is", 0x0000_0b00_0000_0000, 0x0000_0b00_0000_0000);
        yield return Case("code of privilege 0", Code, Code | Dpl3);
        yield return Case("code of privilege 1", Code | (1UL << 45), Code | Dpl3);
        yield return Case("data of privilege 3", 0x00cf_f300_0000_ffff, 0x00cf_f300_0000_ffff);
        yield return Case("type 0, the second half of a gate", 0x0000_8000_0000_0000, 0x0000_8000_0000_0000);
        yield return Case("TSS", 0x0000_8900_0000_0067, null);
        yield return Case("busy TSS", 0x0000_8b00_0000_0067, null);
        yield return Case("LDT", 0x0000_8200_0000_ffff, null);
        yield return Case("interrupt gate", 0x0000_8e00_0010_0000, null);
        yield return Case("trap gate", 0x0000_8f00_0010_0000, null);

        // A call gate keeps faulting: its privilege goes to the selector, and is always the guest's.
        yield return Case("call gate to the guest's code", 0x1234_8c00_0008_5678, 0x1234_8c00_000b_5678);
        yield return Case("call gate of privilege 1", 0x1234_ac00_0008_5678, 0x1234_8c00_000b_5678);
        yield return Case("call gate of privilege 2", 0x1234_cc00_0009_5678, 0x1234_8c00_000b_5678);
        yield return Case("call gate of privilege 3", 0x1234_ec00_0008_5678, 0x1234_8c00_000b_5678);
        yield return Case("call gate to the LDT", 0x1234_8c00_fffc_5678, 0x1234_8c00_ffff_5678);
        yield return Case("call gate to Xen's flat code", 0x1234_8c00_e033_5678, 0x1234_8c00_e033_5678);
        yield return Case("call gate to Xen's own code", 0x1234_8c00_e008_5678, null);
        yield return Case("call gate with reserved bits", 0x1234_8c01_0008_5678, null);
    }

    [TestCaseSource(nameof(Descriptors))]
    public void A_descriptor_is_made_harmless_or_refused(ulong descriptor, ulong? stored)
    {
        using var machine = new TestMachine();
        *(ulong*)machine.Entry(Gdt, 5) = 0x42;
        long result = Update(machine, Gdt, 5, descriptor);
        Assert.That(result, Is.EqualTo(stored == null ? -(long)Errno.EINVAL : 0));
        Assert.That(*(ulong*)machine.Entry(Gdt, 5), Is.EqualTo(stored ?? 0x42));

        // The same by handing over the page with it in.
        *(ulong*)machine.Entry(Gdt, 5) = descriptor;
        Assert.That(Set(machine, 512, Gdt), Is.EqualTo(stored == null ? -(long)Errno.EINVAL : 0));
        Assert.That(*(ulong*)machine.Entry(Gdt, 5), Is.EqualTo(stored ?? descriptor));
        Assert.That(machine.Info(Gdt).TypeCount, Is.EqualTo(stored == null ? 0 : 1));

        // And once it is a descriptor page.
        *(ulong*)machine.Entry(Gdt, 5) = 0;
        Assert.That(Set(machine, 512, Gdt), Is.Zero);
        Assert.That(Update(machine, Gdt, 5, descriptor), Is.EqualTo(stored == null ? -(long)Errno.EINVAL : 0));
    }

    [TestCase(0U, 0)]
    [TestCase(1U, 1)]
    [TestCase(512U, 1)]
    [TestCase(513U, 2)]
    [TestCase(14U * 512, 14)]
    public void As_many_frames_as_entries_need(uint entries, int frames)
    {
        using var machine = new TestMachine();
        Assert.That(Set(machine, 1024, 40, 41), Is.Zero);
        int[] list = [.. Enumerable.Range(Gdt, frames)];
        Assert.That(Set(machine, entries, list), Is.Zero);
        Assert.That(machine.Vcpu->State->GdtEntries, Is.EqualTo(entries));
        for (int i = 0; i < 14; i++)
        {
            Assert.That(machine.Vcpu->State->GdtFrames[i], Is.EqualTo(i < frames ? Frame(Gdt + i).Value : 0));
            Assert.That(machine.DescriptorPages[i].IsPresent, Is.EqualTo(i < frames));
            if (i < frames)
                Assert.That(machine.DescriptorPages[i].Frame, Is.EqualTo(Frame(Gdt + i)));
        }

        Assert.That(machine.Info(40).TypeCount, Is.Zero, "the old ones are let go");
    }

    [Test]
    public void A_table_that_is_refused_leaves_the_old_one()
    {
        using var machine = new TestMachine(64, 60);
        Assert.That(Set(machine, 512, Gdt), Is.Zero);
        Assert.That(Set(machine, (14 * 512) + 1, Gdt), Is.EqualTo(-(long)Errno.EINVAL));
        Assert.That(Set(machine, 1024, Gdt + 1, 0), Is.EqualTo(-(long)Errno.EINVAL), "a page table");
        Assert.That(Set(machine, 1024, Gdt + 1, 4), Is.EqualTo(-(long)Errno.EINVAL), "a page that is mapped writable");
        Assert.That(Set(machine, 1024, Gdt + 1, 62), Is.EqualTo(-(long)Errno.EINVAL), "nobody's page");
        var arguments = new HypercallArguments { A0 = 0x7000_0000, A1 = 512 };
        Assert.That(DescriptorTables.SetGdt(machine.Vcpu, arguments), Is.EqualTo(-(long)Errno.EFAULT));
        Assert.That(machine.Info(Gdt).TypeCount, Is.EqualTo(1));
        Assert.That(machine.Info(Gdt + 1).TypeCount, Is.Zero);
        Assert.That(machine.DescriptorPages[0].Frame, Is.EqualTo(Frame(Gdt)));
    }

    [Test]
    public void Where_update_descriptor_may_not_write()
    {
        using var machine = new TestMachine(64, 60);
        Assert.That(Update(machine, 0, 5, 0), Is.EqualTo(-(long)Errno.EINVAL), "a page table");
        Assert.That(Update(machine, 62, 5, 0), Is.EqualTo(-(long)Errno.EINVAL), "nobody's page");
        var arguments = new HypercallArguments { A0 = EntryAddress(Gdt, 5).Value + 4 };
        Assert.That(DescriptorTables.UpdateDescriptor(machine.Vcpu, arguments), Is.EqualTo(-(long)Errno.EINVAL), "between two");
    }

    [Test]
    public void Pages_of_the_ldt_are_typed_as_they_are_used()
    {
        using var machine = new TestMachine();
        PutLdt(machine, Code);
        Assert.That(SetLdt(machine, DataAddress + Paging.PageSize, 1024), Is.Zero);
        Assert.That((machine.Info(5).Type, machine.Info(6).Type), Is.EqualTo((PageType.Writable, PageType.Writable)), "nothing is used yet");
        Assert.That(DescriptorTables.MapLdtPage(machine.Vcpu, 8), Is.False, "it is mapped writable");
        MapReadOnly(machine, 1, 2);
        Assert.That(DescriptorTables.MapLdtPage(machine.Vcpu, 8), Is.True);
        Assert.That(DescriptorTables.MapLdtPage(machine.Vcpu, 16), Is.True, "the page is there");
        Assert.That((machine.Info(5).Type, machine.Info(5).TypeCount, machine.Info(6).TypeCount), Is.EqualTo((PageType.SegmentDescriptors, 1U, 0U)));
        PageTableEntry mapping = machine.DescriptorPages[DescriptorWindow.GdtPages];
        Assert.That(mapping, Is.EqualTo(new PageTableEntry(Frame(5), TableFlags)), "the guest has no business with it");
        Assert.That(machine.DescriptorPages[DescriptorWindow.GdtPages + 1].IsPresent, Is.False);

        Assert.That(DescriptorTables.TryReadLdt(machine.Vcpu, 513, out ulong descriptor), Is.True);
        Assert.That((descriptor, machine.Info(6).TypeCount), Is.EqualTo((0UL, 1U)));
        Assert.That(DescriptorTables.TryReadLdt(machine.Vcpu, 1, out descriptor), Is.True);
        Assert.That(descriptor, Is.EqualTo(Code | Dpl3));
        Assert.That(DescriptorTables.TryReadLdt(machine.Vcpu, 1024, out descriptor), Is.True, "past the end there is nothing");
        Assert.That(descriptor, Is.Zero);
    }

    [Test]
    public void Another_table_or_root_lets_the_ldt_go()
    {
        using var machine = new TestMachine();
        PutLdt(machine, Code);
        MapReadOnly(machine, 1);
        Assert.That(SetLdt(machine, DataAddress + Paging.PageSize, 512), Is.Zero);
        Assert.That(DescriptorTables.MapLdtPage(machine.Vcpu, 8), Is.True);
        Assert.That(SetLdt(machine, DataAddress + Paging.PageSize, 512), Is.Zero);
        Assert.That(machine.Info(5).TypeCount, Is.EqualTo(1), "the same again");
        Assert.That(SetLdt(machine, DataAddress + Paging.PageSize, 8193), Is.EqualTo(-(long)Errno.EINVAL));
        Assert.That(machine.Info(5).TypeCount, Is.EqualTo(1), "refused");
        machine.Queue->FlushPending = 0;
        Assert.That(SetLdt(machine, DataAddress + Paging.PageSize, 511), Is.Zero);
        Assert.That((machine.Info(5).TypeCount, machine.Queue->FlushPending), Is.EqualTo((0U, 1)), "shorter by one");
        Assert.That(machine.DescriptorPages[DescriptorWindow.GdtPages].IsPresent, Is.False);

        Assert.That(DescriptorTables.MapLdtPage(machine.Vcpu, 8), Is.True);
        new ReadOnlySpan<ulong>(machine.Entry(0, 0), 256).CopyTo(new Span<ulong>(machine.Entry(Gdt, 0), 256));
        Assert.That(MmuextOp.NewBaseptr(machine.Vcpu, Frame(0)), Is.EqualTo(Errno.None));
        Assert.That(machine.Info(5).TypeCount, Is.EqualTo(1), "the same root");
        Assert.That(MmuextOp.NewBaseptr(machine.Vcpu, Frame(Gdt)), Is.EqualTo(Errno.None));
        Assert.That(machine.Info(5).TypeCount, Is.Zero, "another root");
        Assert.That(DescriptorTables.MapLdtPage(machine.Vcpu, 8), Is.True, "the table is the same");
        Assert.That(SetLdt(machine, 0, 0), Is.Zero);
        Assert.That((machine.Info(5).TypeCount, machine.Info(5).ReferenceCount), Is.EqualTo((0U, 2U)), "its owner's and the mapping's");
    }

    [Test]
    public void What_the_ldt_cannot_be()
    {
        using var machine = new TestMachine();
        PutLdt(machine, 0x0000_8900_0000_0067);
        MapReadOnly(machine, 1);
        foreach ((string what, ulong address) in ((string, ulong)[])
            [
                ("a page with a TSS", DataAddress + Paging.PageSize), ("not mapped", 0x7000_0000), ("not canonical", 0x7fff_ffff_f000),
            ])
        {
            Assert.That(SetLdt(machine, address, 8192), Is.Zero, what);
            Assert.That(DescriptorTables.MapLdtPage(machine.Vcpu, what == "not canonical" ? 4104U : 8), Is.False, what);
            Assert.That(DescriptorTables.TryReadLdt(machine.Vcpu, 513, out _), Is.False, what);
        }

        foreach ((ulong address, uint entries) in ((ulong, uint)[])[(DataAddress + 8, 1), (Paging.HypervisorVirtualStart, 1), (1UL << 63, 1), (DataAddress, 8193)])
            Assert.That(SetLdt(machine, address, entries), Is.EqualTo(-(long)Errno.EINVAL));
        Assert.That(SetLdt(machine, DataAddress + 8, 0), Is.Zero, "none, wherever");
    }

    /// <summary>A descriptor at 1 of the second data page.</summary>
    private static void PutLdt(TestMachine machine, ulong descriptor) => ((ulong*)machine.Data)[513] = descriptor;

    private static void MapReadOnly(TestMachine machine, params int[] dataPages)
    {
        foreach (int page in dataPages)
        {
            var entry = new PageTableEntry(Frame(4 + page), Leaf & ~PageFlags.Writable);
            Assert.That(machine.UpdateVa(DataAddress + ((ulong)page << Paging.PageShift), entry), Is.Zero);
        }
    }

    private static long SetLdt(TestMachine machine, ulong address, uint entries) => machine.Extended(13, address, entries);

    private static long Set(TestMachine machine, uint entries, params int[] frames)
    {
        for (int i = 0; i < frames.Length; i++)
            ((ulong*)machine.Data)[i] = Frame(frames[i]).Value;
        return DescriptorTables.SetGdt(machine.Vcpu, new HypercallArguments { A0 = DataAddress, A1 = entries });
    }

    private static long Update(TestMachine machine, int frame, int index, ulong descriptor)
        => DescriptorTables.UpdateDescriptor(machine.Vcpu, new HypercallArguments { A0 = EntryAddress(frame, index).Value, A1 = descriptor });
}
