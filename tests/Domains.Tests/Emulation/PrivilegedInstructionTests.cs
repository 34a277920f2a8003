using Iced.Intel;
using XenSharp.Core;
using XenSharp.Domains.Emulation;
using XenSharp.Domains.Hypercalls;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Domains.Tests.Emulation;

/// <summary>Control and debug registers, time, interrupts and segments, one instruction form after the other.</summary>
public sealed unsafe class PrivilegedInstructionTests
{
    private FakeGuest _guest = null!;

    [SetUp]
    public void CreateGuest() => _guest = new FakeGuest();

    [TearDown]
    public void DisposeGuest() => _guest.Dispose();

    private void Expect(Action<Assembler> code, EmulationResult expected)
    {
        CpuRegisters before = *_guest.Registers;
        int length = _guest.Load(code);
        Assert.That(_guest.Emulator.GeneralProtection(0), Is.EqualTo(expected));
        Assert.That(_guest.Rip, Is.EqualTo(before.Rip + (expected.Outcome == EmulationOutcome.Done ? (uint)length : 0)));
        if (expected.Outcome != EmulationOutcome.Done)
        {
            Assert.That(_guest.Calls, Is.Empty);
            Assert.That(*_guest.Registers, Is.EqualTo(before));
        }
    }

    private void ExpectDone(Action<Assembler> code) => Expect(code, EmulationResult.Done);

    private void ExpectBounce(Action<Assembler> code) => Expect(code, EmulationResult.NotHandled);

    [Test]
    public void Cr0ShowsXensBitsAndTs()
    {
        ExpectDone(c => c.mov(rax, cr0));
        Assert.That(_guest.Registers->Rax, Is.EqualTo(0x8005_0033));
        _guest.State->TaskSwitched = 1;
        ExpectDone(c => c.mov(r15, cr0));
        Assert.That(_guest.Registers->R15, Is.EqualTo(0x8005_003b));
    }

    [Test]
    public void Cr0LetsOnlyTsChange()
    {
        _guest.Registers->Rbx = 0x8005_003b;
        ExpectDone(c => c.mov(cr0, rbx));
        Assert.That(_guest.State->TaskSwitched, Is.EqualTo(1));
        ExpectDone(c => c.clts());
        Assert.That(_guest.State->TaskSwitched, Is.Zero);
        Assert.That(_guest.Calls, Is.EqualTo(new[] { "TS True", "TS False" }));
        _guest.Calls.Clear();
        _guest.Registers->Rbx = 0x8004_0033;
        ExpectBounce(c => c.mov(cr0, rbx));
        _guest.Registers->Rbx = 0x1_8005_0033;
        ExpectBounce(c => c.mov(cr0, rbx));
    }

    [Test]
    public void Cr2IsTheGuestsOwn()
    {
        ExpectDone(c => c.mov(cr2, rsp));
        Assert.That(_guest.Info->Cr2, Is.EqualTo(_guest.Registers->Rsp));
        _guest.Info->Cr2 = 0xdead_b000;
        ExpectDone(c => c.mov(rsi, cr2));
        Assert.That(_guest.Registers->Rsi, Is.EqualTo(_guest.Registers->Rsp), "vcpu_info has a copy only");
    }

    [Test]
    public void Cr3NamesTheMachineFrame()
    {
        ExpectDone(c => c.mov(rdi, cr3));
        Assert.That(_guest.Registers->Rdi, Is.EqualTo(_guest.State->KernelRoot << 12));
        _guest.Registers->Rdi = 0x1234_5000;
        ExpectDone(c => c.mov(cr3, rdi));
        Assert.That(_guest.Calls, Is.EqualTo(new[] { "CR3 12345" }));
    }

    [Test]
    public void Cr3ThatFailsIsBouncedAndOneThatContinuesIsExecutedAgain()
    {
        _guest.RootAnswer = Errno.EINVAL;
        Assert.That(_guest.Execute(c => c.mov(cr3, rax)), Is.EqualTo(EmulationResult.NotHandled));
        _guest.RootAnswer = Errno.ERESTART;
        Assert.That(_guest.Execute(c => c.mov(cr3, rax)), Is.EqualTo(EmulationResult.Done));
        Assert.That(_guest.Rip, Is.EqualTo(FakeGuest.CodeStart));
    }

    [Test]
    public void Cr4KeepsOnlyWhatAGuestMayChoose()
    {
        ExpectDone(c => c.mov(rax, cr4));
        Assert.That(_guest.Registers->Rax, Is.EqualTo(0x660));
        _guest.Registers->Rax = ulong.MaxValue;
        ExpectDone(c => c.mov(cr4, rax));
        Assert.That(_guest.State->Cr4, Is.EqualTo(0x5_066c));
        Assert.That(_guest.Calls, Is.EqualTo(new[] { "CR4 5066c" }));
    }

    [Test]
    public void OtherControlRegistersBounce()
    {
        ExpectBounce(c => c.mov(rax, cr8));
        ExpectBounce(c => c.mov(cr8, rax));
    }

    [Test]
    public void DebugRegistersFollowSetDebugreg()
    {
        _guest.Registers->Rcx = FakeGuest.DataStart;
        ExpectDone(c => c.mov(dr2, rcx));
        ExpectDone(c => c.mov(rdx, dr2));
        Assert.That(_guest.Registers->Rdx, Is.EqualTo(FakeGuest.DataStart));
        _guest.Registers->Rcx = 0x20;
        ExpectDone(c => c.mov(dr7, rcx));
        ExpectDone(c => c.mov(rdx, dr7));
        Assert.That(_guest.Registers->Rdx, Is.EqualTo(0x420));
        _guest.Registers->Rcx = 0;
        ExpectDone(c => c.mov(dr6, rcx));
        ExpectDone(c => c.mov(rdx, dr4));
        Assert.That(_guest.Registers->Rdx, Is.EqualTo(0xffff_0ff0));
        Assert.That(_guest.Calls, Is.EqualTo(new[] { "DR2 500000", "DR7 420", "DR6 ffff0ff0" }));
    }

    [TestCase(0, Paging.HypervisorVirtualStart)]
    [TestCase(1, 0x8000_0000_0000UL)]
    [TestCase(6, 1UL << 32)]
    [TestCase(7, 1UL << 32)]
    [TestCase(7, 1UL << 13)]
    [TestCase(7, 0x2_0001UL)]
    public void BadDebugRegisterValuesRaiseGeneralProtection(int number, ulong value)
    {
        _guest.Registers->Rax = value;
        Expect(c => c.mov(new AssemblerRegisterDR(Register.DR0 + number), rax), EmulationResult.GeneralProtection);
    }

    [Test]
    public void Dr4And5AreUndefinedWithDebugExtensions()
    {
        _guest.State->Cr4 |= 8;
        Expect(c => c.mov(rax, dr4), EmulationResult.InvalidOpcode);
        Expect(c => c.mov(dr5, rax), EmulationResult.InvalidOpcode);
    }

    [Test]
    public void IoBreakpointsDoNotReachTheProcessor()
    {
        _guest.State->Cr4 |= 8;
        _guest.Registers->Rax = 0x2_0003;
        ExpectDone(c => c.mov(dr7, rax));
        Assert.That(_guest.Calls, Is.EqualTo(new[] { "DR7 20400" }));
        ExpectDone(c => c.mov(rbx, dr7));
        Assert.That(_guest.Registers->Rbx, Is.EqualTo(0x2_0403));
    }

    [Test]
    public void PrivilegedInstructionsBounceInUserMode()
    {
        _guest.State->KernelMode = 0;
        ExpectBounce(c => c.mov(rax, cr0));
        ExpectBounce(c => c.mov(cr2, rax));
        ExpectBounce(c => c.mov(rax, dr0));
        ExpectBounce(c => c.mov(dr0, rax));
        ExpectBounce(c => c.clts());
        ExpectBounce(c => c.rdmsr());
        ExpectBounce(c => c.wrmsr());
        ExpectBounce(c => c.wbinvd());
        ExpectBounce(c => c.cli());
    }

    [Test]
    public void WhatXenDoesNotEmulateBounces()
    {
        ExpectBounce(c => c.hlt());
        ExpectBounce(c => c.invd());
        ExpectBounce(c => c.invlpg(__[rax]));
        ExpectBounce(c => c.lgdt(__[rax]));
        ExpectBounce(c => c.lidt(__[rax]));
        ExpectBounce(c => c.lldt(ax));
        ExpectBounce(c => c.ltr(ax));
        ExpectBounce(c => c.lmsw(ax));
        ExpectBounce(c => c.smsw(eax));
        ExpectBounce(c => c.sgdt(__[rax]));
        ExpectBounce(c => c.rdpmc());
        ExpectBounce(c => c.swapgs());
        ExpectBounce(c => c.sysretq());
        ExpectBounce(c => c.iretq());
        ExpectBounce(c => c.nop());
        ExpectBounce(c => c.mov(rax, __[rbx]));
    }

    [Test]
    public void CacheFlushesPass()
    {
        ExpectDone(c => c.wbinvd());
        ExpectDone(c => c.wbnoinvd());
    }

    [TestCase(1, 0x1000UL, false, true)]
    [TestCase(1, 0UL, false, false)]
    [TestCase(1, 0UL, true, true)]
    [TestCase(0, 0x1000UL, false, false)]
    [TestCase(0, 0x2000UL, true, false)]
    [TestCase(0, 0x3000UL, false, true)]
    public void CliAndStiDependOnIopl(int kernelMode, ulong iopl, bool architectural, bool allowed)
    {
        _guest.State->KernelMode = kernelMode;
        _guest.State->Iopl = iopl;
        _guest.Domain->VmAssists = architectural ? (ulong)VmAssist.ArchitecturalIopl : 0;
        ulong flags = _guest.Registers->Rflags;
        EmulationResult expected = allowed ? EmulationResult.Done : EmulationResult.NotHandled;
        Expect(c => c.cli(), expected);
        Expect(c => c.sti(), expected);
        Assert.That(_guest.Registers->Rflags, Is.EqualTo(flags));
        Assert.That(_guest.Info->EvtchnUpcallMask, Is.Zero);
    }

    [Test]
    public void TscCanAlwaysBeReadByTheKernel()
    {
        _guest.State->Cr4 |= 4;
        ExpectDone(c => c.rdtsc());
        Assert.That(_guest.Registers->Rax, Is.EqualTo(0x9abc_def0));
        Assert.That(_guest.Registers->Rdx, Is.EqualTo(0x1234_5678));
        _guest.Emulator.Msrs.TryWrite(Msr.TscAux, 7);
        ExpectDone(c => c.rdtscp());
        Assert.That(_guest.Registers->Rcx, Is.EqualTo(7));
    }

    [Test]
    public void TimeStampDisableBindsUserSpace()
    {
        _guest.State->KernelMode = 0;
        ExpectDone(c => c.rdtsc());
        _guest.State->Cr4 |= 4;
        ExpectBounce(c => c.rdtsc());
        ExpectBounce(c => c.rdtscp());
    }

    [Test]
    public void XsetbvChecksEverything()
    {
        _guest.Registers->Rax = 7;
        Expect(c => c.xsetbv(), EmulationResult.InvalidOpcode);
        _guest.State->Cr4 |= 1 << 18;
        ExpectDone(c => c.xsetbv());
        Assert.That(_guest.State->Xcr0, Is.EqualTo(7));
        Assert.That(_guest.Calls, Is.EqualTo(new[] { "XCR0 7" }));
        _guest.Calls.Clear();
        foreach (ulong bad in (ulong[])[0, 2, 5, 0x27, 0xe3, 0x207, 1UL << 63])
        {
            _guest.Registers->Rax = bad & uint.MaxValue;
            _guest.Registers->Rdx = bad >> 32;
            Expect(c => c.xsetbv(), EmulationResult.GeneralProtection);
        }

        _guest.Registers->Rax = 0xe7;
        _guest.Registers->Rdx = 0;
        _guest.Registers->Rcx = 1;
        Expect(c => c.xsetbv(), EmulationResult.GeneralProtection);
        _guest.Registers->Rcx = 0;
        _guest.State->KernelMode = 0;
        Expect(c => c.xsetbv(), EmulationResult.GeneralProtection);
    }

    [Test]
    public void SingleStepTrapsAfterTheInstruction()
    {
        _guest.Registers->Rflags |= (ulong)(Rflags.Trap | Rflags.Resume);
        int length = _guest.Load(c => c.clts());
        Assert.That(_guest.Emulator.GeneralProtection(0), Is.EqualTo(EmulationResult.Raise(ExceptionVector.Debug)));
        Assert.That(_guest.Rip, Is.EqualTo(FakeGuest.CodeStart + (uint)length));
        Assert.That(_guest.State->DebugRegisters[6], Is.EqualTo(0xffff_4ff0));
        Assert.That(_guest.Registers->Rflags & (ulong)Rflags.Resume, Is.Zero);
    }

    [Test]
    public void ForcedCpuidShowsTheKernelOsxsave()
    {
        _guest.Poke(_guest.Rip, [0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x0f, 0xa2]);
        _guest.Registers->Rax = 1;
        Assert.That(_guest.Emulator.InvalidOpcode(), Is.EqualTo(EmulationResult.Done));
        Assert.That(_guest.Rip, Is.EqualTo(FakeGuest.CodeStart + 7));
        Assert.That(_guest.Registers->Rcx & (1 << 27), Is.Not.Zero);
        _guest.Reset();
        _guest.Registers->Rax = 1;
        ExpectDone(c => c.cpuid());
        Assert.That(_guest.Registers->Rcx & (1 << 27), Is.Zero);
    }

    [Test]
    public void OtherUndefinedInstructionsBounce()
    {
        foreach (byte[] bytes in (byte[][])[[0x0f, 0x0b, 0x90], [0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x90, 0x90], [0x06], [0x0f, 0xff]])
        {
            _guest.Poke(_guest.Rip, bytes);
            Assert.That(_guest.Emulator.InvalidOpcode(), Is.EqualTo(EmulationResult.NotHandled));
            Assert.That(_guest.Rip, Is.EqualTo(FakeGuest.CodeStart));
        }
    }

    [Test]
    public void ForcedEmulationKnowsNo32BitMode()
    {
        _guest.Segments->Cs = FlatSelectors.Ring3Cs32;
        _guest.State->KernelMode = 0;
        _guest.Poke(_guest.Rip, [0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x0f, 0xa2]);
        Assert.That(_guest.Emulator.InvalidOpcode(), Is.EqualTo(EmulationResult.Done));
        Assert.That(_guest.Rip, Is.EqualTo(FakeGuest.CodeStart + 7));
    }

    [Test]
    public void BreakpointAndOverflowOf32BitCodeMayArriveAsUndefined()
    {
        static EmulationResult Raised(ExceptionVector vector) => new(EmulationOutcome.Exception, vector, IsSoftwareInterrupt: true);
        _guest.Segments->Cs = FlatSelectors.Ring3Cs32;
        _guest.Poke(_guest.Rip, [0xcc, 0xce]);
        Assert.That(_guest.Emulator.InvalidOpcode(), Is.EqualTo(Raised(ExceptionVector.Breakpoint)));
        Assert.That(_guest.Rip, Is.EqualTo(FakeGuest.CodeStart + 1));
        Assert.That(_guest.Emulator.InvalidOpcode(), Is.EqualTo(EmulationResult.Done), "INTO without OF");
        Assert.That(_guest.Rip, Is.EqualTo(FakeGuest.CodeStart + 2));
        _guest.Registers->Rip = FakeGuest.CodeStart + 1;
        _guest.Registers->Rflags |= (ulong)Rflags.Overflow;
        Assert.That(_guest.Emulator.InvalidOpcode(), Is.EqualTo(Raised(ExceptionVector.Overflow)));
        Assert.That(_guest.Rip, Is.EqualTo(FakeGuest.CodeStart + 2));
    }

    [TestCase(5, true)]
    [TestCase(-2, true)]
    [TestCase(6, false)]
    [TestCase(-3, false)]
    public void BoundOf32BitCodeMayArriveAsUndefined(int index, bool holds)
    {
        *_guest.Segments = new SegmentRegisters { Cs = FlatSelectors.Ring3Cs32, Ds = FlatSelectors.Ring3Data, Ss = FlatSelectors.Ring3Data };
        _guest.Poke(FakeGuest.DataStart, [0xfe, 0xff, 0xff, 0xff, 5, 0, 0, 0]);
        _guest.Registers->Rax = (uint)index;
        _guest.Registers->Rsi = FakeGuest.DataStart;

        // bound eax, [esi]
        _guest.Poke(_guest.Rip, [0x62, 0x06]);
        Assert.That(
            _guest.Emulator.InvalidOpcode(),
            Is.EqualTo(holds ? EmulationResult.Done : EmulationResult.Raise(ExceptionVector.BoundRange)));
        Assert.That(_guest.Rip, Is.EqualTo(FakeGuest.CodeStart + (holds ? 2UL : 0)));
    }

    [TestCase(1, 0, 0x30, false)]
    [TestCase(1, 1, 0x30, true)]
    [TestCase(0, 1, 0x30, false)]
    [TestCase(0, 3, 0x30, true)]
    [TestCase(0, 0, 0x80, true)]
    [TestCase(0, 3, 0x82, true)]
    [TestCase(1, 0, 0x82, false)]
    public void SoftwareInterruptsFollowTheTrapTable(int kernelMode, int privilege, int vector, bool allowed)
    {
        _guest.State->KernelMode = kernelMode;
        _guest.State->Traps[vector].Flags = (byte)privilege;
        _guest.State->Traps[vector].Address = FakeGuest.CodeStart;
        uint error = ((uint)vector << 3) | 2;
        EmulationResult asGp = _guest.Execute(c => c.@int((byte)vector), error);
        ulong afterGp = _guest.Rip;
        _guest.Registers->Rip = FakeGuest.CodeStart;
        EmulationResult asUd = _guest.Emulator.InvalidOpcode();
        if (allowed)
        {
            var expected = new EmulationResult(EmulationOutcome.Exception, (ExceptionVector)vector, IsSoftwareInterrupt: true);
            Assert.That((asGp, asUd), Is.EqualTo((expected, expected)));
            Assert.That((afterGp, _guest.Rip), Is.EqualTo((FakeGuest.CodeStart + 2, FakeGuest.CodeStart + 2)));
        }
        else
        {
            Assert.That(asGp, Is.EqualTo(asUd));
            Assert.That(asUd, Is.EqualTo(EmulationResult.Raise(ExceptionVector.GeneralProtection, error)));
            Assert.That((afterGp, _guest.Rip), Is.EqualTo((FakeGuest.CodeStart, FakeGuest.CodeStart)));
        }
    }

    /// <summary>SYSCALL outside 64-bit mode is AMD's: on others it stays the #UD that it is, as in 64-bit code that the processor refused.</summary>
    [TestCase(true, true, true)]
    [TestCase(true, false, false)]
    [TestCase(false, true, false)]
    public void SyscallOf32BitCode(bool amd, bool compatible, bool taken)
    {
        using var guest = new FakeGuest(new CpuidPolicy(HostProcessor.Everything(amd ? HostProcessor.Amd : HostProcessor.Intel), HostProcessor.Options));
        guest.Segments->Cs = compatible ? FlatSelectors.Ring3Cs32 : FlatSelectors.Ring3Cs64;
        guest.Registers->Rflags |= (ulong)(Rflags.Direction | Rflags.Carry);
        CpuRegisters before = *guest.Registers;
        guest.Load(code => code.syscall());
        EmulationResult result = guest.Emulator.InvalidOpcode();
        if (!taken)
        {
            Assert.That(result, Is.EqualTo(EmulationResult.NotHandled));
            Assert.That(*guest.Registers, Is.EqualTo(before));
            return;
        }

        Assert.That(result, Is.EqualTo(EmulationResult.SystemCall));
        Assert.That((guest.Rip, guest.Registers->Rcx, guest.Registers->R11), Is.EqualTo((before.Rip + 2, before.Rip + 2, before.Rflags)));
        Assert.That((guest.Segments->Cs, guest.Segments->Ss), Is.EqualTo((FlatSelectors.Ring3Cs32, FlatSelectors.Ring3Data)));
    }

    /// <summary>SYSENTER is Intel's; where the VM's own entry is closed it is a #GP, where the host has none a #UD.</summary>
    [Test]
    public void Sysenter([Values] bool intel, [Values] bool asInvalidOpcode)
    {
        using var guest = new FakeGuest(new CpuidPolicy(HostProcessor.Everything(intel ? HostProcessor.Intel : HostProcessor.Amd), HostProcessor.Options));
        guest.Segments->Cs = FlatSelectors.Ring3Cs32;
        CpuRegisters before = *guest.Registers;
        guest.Load(code => code.sysenter());
        EmulationResult result = asInvalidOpcode ? guest.Emulator.InvalidOpcode() : guest.Emulator.GeneralProtection(0);
        if (intel)
        {
            Assert.That(result, Is.EqualTo(EmulationResult.SystemEnter));
            Assert.That((guest.Rip, guest.Registers->Rsp, guest.Segments->Cs), Is.EqualTo((0UL, 0UL, FlatSelectors.NullRing3)));
        }
        else
        {
            Assert.That(result, Is.EqualTo(asInvalidOpcode ? EmulationResult.NotHandled : EmulationResult.InvalidOpcode));
            Assert.That(*guest.Registers, Is.EqualTo(before));
        }
    }

    /// <summary>
    /// A null selector for GS that the guest may have misread does not take a thread's data away, where the base is that of a descriptor;
    /// on a host that shows selectors, and for any other base, it does.
    /// </summary>
    [TestCase(true, 0x1234_5678UL, true)]
    [TestCase(true, 0x1234_5679UL, false)]
    [TestCase(false, 0x1234_5678UL, false)]
    public void ANullGsThatWasMisread(bool readsNull, ulong segmentBase, bool kept)
    {
        const ulong selectorOfGs = 3;
        _guest.SetGdt(0, 0, 0x12cf_f334_5678_ffff);
        _guest.State->SelectorsReadNull = readsNull ? 1 : 0;
        _guest.Segments->Gs = 0x13;
        _guest.State->InactiveGsBase = segmentBase;
        Assert.That(TaskSwitch.SetSegmentBase(_guest.Vcpu, new HypercallArguments { A0 = selectorOfGs, A1 = 3 }), Is.Zero);
        Assert.That((_guest.Segments->Gs, _guest.State->InactiveGsBase), Is.EqualTo(kept ? (0x13, segmentBase) : ((ushort)3, 0UL)));
    }

    [Test]
    public void LegacySyscallWithoutHandlerNeedsThePrivilege()
    {
        _guest.State->KernelMode = 0;
        Assert.That(_guest.Execute(c => c.@int(0x80), 0x402), Is.EqualTo(EmulationResult.Raise(ExceptionVector.GeneralProtection, 0x402)));
    }

    [Test]
    public void TheVectorOfASoftwareInterruptIsTheInstructions()
    {
        _guest.State->Traps[0x80].Flags = 3;
        _guest.State->Traps[0x80].Address = FakeGuest.CodeStart;
        EmulationResult expected = new(EmulationOutcome.Exception, (ExceptionVector)0x80, IsSoftwareInterrupt: true);
        Assert.That(_guest.Execute(c => c.@int(0x80), 0x802), Is.EqualTo(expected));
        Assert.That(_guest.Execute(c => c.clts(), 0x402), Is.EqualTo(EmulationResult.NotHandled), "another processor changed the code");
    }

    [Test]
    public void ExternalErrorsAreNotTheInstructions()
        => Assert.That(_guest.Execute(c => c.clts(), 1), Is.EqualTo(EmulationResult.NotHandled));

    [Test]
    public void FlatSelectorsAreLoaded()
    {
        _guest.Segments->FsBase = 5;
        _guest.Segments->GsBase = 6;
        _guest.Registers->Rax = FlatSelectors.Ring3Data;
        Assert.That(_guest.Execute(c => c.mov(ds, ax), 0xe028), Is.EqualTo(EmulationResult.Done));
        _guest.Registers->Rbx = FlatSelectors.Ring3Cs64;
        Assert.That(_guest.Execute(c => c.mov(es, bx), 0xe030), Is.EqualTo(EmulationResult.Done));
        Assert.That(_guest.Execute(c => c.mov(ss, ax), 0xe028), Is.EqualTo(EmulationResult.Done));
        _guest.Poke(FakeGuest.DataStart + 8, [0x2b, 0xe0]);
        _guest.Registers->Rsi = FakeGuest.DataStart;
        _guest.Registers->Rdi = 4;
        Assert.That(_guest.Execute(c => c.mov(fs, __word_ptr[rsi + (rdi * 2)]), 0xe028), Is.EqualTo(EmulationResult.Done));
        Assert.That(_guest.Execute(c => c.mov(gs, __word_ptr[FakeGuest.DataStart + 8]), 0xe028), Is.EqualTo(EmulationResult.Done));
        Assert.That(*_guest.Segments, Is.EqualTo(new SegmentRegisters
        {
            Cs = 0xe033, Ss = 0xe02b, Ds = 0xe02b, Es = 0xe033, Fs = 0xe02b, Gs = 0xe02b,
        }));
    }

    [Test]
    public void OtherSelectorsBounce()
    {
        _guest.Registers->Rax = 0xe033;
        Assert.That(_guest.Execute(c => c.mov(ss, ax), 0xe030), Is.EqualTo(EmulationResult.NotHandled));
        _guest.Registers->Rax = 0x1b;
        Assert.That(_guest.Execute(c => c.mov(ds, ax), 0x18), Is.EqualTo(EmulationResult.NotHandled));
        _guest.Registers->Rax = FlatSelectors.Ring3Data;
        Assert.That(_guest.Execute(c => c.mov(ds, ax), 0xe030), Is.EqualTo(EmulationResult.NotHandled));
        _guest.Registers->Rax = 0;
        Assert.That(_guest.Execute(c => c.mov(ss, ax)), Is.EqualTo(EmulationResult.NotHandled));
        Assert.That(_guest.Execute(c => c.mov(ds, ax)), Is.EqualTo(EmulationResult.Done));
    }

    [Test]
    public void SegmentOperandThatCannotBeReadFaults()
    {
        _guest.Registers->Rsi = FakeGuest.DataEnd - 1;
        Assert.That(
            _guest.Execute(c => c.mov(ds, __word_ptr[rsi]), 0xe028),
            Is.EqualTo(EmulationResult.PageFault(FakeGuest.DataEnd, PageFaultError.User)));
    }

    [Test]
    public void FetchFaultsOnlyWhereTheInstructionGoesOn()
    {
        _guest.Registers->Rip = FakeGuest.CodeStart + Paging.PageSize - 3;
        ulong rip = _guest.Rip;
        _guest.Load(c => c.mov(rax, cr0));
        Assert.That(_guest.Emulator.GeneralProtection(0), Is.EqualTo(EmulationResult.Done));
        _guest.Registers->Rip = rip + 1;
        _guest.Poke(rip + 1, [0x0f, 0x20]);
        var fault = EmulationResult.PageFault(rip + 3, PageFaultError.User);
        Assert.That(_guest.Emulator.GeneralProtection(0), Is.EqualTo(fault));
        Assert.That(_guest.Rip, Is.EqualTo(rip + 1));
        _guest.Poke(rip + 1, [0x0f, 0x0b]);
        Assert.That(_guest.Emulator.InvalidOpcode(), Is.EqualTo(fault));
        _guest.Map(FakeGuest.CodeStart + Paging.PageSize, PageFlags.None);
        _guest.Poke(rip + 3, [0x78, 0x65, 0x6e, 0x0f, 0xa2]);
        Assert.That(_guest.Emulator.InvalidOpcode(), Is.EqualTo(EmulationResult.Done));
    }

    [Test]
    public void UnmappedAndNonCanonicalCodeFaults()
    {
        _guest.Registers->Rip = 0x60_0000;
        Assert.That(
            _guest.Emulator.GeneralProtection(0),
            Is.EqualTo(EmulationResult.PageFault(0x60_0000, PageFaultError.User)));
        _guest.Registers->Rip = 0x8000_0000_0000;
        Assert.That(_guest.Emulator.GeneralProtection(0), Is.EqualTo(EmulationResult.GeneralProtection));
        _guest.Registers->Rip = Paging.HypervisorVirtualStart;
        Assert.That(_guest.Emulator.GeneralProtection(0), Is.EqualTo(EmulationResult.GeneralProtection));
    }

    [Test]
    public void CodeSegmentsOfTheGuestsTablesDecideTheMode()
    {
        _guest.SetGdt(0, 0x00cf_fb00_0000_ffff, 0x00af_fb00_0000_ffff, 0x00cf_f300_0000_ffff, 0x004f_fb40_0000_ffff);
        int length = _guest.Load(c => c.mov(eax, cr0), bitness: 32);
        foreach (ushort selector in (ushort[])[0x0b, FlatSelectors.Ring3Cs32, 0x13])
        {
            _guest.Segments->Cs = selector;
            _guest.Registers->Rip = FakeGuest.CodeStart;
            Assert.That(_guest.Emulator.GeneralProtection(0), Is.EqualTo(EmulationResult.Done));
            Assert.That(_guest.Rip, Is.EqualTo(FakeGuest.CodeStart + (uint)length));
        }

        // Data, the null selector, past the GDT, an LDT that is not there.
        foreach (ushort selector in (ushort[])[0x1b, 3, 0x33, 7])
        {
            _guest.Segments->Cs = selector;
            _guest.Registers->Rip = FakeGuest.CodeStart;
            Assert.That(_guest.Emulator.GeneralProtection(0), Is.EqualTo(EmulationResult.NotHandled));
        }

        // A base of 0x400000.
        _guest.Segments->Cs = 0x23;
        _guest.Registers->Rip = 0;
        Assert.That(_guest.Emulator.GeneralProtection(0), Is.EqualTo(EmulationResult.Done));
        Assert.That(_guest.Rip, Is.EqualTo((ulong)length));
    }

    [Test]
    public void NothingIsAllocated()
    {
        int length = _guest.Load(c =>
        {
            c.rdmsr();
            c.cpuid();
            c.mov(rax, cr4);
            c.@in(al, 0x61);
            c.cli();
            c.mov(rax, dr7);
        });
        ulong end = _guest.Rip + (uint)length;
        long allocated = 0;
        for (int round = 0; round < 3; round++)
        {
            _guest.Registers->Rip = FakeGuest.CodeStart;
            _guest.Registers->Rcx = Msr.FsBase;
            long before = GC.GetAllocatedBytesForCurrentThread();
            while (_guest.Rip != end)
                _ = _guest.Emulator.GeneralProtection(0);
            allocated = GC.GetAllocatedBytesForCurrentThread() - before;
        }

        Assert.That(allocated, Is.Zero);
    }

    [Test]
    public void CliAndStiLeaveASingleStepToTheNextInstruction()
    {
        _guest.State->Iopl = 3UL << 12;
        _guest.Registers->Rflags |= (ulong)Rflags.Trap;
        ExpectDone(c => c.cli());
        ExpectDone(c => c.sti());
    }

    /// <summary>A prefix of SS's is none in 64-bit code: not even the exception is its own.</summary>
    [Test]
    public void AStackSegmentPrefixOfOutsIsIgnored()
    {
        _guest.State->Iopl = 3UL << 12;
        _guest.Registers->Rdx = 0x70;
        _guest.Registers->Rsi = 1UL << 63;
        Expect(c => c.db(0x36, 0x6e), EmulationResult.GeneralProtection);
    }

    [Test]
    public void PartialRegistersKeepTheRest()
    {
        _guest.Registers->Rax = ulong.MaxValue;
        _guest.Registers->Rdx = 0x70;
        ExpectDone(c => c.@in(al, dx));
        Assert.That(_guest.Registers->Rax, Is.EqualTo(0xffff_ffff_ffff_ff00));
        ExpectDone(c => c.@in(eax, dx));
        Assert.That(_guest.Registers->Rax, Is.EqualTo(0xffff_ff00));
    }
}
