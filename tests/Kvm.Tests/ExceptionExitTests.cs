// Every exception that code at CPL 3 can raise: vector, error code, RIP, CR2, and all other registers untouched.
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm.Tests;

public sealed unsafe class ExceptionExitTests : KvmTest
{
    private const ulong Start = ScratchGuest.CodeAddress;
    private const ulong NonCanonical = 0x8000_0000_0000_0000;
    private const ulong Unmapped = 0x50_0000;

    private ScratchGuest _guest = null!;

    [SetUp]
    public void MakeGuest() => _guest = NewGuest();

    [TearDown]
    public void DropGuest() => _guest?.Dispose();

    [Test]
    public void DivideError() => AssertException(code => code.div(rcx), ExceptionVector.DivideError);

    [Test]
    public void DivideOverflow()
        => AssertException(code => code.idiv(ecx), ExceptionVector.DivideError, (ref CpuRegisters registers) => (registers.Rdx, registers.Rcx) = (0x8000_0000, 1));

    [Test]
    public void SingleStep()
        => AssertException(code => code.nop(), ExceptionVector.Debug, (ref CpuRegisters registers) => registers.Rflags |= (ulong)Rflags.Trap, length: 1);

    [Test]
    public void SingleStepEveryInstruction()
    {
        _guest.Load(code =>
        {
            for (int i = 0; i < 50; i++)
                code.inc(rax);
        });
        _guest.Vcpu.Registers->Rflags |= (ulong)Rflags.Trap;
        for (ulong i = 1; i <= 50; i++)
        {
            VcpuExit exit = RunWatched(_guest);
            Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.Debug)), exit.Failure);
            Assert.That(_guest.Vcpu.Registers->Rax, Is.EqualTo(i));
            Assert.That(_guest.Vcpu.Registers->Rip, Is.EqualTo(Start + (3 * i)));
        }
    }

    [Test]
    public void SingleStepAfterQueuedStores()
    {
        if (!Capabilities.ShadowPageTables)
            _guest.Vcpu.PageTableWrites->Flush();
        else
            _guest.Vcpu.PageTableWrites->Repeat(_guest.DataEntryAddress);
        SingleStep();
    }

    [Test]
    public void HardwareBreakpoints()
    {
        // DR7: L0 and, for a data watch of eight bytes on writes, R/W0 = 1 and LEN0 = 2.
        const ulong execute = 0x401;
        const ulong write = 0x401 | (1 << 16) | (2 << 18);
        _guest.Vcpu.SetDebugRegisters([Start + 1, 0, 0, 0, 0, 0, 0xffff_0ff0, execute]);
        VcpuExit exit = RunCode(_guest, code =>
        {
            code.nop();
            code.inc(rax);
            code.syscall();
        });
        if (!Capabilities.DebugRegistersWork)
        {
            AssertSyscall(exit);
            return;
        }

        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.Debug)), exit.Failure);
        Assert.That((_guest.Vcpu.Registers->Rip, _guest.Vcpu.Registers->Rax), Is.EqualTo((Start + 1, 0UL)), "before the instruction");

        // RF lets it pass, as a debugger does.
        _guest.Vcpu.Registers->Rflags |= (ulong)Rflags.Resume;
        AssertSyscall(RunWatched(_guest));

        _guest.Vcpu.SetDebugRegisters([ScratchGuest.DataAddress, 0, 0, 0, 0, 0, 0xffff_0ff0, write]);
        exit = RunCode(_guest, code =>
        {
            code.nop();
            code.mov(__qword_ptr[ScratchGuest.DataAddress], rax);
            code.syscall();
        });
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.Debug)), exit.Failure);
        Assert.That(_guest.Vcpu.Registers->Rip, Is.EqualTo(Start + 9), "after the instruction");

        _guest.Vcpu.SetDebugRegisters([0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400]);
        AssertSyscall(RunWatched(_guest));
    }

    [Test]
    public void Breakpoint() => AssertException(code => code.int3(), ExceptionVector.Breakpoint, length: 1);

    [Test]
    public void Icebp()
    {
        // A trap on hardware; a page-table KVM reports it like a fault.
        VcpuExit exit = RunCode(_guest, code => code.int1());
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.Debug)), exit.Failure);
        Assert.That(_guest.Vcpu.Registers->Rip, Is.EqualTo(Start).Or.EqualTo(Start + 1));
    }

    [Test]
    public void UndefinedOpcodes()
    {
        AssertException(code => code.ud2(), ExceptionVector.InvalidOpcode);
        AssertException(code => code.db(0xce), ExceptionVector.InvalidOpcode); // INTO
        AssertException(code => code.db(0x06), ExceptionVector.InvalidOpcode); // PUSH ES
        AssertException(code => code.db(0x0f, 0x0a), ExceptionVector.InvalidOpcode);
        AssertException(code => code.db(0xf0, 0x90), ExceptionVector.InvalidOpcode); // LOCK NOP
    }

    [Test]
    public void DeviceNotAvailable()
    {
        _guest.Vcpu.SetTaskSwitched(true);
        foreach (Action<Assembler> use in (ReadOnlySpan<Action<Assembler>>)[code => code.fninit(), code => code.movaps(xmm0, xmm1)])
        {
            if (Capabilities.TaskSwitchedTraps)
            {
                AssertException(use, ExceptionVector.DeviceNotAvailable);
                continue;
            }

            AssertSyscall(RunCode(_guest, code =>
            {
                use(code);
                code.syscall();
            }));
        }

        _guest.Vcpu.SetTaskSwitched(false);
        AssertSyscall(RunCode(_guest, code =>
        {
            code.fninit();
            code.movaps(xmm0, xmm1);
            code.syscall();
        }));
    }

    [Test]
    public void TimeStampDisable()
    {
        _guest.Vcpu.SetTimeStampDisable(true);
        if (Capabilities.TimeStampDisableTraps)
            AssertException(code => code.rdtsc(), ExceptionVector.GeneralProtection);
        _guest.Vcpu.SetTimeStampDisable(false);
        AssertSyscall(RunCode(_guest, code =>
        {
            code.rdtsc();
            code.syscall();
        }));
    }

    private static IEnumerable<TestCaseData> Privileged()
    {
        yield return Case("hlt", code => code.hlt());
        yield return Case("cli", code => code.cli());
        yield return Case("sti", code => code.sti());
        yield return Case("clts", code => code.clts());
        yield return Case("invd", code => code.invd());
        yield return Case("wbinvd", code => code.wbinvd());
        yield return Case("invlpg", code => code.invlpg(__[rcx]));
        yield return Case("lgdt", code => code.lgdt(__[rcx]));
        yield return Case("lidt", code => code.lidt(__[rcx]));
        yield return Case("lldt", code => code.lldt(cx));
        yield return Case("ltr", code => code.ltr(cx));
        yield return Case("lmsw", code => code.lmsw(cx));
        yield return Case("mov to cr0", code => code.mov(cr0, rcx));
        yield return Case("mov from cr0", code => code.mov(rcx, cr0));
        yield return Case("mov to cr3", code => code.mov(cr3, rcx));
        yield return Case("mov from cr3", code => code.mov(rcx, cr3));
        yield return Case("mov to cr4", code => code.mov(cr4, rcx));
        yield return Case("mov to cr8", code => code.mov(cr8, rcx));
        yield return Case("mov to dr7", code => code.mov(dr7, rcx));
        yield return Case("mov from dr0", code => code.mov(rcx, dr0));
        yield return Case("rdmsr", code => code.rdmsr());
        yield return Case("wrmsr", code => code.wrmsr());
        yield return Case("xsetbv", code => code.xsetbv());
        yield return Case("swapgs", code => code.swapgs());
        yield return Case("sysretq", code => code.sysretq());
        yield return Case("out to a denied port", code => code.@out(0x80, al));
        yield return Case("in from a denied port", code => code.@in(eax, dx));
        yield return Case("outsb", code => code.outsb());

        static TestCaseData Case(string name, Action<Assembler> code) => new TestCaseData(code).SetArgDisplayNames(name);
    }

    [TestCaseSource(nameof(Privileged))]
    public void PrivilegedInstruction(Action<Assembler> code)
        => AssertException(
            code,
            ExceptionVector.GeneralProtection,
            (ref CpuRegisters registers) => (registers.Rcx, registers.Rdx, registers.Rsi) = (ScratchGuest.DataAddress, 0x3f8, ScratchGuest.DataAddress));

    [Test]
    public void NonCanonicalAddresses()
    {
        RegisterChange change = (ref CpuRegisters registers) => registers.Rcx = NonCanonical;
        AssertException(code => code.mov(rax, __qword_ptr[rcx]), ExceptionVector.GeneralProtection, change);
        AssertException(code => code.mov(__qword_ptr[rcx], rax), ExceptionVector.GeneralProtection, change);
    }

    [Test]
    public void NonCanonicalJump()
    {
        // Intel raises it at the jump, AMD too for near branches; a KVM may let the processor arrive first.
        VcpuExit exit = RunCode(_guest, code => code.jmp(rcx), (ref CpuRegisters registers) => registers.Rcx = NonCanonical);
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.GeneralProtection)), exit.Failure);
        Assert.That(_guest.Vcpu.Registers->Rip, Is.EqualTo(Start).Or.EqualTo(NonCanonical));
    }

    [Test]
    public void NonCanonicalStack()
    {
        RegisterChange change = (ref CpuRegisters registers) => registers.Rsp = NonCanonical;
        AssertException(code => code.push(rax), ExceptionVector.StackFault, change);
        AssertException(code => code.ud2(), ExceptionVector.InvalidOpcode, change);
        AssertException(code => code.div(rcx), ExceptionVector.DivideError, change);
        AssertSyscall(RunCode(_guest, code => code.syscall(), change));
        Assert.That(_guest.Vcpu.Registers->Rsp, Is.EqualTo(NonCanonical));

        // A page-table KVM makes #UD of INT3 here, and leaves RIP on it.
        VcpuExit exit = RunCode(_guest, code => code.int3(), change);
        Assert.That(
            (exit.Kind, exit.Vector, _guest.Vcpu.Registers->Rip),
            Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.Breakpoint, Start + 1))
                .Or.EqualTo((VcpuExitKind.Exception, ExceptionVector.InvalidOpcode, Start)), exit.Failure);
        Assert.That(_guest.Vcpu.Registers->Rsp, Is.EqualTo(NonCanonical));
    }

    private static IEnumerable<TestCaseData> PageFaults()
    {
        const PageFlags present = PageFlags.Present | PageFlags.User;
        const PageFlags data = present | PageFlags.Writable | PageFlags.NoExecute;
        foreach (PageFlags accessed in (PageFlags[])[PageFlags.None, PageFlags.Accessed | PageFlags.Dirty])
        {
            yield return Case("read, not present", PageFlags.None, false, false, PageFaultError.User);
            yield return Case("write, not present", PageFlags.None, true, false, PageFaultError.User | PageFaultError.Write);
            yield return Case("fetch, not present", PageFlags.None, false, true, PageFaultError.User | PageFaultError.InstructionFetch);
            yield return Case(
                "write, read-only", present, true, false, PageFaultError.User | PageFaultError.Write | PageFaultError.Present);
            yield return Case(
                "fetch, no-execute", data, false, true, PageFaultError.User | PageFaultError.InstructionFetch | PageFaultError.Present);
            yield return Case(
                "read, supervisor", data & ~PageFlags.User, false, false, PageFaultError.User | PageFaultError.Present);
            yield return Case(
                "write, supervisor", data & ~PageFlags.User, true, false, PageFaultError.User | PageFaultError.Write | PageFaultError.Present);

            TestCaseData Case(string name, PageFlags flags, bool write, bool fetch, PageFaultError expected)
                => new TestCaseData(flags == PageFlags.None ? flags : flags | accessed, write, fetch, expected)
                    .SetArgDisplayNames(name, accessed == PageFlags.None ? "untouched" : "touched");
        }
    }

    [TestCaseSource(nameof(PageFaults))]
    public void PageFault(PageFlags flags, bool write, bool fetch, PageFaultError expected)
    {
        const ulong address = ScratchGuest.DataAddress + 0x128;
        *_guest.DataEntry = new PageTableEntry(_guest.FirstDataFrame, flags);
        VcpuExit exit = RunCode(
            _guest,
            code =>
            {
                if (fetch)
                    code.jmp(rcx);
                else if (write)
                    code.mov(__byte_ptr[rcx], al);
                else
                    code.mov(al, __byte_ptr[rcx]);
            },
            (ref CpuRegisters registers) => registers.Rcx = address);
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.PageFault)), exit.Failure);
        Assert.That((PageFaultError)exit.ErrorCode, Is.EqualTo(expected));
        Assert.That(_guest.Vcpu.FaultAddress.Value, Is.EqualTo(address));
        Assert.That(_guest.Vcpu.Registers->Rip, Is.EqualTo(fetch ? address : Start));
    }

    /// <summary>A write that begins in one page and faults in the next names the second, and changed nothing.</summary>
    [Test]
    public void PageFaultAcrossABoundary()
    {
        const ulong address = ScratchGuest.DataAddress - 4;
        *_guest.DataEntry = default;
        *(uint*)HostAddress(_guest, address) = 0;
        AssertException(code => code.mov(__qword_ptr[rcx], rax), ExceptionVector.PageFault, (ref CpuRegisters registers) => (registers.Rcx, registers.Rax) = (address, ulong.MaxValue), errorCode: (uint)(PageFaultError.User | PageFaultError.Write));
        Assert.That(_guest.Vcpu.FaultAddress.Value, Is.EqualTo(ScratchGuest.DataAddress));
        Assert.That(*(uint*)HostAddress(_guest, address), Is.Zero);
    }

    [Test]
    public void PageFaultOnAMissingTable()
    {
        foreach (ulong address in (ReadOnlySpan<ulong>)[Unmapped, 0x4000_0000, 0x80_0000_0000, 0xffff_ffff_8000_0000, 0xffff_8800_0000_0000])
        {
            AssertException(
                code => code.mov(rax, __qword_ptr[rcx]), ExceptionVector.PageFault, (ref CpuRegisters registers) => registers.Rcx = address, errorCode: (uint)PageFaultError.User);
            Assert.That(_guest.Vcpu.FaultAddress.Value, Is.EqualTo(address));
        }
    }

    [Test]
    public void ReservedBit()
    {
        *_guest.DataEntry = new PageTableEntry(_guest.DataEntry->Value | (1UL << 51));
        AssertException(
            code => code.mov(rax, __qword_ptr[rcx]),
            ExceptionVector.PageFault,
            (ref CpuRegisters registers) => registers.Rcx = ScratchGuest.DataAddress,
            errorCode: (uint)(PageFaultError.User | PageFaultError.Present | PageFaultError.ReservedBit));
    }

    [Test]
    public void AlignmentCheck()
        => AssertException(
            code => code.mov(rax, __qword_ptr[rcx]),
            ExceptionVector.AlignmentCheck,
            (ref CpuRegisters registers) =>
            {
                registers.Rcx = ScratchGuest.DataAddress + 1;
                registers.Rflags |= (ulong)Rflags.AlignmentCheck;
            });

    [Test]
    public void X87Error()
    {
        VcpuExit exit = RunCode(_guest, code =>
        {
            code.fninit();
            code.mov(__dword_ptr[ScratchGuest.DataAddress], 0x360); // all exceptions unmasked but the denormal one
            code.fldcw(__word_ptr[ScratchGuest.DataAddress]);
            code.fld1();
            code.fldz();
            code.fdivp(st1, st0);
            code.wait();
            code.syscall();
        });
        Assert.That((exit.Kind, exit.Vector, exit.ErrorCode), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.X87Error, 0U)), exit.Failure);
    }

    [Test]
    public void SimdError()
    {
        VcpuExit exit = RunCode(_guest, code =>
        {
            code.mov(__dword_ptr[ScratchGuest.DataAddress], 0);
            code.ldmxcsr(__dword_ptr[ScratchGuest.DataAddress]);
            code.mov(eax, 1);
            code.cvtsi2sd(xmm0, eax);
            code.xorpd(xmm1, xmm1);
            code.divsd(xmm0, xmm1);
            code.syscall();
        });
        Assert.That((exit.Kind, exit.Vector, exit.ErrorCode), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.SimdError, 0U)), exit.Failure);
    }

    /// <summary>Whatever the vector, CPL 3 gets no gate but INT3's and INTO's: #GP with the vector as hardware says, or #UD where KVM says so.</summary>
    [Test]
    public void SoftwareInterrupts()
    {
        for (int vector = 0; vector < 256; vector++)
        {
            VcpuExit exit = RunCode(_guest, code =>
            {
                code.db(0xcd, (byte)vector);
                code.syscall();
            });
            if (vector is 3 or 4)
            {
                Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, (ExceptionVector)vector)), exit.Failure);
                Assert.That(_guest.Vcpu.Registers->Rip, Is.EqualTo(Start + 2), "a gate that CPL 3 may use");
                continue;
            }

            if (vector is 0x17 or 0x19 or 0x1a && Capabilities.SoftwareInterruptVector == ExceptionVector.InvalidOpcode)
            {
                // A page-table KVM keeps three vectors for itself; the guest gets no further than the next instruction by them.
                Assert.That(_guest.Vcpu.Registers->Rip, Is.EqualTo(Start + 2).Or.EqualTo(Start + 4), $"int {vector:x}: {exit}");
                continue;
            }

            Assert.That(exit.Kind, Is.EqualTo(VcpuExitKind.Exception), exit.Failure);

            Assert.That(exit.Vector, Is.EqualTo(Capabilities.SoftwareInterruptVector), $"int {vector:x}");
            Assert.That(_guest.Vcpu.Registers->Rip, Is.EqualTo(Start), $"int {vector:x}");
            if (exit.Vector == ExceptionVector.GeneralProtection)
                Assert.That(exit.ErrorCode, Is.EqualTo((uint)(vector << 3) | 2), "IDT bit and vector");
        }
    }

    [Test]
    public void OtherWaysIntoAKernel()
    {
        foreach (Action<Assembler> way in (ReadOnlySpan<Action<Assembler>>)
            [code => code.sysenter(), code => code.vmcall(), code => code.vmmcall(), code => code.clac(), code => code.stac(), code => code.monitor(), code => code.mwait()])
        {
            VcpuExit exit = RunCode(_guest, code =>
            {
                way(code);
                code.syscall();
            });
            Assert.That(exit.Kind, Is.EqualTo(VcpuExitKind.Exception).Or.EqualTo(VcpuExitKind.Syscall), exit.Failure);
        }
    }

    /// <summary>Runs one instruction; RIP must be on it, or behind it by its length for a trap.</summary>
    private void AssertException(Action<Assembler> code, ExceptionVector vector, RegisterChange? change = null, ulong length = 0, uint errorCode = 0)
    {
        _guest.Load(assembler =>
        {
            code(assembler);
            assembler.nop();
            assembler.syscall();
        });
        CpuRegisters* registers = _guest.Vcpu.Registers;
        CpuRegisters intended = *registers;
        new Random((int)vector).NextBytes(new Span<byte>(&intended.R8, 8 * sizeof(ulong)));
        change?.Invoke(ref intended);
        *registers = intended;
        VcpuExit exit = RunWatched(_guest);
        Assert.That((exit.Kind, exit.Vector, exit.ErrorCode), Is.EqualTo((VcpuExitKind.Exception, vector, errorCode)), exit.Failure);
        Assert.That(registers->Rip, Is.EqualTo(Start + length));
        intended.Rip = registers->Rip;
        Assert.That(registers->Rflags & ~(ulong)Rflags.Resume, Is.EqualTo(intended.Rflags), "RFLAGS");
        intended.Rflags = registers->Rflags;
        Assert.That(*registers, Is.EqualTo(intended));
        Assert.That(_guest.Vcpu.Segments->Cs, Is.EqualTo(FlatSelectors.Ring3Cs64));
        Assert.That(_guest.Vcpu.Segments->Ss, Is.EqualTo(FlatSelectors.Ring3Data));
    }
}
