// What a vCPU's SYSCALL entry is told to serve, and what comes of its report.
using XenSharp.Core;
using XenSharp.Domains.Emulation;

namespace XenSharp.Domains.Tests.Runtime;

public sealed class InsideCallsTests : ScriptedGuest
{
    private const uint TimerVirq = 0;
    private const long Millisecond = 1_000_000;
    private const int SwitchSlot = 261;
    private const ulong UserSlot = 0xfed0_0000_0003;

    [Test]
    public void The_kernel_is_served_and_user_mode_is_not()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            Assert.That(Served(cpu), Is.EqualTo((1, 1, 1)));
            SetMode(0);
            yield return new VcpuExit(VcpuExitKind.Kicked);
            Assert.That(Served(cpu), Is.EqualTo((0, 0, 0)));
            SetMode(1);
            yield return new VcpuExit(VcpuExitKind.Kicked);
            Assert.That(Served(cpu), Is.EqualTo((1, 1, 1)));
        }

        _ = Fake.Run(Guest);
    }

    /// <summary>What iret changes beside the registers and the mask, only the manager knows of.</summary>
    [Test]
    public void An_iret_that_does_more_is_the_managers()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            MaskNmi();
            yield return new VcpuExit(VcpuExitKind.Kicked);
            Assert.That(Served(cpu), Is.EqualTo((0, 1, 1)), "after an NMI");
            cpu.Rsp = Stack;
            Fake.WriteAll(Stack, 0, 0, 0, 0, Handler, FlatSelectors.KernelCs64, 0, Stack, FlatSelectors.Ring3Data);
            yield return cpu.Hypercall(HypercallNumber.Iret);
            Assert.That(Served(cpu), Is.EqualTo((1, 1, 1)));
            yield return cpu.Hypercall(HypercallNumber.VmAssist, 0, 4);
            Assert.That((cpu.Result, Served(cpu)), Is.EqualTo((0L, (0, 1, 1))), "with a virtual IOPL in RFLAGS");
        }

        _ = Fake.Run(Guest);
    }

    /// <summary>The ways between the modes are the entry's where both roots show what it needs, and what it does is what the guest wants.</summary>
    [Test]
    public void System_calls_are_the_entrys_where_they_are_as_it_has_them()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            Assert.That(Switches(cpu), Is.Zero);
            PrepareSwitch();
            yield return new VcpuExit(VcpuExitKind.Kicked);
            Assert.That(Switches(cpu), Is.EqualTo(1));
            Assert.That(SwitchesTo(cpu), Is.EqualTo((KernelRoot, OtherRoot, Handler + 0x80)));
            foreach (string hindrance in (string[])["flag", "callback", "no root", "one root", "kernel slot", "user slot", "no slot", "NMI", "breakpoint"])
            {
                Hinder(hindrance);
                yield return new VcpuExit(VcpuExitKind.Kicked);
                Assert.That(Switches(cpu), Is.Zero, hindrance);
                PrepareSwitch();
                yield return new VcpuExit(VcpuExitKind.Kicked);
                Assert.That(Switches(cpu), Is.EqualTo(1), $"after {hindrance}");
            }

            // With them it serves kernel mode, which user mode comes to by itself; without, nothing.
            SetMode(0);
            yield return new VcpuExit(VcpuExitKind.Kicked);
        }

        _ = Fake.Run(Guest);
    }

    /// <summary>The mode is the one whose root the vCPU came back with, and the GS bases are as the entry left them.</summary>
    [Test]
    public void The_mode_is_taken_over_with_what_belongs_to_it()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            PrepareSwitch();
            yield return new VcpuExit(VcpuExitKind.Kicked);
            cpu.PageTableRoot = new Mfn(OtherRoot);
            SetReportedBase(cpu, 0xffff_8880_0000_0000);
            yield return new VcpuExit(VcpuExitKind.Kicked);
            Assert.That((Mode, Switched.GsBase), Is.EqualTo((0, 0xffff_8880_0000_0000)));
            Assert.That((cpu.PageTableRoot.Value, Served(cpu)), Is.EqualTo((OtherRoot, (1, 1, 1))), "kernel mode may come by itself");

            // A system call that was left to the manager, found with the kernel's root.
            cpu.Rip = 0x40_0000;
            yield return cpu.Hypercall((HypercallNumber)1);
            Assert.That((Mode, cpu.Rip), Is.EqualTo((1, Handler + 0x80)));
            Assert.That(cpu.PageTableRoot.Value, Is.EqualTo(KernelRoot));
            SetReportedBase(cpu, 0x8000_0000_0000);
            cpu.PageTableRoot = new Mfn(OtherRoot);
            yield return new VcpuExit(VcpuExitKind.Kicked);
            Assert.That(Mode, Is.Zero);
            Assert.That(new VirtualAddress(Switched.GsBase).IsCanonical, "whatever a guest writes there");
            cpu.PageTableRoot = new Mfn(KernelRoot);
            yield return new VcpuExit(VcpuExitKind.Kicked);
            Assert.That(Mode, Is.EqualTo(1));
        }

        _ = Fake.Run(Guest);
    }

    /// <summary>A place is served that was met twice in a row; while breakpoints are armed, and for user mode, none is.</summary>
    [Test]
    public void Reads_of_user_modes_gs_base_are_learned()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            foreach ((ulong rip, int length, ulong served) in
                ((ulong, int, ulong)[])[(Handler, 2, 0), (Data, 2, 0), (Handler, 2, 0), (Handler, 2, Handler), (Data, 2, Handler), (Data, 3, Handler), (Data, 2, Data)])
            {
                Fake.Vcpu.NoteGsBaseRead(rip, length);
                yield return new VcpuExit(VcpuExitKind.Kicked);
                Assert.That(Read(cpu), Is.EqualTo(served));
            }

            SetMode(0);
            yield return new VcpuExit(VcpuExitKind.Kicked);
            Assert.That(Read(cpu), Is.Zero, "in user mode, which the entry cannot leave");
            SetMode(1);
            Hinder("breakpoint");
            yield return new VcpuExit(VcpuExitKind.Kicked);
            Assert.That(Read(cpu), Is.Zero, "with a breakpoint");
        }

        _ = Fake.Run(Guest);
        static unsafe ulong Read(FakeVcpu cpu) => cpu.EntryService->GsBaseRead;
    }

    [Test]
    public void Vcpu_info_is_shown_where_it_lies()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            Assert.That(cpu.VcpuInfo, Is.EqualTo((new Mfn(SharedInfoFrame), 0)));
            Fake.WriteAll(Data, FrameOf(Data + 0x1000), 0x140);
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 10, 0, Data);
            Assert.That(cpu.Result, Is.Zero);
            Assert.That(cpu.VcpuInfo, Is.EqualTo((new Mfn(FrameOf(Data + 0x1000)), 0x140)));
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void A_timer_that_was_reported_fires()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            yield return BindVirq(cpu, TimerVirq);
            uint port = Port();
            SetMask(1);
            long due = Now + (5 * Millisecond);
            Report(cpu, (ulong)due);
            cpu.Rsp = Stack;
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 1);
            Assert.That(Now, Is.GreaterThanOrEqualTo(due));
            Assert.That(IsPending(port), Is.True);
            Assert.That(cpu.Rip, Is.EqualTo(Handler));
        }

        _ = Fake.Run(Guest);
    }

    /// <summary>It is taken over before what the vCPU came back for is served, and only once.</summary>
    [Test]
    public void A_report_comes_before_the_hypercall_after_it()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            long late = Now + (3_600_000 * Millisecond);
            Report(cpu, (ulong)late);
            Fake.WriteAll(Data, (ulong)late + 1, 0);
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 8, 0, Data);
            Assert.That(Fake.Vcpu.Timers.Singleshot, Is.EqualTo(late + 1));
            Report(cpu, ulong.MaxValue);
            yield return new VcpuExit(VcpuExitKind.Kicked);
            Assert.That(Fake.Vcpu.Timers.Singleshot, Is.EqualTo(long.MaxValue), "whatever a guest writes there");
            Fake.WriteAll(Data, (ulong)late);
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 8, 0, Data);
            yield return new VcpuExit(VcpuExitKind.Kicked);
            Assert.That(Fake.Vcpu.Timers.Singleshot, Is.EqualTo(late));
        }

        _ = Fake.Run(Guest);
    }

    [Test]
    public void A_switch_of_tasks_that_was_reported_is_made()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            ReportSwitch(cpu, 0xe028, Stack, 0x7000_1000);
            yield return new VcpuExit(VcpuExitKind.Kicked);
            Assert.That(Switched, Is.EqualTo((0xe02bUL, Stack, 0x7000_1000UL)));

            // Once: what the hypercalls set later stays.
            yield return cpu.Hypercall(HypercallNumber.StackSwitch, 0xe02b, Stack + 16);
            yield return cpu.Hypercall(HypercallNumber.SetSegmentBase, 1, 0x7000_2000);
            yield return new VcpuExit(VcpuExitKind.Kicked);
            Assert.That(Switched, Is.EqualTo((0xe02bUL, Stack + 16, 0x7000_2000UL)));

            // What no hypercall lets a guest set.
            ReportSwitch(cpu, 0xe02b, Stack, 0x8000_0000_0000);
            yield return new VcpuExit(VcpuExitKind.Kicked);
            Assert.That(Switched, Is.EqualTo((0xe02bUL, Stack, 0x7000_2000UL)));

            // While user mode runs it is not the vCPU that reports.
            SetMode(0);
            yield return new VcpuExit(VcpuExitKind.Kicked);
            ReportSwitch(cpu, 0xe02b, Stack + 32, 0x7000_3000);
            yield return new VcpuExit(VcpuExitKind.Kicked);
            Assert.That(Switched, Is.EqualTo((0xe02bUL, Stack, 0x7000_2000UL)));
            SetMode(1);
        }

        _ = Fake.Run(Guest);
    }

    /// <summary>A vCPU that was woken has a look coming soon, and so may set a timer for any later time; that look takes place once.</summary>
    [Test]
    public void A_look_follows_a_wake_up()
    {
        IEnumerable<VcpuExit> Guest(FakeVcpu cpu)
        {
            yield return BindVirq(cpu, TimerVirq);
            SetMask(1);
            Fake.WriteAll(Data, (ulong)(Now + Millisecond), 0);
            yield return cpu.Hypercall(HypercallNumber.VcpuOp, 8, 0, Data);
            cpu.Rsp = Stack;
            yield return cpu.Hypercall(HypercallNumber.SchedOp, 1);
            Assert.That(NextLook(cpu), Is.LessThanOrEqualTo(Now + Millisecond));
            while (Now <= NextLook(cpu))
                Thread.SpinWait(100);

            // The next is for the correction of the clock, and may be due by the time that it is looked at here.
            bool isAhead = NextLook(cpu) > Now;
            for (int i = 0; i < 100_000 && !isAhead; i++)
            {
                yield return new VcpuExit(VcpuExitKind.Kicked);
                isAhead = NextLook(cpu) > Now;
            }

            Assert.That(isAhead);
        }

        _ = Fake.Run(Guest);
    }

    private static unsafe (int Iret, int SingleshotTimer, int TaskSwitch) Served(FakeVcpu cpu)
        => (cpu.EntryService->Iret, cpu.EntryService->SingleshotTimer, cpu.EntryService->TaskSwitch);

    private static unsafe int Switches(FakeVcpu cpu) => cpu.EntryService->ModeSwitch;

    private static unsafe (ulong KernelRoot, ulong UserRoot, ulong Callback) SwitchesTo(FakeVcpu cpu)
        => (cpu.EntryService->KernelRoot, cpu.EntryService->UserRoot, cpu.EntryService->SyscallCallback);

    private static unsafe void SetReportedBase(FakeVcpu cpu, ulong address) => cpu.EntryReport->InactiveGsBase = address;

    private unsafe ulong KernelRoot => Fake.Context->State->KernelRoot;

    private unsafe ulong OtherRoot => FrameOf(Data + 0x2000);

    private unsafe int Mode => Fake.Context->State->KernelMode;

    /// <summary>Two roots that show what they have to, and a callback as Linux's.</summary>
    private unsafe void PrepareSwitch()
    {
        DomainContext* domain = Fake.Context->Domain;
        domain->KernelSlot = SwitchSlot;
        domain->UserSlot = UserSlot;
        VcpuState* state = Fake.Context->State;
        state->UserRoot = OtherRoot;
        state->NmiMasked = 0;
        state->DebugRegisters[7] = DebugRegisters.ControlOnes;
        state->SyscallCallback = Handler + 0x80;
        state->CallbackFlags |= CallbackFlags.SyscallDisablesEvents;
        domain->Memory.Table(new Mfn(KernelRoot))[SwitchSlot] = new PageTableEntry(domain->HypervisorSlots[SwitchSlot - 256] | (ulong)PageFlags.Dirty);
        domain->Memory.Table(new Mfn(OtherRoot))[SwitchSlot] = new PageTableEntry(UserSlot | (ulong)PageFlags.Accessed);
    }

    private unsafe void Hinder(string hindrance)
    {
        DomainContext* domain = Fake.Context->Domain;
        VcpuState* state = Fake.Context->State;
        switch (hindrance)
        {
            case "flag":
                state->CallbackFlags &= ~CallbackFlags.SyscallDisablesEvents;
                break;
            case "callback":
                state->SyscallCallback = 0;
                break;
            case "no root":
                state->UserRoot = 0;
                break;
            case "one root":
                state->UserRoot = KernelRoot;
                break;
            case "kernel slot":
                domain->Memory.Table(new Mfn(KernelRoot))[SwitchSlot] = new PageTableEntry(UserSlot);
                break;
            case "user slot":
                domain->Memory.Table(new Mfn(OtherRoot))[SwitchSlot] = new PageTableEntry(domain->HypervisorSlots[SwitchSlot - 256]);
                break;
            case "breakpoint":
                state->DebugRegisters[7] |= 0x10;
                break;
            case "no slot":
                domain->KernelSlot = 0;
                break;
            default:
                MaskNmi();
                break;
        }
    }

    private static unsafe long NextLook(FakeVcpu cpu) => (long)cpu.EntryService->NextLook;

    private static unsafe void Report(FakeVcpu cpu, ulong timeout) => cpu.EntryReport->SingleshotTimeout = timeout;

    private static unsafe void ReportSwitch(FakeVcpu cpu, ulong selector, ulong stack, ulong segmentBase)
        => *cpu.EntryReport = new EntryReport { KernelSs = selector, KernelSp = stack, InactiveGsBase = segmentBase };

    private unsafe (ulong Selector, ulong Stack, ulong GsBase) Switched
        => (Fake.Context->State->KernelSs, Fake.Context->State->KernelSp, Fake.Context->State->InactiveGsBase);

    private unsafe void SetMode(int mode) => Fake.Context->State->KernelMode = mode;

    private unsafe void MaskNmi() => Fake.Context->State->NmiMasked = 1;

    private unsafe ulong SharedInfoFrame => Fake.Context->Domain->State->SharedInfoFrame;

    private static ulong FrameOf(ulong address) => FakeMachine.FirstFrame + ((address - FakeDomain.Base) >> 12);
}
