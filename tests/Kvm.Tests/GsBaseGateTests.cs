// RDMSR of user mode's GS base, which the gate of #GP makes inside the VM, and what is left to the manager.
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm.Tests;

public sealed unsafe class GsBaseGateTests : EntryTest
{
    private const ulong UserGs = 0x7f12_3456_7000;
    private const ulong Rax = 0x1111_2222_3333_4444;
    private const ulong Rdx = 0x5555_6666_7777_8888;

    /// <summary>Where <see cref="LoadRead"/> has its RDMSR.</summary>
    private const ulong Read = ScratchGuest.CodeAddress;

    private CpuRegisters* Registers => Guest.Vcpu.Registers;

    [TestCase(0UL)]
    [TestCase(UserGs)]
    [TestCase(0xffff_8880_9abc_def0UL)]
    public void KernelModeFindsIt(ulong value)
    {
        LoadRead(code => code.rdmsr());
        Vcpu.EntryReport->InactiveGsBase = value;
        Registers->Rflags = (ulong)(Always | Rflags.Carry | Rflags.Direction);
        CpuRegisters before = *Registers;
        AssertException(RunWatched(Guest), Read + 2);
        (before.Rax, before.Rdx, before.Rip) = ((uint)value, value >> 32, Read + 2);
        AssertRegisters(before);
    }

    [TestCase("not served")]
    [TestCase("another register")]
    [TestCase("another place")]
    [TestCase("a prefix before it")]
    [TestCase("another instruction there")]
    [TestCase("user mode")]
    [TestCase("user mode that is served too")]
    public void WhatIsLeftIsAsItWas(string why)
    {
        LoadRead(code =>
        {
            if (why == "a prefix before it")
                code.db(0x66);
            if (why == "another instruction there")
                code.wrmsr();
            else
                code.rdmsr();
        });
        switch (why)
        {
            case "not served":
                Vcpu.EntryService->GsBaseRead = 0;
                break;
            case "another register":
                Registers->Rcx = Msr.KernelGsBase - 1;
                break;
            case "another place":
                Vcpu.EntryService->GsBaseRead = Read + 1;
                break;
            case "user mode":
            case "user mode that is served too":
                Mfn userRoot = MakeUserRoot();
                *Vcpu.EntryService = *Vcpu.EntryService with
                {
                    ModeSwitch = why == "user mode" ? 0 : 1, KernelRoot = Vcpu.PageTableRoot.Value, UserRoot = userRoot.Value,
                };
                Vcpu.PageTableRoot = userRoot;
                break;
        }

        CpuRegisters before = *Registers;
        AssertException(RunWatched(Guest), Read);
        AssertRegisters(before);
    }

    /// <summary>The trap behind the instruction is the manager's to raise.</summary>
    [Test]
    public void ASingleStepIsLeft()
    {
        LoadRead(code => code.rdmsr());
        Registers->Rflags |= (ulong)Rflags.Trap;
        CpuRegisters before = *Registers;
        AssertException(RunWatched(Guest), Read);
        AssertRegisters(before);
    }

    /// <summary>The processor looks at ECX.</summary>
    [Test]
    public void TheUpperHalfOfRcxDoesNotCount()
    {
        LoadRead(code => code.rdmsr());
        Registers->Rcx = Msr.KernelGsBase | (7UL << 32);
        AssertException(RunWatched(Guest), Read + 2);
        Assert.That((Registers->Rax, Registers->Rdx), Is.EqualTo((UserGs & uint.MaxValue, UserGs >> 32)));
    }

    /// <summary>Two places that take turns: each is served from the entry on for which it is said.</summary>
    [Test]
    public void ThePlaceMayChange()
    {
        LoadRead(code =>
        {
            code.rdmsr();
            code.mov(r8, rax);
            code.rdmsr();
        });
        AssertException(RunWatched(Guest), Read + 5);
        Vcpu.EntryService->GsBaseRead = Read + 5;
        AssertException(RunWatched(Guest), Read + 7);
        Assert.That(Registers->R8, Is.EqualTo(UserGs & uint.MaxValue));
        Registers->Rip = Read;
        AssertException(RunWatched(Guest), Read);
    }

    /// <summary>Another vCPU may take the instruction's page away before the gate looks at it: then the guest finds that by itself.</summary>
    [Test]
    public void TheInstructionsPageComesAndGoes()
    {
        const ulong otherCode = Read + Paging.PageSize;
        LoadRead(code =>
        {
            code.rdmsr();
            code.inc(r15);
            code.mov(r14d, eax);
            code.jmp(Read);
        });
        var assembler = new Assembler(64);
        Label again = MonitorCode.Here(assembler);
        foreach (AssemblerRegister64 entry in (AssemblerRegister64[])[rax, rbx])
        {
            assembler.mov(__qword_ptr[ScratchGuest.DataAddress], entry);
            assembler.mov(ecx, 200);
            Label wait = MonitorCode.Here(assembler);
            assembler.pause();
            assembler.dec(ecx);
            assembler.jne(wait);
        }

        assembler.jmp(again);
        byte[] bytes = MonitorCode.Emit(assembler, otherCode, out _);
        bytes.CopyTo(new Span<byte>(HostAddress(Guest, otherCode), bytes.Length));
        PageTableEntry* table = Guest.CodeEntry;
        *Guest.DataEntry = new PageTableEntry(Guest.DataEntryAddress.Frame, table->Flags);
        using KvmVirtualCpu second = Guest.Machine.CreateKvmVcpu(1);
        second.PageTableRoot = Vcpu.PageTableRoot;
        *second.Registers = *Registers with { Rip = otherCode, Rax = 0, Rbx = *(ulong*)table };
        *second.Segments = *Vcpu.Segments;
        VcpuExit other = default;
        int gone = 0;
        ulong reads = 0;
        using (new Background(() => other = second.Run()))
        {
            try
            {
                long end = Libc.MonotonicNow() + 20_000_000_000;
                while ((gone < 10 || reads < 100) && Libc.MonotonicNow() < end)
                {
                    Vcpu.SetWakeTimer(end);
                    VcpuExit exit = Vcpu.Run();
                    Assert.That(
                        exit.Kind == VcpuExitKind.Kicked || (exit.Kind, exit.Vector) == (VcpuExitKind.Exception, ExceptionVector.PageFault),
                        () => $"{exit.Kind} {exit.Vector} {exit.Failure} at {Registers->Rip:x}");
                    Assert.That(Registers->Rip - Read, Is.LessThan(16));

                    // Nobody kicks but the timer, at the end.
                    gone += exit.Kind == VcpuExitKind.Kicked && Libc.MonotonicNow() < end ? 1 : 0;
                    reads = Registers->R15;
                }
            }
            finally
            {
                second.Kick();
            }
        }

        Assert.That(other.Kind, Is.EqualTo(VcpuExitKind.Kicked), other.Failure);
        Assert.That(gone, Is.GreaterThan(0), "the page was gone for the gate");
        Assert.That(reads, Is.GreaterThanOrEqualTo(100));
        Assert.That(Registers->R14, Is.EqualTo(UserGs & uint.MaxValue));
    }

    /// <summary>A kick in the midst of it: it has not been made, or has been.</summary>
    [Test]
    public void KicksAtAnyMoment()
    {
        Guest.Load(code =>
        {
            Label read = code.CreateLabel();
            Label wrong = code.CreateLabel();
            code.Label(ref read);
            code.rdmsr();
            code.inc(r15);
            code.shl(rdx, 32);
            code.or(rax, rdx);
            code.cmp(rax, r14);
            code.jne(wrong);
            code.mov(edx, 0x5a5a);
            code.jmp(read);
            code.Label(ref wrong);
            code.hlt();
        });
        Vcpu.EntryService->GsBaseRead = Read;
        Vcpu.EntryReport->InactiveGsBase = UserGs;
        Registers->R14 = UserGs;
        Registers->Rcx = Msr.KernelGsBase;
        using Background kicker = KickAtRandom(9);
        ulong reads = 0;
        while (!kicker.IsDone)
        {
            Vcpu.SetWakeTimer(Libc.MonotonicNow() + 100_000_000);
            VcpuExit exit = Vcpu.Run();
            Assert.That(exit.Kind, Is.EqualTo(VcpuExitKind.Kicked), () => $"{exit.Vector} {exit.Failure} at {Registers->Rip:x}");
            Assert.That(Registers->Rip - Read, Is.LessThan(64));
            Assert.That(Registers->R15, Is.GreaterThanOrEqualTo(reads));
            reads = Registers->R15;
        }

        Assert.That(reads, Is.GreaterThan(1000));
        TestContext.Out.WriteLine($"{reads} reads");
    }

    /// <summary>Code that begins with an RDMSR, which is served, and the registers for it.</summary>
    private void LoadRead(Action<Assembler> code)
    {
        Guest.Load(assembler =>
        {
            code(assembler);
            assembler.hlt();
        });
        Vcpu.EntryService->GsBaseRead = Read;
        Vcpu.EntryReport->InactiveGsBase = UserGs;
        (Registers->Rcx, Registers->Rax, Registers->Rdx) = (Msr.KernelGsBase, Rax, Rdx);
    }

    /// <summary>#GP at an address: of an RDMSR that is left, or of the HLT behind the code.</summary>
    private void AssertException(VcpuExit exit, ulong rip)
    {
        Assert.That((exit.Kind, exit.Vector, exit.ErrorCode), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.GeneralProtection, 0U)), exit.Failure);
        Assert.That(Registers->Rip, Is.EqualTo(rip));
    }

    private void AssertRegisters(CpuRegisters expected)
    {
        CpuRegisters found = *Registers;

        // What a fault is pushed with.
        found.Rflags &= ~(ulong)Rflags.Resume;
        expected.Rflags &= ~(ulong)Rflags.Resume;
        Assert.That(found, Is.EqualTo(expected));
    }
}
