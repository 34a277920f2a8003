// mmu_update and update_va_mapping: what Xen answers, case by case, and how a batch goes on after a kick.
using XenSharp.Core;
using static XenSharp.Mmu.Tests.TestMachine;

namespace XenSharp.Mmu.Tests;

public sealed unsafe class MmuUpdateTests
{
    private const int L1 = 10, L2 = 11, L3 = 12, L4 = 13, Page = 14, Gdt = 15, Free = 62;
    private const ushort Self = 0x7ff0;

    /// <summary>Zeros.</summary>
    private const ulong BitmapAddress = DataAddress + 2048;

    /// <summary>A tree of pinned tables, a descriptor page and plain pages; frames 60–63 belong to nobody.</summary>
    private static TestMachine NewMachine()
    {
        var machine = new TestMachine(64, 60);
        *machine.Entry(L1, 5) = new PageTableEntry(Frame(Page), Leaf);
        *machine.Entry(L2, 0) = new PageTableEntry(Frame(L1), Branch);
        *machine.Entry(L3, 0) = new PageTableEntry(Frame(L2), Branch);
        *machine.Entry(L4, 0) = new PageTableEntry(Frame(L3), Branch);
        Assert.That(machine.Pin(4, L4), Is.Zero);
        ((ulong*)machine.Data)[0] = Frame(Gdt).Value;
        Assert.That(DescriptorTables.SetGdt(machine.Vcpu, new HypercallArguments { A0 = DataAddress, A1 = 512 }), Is.Zero);
        machine.Queue->FlushPending = 0;
        return machine;
    }

    private static PageTableEntry Entry(int frame, PageFlags flags = Leaf) => new(Frame(frame), flags);

    private static IEnumerable<TestCaseData> Answers()
    {
        static TestCaseData Case(string name, int table, int index, PageTableEntry value, Errno error, ulong command = 0)
            => new TestCaseData(table, index, value, error, command).SetArgDisplayNames(name);
        yield return Case("L1: map", L1, 1, Entry(20), 0);
        yield return Case("L1: map read-only", L1, 1, Entry(20, ReadOnly), 0);
        yield return Case("L1: read-only view of a table", L1, 1, Entry(L4, ReadOnly), 0);
        yield return Case("L1: any software bits", L1, 1, Entry(20, Leaf | (PageFlags)(0x7ffUL << 52) | PageFlags.Available0 | PageFlags.Available2), 0);
        yield return Case("L1: global", L1, 1, Entry(20, Leaf | PageFlags.Global), 0);
        yield return Case("L1: not present, any rubbish", L1, 1, new PageTableEntry(0xffff_ffff_ffff_fffe), 0);
        yield return Case("L1: writable view of a table", L1, 1, Entry(L2), Errno.EBUSY);
        yield return Case("L1: writable view of descriptors", L1, 1, Entry(Gdt), Errno.EBUSY);
        yield return Case("L1: write-through", L1, 1, Entry(20, Leaf | PageFlags.WriteThrough), Errno.EINVAL);
        yield return Case("L1: uncached", L1, 1, Entry(20, Leaf | PageFlags.CacheDisable), Errno.EINVAL);
        yield return Case("L1: PAT", L1, 1, Entry(20, Leaf | PageFlags.LargePage), Errno.EINVAL);
        yield return Case("L1: frame of nobody", L1, 1, Entry(Free), Errno.EBUSY);
        yield return Case("L1: beyond memory", L1, 1, new PageTableEntry(new Mfn(0x123456), Leaf), Errno.EPERM);
        yield return Case("L1: below memory", L1, 1, new PageTableEntry(new Mfn(1), Leaf), Errno.EPERM);
        yield return Case("L1: invalid mfn", L1, 1, new PageTableEntry(PageTableEntry.FrameMask | 1), Errno.EINVAL);
        yield return Case("L2: an L1", L2, 1, Entry(21, Branch), 0);
        yield return Case("L2: a table of another level", L2, 1, Entry(L3, Branch), Errno.EINVAL);
        yield return Case("L2: a page that is mapped writable", L2, 1, Entry(Page, Branch), Errno.EINVAL);
        yield return Case("L2: large page", L2, 1, Entry(21, Branch | PageFlags.LargePage), Errno.EINVAL);
        yield return Case("L2: global", L2, 1, Entry(21, Branch | PageFlags.Global), Errno.EINVAL);
        yield return Case("L2: frame of nobody", L2, 1, Entry(Free, Branch), Errno.EINVAL);
        yield return Case("L2: beyond memory", L2, 1, new PageTableEntry(new Mfn(0x123456), Branch), Errno.EINVAL);
        yield return Case("L3: an L2", L3, 1, Entry(21, Branch), 0);
        yield return Case("L3: large page", L3, 1, Entry(21, Branch | PageFlags.LargePage), Errno.EINVAL);
        yield return Case("L4: an L3", L4, 1, Entry(21, Branch), 0);
        yield return Case("L4: last slot before Xen's", L4, 255, Entry(21, Branch), 0);
        yield return Case("L4: Xen's first slot", L4, 256, Entry(21, Branch), Errno.EINVAL);
        yield return Case("L4: Xen's last slot, cleared", L4, 271, default, Errno.EINVAL);
        yield return Case("L4: first slot behind Xen's", L4, 272, Entry(21, Branch), 0);
        yield return Case("L4: cache attribute", L4, 1, Entry(21, Branch | PageFlags.CacheDisable), Errno.EINVAL);
        yield return Case("a plain page: any value", 30, 3, new PageTableEntry(0x99), 0);
        yield return Case("a plain page, preserving bits", 30, 3, new PageTableEntry(0x99), 0, 2);
        yield return Case("descriptors", Gdt, 3, new PageTableEntry(0), Errno.EINVAL);
        yield return Case("a page of nobody", Free, 3, new PageTableEntry(0), Errno.EINVAL);
        yield return Case("no translation", L1, 1, Entry(20), 0, 3);
        yield return Case("command 4", L1, 1, Entry(20), Errno.ENOSYS, 4);
        yield return Case("command 7", L1, 1, Entry(20), Errno.ENOSYS, 7);
        yield return Case("M2P", 20, 0, new PageTableEntry(0x55), 0, 1);
        yield return Case("M2P of nobody's frame", Free, 0, new PageTableEntry(0x55), Errno.EINVAL, 1);
    }

    [TestCaseSource(nameof(Answers))]
    public void Answers_as_Xen(int table, int index, PageTableEntry value, Errno error, ulong command)
    {
        using TestMachine machine = NewMachine();
        PageTableEntry before = *machine.Entry(table, index);
        Assert.That(machine.Update((EntryAddress(table, index).Value | command, value.Value)), Is.EqualTo(-(long)error));
        if (error != Errno.None)
            Assert.That(*machine.Entry(table, index), Is.EqualTo(before));
        else if (command == 1)
            Assert.That(machine.Context->MachineToPhys[table], Is.EqualTo(value.Value));
        else
            Assert.That(machine.Entry(table, index)->Frame, Is.EqualTo(value.Frame));
    }

    [TestCase(1, PageFlags.None, PageFlags.User | PageFlags.GuestKernel)]
    [TestCase(1, PageFlags.User, PageFlags.User | PageFlags.Global)]
    [TestCase(1, PageFlags.GuestKernel | PageFlags.User, PageFlags.GuestKernel | PageFlags.User)]
    [TestCase(2, PageFlags.None, PageFlags.User)]
    [TestCase(3, PageFlags.None, PageFlags.User)]
    [TestCase(4, PageFlags.None, PageFlags.User | PageFlags.Accessed)]
    public void Entries_are_made_fit_for_CPL_3(int level, PageFlags written, PageFlags found)
    {
        using TestMachine machine = NewMachine();
        int table = L1 + level - 1;
        Assert.That(machine.Update(table, 7, Entry(21, PageFlags.Present | written)), Is.Zero);
        Assert.That(machine.Entry(table, 7)->Flags, Is.EqualTo(PageFlags.Present | found));

        // The same by pinning a page that has the entry already.
        *machine.Entry(30, 9) = Entry(22, PageFlags.Present | written);
        Assert.That(machine.Pin(level, 30), Is.Zero);
        Assert.That(machine.Entry(30, 9)->Flags, Is.EqualTo(PageFlags.Present | found));
    }

    [Test]
    public void Preserve_AD_keeps_what_the_processor_set()
    {
        using TestMachine machine = NewMachine();
        *machine.Entry(L1, 5) = machine.Entry(L1, 5)->With(PageFlags.Accessed | PageFlags.Dirty);
        Assert.That(machine.Update((EntryAddress(L1, 5).Value | 2, Entry(Page, PageFlags.Present).Value)), Is.Zero);
        Assert.That(machine.Entry(L1, 5)->Has(PageFlags.Accessed | PageFlags.Dirty), Is.True);
        Assert.That(machine.Update(L1, 5, Entry(Page, PageFlags.Present)), Is.Zero);
        Assert.That(machine.Entry(L1, 5)->Flags & (PageFlags.Accessed | PageFlags.Dirty), Is.EqualTo(PageFlags.None));
    }

    [TestCase(0x0000_7ff0U, 0, 1, Description = "oneself")]
    [TestCase(0x0006_7ff0U, 0, 1, Description = "tables of oneself by number")]
    [TestCase(0x0000_0005U, Errno.ESRCH, 0, Description = "oneself by number")]
    [TestCase(0x0000_0009U, Errno.ESRCH, 0, Description = "a domain that is not there")]
    [TestCase(0x0000_0000U, Errno.EPERM, 0, Description = "domain 0")]
    [TestCase(0x0000_7ff2U, Errno.EPERM, 0, Description = "DOMID_XEN")]
    [TestCase(0x0001_7ff0U, Errno.EPERM, 0, Description = "tables of domain 0")]
    [TestCase(0x0009_7ff0U, Errno.ESRCH, 77, Description = "tables of a domain that is not there: found before anything is done")]
    [TestCase(0x7ff1_7ff0U, Errno.ESRCH, 77, Description = "tables of DOMID_SELF")]
    public void Foreign_domains(uint domains, Errno error, int done)
    {
        using TestMachine machine = NewMachine();
        ((ulong*)machine.Data)[0] = EntryAddress(L1, 1).Value;
        ((ulong*)machine.Data)[1] = Entry(20).Value;
        *(uint*)(machine.Data + 64) = 77;
        var arguments = new HypercallArguments { A0 = DataAddress, A1 = 1, A2 = DataAddress + 64, A3 = domains };
        Assert.That(MmuUpdate.Execute(machine.Vcpu, arguments), Is.EqualTo(-(long)error));
        Assert.That(*(uint*)(machine.Data + 64), Is.EqualTo(done));
    }

    [Test]
    public void A_batch_stops_at_the_first_error_and_says_how_far_it_came()
    {
        using TestMachine machine = NewMachine();
        var requests = (ulong*)machine.Data;
        for (int i = 0; i < 5; i++)
        {
            requests[2 * i] = EntryAddress(L1, 100 + i).Value;
            requests[(2 * i) + 1] = Entry(i == 3 ? Free : 20 + i).Value;
        }

        var arguments = new HypercallArguments { A0 = DataAddress, A1 = 5, A2 = DataAddress + 256, A3 = Self };
        Assert.That(MmuUpdate.Execute(machine.Vcpu, arguments), Is.EqualTo(-(long)Errno.EBUSY));
        Assert.That(*(uint*)(machine.Data + 256), Is.EqualTo(3));
        Assert.That(machine.Entry(L1, 102)->Frame, Is.EqualTo(Frame(22)));
        Assert.That(machine.Entry(L1, 104)->IsPresent, Is.False);
    }

    [TestCase(0xffff_8000_0000_0000UL, 0UL, Errno.EFAULT, Description = "list in Xen's part, though empty")]
    [TestCase(0x1_0000_0000_0000UL, 1UL, Errno.EFAULT, Description = "not canonical")]
    [TestCase(0x7000_0000UL, 1UL, Errno.EFAULT, Description = "not mapped")]
    [TestCase(0x7000_0000UL, 0UL, Errno.None, Description = "not mapped, and empty")]
    public void Lists_that_cannot_be_read(ulong address, ulong count, Errno error)
    {
        using TestMachine machine = NewMachine();
        var arguments = new HypercallArguments { A0 = address, A1 = count, A3 = Self };
        Assert.That(MmuUpdate.Execute(machine.Vcpu, arguments), Is.EqualTo(-(long)error));
        Assert.That(MmuextOp.Execute(machine.Vcpu, arguments), Is.EqualTo(-(long)error));
    }

    [Test]
    public void A_kick_in_the_middle_loses_nothing_and_repeats_nothing([Range(1, 6)] int parts)
    {
        using TestMachine machine = NewMachine();
        var requests = (ulong*)machine.Data;
        const int count = 24;
        for (int i = 0; i < count; i++)
        {
            requests[2 * i] = EntryAddress(L1, 100 + i).Value;
            requests[(2 * i) + 1] = Entry(20 + (i % 8)).Value;
        }

        *(uint*)(machine.Data + 1024) = 9999;
        var arguments = new HypercallArguments { A0 = DataAddress, A1 = count, A2 = DataAddress + 1024, A3 = Self };
        int calls = 0;
        *machine.Vcpu->KickPending = 1;
        while (true)
        {
            // With a kick pending exactly one request is done a call.
            if (calls == parts)
                *machine.Vcpu->KickPending = 0;
            long result = MmuUpdate.Execute(machine.Vcpu, arguments);
            calls++;
            if (machine.Vcpu->Continuation.Pending == 0)
            {
                Assert.That(result, Is.Zero);
                break;
            }

            machine.Vcpu->Continuation.Pending = 0;
            arguments = machine.Vcpu->Continuation.Arguments;
            Assert.That(arguments.A1, Is.EqualTo((ulong)(count - calls) | MmuUpdate.Preempted));
            Assert.That(*(uint*)(machine.Data + 1024), Is.EqualTo(calls));
        }

        Assert.That(calls, Is.EqualTo(parts + 1));
        Assert.That(*(uint*)(machine.Data + 1024), Is.EqualTo(count));
        for (int i = 0; i < count; i++)
            Assert.That(machine.Entry(L1, 100 + i)->Frame, Is.EqualTo(Frame(20 + (i % 8))));
        for (int i = 0; i < 8; i++)
            Assert.That(machine.Info(20 + i).TypeCount, Is.EqualTo(count / 8));
    }

    [Test]
    public void An_unmasked_event_stops_a_batch_as_well()
    {
        using TestMachine machine = NewMachine();
        machine.Vcpu->Info->EvtchnUpcallPending = 1;
        Assert.That(machine.Update((EntryAddress(L1, 100).Value, Entry(20).Value), (EntryAddress(L1, 101).Value, Entry(20).Value)), Is.Zero);
        Assert.That(machine.Vcpu->Continuation.Pending, Is.EqualTo(1));
        machine.Vcpu->Continuation.Pending = 0;
        machine.Vcpu->Info->EvtchnUpcallMask = 1;
        Assert.That(MmuUpdate.Execute(machine.Vcpu, machine.Vcpu->Continuation.Arguments), Is.Zero);
        Assert.That(machine.Vcpu->Continuation.Pending, Is.Zero);
        Assert.That(machine.Entry(L1, 101)->IsPresent, Is.True);
    }

    private static IEnumerable<TestCaseData> Addresses()
    {
        yield return new TestCaseData(DataAddress + (9 * Paging.PageSize), 0UL, Errno.None).SetArgDisplayNames("map");
        yield return new TestCaseData(DataAddress + (9 * Paging.PageSize), 1UL, Errno.None).SetArgDisplayNames("flush");
        yield return new TestCaseData(DataAddress + (9 * Paging.PageSize), 1UL | 4, Errno.None).SetArgDisplayNames("flush on all");
        yield return new TestCaseData(DataAddress + (9 * Paging.PageSize), 2UL, Errno.None).SetArgDisplayNames("invlpg");
        yield return new TestCaseData(DataAddress + (9 * Paging.PageSize), 2UL | 4, Errno.None).SetArgDisplayNames("invlpg on all");
        yield return new TestCaseData(DataAddress + (9 * Paging.PageSize), 2UL | BitmapAddress, Errno.None).SetArgDisplayNames("invlpg on an empty bitmap");
        yield return new TestCaseData(DataAddress + (9 * Paging.PageSize), 2UL | 0x7000_0000, Errno.EFAULT).SetArgDisplayNames("bitmap that cannot be read");
        yield return new TestCaseData(DataAddress + (9 * Paging.PageSize), 3UL | 0x7000_0000, Errno.None).SetArgDisplayNames("no such flush");
        yield return new TestCaseData(0x1234_5000UL, 0UL, Errno.EINVAL).SetArgDisplayNames("no L1 there");
        yield return new TestCaseData(0xffff_8000_0000_0000UL, 0UL, Errno.EINVAL).SetArgDisplayNames("Xen's part");
        yield return new TestCaseData(0x8000_0000_0000UL, 0UL, Errno.EINVAL).SetArgDisplayNames("not canonical");
    }

    [TestCaseSource(nameof(Addresses))]
    public void Update_va_mapping(ulong address, ulong flags, Errno error)
    {
        using TestMachine machine = NewMachine();
        Assert.That(machine.UpdateVa(address, Entry(20), flags), Is.EqualTo(-(long)error));
        bool stored = machine.Entry(3, 9)->IsPresent;

        // A flush that cannot be done comes after the entry was stored.
        Assert.That(stored, Is.EqualTo(error is Errno.None or Errno.EFAULT));
        bool here = error == Errno.None && (flags & ~3UL) != BitmapAddress;
        Assert.That(machine.Queue->FlushPending, Is.EqualTo(here && (flags & 3) == 1 ? 1 : 0));
        ulong[] pages = [.. Enumerable.Range(0, machine.Queue->InvalidationCount).Select(i => machine.Queue->Invalidated(i))];
        Assert.That(pages, Is.EqualTo(here && (flags & 3) == 2 ? new[] { address } : []));
    }

    [TestCase(0x7ff0, 0)]
    [TestCase(5, Errno.ESRCH)]
    [TestCase(9, Errno.ESRCH)]
    [TestCase(0, Errno.EPERM)]
    public void Update_va_mapping_otherdomain(int domain, Errno error)
    {
        using TestMachine machine = NewMachine();
        var arguments = new HypercallArguments { A0 = DataAddress + 0x9000, A1 = Entry(20).Value, A3 = (ulong)domain };
        Assert.That(MmuUpdate.UpdateVaMappingOtherdomain(machine.Vcpu, arguments), Is.EqualTo(-(long)error));
    }

    [Test]
    public void A_page_given_up_stays_until_its_last_mapping_goes()
    {
        using TestMachine machine = NewMachine();
        ulong owned = machine.Context->State->OwnedPages;
        Assert.That(machine.Reservation(1, [Frame(Page).Value]), Is.EqualTo(1));
        Assert.That(machine.Context->State->OwnedPages, Is.EqualTo(owned));
        Assert.That(machine.Update(L1, 6, Entry(Page)), Is.Zero, "still mapped, it may be mapped once more");
        Assert.That(machine.Reservation(1, [Frame(Page).Value]), Is.EqualTo(1), "and be given up again, to no effect");
        Assert.That(machine.Update(L1, 5, default), Is.Zero);
        Assert.That(machine.Update(L1, 6, default), Is.Zero);
        Assert.That(machine.Context->State->OwnedPages, Is.EqualTo(owned - 1));
        Assert.That(machine.Update(L1, 5, Entry(Page)), Is.EqualTo(-(long)Errno.EBUSY));
    }

    [Test]
    public void Walks_through_an_upper_entry_that_is_gone_are_flushed([Values] bool inGuest, [Range(1, 4)] int level)
    {
        using var machine = new TestMachine(inGuest: inGuest);
        *machine.Entry(20, 1) = level == 1 ? Entry(21) : Entry(21, Branch);
        Assert.That(machine.Pin(level, 20), Is.Zero);
        machine.Queue->FlushPending = 0;
        Assert.That(machine.Update(20, 2, level == 1 ? Entry(22) : Entry(22, Branch)), Is.Zero);
        Assert.That(machine.Queue->FlushPending, Is.Zero, "nothing was there");
        Assert.That(machine.Update(20, 1, default), Is.Zero);
        Assert.That(machine.Queue->FlushPending, Is.EqualTo(level > 1 && !inGuest ? 1 : 0), "of an L1 the guest asks for it");
    }

    [Test]
    public void A_page_that_was_writable_is_flushed_before_it_is_a_table([Values] bool inGuest, [Values] bool asGdt)
    {
        using var machine = new TestMachine(inGuest: inGuest);
        Assert.That(machine.Update(3, 50, Entry(20)), Is.Zero);
        Assert.That(machine.Update(3, 50, default), Is.Zero);
        Assert.That(machine.Queue->FlushPending, Is.Zero);
        Errno error = PageTables.GetPageAndType(machine.Vcpu, Frame(20), asGdt ? PageType.SegmentDescriptors : PageType.L1PageTable, out _);
        Assert.That(error, Is.EqualTo(Errno.None));
        Assert.That(machine.Queue->FlushPending, Is.EqualTo(inGuest ? 0 : 1));
    }
}
