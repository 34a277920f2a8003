// The vCPU's loop with a guest played by the test: events, timers, exceptions, system calls, and every way to stop.
using XenSharp.Core;

namespace XenSharp.Domains.Tests.Runtime;

public sealed unsafe class RunLoopTests
{
    private const ulong Data = FakeDomain.Data;
    private const ulong Stack = FakeDomain.Stack;
    private const ulong Handler = FakeDomain.Handler;
    private const uint TimerVirq = 0;
    private FakeDomain _domain = null!;

    [SetUp]
    public void SetUp()
    {
        _domain = new FakeDomain();
        _domain.Context->State->EventCallback = Handler;
    }

    [TearDown]
    public void TearDown() => _domain.Dispose();

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

        Assert.That(_domain.Run(Guest), Is.EqualTo(new DomainExit(ShutdownReason.PowerOff)));
        Assert.That(_domain.Domain.HypercallCount, Is.EqualTo(2));
    }

    [Test]
    public void A_continuation_is_issued_again_from_the_guests_own_instruction()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            WriteMulticall(0, HypercallNumber.XenVersion);
            WriteMulticall(1, HypercallNumber.XenVersion);
            WriteMulticall(2, HypercallNumber.XenVersion);
            ulong rip = cpu.Rip;
            cpu.Kick();
            yield return cpu.Hypercall(HypercallNumber.Multicall, Data, 3, 33, 44, 55, 66);
            Registers after = Registers.Of(cpu);
            Assert.That((after.Rip, after.Rax, after.Rdi, after.Rsi), Is.EqualTo((rip, (ulong)HypercallNumber.Multicall, Data + 64, 2UL)));
            Assert.That((after.Rdx, after.R10, after.R8, after.R9), Is.EqualTo((33UL, 44UL, 55UL, 66UL)), "registers that carry no argument stay");
            yield return cpu.Again();
            Assert.That((cpu.Rip, cpu.Result), Is.EqualTo((rip + 2, 0L)));
            for (int i = 0; i < 3; i++)
                Assert.That(_domain.Read<long>(Data + (64UL * (ulong)i) + 8), Is.EqualTo((4 << 16) | 17));
        }

        _ = _domain.Run(Guest);
    }

    [Test]
    public void Multicall_serves_all_and_keeps_every_result()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            WriteMulticall(0, HypercallNumber.XenVersion);
            WriteMulticall(1, (HypercallNumber)63);
            WriteMulticall(2, HypercallNumber.Multicall, Data, 1);
            WriteMulticall(3, HypercallNumber.XenVersion, 7, 1);
            WriteMulticall(4, HypercallNumber.XenVersion, 7);
            yield return cpu.Hypercall(HypercallNumber.Multicall, Data, 5);
            Assert.That(cpu.Result, Is.Zero);
            Assert.That(MulticallResults(5), Is.EqualTo(new[] { (4 << 16) | 17, -(long)Errno.ENOSYS, -(long)Errno.EINVAL, -(long)Errno.EINVAL, 4096 }));

            // After a nested one was refused the next is none.
            yield return cpu.Hypercall(HypercallNumber.Multicall, Data, 1);
            Assert.That(cpu.Result, Is.Zero);

            // Nothing is read of an empty list.
            yield return cpu.Hypercall(HypercallNumber.Multicall, 0x7000_0000, 0);
            Assert.That(cpu.Result, Is.Zero);
        }

        _ = _domain.Run(Guest);
    }

    [Test]
    public void An_operation_that_is_continued_within_a_multicall()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            ulong machineFrame = FakeMachine.FirstFrame + 4;
            for (ulong i = 0; i < 3; i++)
                _domain.WriteAll(Data + 0x800 + (i * 16), ((machineFrame + i) << 12) | 1, 0x500 + i);
            WriteMulticall(0, HypercallNumber.MmuUpdate, Data + 0x800, 3, Data + 0xf00, 0x7ff0);
            WriteMulticall(1, HypercallNumber.XenVersion, 7);
            cpu.Kick();
            yield return cpu.Hypercall(HypercallNumber.Multicall, Data, 2);

            // The entry says what is left of it.
            Assert.That((_domain.Read<ulong>(Data + 16), _domain.Read<ulong>(Data + 24)), Is.EqualTo((Data + 0x810, 0x8000_0002UL)));
            Assert.That(_domain.Read<uint>(Data + 0xf00), Is.EqualTo(1));
            cpu.Kick();
            yield return cpu.Again();
            yield return cpu.Again();
            Assert.That(cpu.Result, Is.Zero);
            Assert.That(MulticallResults(2), Is.EqualTo(new[] { 0L, 4096 }));
            Assert.That(_domain.Read<uint>(Data + 0xf00), Is.EqualTo(3));
            for (ulong i = 0; i < 3; i++)
                Assert.That(MachineToPhys(4 + i), Is.EqualTo(0x500 + i));
        }

        _ = _domain.Run(Guest);
    }

    [Test]
    public void Iret_ends_a_multicall()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetUserRoot();
            cpu.Rsp = Stack;
            _domain.WriteAll(Stack, 0xabcd, 11, 12, 0, 0x1234, 0xe033, 0x202, 0x5678, 0xe02b);
            WriteMulticall(0, HypercallNumber.StackSwitch, 0xe02b, Stack + 0x100);
            WriteMulticall(1, HypercallNumber.Iret);
            WriteMulticall(2, HypercallNumber.StackSwitch, 0xe02b, 0x666);
            yield return cpu.Hypercall(HypercallNumber.Multicall, Data, 3);
            Registers after = Registers.Of(cpu);
            Assert.That((after.Rax, after.Rip, after.Rsp, after.Rcx, after.R11), Is.EqualTo((0xabcdUL, 0x1234UL, 0x5678UL, 12UL, 11UL)));
            Assert.That(KernelMode, Is.Zero);
            Assert.That(KernelSp, Is.EqualTo(Stack + 0x100), "what comes behind is not looked at");
            Assert.That(MulticallResults(2)[1], Is.EqualTo(0xabcd));
            BackToKernel(cpu);
        }

        _ = _domain.Run(Guest);
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
            _domain.WriteAll(Data, (ulong)(start + 5_000_000), 0);
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 8, 0, Data);
            cpu.Rsp = Stack;
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 1);
            Assert.That(Now, Is.GreaterThanOrEqualTo(start + 5_000_000));
            Assert.That(cpu.Rip, Is.EqualTo(Handler));
            Assert.That(IsPending(port), Is.True);
            Assert.That((Mask, cpu.Rsp), Is.EqualTo((1, Stack - 56)));
            Assert.That(_domain.Read<ulong>(cpu.Rsp + 24), Is.EqualTo(0xe030), "block had opened the mask");
        }

        _ = _domain.Run(Guest);
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

        _ = _domain.Run(Guest);
    }

    [Test]
    public void A_multicall_that_blocks_goes_on_after_the_event()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            yield return BindVirq(cpu, TimerVirq);
            SetMask(1);
            _domain.WriteAll(Data + 0x800, (ulong)(Now + 2_000_000), 0);
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 8, 0, Data + 0x800);
            cpu.Rsp = Stack;
            ulong rip = cpu.Rip;
            WriteMulticall(0, HypercallNumber.SchedOp, 1);
            WriteMulticall(1, HypercallNumber.XenVersion, 7);
            yield return cpu.Hypercall(HypercallNumber.Multicall, Data, 2);
            Assert.That(cpu.Rip, Is.EqualTo(Handler));
            Assert.That(_domain.Read<ulong>(cpu.Rsp + 16), Is.EqualTo(rip), "the frame leads back to the SYSCALL");
            cpu.Rip = rip;
            yield return cpu.Again();
            Assert.That(MulticallResults(2), Is.EqualTo(new[] { 0L, 4096 }));
        }

        _ = _domain.Run(Guest);
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
            _domain.WriteAll(Data + 0x100, Data + 0x200, 1, (ulong)(start + 3_000_000));
            _domain.WriteAll(Data + 0x200, port);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 3, Data + 0x100);
            Assert.That(cpu.Result, Is.Zero);
            Assert.That(Now, Is.GreaterThanOrEqualTo(start + 3_000_000));

            // Time that is past already.
            _domain.WriteAll(Data + 0x110, 1);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 3, Data + 0x100);
            Assert.That(cpu.Result, Is.Zero);
            _domain.WriteAll(Data + 0x110, unchecked((ulong)-1L));
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 3, Data + 0x100);
            Assert.That(cpu.Result, Is.Zero);

            // Pending: no sleep, though there is no timeout and events are masked.
            _domain.WriteAll(Data + 0x110, 0);
            yield return Send(cpu, port);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 3, Data + 0x100);
            Assert.That(cpu.Result, Is.Zero);

            // Ports that there are not, lists that cannot be read or are too long.
            _domain.WriteAll(Data + 0x200, 0x7fff_ffff);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 3, Data + 0x100);
            Assert.That(cpu.Result, Is.EqualTo(-(long)Errno.EINVAL));
            _domain.WriteAll(Data + 0x100, 0x7000_0000, 1, 0);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 3, Data + 0x100);
            Assert.That(cpu.Result, Is.EqualTo(-(long)Errno.EFAULT));
            _domain.WriteAll(Data + 0x100, Data + 0x200, 129, 0);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 3, Data + 0x100);
            Assert.That(cpu.Result, Is.EqualTo(-(long)Errno.EINVAL));
        }

        _ = _domain.Run(Guest);
    }

    [Test]
    public void Poll_is_woken_by_the_back_end()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetMask(1);
            _domain.WriteAll(Data + 0x100, Data + 0x200, 1, 0);
            _domain.WriteAll(Data + 0x200, _domain.Domain.ConsolePort);
            _ = Task.Run(async () =>
            {
                await Task.Delay(5);
                _domain.Domain.ConsoleChannel.Notify();
            });
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 3, Data + 0x100);
            Assert.That(cpu.Result, Is.Zero);
            Assert.That(IsPending(_domain.Domain.ConsolePort), Is.True);
        }

        _ = _domain.Run(Guest);
    }

    [Test]
    public void Timers_tick_while_the_guest_runs()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetMask(1);
            yield return BindVirq(cpu, TimerVirq);
            uint port = Port();
            _domain.WriteAll(Data, 1_000_000);
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
            _domain.WriteAll(Data, 1, 0);
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 8, 0, Data);
            Assert.That(IsPending(port), Is.True);
        }

        _ = _domain.Run(Guest);
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
            Assert.That(_domain.Read<ulong>(cpu.Rsp + 16), Is.EqualTo(hasErrorCode ? errorCode : 0x4444));
            Assert.That(Mask, Is.EqualTo(1), "as it was at the start");
        }

        _ = _domain.Run(Guest);
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

        _ = _domain.Run(Guest);
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
            Assert.That(_domain.Read<ulong>(cpu.Rsp + 16), Is.EqualTo(found));
            Assert.That(Cr2, Is.EqualTo(0x1234_5678_9000));
            Assert.That(KernelMode, Is.EqualTo(1));
        }

        _ = _domain.Run(Guest);
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
            Assert.That(_domain.Read<ulong>(entry) & 1, Is.EqualTo(1));
            _domain.WriteAll(Data + 0x100, 0x07_8948);
            cpu.Rip = Data + 0x100;
            cpu.Rsp = Stack;
            SetRegisters(cpu, rax: 0, rdi: entry);
            cpu.FaultAddress = new VirtualAddress(entry);
            yield return FakeVcpu.Exception(ExceptionVector.PageFault, 7);
            Assert.That(cpu.Rip, Is.EqualTo(assist ? Data + 0x103 : Handler));
            Assert.That(_domain.Read<ulong>(entry) == 0, Is.EqualTo(assist));
        }

        _ = _domain.Run(Guest);
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

        _ = _domain.Run(Guest);
    }

    [Test]
    public void System_calls_of_user_mode([Values] bool masks)
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            SetMask(0);
            _domain.WriteAll(Data, 2 | (masks ? 1UL << 16 : 0), Handler + 0x80);
            yield return cpu.Hypercall(HypercallNumber.CallbackOp, 0, Data);
            ToUser(cpu);
            SetKernelStack(Stack);
            cpu.Rsp = 0x7fff_0000;
            cpu.Rflags = 0x202 | (ulong)Rflags.Direction | (ulong)Rflags.Carry;
            cpu.Rip = 0x40_0000;
            yield return cpu.Hypercall((HypercallNumber)1, 1, 2, 3);
            Assert.That((KernelMode, cpu.Rip, cpu.Rsp), Is.EqualTo((1, Handler + 0x80, Stack - 56)));
            Assert.That(cpu.Rflags & (ulong)Rflags.Direction, Is.Zero, "the virtual SYSCALL mask clears DF");
            Assert.That(_domain.Read<ulong>(cpu.Rsp + 16), Is.EqualTo(0x40_0002), "behind the SYSCALL");
            Assert.That(_domain.Read<ulong>(cpu.Rsp + 32) & (ulong)(Rflags.Direction | Rflags.Carry), Is.EqualTo((ulong)(Rflags.Direction | Rflags.Carry)));
            Assert.That(_domain.Read<ulong>(cpu.Rsp + 24), Is.EqualTo(0xe033));
            Assert.That(Mask, Is.EqualTo(masks ? 1 : 0));
            Assert.That(Registers.Of(cpu).Rax, Is.EqualTo(1UL));
        }

        _ = _domain.Run(Guest);
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
            Assert.That(_domain.Read<ulong>(cpu.Rsp + 16), Is.EqualTo(0x40_0000), "on the SYSCALL");
        }

        Assert.That(_domain.Run(Guest).Reason, Is.EqualTo(ShutdownReason.PowerOff));
    }

    [Test]
    public void An_NMI_is_taken_once_and_the_next_waits_for_iret()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            _domain.WriteAll(Data, Handler + 0x20);
            yield return cpu.Hypercall(HypercallNumber.NmiOp, 0, Data);
            cpu.Rsp = Stack;
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 11);
            Assert.That((cpu.Rip, Mask), Is.EqualTo((Handler + 0x20, 1)));
            cpu.Rip = 0x1000;
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 11);
            Assert.That(cpu.Rip, Is.EqualTo(0x1002UL));
            _domain.WriteAll(Stack, 0, 0, 0, 0, 0x2000, 0xe030, 2, Stack + 0x100, 0xe02b);
            cpu.Rsp = Stack;
            yield return cpu.Hypercall(HypercallNumber.Iret);
            Assert.That(cpu.Rip, Is.EqualTo(Handler + 0x20));
            Assert.That(_domain.Read<ulong>(cpu.Rsp + 16), Is.EqualTo(0x2000));
        }

        _ = _domain.Run(Guest);
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
            Assert.That(_domain.Read<ulong>(cpu.Rsp + 16), Is.EqualTo(Handler + 0x20));
            Assert.That(_domain.Read<ulong>(_domain.Read<ulong>(cpu.Rsp + 40) + 16), Is.EqualTo(rip + 2));
        }

        _ = _domain.Run(Guest);
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

        _ = _domain.Run(Guest);
    }

    [TestCase(0U, ShutdownReason.PowerOff)]
    [TestCase(1U, ShutdownReason.Reboot)]
    [TestCase(2U, ShutdownReason.Suspend)]
    [TestCase(3U, ShutdownReason.Crash)]
    [TestCase(4U, ShutdownReason.Watchdog)]
    [TestCase(5U, ShutdownReason.SoftReset)]
    [TestCase(0x105U, ShutdownReason.SoftReset, Description = "eight bits count")]
    public void Every_reason_to_shut_down(uint code, ShutdownReason reason)
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            _domain.WriteAll(Data, code);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 2, Data);
            Assert.Fail("the guest does not run on");
        }

        DomainExit exit = _domain.Run(Guest);
        Assert.That(exit.Reason, Is.EqualTo(reason));
        Assert.That(exit.Report, reason == ShutdownReason.Crash ? Does.Contain("reported that it has crashed") : Is.Null);
    }

    [Test]
    public void The_first_shutdown_code_counts()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            foreach (ulong code in (ulong[])[1, 4])
            {
                _domain.WriteAll(Data, code);
                yield return cpu.Hypercall(HypercallNumber.SchedOp, 5, Data);
                Assert.That(cpu.Result, Is.Zero);
            }

            _domain.WriteAll(Data, 0);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 2, Data);
        }

        Assert.That(_domain.Run(Guest).Reason, Is.EqualTo(ShutdownReason.Reboot));
    }

    [Test]
    public void The_last_vCPU_that_goes_down_powers_off()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 2);
            Assert.Fail("the guest does not run on");
        }

        Assert.That(_domain.Run(Guest).Reason, Is.EqualTo(ShutdownReason.PowerOff));
    }

    [Test]
    public void A_watchdog_that_runs_out_ends_a_sleeping_domain()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            _domain.WriteAll(Data, 0);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 6, Data);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 1);
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 1);
        }

        Assert.That(_domain.Run(Guest).Reason, Is.EqualTo(ShutdownReason.Watchdog));
    }

    [Test]
    public void A_domain_is_destroyed_while_it_sleeps()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            _ = Task.Run(async () =>
            {
                await Task.Delay(5);
                _domain.Domain.Destroy();
            });
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 1);
            Assert.Fail("the guest does not run on");
        }

        _ = _domain.Run(Guest);
    }

    private static IEnumerable<TestCaseData> Crashes()
    {
        static TestCaseData Case(string name, Action<RunLoopTests, FakeVcpu> prepare, VcpuExit exit, string sentence)
            => new TestCaseData(prepare, exit, sentence).SetArgDisplayNames(name);
        yield return Case("no handler", static (_, _) => { }, FakeVcpu.Exception(ExceptionVector.DivideError), "has no handler");
        yield return Case("bad stack", static (t, c) => { t.SetTrap(ExceptionVector.DivideError, Handler); c.Rsp = 0x5000; }, FakeVcpu.Exception(ExceptionVector.DivideError), "stack cannot be written");
        yield return Case("double fault", static (_, _) => { }, FakeVcpu.Exception(ExceptionVector.DoubleFault), "DoubleFault");
        yield return Case("machine check", static (_, _) => { }, FakeVcpu.Exception(ExceptionVector.MachineCheck), "MachineCheck");
        yield return Case("the VM", static (_, _) => { }, new VcpuExit(VcpuExitKind.Failed, Failure: "KVM has had enough."), "KVM has had enough.");
        yield return Case("no event callback", static (t, _) => t.EventWithoutCallback(), new VcpuExit(VcpuExitKind.Kicked), "no event callback");
        yield return Case("iret without a frame", static (_, c) => { c.Rsp = 0x5000; c.Hypercall(HypercallNumber.Iret); }, new VcpuExit(VcpuExitKind.Syscall), "no valid frame");
        yield return Case("iret to user without tables", static (t, c) =>
        {
            c.Rsp = Stack;
            t._domain.WriteAll(Stack, 0, 0, 0, 0, 1, 0xe033, 2, 3, 0xe02b);
            c.Hypercall(HypercallNumber.Iret);
        }, new VcpuExit(VcpuExitKind.Syscall), "no user page tables");
    }

    [TestCaseSource(nameof(Crashes))]
    public void What_cannot_go_on_ends_in_a_report(Delegate prepare, VcpuExit exit, string sentence)
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            yield return cpu.Hypercall(HypercallNumber.VmAssist, 0, 2);
            ((Action<RunLoopTests, FakeVcpu>)prepare)(this, cpu);
            yield return exit;
            Assert.Fail("the guest does not run on");
        }

        DomainExit stopped = _domain.Run(Guest);
        Assert.That(stopped.Reason, Is.EqualTo(ShutdownReason.Crash));
        Assert.That(stopped.Report, Does.Contain(sentence).And.Contain("rip ").And.Contain("VmAssist").And.Contain("Domain 7 (fake) crashed on vCPU 0"));
    }

    private void EventWithoutCallback()
    {
        _domain.Context->State->EventCallback = 0;
        _domain.Context->Info->EvtchnUpcallPending = 1;
        _domain.Context->Info->EvtchnUpcallMask = 0;
    }

    // What iterators cannot do for themselves: everything with a pointer.
    private readonly record struct Registers(
        ulong Rax, ulong Rbx, ulong Rcx, ulong Rdx, ulong Rsi, ulong Rdi, ulong Rsp, ulong R8, ulong R9, ulong R10, ulong R11, ulong R12, ulong Rip, ulong Rflags)
    {
        public static Registers Of(FakeVcpu cpu)
        {
            CpuRegisters r = *cpu.Registers;
            return new Registers(r.Rax, r.Rbx, r.Rcx, r.Rdx, r.Rsi, r.Rdi, r.Rsp, r.R8, r.R9, r.R10, r.R11, r.R12, r.Rip, r.Rflags);
        }

        public void Load(FakeVcpu cpu)
        {
            CpuRegisters* r = cpu.Registers;
            (r->Rax, r->Rbx, r->Rcx, r->Rdx, r->Rsi, r->Rdi, r->Rsp) = (Rax, Rbx, Rcx, Rdx, Rsi, Rdi, Rsp);
            (r->R8, r->R9, r->R10, r->R11, r->R12, r->Rip, r->Rflags) = (R8, R9, R10, R11, R12, Rip, Rflags);
        }
    }

    private int KernelMode => _domain.Context->State->KernelMode;

    private ulong KernelSp => _domain.Context->State->KernelSp;

    private ulong Cr2 => _domain.Context->Info->Cr2;

    private int Mask => _domain.Context->Info->EvtchnUpcallMask;

    private long Now => _domain.Domain.Time.SystemTime;

    private static void SetRegisters(FakeVcpu cpu, ulong rax, ulong rdi) => (cpu.Registers->Rax, cpu.Registers->Rdi) = (rax, rdi);

    private void SetMask(byte value) => _domain.Context->Info->EvtchnUpcallMask = value;

    private void SetUserRoot() => _domain.Context->State->UserRoot = _domain.Context->State->KernelRoot;

    private void SetKernelStack(ulong stack) => _domain.Context->State->KernelSp = stack;

    private ulong MachineToPhys(ulong index) => _domain.Machine.MachineToPhys[index];

    private void ToUser(FakeVcpu cpu)
    {
        SetUserRoot();
        SetKernelStack(Stack);
        _domain.Context->State->KernelMode = 0;
        cpu.Rsp = 0x7fff_0000;
    }

    private void BackToKernel(FakeVcpu cpu)
    {
        _domain.Context->State->KernelMode = 1;
        _domain.Context->State->UserRoot = 0;
        cpu.Rsp = Stack;
    }

    private void SetTrap(ExceptionVector vector, ulong address, bool masks = false)
        => _domain.Context->State->Traps[(int)vector] = new TrapInfo { Vector = (byte)vector, Flags = masks ? (byte)4 : (byte)0, Cs = FlatSelectors.Ring3Cs64, Address = address };

    private void WriteMulticall(ulong index, HypercallNumber number, ulong a0 = 0, ulong a1 = 0, ulong a2 = 0, ulong a3 = 0)
        => _domain.WriteAll(Data + (index * 64), (ulong)number, 0xdead, a0, a1, a2, a3, 0, 0);

    private long[] MulticallResults(int count) => [.. Enumerable.Range(0, count).Select(i => _domain.Read<long>(Data + ((ulong)i * 64) + 8))];

    private VcpuExit BindVirq(FakeVcpu cpu, uint virq)
    {
        _domain.WriteAll(Data, virq, 0);
        return cpu.Hypercall(HypercallNumber.EventChannelOp, 1, Data);
    }

    private VcpuExit BindIpi(FakeVcpu cpu)
    {
        // The port is behind the vCPU: read it as the virq's is.
        _domain.WriteAll(Data, 0, 0);
        VcpuExit exit = cpu.Hypercall(HypercallNumber.EventChannelOp, 7, Data + 4);
        return exit;
    }

    private VcpuExit Send(FakeVcpu cpu, uint port)
    {
        _domain.WriteAll(Data, port);
        return cpu.Hypercall(HypercallNumber.EventChannelOp, 4, Data);
    }

    private uint Port() => _domain.Read<uint>(Data + 8);

    private bool IsPending(uint port) => (_domain.Context->Domain->SharedInfo[SharedInfoLayout.EvtchnPending + (port / 8)] & (1 << (int)(port % 8))) != 0;

    private void ClearPending(uint port)
    {
        _domain.Context->Info->EvtchnUpcallPending = 0;
        _domain.Context->Info->EvtchnPendingSel = 0;
        _domain.Context->Domain->SharedInfo[SharedInfoLayout.EvtchnPending + (port / 8)] &= (byte)~(1 << (int)(port % 8));
    }

    /// <summary>Where the guest sees the L1 entry that maps an address: the tables are mapped read-only behind start_info.</summary>
    private ulong EntryOf(ulong address)
    {
        PageTableEntry* entry = GuestAccess.FindEntry(_domain.Context, new VirtualAddress(address));
        return FakeDomain.Base + (ulong)((byte*)entry - _domain.Host(FakeDomain.Base));
    }
}
