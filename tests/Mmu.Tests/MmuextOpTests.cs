// mmuext_op: what Xen answers to each command.
using XenSharp.Core;
using static XenSharp.Mmu.Tests.TestMachine;

namespace XenSharp.Mmu.Tests;

public sealed unsafe class MmuextOpTests
{
    private const int Free = 62;

    private static TestMachine NewMachine() => new(64, 60);

    private static ulong F(int index) => Frame(index).Value;

    private static IEnumerable<TestCaseData> Answers()
    {
        static TestCaseData Case(string name, uint command, ulong first, ulong second, Errno error)
            => new TestCaseData(command, first, second, error).SetArgDisplayNames(name);
        for (uint level = 1; level <= 4; level++)
        {
            yield return Case($"pin L{level}", level - 1, F(20), 0, 0);
            yield return Case($"pin nobody's frame as L{level}", level - 1, F(Free), 0, Errno.EINVAL);
            yield return Case($"pin beyond memory as L{level}", level - 1, 0x99999, 0, Errno.EINVAL);
            yield return Case($"pin a mapped page as L{level}", level - 1, F(4), 0, Errno.EINVAL);
        }

        yield return Case("pin the boot L4 again", 3, F(0), 0, Errno.EINVAL);
        yield return Case("pin a table of another level", 0, F(1), 0, Errno.EINVAL);
        yield return Case("pin a table in use, of its level", 2, F(1), 0, 0);
        yield return Case("unpin what is not", 4, F(20), 0, Errno.EINVAL);
        yield return Case("unpin nobody's frame", 4, F(Free), 0, Errno.EINVAL);
        yield return Case("unpin beyond memory", 4, 0x99999, 0, Errno.EINVAL);
        yield return Case("new_baseptr, the same", 5, F(0), 0, 0);
        yield return Case("new_baseptr, none", 5, 0, 0, Errno.EINVAL);
        yield return Case("new_baseptr, a lower table", 5, F(1), 0, Errno.EINVAL);
        yield return Case("new_user_baseptr", 15, F(20), 0, 0);
        yield return Case("new_user_baseptr, none", 15, 0, 0, 0);
        yield return Case("new_user_baseptr, a mapped page", 15, F(4), 0, Errno.EINVAL);
        yield return Case("tlb_flush_local", 6, 0, 0, 0);
        yield return Case("invlpg_local", 7, 0x1234, 0, 0);
        yield return Case("tlb_flush_multi", 8, 0, DataAddress, 0);
        yield return Case("tlb_flush_multi without a bitmap", 8, 0, 0x7000_0000, Errno.EINVAL);
        yield return Case("invlpg_multi", 9, 0x1234, DataAddress, 0);
        yield return Case("invlpg_multi without a bitmap", 9, 0x1234, 0x7000_0000, Errno.EINVAL);
        yield return Case("tlb_flush_all", 10, 0, 0, 0);
        yield return Case("invlpg_all", 11, 0xffff_8000_0000_0000, 0, 0);
        yield return Case("flush_cache", 12, 0, 0, Errno.EACCES);
        yield return Case("set_ldt", 13, DataAddress, 512, 0);
        yield return Case("set_ldt, none", 13, 0x123, 0, 0);
        yield return Case("set_ldt, most entries", 13, DataAddress, 8192, 0);
        yield return Case("set_ldt, too many", 13, DataAddress, 8193, Errno.EINVAL);
        yield return Case("set_ldt, not at a page", 13, DataAddress + 8, 16, Errno.EINVAL);
        yield return Case("set_ldt in Xen's part", 13, 0xffff_8000_0000_0000, 16, Errno.EINVAL);
        yield return Case("command 14", 14, 0, 0, Errno.ENOSYS);
        yield return Case("clear_page", 16, F(20), 0, 0);
        yield return Case("clear a table", 16, F(1), 0, Errno.EINVAL);
        yield return Case("clear nobody's page", 16, F(Free), 0, Errno.EINVAL);
        yield return Case("copy_page", 17, F(20), F(21), 0);
        yield return Case("copy a table", 17, F(20), F(1), 0);
        yield return Case("copy to a table", 17, F(1), F(20), Errno.EINVAL);
        yield return Case("copy nobody's page", 17, F(20), F(Free), Errno.EINVAL);
        yield return Case("flush_cache_global", 18, 0, 0, Errno.EINVAL);
        yield return Case("mark_super", 19, F(20), 0, Errno.EOPNOTSUPP);
        yield return Case("unmark_super", 20, F(20), 0, Errno.EOPNOTSUPP);
        yield return Case("command 21", 21, 0, 0, Errno.ENOSYS);
    }

    [TestCaseSource(nameof(Answers))]
    public void Answers_as_Xen(uint command, ulong first, ulong second, Errno error)
    {
        using TestMachine machine = NewMachine();
        Assert.That(machine.Extended(command, first, second), Is.EqualTo(-(long)error));
    }

    [TestCase((ushort)0x7ff0, 0)]
    [TestCase((ushort)5, Errno.ESRCH, Description = "oneself by number")]
    [TestCase((ushort)9, Errno.ESRCH)]
    [TestCase((ushort)0, Errno.EPERM)]
    [TestCase((ushort)0x7ff1, Errno.EPERM)]
    [TestCase((ushort)0x7ff2, Errno.EPERM)]
    public void Foreign_domains(ushort domain, Errno error)
    {
        using TestMachine machine = NewMachine();
        Assert.That(machine.Extended(6, domain: domain), Is.EqualTo(-(long)error));
    }

    [TestCase(0x81UL, Errno.EINVAL, Description = "large page in the L2")]
    [TestCase(0x9999_9000UL | 7, Errno.EINVAL, Description = "an L1 beyond memory")]
    public void What_is_wrong_deep_inside_a_tree_comes_up(ulong entry, Errno error)
    {
        using TestMachine machine = NewMachine();
        const int l4 = 20, l3 = 21, l2 = 22;
        *machine.Entry(l4, 3) = new PageTableEntry(Frame(l3), Branch);
        *machine.Entry(l3, 3) = new PageTableEntry(Frame(l2), Branch);
        *machine.Entry(l2, 2) = new PageTableEntry(Frame(23), Branch);
        *machine.Entry(l2, 3) = new PageTableEntry(entry);
        ExpectUntouched(machine, l4, error);
    }

    [TestCase(0x9999_9000UL | 1, Errno.EPERM, Description = "a page beyond memory")]
    [TestCase(0x103e_000UL | 1, Errno.EBUSY, Description = "nobody's page")]
    [TestCase(0x1014_000UL | 3, Errno.EBUSY, Description = "a writable mapping of the L4 itself")]
    public void What_is_wrong_with_a_page_comes_up(ulong entry, Errno error)
    {
        using TestMachine machine = NewMachine();
        const int l4 = 20;
        for (int i = 0; i < 3; i++)
            *machine.Entry(l4 + i, 3) = new PageTableEntry(Frame(l4 + i + 1), Branch);
        *machine.Entry(l4 + 3, 8) = new PageTableEntry(Frame(30), Leaf);
        *machine.Entry(l4 + 3, 9) = new PageTableEntry(entry);
        ExpectUntouched(machine, l4, error);
    }

    [Test]
    public void Xens_slots_are_filled_whatever_is_in_them()
    {
        using TestMachine machine = NewMachine();
        for (int slot = 256; slot < 272; slot++)
            *machine.Entry(20, slot) = new PageTableEntry(ulong.MaxValue);
        Assert.That(machine.Pin(4, 20), Is.Zero);
        int machineToPhys = machine.Context->MachineToPhysStart.TableIndex(4) - 256;
        for (int slot = 0; slot < 16; slot++)
        {
            ulong expected = slot == machineToPhys ? 0 : slot == TestMachine.KernelSlot - 256 ? TestMachine.UserSlot : machine.Context->HypervisorSlots[slot];
            Assert.That(machine.Entry(20, 256 + slot)->Value, Is.EqualTo(expected));
        }

        Assert.That(machine.Unpin(20), Is.Zero);
    }

    [Test]
    public void The_M2P_table_is_seen_from_roots_of_the_kernel()
    {
        using TestMachine machine = NewMachine();
        int slot = machine.Context->MachineToPhysStart.TableIndex(4);
        ulong shown = machine.Context->HypervisorSlots[slot - 256];
        Assert.That(machine.Extended(15, Frame(20).Value), Is.Zero);
        Assert.That(machine.Entry(20, slot)->Value, Is.Zero, "a root of user mode");
        Assert.That(machine.Extended(5, Frame(20).Value), Is.Zero);
        Assert.That(machine.Entry(20, slot)->Value, Is.EqualTo(shown), "of the kernel");
        Assert.That(MmuextOp.NewBaseptr(machine.Vcpu, Frame(0)), Is.EqualTo(Errno.None));
        Assert.That(machine.Entry(20, slot)->Value, Is.EqualTo(shown), "of the kernel once");

        machine.Context->State->VmAssists = (ulong)VmAssist.M2PStrict;
        Assert.That(machine.Pin(4, 21), Is.Zero);
        Assert.That(machine.Entry(21, slot)->Value, Is.EqualTo(shown), "a new L4 under m2p_strict");
        Assert.That(machine.Extended(15, Frame(21).Value), Is.Zero);
        Assert.That(machine.Entry(21, slot)->Value, Is.Zero, "which becomes a root of user mode");
    }

    /// <summary>And processors that saw it there see it no more: the entry is stored again inside the VM, where it was accessed.</summary>
    [Test]
    public void What_is_the_kernels_alone_is_seen_from_its_roots_alone([Values] bool strict)
    {
        using var machine = new TestMachine(inGuest: true);
        machine.Context->State->VmAssists = strict ? (ulong)VmAssist.M2PStrict : 0;
        ulong shown = machine.Context->HypervisorSlots[TestMachine.KernelSlot - 256];
        PageTableEntry* entry = machine.Entry(20, TestMachine.KernelSlot);
        Assert.That(machine.Extended(15, F(20)), Is.Zero);
        Assert.That(entry->Value, Is.EqualTo(TestMachine.UserSlot), "a root of user mode");
        Assert.That((PageTables.ShowsKernelSlot(machine.Context, Frame(20), true), PageTables.ShowsKernelSlot(machine.Context, Frame(20), false)), Is.EqualTo((false, true)));
        Assert.That(machine.Extended(5, F(20)), Is.Zero);
        Assert.That(entry->Value, Is.EqualTo(shown), "of the kernel");
        Assert.That((PageTables.ShowsKernelSlot(machine.Context, Frame(20), true), PageTables.ShowsKernelSlot(machine.Context, Frame(20), false)), Is.EqualTo((true, false)));
        Assert.That(MmuextOp.NewBaseptr(machine.Vcpu, Frame(0)), Is.EqualTo(Errno.None));
        Assert.That(entry->Value, Is.EqualTo(shown), "of the kernel once");
        Assert.That(machine.Extended(15, F(0)), Is.Zero);
        Assert.That(machine.Entry(0, TestMachine.KernelSlot)->Value, Is.EqualTo(shown), "of both at the same time");
        *entry = new PageTableEntry(shown | (ulong)PageFlags.Accessed);
        Assert.That(machine.Extended(15, 0), Is.Zero);
        machine.Queue->Clear();
        Assert.That(machine.Extended(15, F(20)), Is.Zero);
        Assert.That(entry->Value, Is.EqualTo(TestMachine.UserSlot), "of user mode again");
        Assert.That(machine.Queue->Count, Is.EqualTo(1));
        Assert.That((*machine.Queue)[0].Address, Is.EqualTo(TestMachine.EntryAddress(20, TestMachine.KernelSlot).Value));
    }

    [Test]
    public void The_old_root_is_let_go()
    {
        using TestMachine machine = NewMachine();
        new ReadOnlySpan<PageTableEntry>(machine.Entry(0, 0), 256).CopyTo(new Span<PageTableEntry>(machine.Entry(20, 0), 256));
        Assert.That(machine.Extended(5, F(20)), Is.Zero);
        Assert.That(machine.Vcpu->State->KernelRoot, Is.EqualTo(F(20)));
        Assert.That((machine.Info(0).TypeCount, machine.Info(20).TypeCount), Is.EqualTo((1U, 1U)));
        Assert.That(machine.Unpin(0), Is.Zero);
        Assert.That((machine.Info(0).TypeCount, machine.Info(0).ReferenceCount), Is.EqualTo((0U, 1U)));
        Assert.That(machine.Extended(15, F(20)), Is.Zero);
        Assert.That(machine.Info(20).TypeCount, Is.EqualTo(2U));
        Assert.That(machine.Extended(15, 0), Is.Zero);
        Assert.That(machine.Vcpu->State->UserRoot, Is.Zero);
        Assert.That(machine.Info(20).TypeCount, Is.EqualTo(1U));
    }

    [Test]
    public void Whole_pages_are_cleared_and_copied()
    {
        using TestMachine machine = NewMachine();
        new Span<byte>(machine.Entry(20, 0), 4096).Fill(0x5a);
        Assert.That(machine.Extended(17, F(21), F(20)), Is.Zero);
        Assert.That(new ReadOnlySpan<byte>(machine.Entry(21, 0), 4096).ContainsAnyExcept((byte)0x5a), Is.False);
        Assert.That(machine.Extended(16, F(20)), Is.Zero);
        Assert.That(new ReadOnlySpan<byte>(machine.Entry(20, 0), 4096).ContainsAnyExcept((byte)0), Is.False);
    }

    [Test]
    public void A_kick_in_the_middle_of_a_list()
    {
        using TestMachine machine = NewMachine();
        var requests = (ulong*)machine.Data;
        for (int i = 0; i < 4; i++)
            (requests[3 * i], requests[(3 * i) + 1]) = (0, F(20 + i));
        requests[10] = F(Free);
        *machine.Vcpu->KickPending = 1;
        var arguments = new HypercallArguments { A0 = DataAddress, A1 = 4, A2 = DataAddress + 512, A3 = DomainId.Self.Value };
        for (uint done = 1; done <= 3; done++)
        {
            Assert.That(MmuextOp.Execute(machine.Vcpu, arguments), Is.Zero);
            Assert.That(machine.Vcpu->Continuation.Pending, Is.EqualTo(1));
            machine.Vcpu->Continuation.Pending = 0;
            arguments = machine.Vcpu->Continuation.Arguments;
            Assert.That(*(uint*)(machine.Data + 512), Is.EqualTo(done));
            Assert.That(machine.Info(19 + (int)done).Has(FrameFlags.Pinned), Is.True);
        }

        Assert.That(MmuextOp.Execute(machine.Vcpu, arguments), Is.EqualTo(-(long)Errno.EINVAL));
        Assert.That(machine.Vcpu->Continuation.Pending, Is.Zero);
        Assert.That(*(uint*)(machine.Data + 512), Is.EqualTo(3), "the one that failed does not count");
    }

    [Test]
    public void Flushes_are_asked_of_a_processor_that_walks_the_tables_itself([Values] bool inGuest)
    {
        using var machine = new TestMachine(inGuest: inGuest);
        *(ulong*)(machine.Data + 256) = 1;
        foreach ((uint command, ulong second, bool everything) in ((uint, ulong, bool)[])
            [(6, 0, true), (7, 0, false), (8, DataAddress + 256, true), (9, DataAddress + 256, false), (10, 0, true), (11, 0, false)])
        {
            machine.Queue->Clear();
            Assert.That(machine.Extended(command, 0x1234, second), Is.Zero);
            Assert.That(machine.Queue->FlushPending, Is.EqualTo(!inGuest && everything ? 1 : 0), $"command {command}");
            Assert.That(machine.Queue->InvalidationCount, Is.EqualTo(!inGuest && !everything ? 1 : 0), $"command {command}");
            if (machine.Queue->InvalidationCount != 0)
                Assert.That(machine.Queue->Invalidated(0), Is.EqualTo(0x1000), "its page");
        }
    }

    private static void ExpectUntouched(TestMachine machine, int root, Errno error)
    {
        Assert.That(machine.Pin(4, root), Is.EqualTo(-(long)error));
        Assert.That(machine.Extended(15, F(root)), Is.EqualTo(-(long)error));
        for (int i = FirstPlayFrame; i < 60; i++)
            Assert.That((machine.Info(i).TypeCount, machine.Info(i).ReferenceCount), Is.EqualTo((0U, 1U)), $"frame {i}");
    }
}
