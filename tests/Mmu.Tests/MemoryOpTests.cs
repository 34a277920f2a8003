// memory_op: what Xen answers to an unprivileged PV domain.
using XenSharp.Core;
using static XenSharp.Mmu.Tests.TestMachine;

namespace XenSharp.Mmu.Tests;

public sealed unsafe class MemoryOpTests
{
    private const ulong Unmapped = 0x7000_0000;
    private const ulong Started = 1 << 6;

    private static TestMachine NewMachine() => new(64, 40);

    private static IEnumerable<TestCaseData> Answers()
    {
        static TestCaseData Case(string name, ulong command, long result, ushort domain = 0x7ff0, ulong pointer = DataAddress)
            => new TestCaseData(command, result, domain, pointer).SetArgDisplayNames(name);
        const long efault = -(long)Errno.EFAULT, einval = -(long)Errno.EINVAL, esrch = -(long)Errno.ESRCH, eperm = -(long)Errno.EPERM;
        const long eacces = -(long)Errno.EACCES, enosys = -(long)Errno.ENOSYS, edom = -(long)Errno.EDOM, eopnotsupp = -(long)Errno.EOPNOTSUPP;
        yield return Case("maximum_ram_page", 2, (long)FirstFrame + 64);
        yield return Case("maximum_ram_page, continued", 2 | Started, einval);
        yield return Case("current_reservation", 3, 40);
        yield return Case("current_reservation by number", 3, 40, 5);
        yield return Case("current_reservation of domain 0", 3, eperm, 0);
        yield return Case("current_reservation of another", 3, esrch, 9);
        yield return Case("current_reservation, no argument", 3, efault, pointer: Unmapped);
        yield return Case("current_reservation, continued", 3 | Started, einval);
        yield return Case("maximum_reservation", 4, 64);
        yield return Case("maximum_gpfn", 14, 0);
        yield return Case("add_to_physmap", 7, eacces);
        yield return Case("add_to_physmap of another", 7, esrch, 9);
        yield return Case("add_to_physmap, no argument", 7, efault, pointer: Unmapped);
        yield return Case("add_to_physmap, continued beyond its size", 7 | (Started << 16), edom);
        yield return Case("add_to_physmap_batch", 23, eacces);
        yield return Case("remove_from_physmap", 15, eacces);
        yield return Case("remove_from_physmap of another", 15, esrch, 9);
        yield return Case("remove_from_physmap, continued", 15 | Started, einval);
        yield return Case("machine_memory_map", 10, eperm);
        yield return Case("get_pod_target, no argument", 17, efault, pointer: Unmapped);
        yield return Case("get_vnumainfo", 26, eopnotsupp);
        yield return Case("get_vnumainfo of another", 26, esrch, 9);
        yield return Case("get_vnumainfo, no argument", 26, efault, pointer: Unmapped);
        yield return Case("command 8", 8, enosys);
        yield return Case("command 63", 63, enosys);
        yield return Case("machphys_mapping, no argument", 12, efault, pointer: Unmapped);
        yield return Case("machphys_mfn_list, no argument", 5, efault, pointer: Unmapped);
        yield return Case("machphys_compat_mfn_list", 25, eopnotsupp);
        yield return Case("memory_map, no argument", 9, efault, pointer: Unmapped);
        yield return Case("memory_map, continued", 9 | Started, enosys);
    }

    [TestCaseSource(nameof(Answers))]
    public void Answers_as_Xen(ulong command, long result, ushort domain, ulong pointer)
    {
        using TestMachine machine = NewMachine();
        *(ushort*)machine.Data = domain;
        Assert.That(machine.Memory(command, pointer), Is.EqualTo(result));
    }

    [Test]
    public void Map_spaces_that_need_the_other_call()
    {
        using TestMachine machine = NewMachine();
        *(ulong*)machine.Data = 0x7ff0 | (4UL << 32);
        Assert.That(machine.Memory(7), Is.EqualTo(-(long)Errno.ENOSYS));
        *(ulong*)machine.Data = 0x7ff0 | (3UL << 16);
        Assert.That(machine.Memory(23), Is.EqualTo(-(long)Errno.EOPNOTSUPP));
    }

    [TestCase((ushort)0x7ff0, 0UL, 0U, 0U, Errno.EINVAL, Description = "DOMID_SELF is nobody here")]
    [TestCase((ushort)5, 0UL, 0U, 0U, Errno.EPERM)]
    [TestCase((ushort)5, 1UL, 0U, 0U, Errno.EINVAL)]
    [TestCase((ushort)5, 0UL, 1U, 0U, Errno.EINVAL)]
    [TestCase((ushort)5, 0UL, 0U, 1U, Errno.EINVAL)]
    public void Claims_are_refused(ushort domain, ulong extents, uint order, uint flags, Errno error)
    {
        using TestMachine machine = NewMachine();
        var data = (ulong*)machine.Data;
        (data[0], data[1], data[2], data[3]) = (extents, 1, order | ((ulong)flags << 32), domain);
        Assert.That(machine.Memory(24), Is.EqualTo(-(long)error));
    }

    [Test]
    public void The_last_pfn_is_one_less_than_the_guest_says_there_are()
    {
        using TestMachine machine = NewMachine();
        *(ushort*)machine.Data = 0x7ff0;
        *(ulong*)(machine.Context->SharedInfo + SharedInfoLayout.MaxPfn) = 40;
        Assert.That(machine.Memory(14), Is.EqualTo(39));
    }

    [Test]
    public void No_memory_is_reserved_for_devices()
    {
        using TestMachine machine = NewMachine();
        var data = (uint*)machine.Data;
        (data[0], data[1]) = (1, 7);
        *(ulong*)(data + 2) = DataAddress + 512;
        Assert.That(machine.Memory(27), Is.Zero);
        Assert.That(data[1], Is.Zero);
        data[0] = 2;
        Assert.That(machine.Memory(27), Is.EqualTo(-(long)Errno.EINVAL));
    }

    [TestCase(0U, 0U)]
    [TestCase(1U, 1U)]
    [TestCase(50U, 1U)]
    public void The_memory_map_has_one_entry(uint room, uint entries)
    {
        using TestMachine machine = NewMachine();
        *(ulong*)machine.Data = room;
        *(ulong*)(machine.Data + 8) = DataAddress + 64;
        new Span<byte>(machine.Data + 64, 20).Fill(0xee);
        Assert.That(machine.Memory(9), Is.Zero);
        Assert.That(*(uint*)machine.Data, Is.EqualTo(entries));
        if (entries == 0)
        {
            Assert.That(machine.Data[64], Is.EqualTo(0xee));
            return;
        }

        Assert.That((*(ulong*)(machine.Data + 64), *(ulong*)(machine.Data + 72), *(uint*)(machine.Data + 80)), Is.EqualTo((0UL, 64UL << 12, 1U)));
    }

    [Test]
    public void The_M2P_is_of_the_same_length_for_every_domain()
    {
        using TestMachine machine = NewMachine();
        Assert.That(machine.Memory(12), Is.Zero);
        var data = (ulong*)machine.Data;
        const ulong length = 256UL << 30;
        Assert.That((data[0], data[1], data[2]), Is.EqualTo((0xffff_8300_0000_0000, 0xffff_8300_0000_0000 + length, (length / sizeof(ulong)) - 1)));
    }

    [TestCase(0U, 0U)]
    [TestCase(1U, 1U)]
    [TestCase(3U, 1U)]
    public void The_frames_of_the_M2P_are_listed_as_far_as_there_is_room(uint room, uint listed)
    {
        using TestMachine machine = NewMachine();
        var data = (ulong*)machine.Data;
        (data[0], data[1], data[2], data[8], data[9]) = (room, DataAddress + 64, 77, 0xee, 0xee);
        Assert.That(machine.Memory(5), Is.Zero);
        Assert.That((uint)data[2], Is.EqualTo(listed));
        Assert.That((data[8], data[9]), Is.EqualTo((listed == 0 ? 0xee : machine.Context->MachineToPhysFrame.Value, 0xeeUL)));
        data[1] = Unmapped;
        Assert.That(machine.Memory(5), Is.EqualTo(room == 0 ? 0 : -(long)Errno.EFAULT));
    }

    private static IEnumerable<TestCaseData> Reservations()
    {
        static TestCaseData Case(string name, ulong command, ulong[] extents, long done, uint order = 0, uint flags = 0, ushort domain = 0x7ff0)
            => new TestCaseData(command, extents, done, order, flags, domain).SetArgDisplayNames(name);
        yield return Case("increase", 0, [0, 0, 0], 3);
        yield return Case("increase beyond what is allowed", 0, [.. Enumerable.Repeat(0UL, 30)], 24);
        yield return Case("increase, order 3", 0, [0, 0, 0, 0], 3, order: 3);
        yield return Case("increase, order beyond a domU's", 0, [0], 0, order: 10);
        yield return Case("decrease", 1, [Frame(20).Value, Frame(21).Value], 2);
        yield return Case("decrease, one of nobody's between", 1, [Frame(20).Value, Frame(50).Value, Frame(21).Value], 1);
        yield return Case("decrease beyond memory", 1, [0x99999], 0);
        yield return Case("decrease, order 1", 1, [Frame(20).Value], 1, order: 1);
        yield return Case("decrease, second half nobody's", 1, [Frame(39).Value], 0, order: 1);
        yield return Case("decrease of another", 1, [Frame(20).Value], 0, domain: 9);
        yield return Case("decrease by number", 1, [Frame(20).Value], 1, domain: 5);
        yield return Case("populate", 6, [0x100, 0x200], 2);
        yield return Case("populate on demand, oneself", 6, [0x100], 0, flags: 1 << 16);
        yield return Case("nothing", 6, [], 0);
    }

    [TestCaseSource(nameof(Reservations))]
    public void Reservations_say_how_far_they_came(ulong command, ulong[] extents, long done, uint order, uint flags, ushort domain)
    {
        using TestMachine machine = NewMachine();
        ulong owned = machine.Context->State->OwnedPages;
        Assert.That(machine.Reservation(command, extents, order, flags, domain), Is.EqualTo(done));
        if (done == 0)
            return;
        Assert.That(machine.Context->State->OwnedPages, Is.EqualTo(command == 1 ? owned - ((ulong)done << (int)order) : owned + ((ulong)done << (int)order)));
        if (command == 1)
            return;
        var frames = (ulong*)(machine.Data + 256);
        for (int i = 0; i < done; i++)
        {
            Assert.That(frames[i] & ((1UL << (int)order) - 1), Is.Zero, "aligned to its size");
            for (ulong page = 0; page < 1UL << (int)order; page++)
            {
                int index = (int)(frames[i] + page - FirstFrame);
                Assert.That(machine.Info(index).Owner, Is.EqualTo(Domain));
                Assert.That(machine.Context->MachineToPhys[index], Is.EqualTo(command == 6 ? extents[i] + page : Invalid));
            }
        }
    }

    [Test]
    public void Extents_that_cannot_be_named_or_counted()
    {
        using TestMachine machine = NewMachine();
        Assert.That(machine.Memory(1, Unmapped), Is.Zero);
        Assert.That(machine.Memory(1 | (5 * Started), Unmapped), Is.EqualTo(5));
        var data = (ulong*)machine.Data;
        (data[0], data[1], data[2], data[3]) = (DataAddress + 256, uint.MaxValue, 0, 0x7ff0);
        Assert.That(machine.Memory(1), Is.Zero, "more than a continuation can count");
        (data[0], data[1]) = (Unmapped, 3);
        Assert.That(machine.Memory(1), Is.Zero);
        Assert.That(machine.Memory(1 | (3 * Started)), Is.EqualTo(3), "all done before");
        (data[0], data[1]) = (0, 3);
        Assert.That(machine.Memory(0), Is.EqualTo(3), "increase_reservation without a list");
    }

    [Test]
    public void A_kick_in_the_middle()
    {
        using TestMachine machine = NewMachine();
        *machine.Vcpu->KickPending = 1;
        Assert.That(machine.Reservation(6, [0x100, 0x101, 0x102]), Is.Zero);
        Assert.That(machine.Vcpu->Continuation.Pending, Is.EqualTo(1));
        Assert.That(machine.Vcpu->Continuation.Arguments.A0, Is.EqualTo(6 | Started));
        machine.Vcpu->Continuation.Pending = 0;
        *machine.Vcpu->KickPending = 0;
        Assert.That(MemoryOp.Execute(machine.Vcpu, machine.Vcpu->Continuation.Arguments), Is.EqualTo(3));
        Assert.That(new ReadOnlySpan<ulong>(machine.Context->MachineToPhys + 40, 3).ToArray(), Is.EqualTo(new ulong[] { 0x100, 0x101, 0x102 }));
    }

    [Test]
    public void The_hypervisors_own_page_is_not_given_up()
    {
        using TestMachine machine = NewMachine();
        Assert.That(machine.Frames->TryAllocate(FrameFlags.Special, 0, out Mfn shared), Is.True);
        Assert.That(machine.Reservation(1, [shared.Value]), Is.Zero);
        Assert.That(machine.Update(3, 50, new PageTableEntry(shared, Leaf)), Is.Zero, "though the guest may map it");
    }

    [Test]
    public void New_pages_hold_nothing_of_anyone()
    {
        using TestMachine machine = NewMachine();
        new Span<byte>(machine.Entry(20, 0), 4096).Fill(0x77);
        Assert.That(machine.Reservation(1, [Frame(20).Value]), Is.EqualTo(1));
        Assert.That(machine.Reservation(0, [0, 0]), Is.EqualTo(2));
        Assert.That(new ReadOnlySpan<ulong>(machine.Data + 256, 2).ToArray(), Is.EqualTo(new[] { Frame(20).Value, Frame(40).Value }));
        foreach (int frame in (ReadOnlySpan<int>)[20, 40])
        {
            Assert.That(new ReadOnlySpan<byte>(machine.Entry(frame, 0), 4096).ContainsAnyExcept((byte)0), Is.False);
            Assert.That(machine.Info(frame).Has(FrameFlags.NeedScrub), Is.False);
        }
    }

    [Test]
    public void A_frame_that_comes_back_may_still_be_in_a_TLB()
    {
        // Mapped writable and used, then unmapped without a flush, given up, and had again: its next use may be a page table.
        using TestMachine machine = NewMachine();
        Assert.That(machine.Update(3, 50, new PageTableEntry(Frame(20), Leaf)), Is.Zero);
        Assert.That(machine.Update(3, 50, default), Is.Zero);
        Assert.That(machine.Reservation(1, [Frame(20).Value]), Is.EqualTo(1));
        machine.Queue->FlushPending = 0;
        Assert.That(machine.Reservation(6, [0x100]), Is.EqualTo(1));
        Assert.That(*(ulong*)(machine.Data + 256), Is.EqualTo(Frame(20).Value));
        Assert.That(machine.Queue->FlushPending, Is.EqualTo(1));
    }
}
