// SYSCALL out of the guest: the instruction itself, and guest code that only pretends.
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm.Tests;

public sealed unsafe class SyscallExitTests : KvmTest
{
    private const ulong AfterFirstInstruction = ScratchGuest.CodeAddress + 2;
    private const Rflags Always = Rflags.Fixed | Rflags.InterruptEnable;

    private ScratchGuest _guest = null!;

    private static IEnumerable<Rflags> FlagCombinations()
    {
        Rflags[] bits = [Rflags.Carry, Rflags.Zero, Rflags.Direction, Rflags.Overflow, Rflags.AlignmentCheck, Rflags.Id];
        for (int mask = 0; mask < 1 << bits.Length; mask++)
            yield return bits.Where((_, bit) => (mask & (1 << bit)) != 0).Aggregate(Always, (all, one) => all | one);
    }

    [SetUp]
    public void MakeGuest() => _guest = NewGuest();

    [TearDown]
    public void DropGuest() => _guest?.Dispose();

    [Test]
    public void FlagsRipAndRegistersComeBack()
    {
        foreach (Rflags flags in FlagCombinations())
        {
            _guest.Load(code => code.syscall());
            CpuRegisters* registers = _guest.Vcpu.Registers;
            new Random((int)flags).NextBytes(new Span<byte>(registers, sizeof(CpuRegisters) - (2 * sizeof(ulong))));
            registers->Rflags = (ulong)flags;
            CpuRegisters intended = *registers;
            AssertSyscall(RunWatched(_guest));
            intended.Rip = intended.Rcx = AfterFirstInstruction;
            intended.R11 = registers->R11;
            Assert.That(registers->R11 & ~(ulong)Rflags.Resume, Is.EqualTo((ulong)flags), "R11 holds the flags before.");
            Assert.That(registers->Rflags & ~(ulong)Rflags.Resume, Is.EqualTo((ulong)flags), "RFLAGS are those before.");
            intended.Rflags = registers->Rflags;
            Assert.That(*registers, Is.EqualTo(intended), flags.ToString());
            Assert.That(_guest.Vcpu.Segments->Cs, Is.EqualTo(FlatSelectors.Ring3Cs64));
            Assert.That(_guest.Vcpu.Segments->Ss, Is.EqualTo(FlatSelectors.Ring3Data));
        }
    }

    [Test]
    public void ReturnContinuesBehindIt()
    {
        _guest.Load(code =>
        {
            code.syscall();
            code.inc(rbx);
            code.syscall();
        });
        for (int i = 0; i < 2; i++)
            AssertSyscall(RunWatched(_guest));
        Assert.That(_guest.Vcpu.Registers->Rbx, Is.EqualTo(1));
    }

    /// <summary>The entry clears TF, so the single step happens once the guest runs on, and shows TF still set.</summary>
    [Test]
    public void SingleStepOverIt()
    {
        VcpuExit exit = RunCode(
            _guest,
            code =>
            {
                code.syscall();
                code.nop();
                code.nop();
            },
            (ref CpuRegisters registers) => registers.Rflags |= (ulong)Rflags.Trap);
        AssertSyscall(exit);
        Assert.That(_guest.Vcpu.Registers->Rip, Is.EqualTo(AfterFirstInstruction));
        Assert.That(_guest.Vcpu.Registers->Rflags & (ulong)Rflags.Trap, Is.Not.Zero);
        exit = RunWatched(_guest);
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.Debug)), exit.Failure);
        Assert.That(_guest.Vcpu.Registers->Rip, Is.EqualTo(AfterFirstInstruction + 1));
    }

    /// <summary>A jump to the entry page where the guest can reach it is no more than a SYSCALL, and brings no privilege along.</summary>
    [Test]
    public void JumpToTheEntryPageGivesNoPrivilege([Values] bool of32BitCode)
    {
        const ulong continuation = ScratchGuest.CodeAddress + 0x100;
        const Rflags forbidden = Rflags.Iopl | Rflags.Virtual8086 | Rflags.VirtualInterrupt | Rflags.VirtualInterruptPending;
        ulong entry = of32BitCode ? _guest.Vcpu.Entry.Of32BitCode : _guest.Vcpu.Entry.Of64BitCode;
        VcpuExit exit = RunCode(
            _guest,
            code => code.jmp(rax),
            (ref CpuRegisters registers) =>
            {
                registers.Rax = entry;
                registers.Rcx = continuation;
                registers.R11 = (ulong)forbidden;
            });
        if (Capabilities.SyscallEntryLevel == 0)
        {
            Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.PageFault)), exit.Failure);
            return;
        }

        AssertSyscall(exit);
        Assert.That(
            (_guest.Vcpu.Registers->Rip, _guest.Vcpu.Segments->Cs),
            Is.EqualTo((continuation, of32BitCode ? FlatSelectors.Ring3Cs32 : FlatSelectors.Ring3Cs64)));
        Assert.That((Rflags)_guest.Vcpu.Registers->Rflags, Is.EqualTo(Always), "No flag that CPL 3 cannot set itself.");
    }

    /// <summary>Behind the 32-bit entry is an undefined opcode, and the page's end is empty.</summary>
    [Test]
    public void JumpBehindTheEntry([Values(2, 0xfff)] int offset)
    {
        ulong entry = _guest.Vcpu.Entry.Of32BitCode;
        VcpuExit exit = RunCode(_guest, code => code.jmp(rax), (ref CpuRegisters registers) => registers.Rax = entry + (ulong)offset);
        Assert.That(exit.Kind, Is.EqualTo(VcpuExitKind.Exception), exit.Failure);
        Assert.That(
            _guest.Vcpu.Registers->Rip,
            Is.InRange(entry + (ulong)offset, entry + Paging.PageSize),
            "The guest is told where it was, not where the monitor is.");
    }

    /// <summary>The one port that CPL 3 may use: from guest code it is I/O, not SYSCALL, and RIP is still on it.</summary>
    [Test]
    public void MonitorPortUsedByTheGuest()
    {
        AssertGuestIo(code => code.@out(MonitorLayout.SyscallPort, al));
        AssertGuestIo(code => code.@in(al, MonitorLayout.SyscallPort));
        AssertGuestIo(code => code.@out(dx, al));
        AssertGuestIo(code => code.@in(al, dx));
    }

    /// <summary>What the guest's own I/O was answered with stays, however KVM had meant to complete the instruction.</summary>
    [Test]
    public void AnswerToGuestIoStays()
    {
        RequireOpenPort();
        _guest.Load(code =>
        {
            code.@in(al, MonitorLayout.SyscallPort);
            code.inc(rbx);
            code.syscall();
        });
        Assert.That(RunWatched(_guest).Kind, Is.EqualTo(VcpuExitKind.GuestIo));
        _guest.Vcpu.Registers->Rip += 2;
        _guest.Vcpu.Registers->Rax = 0x1122_3344_5566_7788;
        _guest.Vcpu.Registers->R15 = 15;
        AssertSyscall(RunWatched(_guest));
        Assert.That(_guest.Vcpu.Registers->Rax, Is.EqualTo(0x1122_3344_5566_7788));
        Assert.That(_guest.Vcpu.Registers->R15, Is.EqualTo(15));
        Assert.That(_guest.Vcpu.Registers->Rbx, Is.EqualTo(1));
        Assert.That(_guest.Vcpu.Registers->Rip, Is.EqualTo(ScratchGuest.CodeAddress + 7));
    }

    /// <summary>An I/O instruction that is answered by an exception handler elsewhere, as a refusal is.</summary>
    [Test]
    public void GuestIoMayBeContinuedElsewhere()
    {
        RequireOpenPort();
        foreach (bool input in (ReadOnlySpan<bool>)[true, false])
        {
            _guest.Load(code =>
            {
                if (input)
                    code.@in(al, MonitorLayout.SyscallPort);
                else
                    code.@out(MonitorLayout.SyscallPort, al);
                code.ud2();
                code.syscall();
            });
            Assert.That(RunWatched(_guest).Kind, Is.EqualTo(VcpuExitKind.GuestIo));
            _guest.Vcpu.Registers->Rip = ScratchGuest.CodeAddress + 4;
            _guest.Vcpu.Registers->Rax = 7;
            AssertSyscall(RunWatched(_guest));
            Assert.That(_guest.Vcpu.Registers->Rax, Is.EqualTo(7));
        }
    }

    [Test]
    public void MonitorPortUsedByStringInstructions()
    {
        RequireOpenPort();
        foreach (bool input in (ReadOnlySpan<bool>)[true, false])
        {
            VcpuExit exit = RunCode(
                _guest,
                code =>
                {
                    if (input)
                        code.rep.insb();
                    else
                        code.rep.outsb();
                },
                (ref CpuRegisters registers) =>
                {
                    registers.Rdx = MonitorLayout.SyscallPort;
                    registers.Rsi = registers.Rdi = ScratchGuest.DataAddress;
                    registers.Rcx = 3;
                });
            Assert.That(exit.Kind, Is.EqualTo(VcpuExitKind.GuestIo).Or.EqualTo(VcpuExitKind.Exception), exit.Failure);
            Assert.That(_guest.Vcpu.Registers->Rip, Is.EqualTo(ScratchGuest.CodeAddress));
        }
    }

    /// <summary>Two bytes at the open port reach into the next one, which is closed.</summary>
    [Test]
    public void WiderUseOfTheMonitorPortIsRefused()
    {
        VcpuExit exit = RunCode(_guest, code => code.@out(MonitorLayout.SyscallPort, ax));
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.GeneralProtection)), exit.Failure);
        exit = RunCode(_guest, code => code.@in(eax, MonitorLayout.SyscallPort));
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.GeneralProtection)), exit.Failure);
    }

    private static void RequireOpenPort()
    {
        if (Capabilities.SyscallEntryLevel == 0)
            Assert.Pass("This host enters SYSCALL at CPL 0: no port is open at CPL 3, so there is nothing to answer.");
    }

    private void AssertGuestIo(Action<Assembler> instruction)
    {
        VcpuExit exit = RunCode(_guest, instruction, (ref CpuRegisters registers) => registers.Rdx = MonitorLayout.SyscallPort);
        if (Capabilities.SyscallEntryLevel == 0)
            Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.GeneralProtection)), exit.Failure);
        else
            Assert.That(exit.Kind, Is.EqualTo(VcpuExitKind.GuestIo), exit.Failure);
        Assert.That(_guest.Vcpu.Registers->Rip, Is.EqualTo(ScratchGuest.CodeAddress));
    }
}
