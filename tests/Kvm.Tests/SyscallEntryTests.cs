// What the SYSCALL entry serves inside the VM, and that whatever comes in between has the manager serve it instead.
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm.Tests;

public sealed unsafe class SyscallEntryTests : EntryTest
{
    private const ulong Target = ScratchGuest.CodeAddress + 0x100;
    private const ulong Frame = ScratchGuest.StackTop - 0x200;
    private const ulong NewStack = ScratchGuest.StackTop - 0x80;
    private const ulong Look = 1_000_000;
    private const int SetSingleshotTimer = 8;

    [SetUp]
    public void ServeAll()
    {
        Vcpu.EntryService->Iret = 1;
        Vcpu.EntryService->SingleshotTimer = 1;
        Vcpu.EntryService->TaskSwitch = 1;
        Vcpu.EntryService->NextLook = Look;
    }

    [Test]
    public void IretGoesWhereItsFrameSays([Values] bool unmasks)
    {
        Mask = 7;
        LoadIret(unmasks ? Rflags.InterruptEnable | Rflags.Carry | Rflags.Direction : Rflags.Zero);
        AssertSyscall(RunWatched(Guest));
        AssertReturned(unmasks ? Rflags.Carry | Rflags.Direction : Rflags.Zero);
        Assert.That(Mask, Is.EqualTo(unmasks ? 0 : 1));
        Assert.That(Pending, Is.Zero);
        Assert.That((Guest.Vcpu.Segments->Cs, Guest.Vcpu.Segments->Ss), Is.EqualTo((FlatSelectors.Ring3Cs64, FlatSelectors.Ring3Data)));
    }

    /// <summary>The bytes around the two flags of vcpu_info are somebody else's.</summary>
    [Test]
    public void IretWritesTheMaskAlone()
    {
        var page = new Span<byte>(Guest.Machine.Memory.Page(Guest.SecondDataFrame), (int)Paging.PageSize);
        page.Fill(0xa5);
        LoadIret(Rflags.Fixed);
        AssertSyscall(RunWatched(Guest));
        AssertReturned(Rflags.Fixed);
        Assert.That(Mask, Is.EqualTo(1));
        page[InfoOffset + 1] = 0xa5;
        Assert.That(page.IndexOfAnyExcept((byte)0xa5), Is.Negative);
    }

    /// <summary>With an upcall pending only a return that leaves events masked is one.</summary>
    [Test]
    public void AnUpcallIsTheManagersToDeliver()
    {
        Pending = 1;
        LoadIret(Rflags.InterruptEnable);
        AssertIsLeft(HypercallNumber.Iret);
        LoadIret(Rflags.Fixed);
        AssertSyscall(RunWatched(Guest));
        AssertReturned(Rflags.Fixed);
    }

    [Test]
    public void WhatTheEntryIsNotToServeItDoesNot()
    {
        Vcpu.EntryService->Iret = 0;
        Vcpu.EntryService->SingleshotTimer = 0;
        Vcpu.EntryService->TaskSwitch = 0;
        LoadIret(Rflags.InterruptEnable);
        AssertIsLeft(HypercallNumber.Iret);
        foreach (HypercallNumber number in (HypercallNumber[])[HypercallNumber.VcpuOp, HypercallNumber.StackSwitch, HypercallNumber.SetSegmentBase])
        {
            Load(number);
            AssertIsLeft(number);
        }

        Assert.That(*Vcpu.EntryReport, Is.EqualTo(default(EntryReport)));
    }

    [TestCase(40, 0xe033UL, TestName = "IretIsLeft(user mode)")]
    [TestCase(40, 0x33UL, TestName = "IretIsLeft(the host's selector)")]
    [TestCase(40, 0xe023UL, TestName = "IretIsLeft(32-bit code)")]
    [TestCase(40, 0x0UL, TestName = "IretIsLeft(null CS)")]
    [TestCase(64, 0x0UL, TestName = "IretIsLeft(null SS)")]
    [TestCase(64, 0xe023UL, TestName = "IretIsLeft(SS of code)")]
    [TestCase(24, 0x100UL, TestName = "IretIsLeft(VGCF_in_syscall)")]
    [TestCase(32, 0x8000_0000_0000_0000UL, TestName = "IretIsLeft(RIP not canonical)")]
    public void IretOfAnotherKindIsLeft(int field, ulong value)
    {
        LoadIret(Rflags.InterruptEnable);
        *(ulong*)HostAddress(Guest, Frame + (ulong)field) = value;
        AssertIsLeft(HypercallNumber.Iret);
    }

    /// <summary>Where the stack is not, where the monitor is, and at the edges of both.</summary>
    [Test]
    public void IretWithAStackThatIsNotTheGuests()
    {
        ulong[] stacks =
        [
            0, 8, 0x7fff_ffff_fff8, 0x8000_0000_0000, Paging.HypervisorVirtualStart - 8, Paging.HypervisorVirtualStart, MonitorLayout.MonitorStart,
            Vcpu.Entry.Of32BitCode, MonitorLayout.VcpuWindowsStart + 64,
            MonitorLayout.VcpuWindowsStart + Paging.PageSize + 0x200, MonitorLayout.VcpuWindowsStart + (2 * Paging.PageSize) + 0x200,
            Paging.HypervisorVirtualEnd - 8, Paging.HypervisorVirtualEnd, ulong.MaxValue - 7, ScratchGuest.StackTop - 8, ScratchGuest.StackTop,
        ];
        foreach (ulong stack in stacks)
        {
            LoadIret(Rflags.InterruptEnable);
            Vcpu.Registers->Rsp = stack;
            CpuRegisters before = *Vcpu.Registers;
            VcpuExit exit = RunWatched(Guest);
            Assert.That(exit.Kind, Is.EqualTo(VcpuExitKind.Syscall), $"stack {stack:x}: {exit.Vector} {exit.Failure}");
            AssertUnchanged(before, HypercallNumber.Iret);
        }
    }

    [Test]
    public void TimersAreReported([Values(Look, Look + 1, (ulong)long.MaxValue, ulong.MaxValue)] ulong timeout)
    {
        LoadTimer(timeout);
        AssertIsServed();
        Assert.That(*Vcpu.EntryReport, Is.EqualTo(new EntryReport { SingleshotTimeout = timeout }));
    }

    [Test]
    public void ATimerThatMayBeDueBeforeTheNextLookIsLeft([Values(0UL, 1UL, Look - 1)] ulong timeout)
    {
        LoadTimer(timeout);
        AssertIsLeft(HypercallNumber.VcpuOp);
        Assert.That(Vcpu.EntryReport->SingleshotTimeout, Is.Zero);
    }

    [Test]
    public void OtherCommandsAndPointersAreLeft()
    {
        (ulong Command, ulong Vcpu, ulong Argument)[] calls =
        [
            (SetSingleshotTimer + 1, 0, ScratchGuest.DataAddress), (SetSingleshotTimer, 1, ScratchGuest.DataAddress), (SetSingleshotTimer, 0, 0),
            (SetSingleshotTimer, 0, 0x8000_0000_0000_0000), (SetSingleshotTimer, 0, Guest.Machine.MachineToPhysStart.Value),
            (SetSingleshotTimer, 0, Vcpu.Entry.Of32BitCode), (SetSingleshotTimer, 0, MonitorLayout.VcpuWindowsStart + Paging.PageSize),
            (SetSingleshotTimer, 0, Paging.HypervisorVirtualEnd - 8), (SetSingleshotTimer, 0, Paging.HypervisorVirtualEnd),
        ];
        foreach ((ulong command, ulong vcpu, ulong argument) in calls)
        {
            LoadTimer(Look);
            (Vcpu.Registers->Rdi, Vcpu.Registers->Rsi, Vcpu.Registers->Rdx) = (command, vcpu, argument);
            AssertIsLeft(HypercallNumber.VcpuOp);
            Assert.That(Vcpu.EntryReport->SingleshotTimeout, Is.Zero);
        }

        // Both are of 32 bits (do_vcpu_op).
        LoadTimer(Look);
        (Vcpu.Registers->Rdi, Vcpu.Registers->Rsi) = (SetSingleshotTimer | (1UL << 32), 1UL << 40);
        AssertSyscall(RunWatched(Guest));
        Assert.That(Vcpu.EntryReport->SingleshotTimeout, Is.EqualTo(Look));
    }

    [Test]
    public void AStackIsReported()
    {
        LoadCall(HypercallNumber.StackSwitch);
        (Vcpu.Registers->Rdi, Vcpu.Registers->Rsi) = (0x1_e028, 0x8000_1234_5678_9abc);
        AssertIsServed();
        Assert.That(
            *Vcpu.EntryReport, Is.EqualTo(new EntryReport { KernelSs = 0x1_e028, KernelSp = 0x8000_1234_5678_9abc }));
    }

    [Test]
    public void AGsBaseIsReported([Values(0UL, 0x7fff_ffff_ffffUL, 0xffff_8000_0000_0000UL, ulong.MaxValue)] ulong address)
    {
        LoadCall(HypercallNumber.SetSegmentBase);
        (Vcpu.Registers->Rdi, Vcpu.Registers->Rsi) = (1UL | (5UL << 32), address);
        AssertIsServed();
        Assert.That(*Vcpu.EntryReport, Is.EqualTo(new EntryReport { InactiveGsBase = address }));
    }

    [TestCase(0UL, 0x1000UL)]
    [TestCase(2UL, 0x1000UL)]
    [TestCase(3UL, 0UL)]
    [TestCase(4UL, 0x1000UL)]
    [TestCase(1UL, 0x8000_0000_0000UL)]
    [TestCase(1UL, 0xffff_7fff_ffff_ffffUL)]
    public void OtherSegmentBasesAreLeft(ulong which, ulong address)
    {
        LoadCall(HypercallNumber.SetSegmentBase);
        (Vcpu.Registers->Rdi, Vcpu.Registers->Rsi) = (which, address);
        AssertIsLeft(HypercallNumber.SetSegmentBase);
        Assert.That(*Vcpu.EntryReport, Is.EqualTo(default(EntryReport)));
    }

    /// <summary>A single step over the hypercall ends behind the instruction that follows it, as over every other.</summary>
    [TestCase(HypercallNumber.VcpuOp)]
    [TestCase(HypercallNumber.StackSwitch)]
    [TestCase(HypercallNumber.SetSegmentBase)]
    public void AHypercallThatIsSteppedOverIsLeft(HypercallNumber number)
    {
        Load(number);
        Vcpu.Registers->Rflags |= (ulong)Rflags.Trap;
        AssertIsLeft(number);
    }

    /// <summary>An interruption before any of the entry's instructions: the hypercall is made, with the registers that it had.</summary>
    [TestCase(HypercallNumber.Iret, 30)]
    [TestCase(HypercallNumber.VcpuOp, 22)]
    [TestCase(HypercallNumber.StackSwitch, 13)]
    [TestCase(HypercallNumber.SetSegmentBase, 18)]
    public void AnInterruptionAnywhereLeavesTheHypercallToTheManager(HypercallNumber number, int least)
    {
        const byte undefinedInstruction = 0x06;
        SyscallEntry entry = Vcpu.Entry;
        int interrupted = 0;
        foreach (ulong address in EntryCode.InstructionsOf(entry))
        {
            Load(number);
            CpuRegisters before = *Vcpu.Registers;
            ref byte code = ref entry.Code[(int)(address - entry.Of32BitCode)];
            byte kept = code;
            code = undefinedInstruction;
            AssertSyscall(RunWatched(Guest));
            code = kept;
            bool isServed = Vcpu.Registers->Rip != ScratchGuest.CodeAddress + 2;
            if (isServed)
                continue;
            interrupted++;
            AssertUnchanged(before, number);
        }

        Assert.That(interrupted, Is.GreaterThanOrEqualTo(least), "Those of the way were met.");
    }

    /// <summary>Kicks at any moment: each is taken note of, and nothing is lost or done by halves.</summary>
    [Test]
    public void KicksAtAnyMoment()
    {
        const ulong round = 0x1111_1111_1111_1111;
        Guest.Load(code =>
        {
            Label again = code.CreateLabel();
            Label failed = code.CreateLabel();
            code.Label(ref again);
            code.inc(r15);
            code.mov(eax, (int)HypercallNumber.VcpuOp);
            code.mov(edi, SetSingleshotTimer);
            code.xor(esi, esi);
            code.syscall();
            code.test(rax, rax);
            code.jne(failed);
            code.mov(eax, (int)HypercallNumber.Iret);
            code.syscall();
            code.Label(ref failed);
            code.ud2();
        });
        ulong* frame = (ulong*)HostAddress(Guest, Frame);
        WriteFrame(frame, ScratchGuest.CodeAddress, Frame, Rflags.InterruptEnable);
        frame[0] = frame[1] = frame[2] = round;
        *(ulong*)HostAddress(Guest, ScratchGuest.DataAddress) = Look;
        Vcpu.Registers->Rsp = Frame;
        Vcpu.Registers->Rdx = ScratchGuest.DataAddress;
        Vcpu.WaitForKick(0);
        using var kicker = new Background(stop =>
        {
            var random = new Random(2);
            for (int i = 0; i < 2000; i++)
            {
                while (Volatile.Read(ref *Vcpu.KickPending) != 0 && !stop.IsCancellationRequested)
                    Thread.SpinWait(10);
                Thread.SpinWait(random.Next(300));
                Vcpu.Kick();
            }
        });
        int left = 0;
        while (!kicker.IsDone)
        {
            // After the last kick, and before that is known, nothing else brings it back: what it calls is served without an exit.
            Vcpu.SetWakeTimer(Libc.MonotonicNow() + 100_000_000);
            VcpuExit exit = Vcpu.Run();
            if (exit.Kind == VcpuExitKind.Kicked)
                continue;
            AssertSyscall(exit);
            left++;
            CpuRegisters* registers = Vcpu.Registers;
            Assert.That(registers->Rsp, Is.EqualTo(Frame));
            if (registers->Rax == (ulong)HypercallNumber.VcpuOp)
            {
                Assert.That((registers->Rdi, registers->Rsi, registers->Rdx), Is.EqualTo(((ulong)SetSingleshotTimer, 0UL, ScratchGuest.DataAddress)));
                registers->Rax = 0;
                continue;
            }

            Assert.That(registers->Rax, Is.EqualTo((ulong)HypercallNumber.Iret));
            registers->Rip = ScratchGuest.CodeAddress;
            registers->Rflags = (ulong)Always; // R11, which SYSCALL had them in, may be the frame's already
            registers->Rcx = registers->R11 = registers->Rax = round;
        }

        Assert.That(Vcpu.Registers->R15, Is.GreaterThan((ulong)left));
        TestContext.Out.WriteLine($"{Vcpu.Registers->R15} rounds, {left} hypercalls left to the manager");
    }

    /// <summary>Wherever in the page a guest jumps to: it gets no more than it could do by itself, and the manager stays in charge.</summary>
    [Test]
    public void JumpsAnywhereIntoThePage()
    {
        for (ulong offset = 0; offset < Paging.PageSize; offset += offset < 0x240 ? 1UL : 0x3fUL)
        {
            VcpuExit exit = default;
            foreach (ulong value in (ulong[])[0, Frame, ulong.MaxValue])
            {
                Guest.Load(code => code.jmp(r8));
                CpuRegisters* registers = Vcpu.Registers;
                *registers = new CpuRegisters
                {
                    Rax = value, Rbx = value, Rcx = value, Rdx = value, Rsi = value, Rdi = value, R11 = value, Rsp = Frame, Rip = registers->Rip,
                    Rflags = registers->Rflags, R8 = Vcpu.Entry.Of32BitCode + offset,
                };
                Vcpu.SetWakeTimer(Libc.MonotonicNow() + 20_000_000);
                exit = Vcpu.Run();
                Vcpu.SetWakeTimer(long.MaxValue);
                Assert.That(exit.Kind, Is.Not.EqualTo(VcpuExitKind.Failed), () => $"offset {offset:x}: {exit.Failure}");
                Assert.That(Vcpu.Registers->Rflags & (ulong)(Rflags.Iopl | Rflags.Virtual8086), Is.Zero);
            }
        }
    }

    /// <summary>vcpu_info moves: the entry follows at the next entry.</summary>
    [Test]
    public void VcpuInfoMayMove()
    {
        LoadIret(Rflags.Fixed);
        AssertSyscall(RunWatched(Guest));
        Assert.That(Mask, Is.EqualTo(1));
        Mask = 0;
        Vcpu.ShowVcpuInfo(Guest.FirstDataFrame, 8);
        LoadIret(Rflags.Fixed);
        AssertSyscall(RunWatched(Guest));
        AssertReturned(Rflags.Fixed);
        Assert.That(Mask, Is.Zero);
        Assert.That(Guest.Machine.Memory.Page(Guest.FirstDataFrame)[9], Is.EqualTo(1));
    }

    /// <summary>iret with its frame, and at its target a SYSCALL that is not served.</summary>
    private void LoadIret(Rflags flags)
    {
        Guest.Load(code =>
        {
            code.syscall();
            while (code.Instructions.Count < (int)(Target - ScratchGuest.CodeAddress) - 1)
                code.nop();
            code.syscall();
        });
        WriteFrame((ulong*)HostAddress(Guest, Frame), Target, NewStack, flags);
        Vcpu.Registers->Rsp = Frame;
        Vcpu.Registers->Rax = (ulong)HypercallNumber.Iret;
    }

    private static void WriteFrame(ulong* frame, ulong rip, ulong stack, Rflags flags)
    {
        ReadOnlySpan<ulong> values = [0x5a5a, 0x1b1b, 0xc1c1, 0, rip, FlatSelectors.KernelCs64 | (1UL << 32), (ulong)flags, stack, FlatSelectors.Ring3Data];
        values.CopyTo(new Span<ulong>(frame, values.Length));
    }

    /// <summary>The SYSCALL behind it saw what the frame says; it has changed RCX and R11 since.</summary>
    private void AssertReturned(Rflags flags)
    {
        CpuRegisters* registers = Vcpu.Registers;
        Assert.That(registers->Rip, Is.EqualTo(Target + 2));
        Assert.That((registers->Rax, registers->Rsp), Is.EqualTo((0x5a5aUL, NewStack)));
        Assert.That((Rflags)registers->R11 & ~Rflags.Resume, Is.EqualTo(flags | Always));
    }

    /// <summary>A hypercall that the entry serves.</summary>
    private void Load(HypercallNumber number)
    {
        switch (number)
        {
            case HypercallNumber.Iret:
                LoadIret(Rflags.InterruptEnable);
                return;
            case HypercallNumber.VcpuOp:
                LoadTimer(Look);
                return;
            default:
                LoadCall(number);
                (Vcpu.Registers->Rdi, Vcpu.Registers->Rsi) = (1, ScratchGuest.DataAddress);
                return;
        }
    }

    private void LoadTimer(ulong timeout)
    {
        LoadCall(HypercallNumber.VcpuOp);
        *(ulong*)HostAddress(Guest, ScratchGuest.DataAddress) = timeout;
        Vcpu.Registers->Rdi = SetSingleshotTimer;
        Vcpu.Registers->Rsi = 0;
        Vcpu.Registers->Rdx = ScratchGuest.DataAddress;
    }

    /// <summary>A hypercall, and behind it another that shows its answer in R12 and is not served.</summary>
    private void LoadCall(HypercallNumber number)
    {
        Guest.Load(code =>
        {
            code.syscall();
            code.mov(r12, rax);
            code.mov(eax, (int)HypercallNumber.XenVersion);
            code.syscall();
        });
        Vcpu.Registers->Rax = (ulong)number;
        Vcpu.Registers->R12 = ulong.MaxValue;
        Vcpu.Registers->Rsp = Frame;
    }

    /// <summary>With all flags that a guest may have.</summary>
    private void AssertIsServed()
    {
        Vcpu.Registers->Rflags = (ulong)(Always | Rflags.Carry | Rflags.Direction | Rflags.Zero | Rflags.Overflow);
        CpuRegisters before = *Vcpu.Registers;
        AssertSyscall(RunWatched(Guest));
        CpuRegisters found = *Vcpu.Registers;
        Assert.That(found.R12, Is.Zero, "RAX after it: success");
        Assert.That((Rflags)found.R11 & ~Rflags.Resume, Is.EqualTo((Rflags)before.Rflags), "the flags, as the next SYSCALL saw them");
        (before.Rax, before.Rcx, before.R11, before.R12, before.Rip, before.Rflags) = (found.Rax, found.Rcx, found.R11, 0, found.Rip, found.Rflags);
        Assert.That(found, Is.EqualTo(before));
    }

    private void AssertIsLeft(HypercallNumber number)
    {
        CpuRegisters before = *Vcpu.Registers;
        AssertSyscall(RunWatched(Guest));
        AssertUnchanged(before, number);
    }

    private void AssertUnchanged(CpuRegisters before, HypercallNumber number)
    {
        before.Rax = (ulong)number;
        before.Rip = ScratchGuest.CodeAddress + 2;
        CpuRegisters found = *Vcpu.Registers;

        // Those that SYSCALL itself takes; iret finds them in its frame.
        before.Rcx = found.Rcx;
        before.R11 = found.R11;
        if (number == HypercallNumber.Iret)
            found.Rip = before.Rip;
        before.Rflags = found.Rflags = 0;
        Assert.That(found, Is.EqualTo(before));
    }
}
