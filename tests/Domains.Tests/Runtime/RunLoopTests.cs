// The vCPU's loop with a guest played by the test: events, timers, exceptions and system calls.
using XenSharp.Core;

namespace XenSharp.Domains.Tests.Runtime;

public sealed class RunLoopTests : ScriptedGuest
{
    private const uint TimerVirq = 0;

    [Test]
    public void Hypercalls_return_in_RAX_and_touch_nothing_else()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            Registers before = Registers.Of(cpu) with { R12 = 12, Rbx = 3, R9 = 9 };
            before.Load(cpu);
            yield return cpu.Hypercall(HypercallNumber.XenVersion, 0, 2, 3, 4, 5, 6);
            Assert.That(cpu.Result, Is.EqualTo((4 << 16) | 17));
            Assert.That(Registers.Of(cpu), Is.EqualTo(before with { Rax = (4 << 16) | 17, Rip = before.Rip + 2, Rcx = before.Rip + 2, R11 = before.Rflags, Rdi = 0, Rsi = 2, Rdx = 3, R10 = 4, R8 = 5, R9 = 6 }));
        }

        Assert.That(Fake.Run(Guest), Is.EqualTo(new DomainExit(ShutdownReason.PowerOff)));
        Assert.That(Fake.Domain.HypercallCount, Is.EqualTo(2));
    }

    [Test]
    public void Block_sleeps_until_the_timer_and_comes_back_with_an_upcall()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            yield return BindVirq(cpu, TimerVirq);
            uint port = Port();
            SetMask(1);
            long start = Now;
            Fake.WriteAll(Data, (ulong)(start + 5_000_000), 0);
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 8, 0, Data);
            cpu.Rsp = Stack;
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 1);
            Assert.That(Now, Is.GreaterThanOrEqualTo(start + 5_000_000));
            Assert.That(cpu.Rip, Is.EqualTo(Handler));
            Assert.That(IsPending(port), Is.True);
            Assert.That((Mask, cpu.Rsp), Is.EqualTo((1, Stack - 56)));
            Assert.That(Fake.Read<ulong>(cpu.Rsp + 24), Is.EqualTo(0xe030), "block had opened the mask");
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void Block_with_an_event_there_does_not_sleep()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            yield return BindIpi(cpu);
            uint port = Port();
            SetMask(1);
            yield return Send(cpu, port);
            Assert.That(cpu.Result, Is.Zero);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 1);
            Assert.That(cpu.Rip, Is.EqualTo(Handler));
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void Poll_comes_back_for_a_port_for_the_time_and_for_nothing_else()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetMask(1);
            yield return BindIpi(cpu);
            uint port = Port();

            // Nothing pending: the time runs out.
            long start = Now;
            Fake.WriteAll(Data + 0x100, Data + 0x200, 1, (ulong)(start + 3_000_000));
            Fake.WriteAll(Data + 0x200, port);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 3, Data + 0x100);
            Assert.That(cpu.Result, Is.Zero);
            Assert.That(Now, Is.GreaterThanOrEqualTo(start + 3_000_000));

            // Time that is past already.
            Fake.WriteAll(Data + 0x110, 1);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 3, Data + 0x100);
            Assert.That(cpu.Result, Is.Zero);
            Fake.WriteAll(Data + 0x110, unchecked((ulong)-1L));
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 3, Data + 0x100);
            Assert.That(cpu.Result, Is.Zero);

            // Pending: no sleep, though there is no timeout and events are masked.
            Fake.WriteAll(Data + 0x110, 0);
            yield return Send(cpu, port);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 3, Data + 0x100);
            Assert.That(cpu.Result, Is.Zero);

            // Ports that there are not, lists that cannot be read or are too long.
            Fake.WriteAll(Data + 0x200, 0x7fff_ffff);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 3, Data + 0x100);
            Assert.That(cpu.Result, Is.EqualTo(-(long)Errno.EINVAL));
            Fake.WriteAll(Data + 0x100, 0x7000_0000, 1, 0);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 3, Data + 0x100);
            Assert.That(cpu.Result, Is.EqualTo(-(long)Errno.EFAULT));
            Fake.WriteAll(Data + 0x100, Data + 0x200, 129, 0);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 3, Data + 0x100);
            Assert.That(cpu.Result, Is.EqualTo(-(long)Errno.EINVAL));
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void Poll_is_woken_by_the_back_end()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetMask(1);
            Fake.WriteAll(Data + 0x100, Data + 0x200, 1, 0);
            Fake.WriteAll(Data + 0x200, Fake.Domain.ConsolePort);
            _ = Task.Run(async () =>
            {
                await Task.Delay(5);
                Fake.Domain.ConsoleChannel.Notify();
            });
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 3, Data + 0x100);
            Assert.That(cpu.Result, Is.Zero);
            Assert.That(IsPending(Fake.Domain.ConsolePort), Is.True);
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void Timers_tick_while_the_guest_runs()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetMask(1);
            yield return BindVirq(cpu, TimerVirq);
            uint port = Port();
            Fake.WriteAll(Data, 1_000_000);
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 6, 0, Data);
            for (int tick = 0; tick < 3; tick++)
            {
                while (!IsPending(port))
                    yield return new VcpuExit(VcpuExitKind.Kicked);
                ClearPending(port);
            }

            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 7);
            ClearPending(port);
            long stopped = Now;
            while (Now < stopped + 3_000_000)
                yield return new VcpuExit(VcpuExitKind.Kicked);
            Assert.That(IsPending(port), Is.False);

            // One that is past fires on the way back.
            Fake.WriteAll(Data, 1, 0);
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 8, 0, Data);
            Assert.That(IsPending(port), Is.True);
        }

        _ = Fake.Run(Guest);
    }

    [TestCase(ExceptionVector.DivideError, 0U, false)]
    [TestCase(ExceptionVector.Debug, 0U, false)]
    [TestCase(ExceptionVector.Breakpoint, 0U, false)]
    [TestCase(ExceptionVector.Overflow, 0U, false)]
    [TestCase(ExceptionVector.BoundRange, 0U, false)]
    [TestCase(ExceptionVector.SegmentNotPresent, 0x120U, true)]
    [TestCase(ExceptionVector.StackFault, 0x18U, true)]
    [TestCase(ExceptionVector.X87Error, 0U, false)]
    [TestCase(ExceptionVector.AlignmentCheck, 0U, true)]
    [TestCase(ExceptionVector.SimdError, 0U, false)]
    public void Exceptions_go_through_the_trap_table(ExceptionVector vector, uint errorCode, bool hasErrorCode)
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetTrap(vector, Handler + 0x40);
            cpu.Rip = 0x4444;
            cpu.Rsp = Stack;
            yield return FakeVcpu.Exception(vector, errorCode);
            Assert.That(cpu.Rip, Is.EqualTo(Handler + 0x40));
            Assert.That(cpu.Rsp, Is.EqualTo(Stack - (hasErrorCode ? 64UL : 56)));
            Assert.That(Fake.Read<ulong>(cpu.Rsp + 16), Is.EqualTo(hasErrorCode ? errorCode : 0x4444));
            Assert.That(Mask, Is.EqualTo(1), "as it was at the start");
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void A_trap_masks_events_only_if_it_says_so([Values] bool masks)
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetTrap(ExceptionVector.Breakpoint, Handler, masks);
            SetMask(0);
            cpu.Rsp = Stack;
            yield return FakeVcpu.Exception(ExceptionVector.Breakpoint);
            Assert.That(Mask, Is.EqualTo(masks ? 1 : 0));
        }

        _ = Fake.Run(Guest);
    }

    [TestCase(0, 0x2U, 0x6U, Description = "user mode, whatever the processor says")]
    [TestCase(0, 0x7U, 0x7U)]
    [TestCase(1, 0x6U, 0x2U, Description = "kernel mode runs at privilege 3")]
    [TestCase(1, 0x14U, 0x10U)]
    public void Page_faults_carry_address_and_mode(int kernelMode, uint raised, uint found)
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetTrap(ExceptionVector.PageFault, Handler);
            if (kernelMode == 0)
                ToUser(cpu);
            cpu.Rsp = Stack;
            cpu.FaultAddress = new VirtualAddress(0x1234_5678_9000);
            yield return FakeVcpu.Exception(ExceptionVector.PageFault, raised);
            Assert.That(cpu.Rip, Is.EqualTo(Handler));
            Assert.That(Fake.Read<ulong>(cpu.Rsp + 16), Is.EqualTo(found));
            Assert.That(Cr2, Is.EqualTo(0x1234_5678_9000));
            Assert.That(KernelMode, Is.EqualTo(1));
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void Debug_exceptions_add_to_DR6()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetTrap(ExceptionVector.Debug, Handler);
            cpu.Rsp = Stack;
            cpu.DebugStatus = 0xffff_4ff0;
            yield return FakeVcpu.Exception(ExceptionVector.Debug);
            Assert.That(cpu.Rip, Is.EqualTo(Handler));
            cpu.DebugStatus = 0xffff_0ff1;
            yield return FakeVcpu.Exception(ExceptionVector.Debug);
            yield return cpu.Hypercall(HypercallNumber.GetDebugreg, 6);
            Assert.That(cpu.Result, Is.EqualTo(0xffff_4ff1));
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void Stores_to_page_tables_are_emulated_for_a_guest_that_asked([Values] bool assist)
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetTrap(ExceptionVector.PageFault, Handler);
            if (assist)
                yield return cpu.Hypercall(HypercallNumber.VmAssist, 0, 2);

            // mov [rdi], rax, on the entry of an L1 that maps a page of the kernel's own.
            ulong entry = EntryOf(Data + 0x1000);
            Assert.That(Fake.Read<ulong>(entry) & 1, Is.EqualTo(1));
            Fake.WriteAll(Data + 0x100, 0x07_8948);
            cpu.Rip = Data + 0x100;
            cpu.Rsp = Stack;
            SetRegisters(cpu, rax: 0, rdi: entry);
            cpu.FaultAddress = new VirtualAddress(entry);
            yield return FakeVcpu.Exception(ExceptionVector.PageFault, 7);
            Assert.That(cpu.Rip, Is.EqualTo(assist ? Data + 0x103 : Handler));
            Assert.That(Fake.Read<ulong>(entry) == 0, Is.EqualTo(assist));
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void A_single_step_traps_behind_an_emulated_store()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetTrap(ExceptionVector.Debug, Handler);
            yield return cpu.Hypercall(HypercallNumber.VmAssist, 0, 2);
            ulong entry = EntryOf(Data + 0x1000);
            Fake.WriteAll(Data + 0x100, 0x07_8948);
            cpu.Rip = Data + 0x100;
            cpu.Rsp = Stack;
            cpu.Rflags |= (ulong)Rflags.Trap;
            SetRegisters(cpu, rax: 0, rdi: entry);
            cpu.FaultAddress = new VirtualAddress(entry);
            yield return FakeVcpu.Exception(ExceptionVector.PageFault, 7);
            Assert.That((cpu.Rip, Fake.Read<ulong>(entry)), Is.EqualTo((Handler, 0UL)));
            Assert.That(Fake.Read<ulong>(cpu.Rsp + 16), Is.EqualTo(Data + 0x103), "behind the store");
            yield return cpu.Hypercall(HypercallNumber.GetDebugreg, 6);
            Assert.That(cpu.Result, Is.EqualTo(0xffff_0ff0), "as Xen, without the bit for a single step");
        }

        _ = Fake.Run(Guest);
    }

    /// <summary>The base of FS does not count, so the entry is looked for where nothing can be read.</summary>
    [Test]
    public void A_store_that_reads_its_operand_elsewhere_is_a_fault_there()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetTrap(ExceptionVector.PageFault, Handler);
            yield return cpu.Hypercall(HypercallNumber.VmAssist, 0, 2);

            // lock or fs:[rdi], rax
            ulong entry = EntryOf(Data + 0x1000);
            ulong before = Fake.Read<ulong>(entry);
            Fake.WriteAll(Data + 0x100, 0x07_0948_f064);
            cpu.Rip = Data + 0x100;
            cpu.Rsp = Stack;
            SetRegisters(cpu, rax: 0x20, rdi: 0x1238);
            SetFsBase(cpu, entry - 0x1238);
            cpu.FaultAddress = new VirtualAddress(entry);
            yield return FakeVcpu.Exception(ExceptionVector.PageFault, 7);
            Assert.That((cpu.Rip, Cr2, Fake.Read<ulong>(cpu.Rsp + 16)), Is.EqualTo((Handler, 0x1238UL, 0UL)));
            Assert.That(Fake.Read<ulong>(entry), Is.EqualTo(before));
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void A_descriptor_of_the_ldt_is_fetched_through_its_page_or_is_the_guests_fault()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetTrap(ExceptionVector.PageFault, Handler);
            SetTrap(ExceptionVector.GeneralProtection, Handler + 1);
            ulong window = cpu.DescriptorWindow.Ldt.Value;
            void At(uint offset)
            {
                cpu.Rip = 0x1000;
                cpu.Rsp = Stack;
                cpu.FaultAddress = new VirtualAddress(window + offset);
            }

            // No table: what the processor read there is no business of the guest's LDT.
            At(8);
            yield return FakeVcpu.Exception(ExceptionVector.PageFault);
            Assert.That((cpu.Rip, Cr2, cpu.LdtEntries), Is.EqualTo((Handler, window + 8, 0U)));

            // A page of nulls, mapped read-only.
            yield return cpu.Hypercall(HypercallNumber.UpdateVaMapping, Data + 0x1000, Fake.Read<ulong>(EntryOf(Data + 0x1000)) & ~2UL, 0);
            Assert.That(cpu.Result, Is.Zero);
            Fake.WriteAll(Data, 13, Data + 0x1000, 512);
            yield return cpu.Hypercall(HypercallNumber.MmuextOp, Data, 1, 0, DomainId.Self.Value);
            Assert.That((cpu.Result, cpu.LdtEntries), Is.EqualTo((0L, 512U)));
            At(8);
            yield return FakeVcpu.Exception(ExceptionVector.PageFault);
            Assert.That(cpu.Rip, Is.EqualTo(0x1000), "the instruction is tried again");
            yield return cpu.Hypercall(HypercallNumber.UpdateVaMapping, Data + 0x1000, Fake.Read<ulong>(EntryOf(Data + 0x1000)) | 2, 0);
            Assert.That(cpu.Result, Is.EqualTo(-(long)Errno.EBUSY), "it is a descriptor table now");

            // A guest that reads there itself has no page either.
            At(8);
            yield return FakeVcpu.Exception(ExceptionVector.PageFault, (uint)PageFaultError.User);
            Assert.That((cpu.Rip, Cr2), Is.EqualTo((Handler, window + 8)));

            Fake.WriteAll(Data, 13, 0x7fff_ffff_f000, 8192);
            yield return cpu.Hypercall(HypercallNumber.MmuextOp, Data, 1, 0, DomainId.Self.Value);
            At(16);
            yield return FakeVcpu.Exception(ExceptionVector.PageFault);
            Assert.That((cpu.Rip, Cr2), Is.EqualTo((Handler, 0x7fff_ffff_f010)));
            At(4096 + 16);
            yield return FakeVcpu.Exception(ExceptionVector.PageFault);
            Assert.That((cpu.Rip, Fake.Read<ulong>(cpu.Rsp + 16)), Is.EqualTo((Handler + 1, 4096UL + 16 + 4)), "not canonical");
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void A_fault_that_the_tables_do_not_bear_out_is_tried_again_but_not_for_ever()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetTrap(ExceptionVector.PageFault, Handler);
            cpu.Rip = 0x1000;
            cpu.Rsp = Stack;
            cpu.FaultAddress = new VirtualAddress(Data);
            int tries = 0;
            while (cpu.Rip == 0x1000 && tries < 100)
            {
                tries++;
                yield return FakeVcpu.Exception(ExceptionVector.PageFault, 7);
            }

            Assert.That(tries, Is.InRange(2, 50));
            Assert.That(cpu.Rip, Is.EqualTo(Handler));
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void System_calls_of_user_mode([Values] bool masks)
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetMask(0);
            Fake.WriteAll(Data, 2 | (masks ? 1UL << 16 : 0), Handler + 0x80);
            yield return cpu.Hypercall(HypercallNumber.CallbackOp, 0, Data);
            ToUser(cpu);
            SetKernelStack(Stack);
            cpu.Rsp = 0x7fff_0000;
            cpu.Rflags = 0x202 | (ulong)Rflags.Direction | (ulong)Rflags.Carry;
            cpu.Rip = 0x40_0000;
            yield return cpu.Hypercall((HypercallNumber)1, 1, 2, 3);
            Assert.That((KernelMode, cpu.Rip, cpu.Rsp), Is.EqualTo((1, Handler + 0x80, Stack - 56)));
            Assert.That(cpu.Rflags & (ulong)Rflags.Direction, Is.Zero, "the virtual SYSCALL mask clears DF");
            Assert.That(Fake.Read<ulong>(cpu.Rsp + 16), Is.EqualTo(0x40_0002), "behind the SYSCALL");
            Assert.That(Fake.Read<ulong>(cpu.Rsp + 32) & (ulong)(Rflags.Direction | Rflags.Carry), Is.EqualTo((ulong)(Rflags.Direction | Rflags.Carry)));
            Assert.That(Fake.Read<ulong>(cpu.Rsp + 24), Is.EqualTo(0xe033));
            Assert.That(Mask, Is.EqualTo(masks ? 1 : 0));
            Assert.That(Registers.Of(cpu).Rax, Is.EqualTo(1UL));
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void A_system_call_without_a_callback_is_no_instruction()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetTrap(ExceptionVector.InvalidOpcode, Handler + 0x60);
            ToUser(cpu);
            SetKernelStack(Stack);
            cpu.Rip = 0x40_0000;
            yield return cpu.Hypercall((HypercallNumber)1);
            Assert.That(cpu.Rip, Is.EqualTo(Handler + 0x60));
            Assert.That(Fake.Read<ulong>(cpu.Rsp + 16), Is.EqualTo(0x40_0000), "on the SYSCALL");
        }

        Assert.That(Fake.Run(Guest).Reason, Is.EqualTo(ShutdownReason.PowerOff));
    }

    [Test]
    public void An_NMI_is_taken_once_and_the_next_waits_for_iret()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            Fake.WriteAll(Data, Handler + 0x20);
            yield return cpu.Hypercall(HypercallNumber.NmiOp, 0, Data);
            cpu.Rsp = Stack;
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 11);
            Assert.That((cpu.Rip, Mask), Is.EqualTo((Handler + 0x20, 1)));
            cpu.Rip = 0x1000;
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 11);
            Assert.That(cpu.Rip, Is.EqualTo(0x1002UL));
            Fake.WriteAll(Stack, 0, 0, 0, 0, 0x2000, 0xe030, 2, Stack + 0x100, 0xe02b);
            cpu.Rsp = Stack;
            yield return cpu.Hypercall(HypercallNumber.Iret);
            Assert.That(cpu.Rip, Is.EqualTo(Handler + 0x20));
            Assert.That(Fake.Read<ulong>(cpu.Rsp + 16), Is.EqualTo(0x2000));
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void An_NMI_without_a_handler_is_lost_and_one_that_masks_nothing_is_interrupted()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            cpu.Rsp = Stack;
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 11);
            SetTrap(ExceptionVector.Nmi, Handler + 0x20, masks: false);
            yield return cpu.Hypercall(HypercallNumber.XenVersion);
            Assert.That(cpu.Rip, Is.Not.EqualTo(Handler + 0x20));

            yield return BindIpi(cpu);
            uint port = Port();
            SetMask(1);
            yield return Send(cpu, port);
            SetMask(0);
            ulong rip = cpu.Rip;
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 11);
            Assert.That(cpu.Rip, Is.EqualTo(Handler), "the event's frame is on top of the NMI's");
            Assert.That(Fake.Read<ulong>(cpu.Rsp + 16), Is.EqualTo(Handler + 0x20));
            Assert.That(Fake.Read<ulong>(Fake.Read<ulong>(cpu.Rsp + 40) + 16), Is.EqualTo(rip + 2));
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void Device_not_available_is_the_guests_while_TS_is_set()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetTrap(ExceptionVector.DeviceNotAvailable, Handler);
            yield return cpu.Hypercall(HypercallNumber.FpuTaskswitch, 1);
            Assert.That(cpu.TaskSwitched, Is.True);
            cpu.Rsp = Stack;
            yield return FakeVcpu.Exception(ExceptionVector.DeviceNotAvailable);
            Assert.That((cpu.Rip, cpu.TaskSwitched), Is.EqualTo((Handler, false)));
            cpu.Rip = 0x1000;
            yield return FakeVcpu.Exception(ExceptionVector.DeviceNotAvailable);
            Assert.That(cpu.Rip, Is.EqualTo(0x1000UL));
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void AFake_is_destroyed_while_it_sleeps()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            _ = Task.Run(async () =>
            {
                await Task.Delay(5);
                Fake.Domain.Destroy();
            });
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 1);
            Assert.Fail("the guest does not run on");
        }

        _ = Fake.Run(Guest);
    }
}
