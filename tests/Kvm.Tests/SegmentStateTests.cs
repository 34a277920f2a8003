// Segment state, extended state and debug registers on their way in and out.
using System.Runtime.Intrinsics.X86;
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm.Tests;

public sealed unsafe class SegmentStateTests : KvmTest
{
    private const ushort GuestCode64 = 0x33;
    private const ushort GuestCode32 = 0x23;
    private const ushort GuestData = 0x2b;
    private const ushort GuestBasedData = 0x3b;
    private const ushort NotPresentData = 0x43;
    private const ulong BasedDataBase = 0x40_8000;

    private ScratchGuest _guest = null!;

    private SegmentRegisters* Segments => _guest.Vcpu.Segments;

    private CpuRegisters* Registers => _guest.Vcpu.Registers;

    [SetUp]
    public void MakeGuest() => _guest = NewGuest();

    [TearDown]
    public void DropGuest() => _guest?.Dispose();

    [Test]
    public void BasesTravel()
    {
        *(ulong*)HostAddress(_guest, ScratchGuest.DataAddress) = 0x1111;
        *(ulong*)HostAddress(_guest, ScratchGuest.DataAddress + 0x800) = 0x2222;
        for (int i = 0; i < 4; i++)
        {
            bool swapped = i % 2 != 0;
            _guest.Load(code =>
            {
                code.mov(rax, __qword_ptr.fs[0]);
                code.mov(rbx, __qword_ptr.gs[0]);
                code.syscall();
            });
            Segments->FsBase = ScratchGuest.DataAddress + (swapped ? 0x800UL : 0);
            Segments->GsBase = ScratchGuest.DataAddress + (swapped ? 0 : 0x800UL);
            if (i >= 2)
                _guest.Vcpu.PageTableWrites->Flush();
            AssertSyscall(RunWatched(_guest));
            Assert.That((Registers->Rax, Registers->Rbx), Is.EqualTo(swapped ? (0x2222UL, 0x1111UL) : (0x1111UL, 0x2222UL)));
        }
    }

    [Test]
    public void BasesSurviveEveryKindOfExit()
    {
        _guest.Load(code =>
        {
            code.syscall();
            code.int3();
            code.div(rcx);
        });
        Segments->FsBase = 0xffff_9000_1234_5678;
        Segments->GsBase = 0x1234_5678;
        for (int i = 0; i < 3; i++)
        {
            _ = RunWatched(_guest);
            Assert.That((Segments->FsBase, Segments->GsBase), Is.EqualTo((0xffff_9000_1234_5678, 0x1234_5678UL)), $"exit {i}");
            Registers->Rcx = 0;
        }
    }

    [Test]
    public void BaseWrittenByTheGuestIsSeen()
    {
        if (X86Base.CpuId(0, 0).Eax < 7 || (X86Base.CpuId(7, 0).Ebx & 1) == 0)
            Assert.Pass("This processor has no WRGSBASE: there is nothing that a guest could do behind our back.");
        _guest.Vcpu.SetFsgsbase(true);
        AssertSyscall(RunCode(
            _guest,
            code =>
            {
                code.wrgsbase(rcx);
                code.wrfsbase(rdx);
                code.syscall();
            },
            (ref CpuRegisters registers) => (registers.Rcx, registers.Rdx) = (0x7fff_1234_5000, 0xffff_c000_0000_1000)));
        Assert.That((Segments->GsBase, Segments->FsBase), Is.EqualTo((0x7fff_1234_5000UL, 0xffff_c000_0000_1000)));

        // It stays when the next entry changes nothing, and is replaced when it does.
        _guest.Load(code =>
        {
            code.rdgsbase(rax);
            code.syscall();
        });
        Segments->GsBase = 0x7fff_1234_5000;
        AssertSyscall(RunWatched(_guest));
        Assert.That(Registers->Rax, Is.EqualTo(0x7fff_1234_5000));
    }

    [Test]
    public void FlatDataSelectors()
    {
        foreach (ushort selector in (ReadOnlySpan<ushort>)[FlatSelectors.Ring3Data, 0, FlatSelectors.Ring3Cs64])
        {
            _guest.Load(code => code.syscall());
            Segments->Ds = Segments->Es = Segments->Fs = Segments->Gs = selector;
            AssertSyscall(RunWatched(_guest));
            Assert.That((Segments->Ds, Segments->Es, Segments->Fs, Segments->Gs), Is.EqualTo((selector, selector, selector, selector)));
        }
    }

    [Test]
    public void FlatSelectorLoadedByTheGuest()
    {
        VcpuExit exit = RunCode(_guest, code =>
        {
            code.mov(eax, FlatSelectors.Ring3Data);
            code.mov(ds, eax);
            code.mov(es, eax);
            code.syscall();
        });
        if (Capabilities.FlatSegmentLoads)
        {
            AssertSyscall(exit);
            Assert.That((Segments->Ds, Segments->Es), Is.EqualTo((FlatSelectors.Ring3Data, FlatSelectors.Ring3Data)));
        }
        else
        {
            Assert.That(
                (exit.Kind, exit.Vector, exit.ErrorCode & ~3U),
                Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.GeneralProtection, FlatSelectors.Ring3Data & ~3U)),
                exit.Failure);
        }
    }

    /// <summary>The guest's own descriptor tables: what set_gdt installs is what entries and loads use.</summary>
    [Test]
    public void CodeSelectorOfTheGuest([Values] bool throughTheMonitor)
    {
        InstallGdt();
        foreach (ushort selector in (ReadOnlySpan<ushort>)[GuestCode64, FlatSelectors.Ring3Cs64, GuestCode64])
        {
            _guest.Load(code => code.ud2());
            Segments->Cs = selector;
            Segments->Ss = selector == GuestCode64 ? GuestData : FlatSelectors.Ring3Data;
            Queue(throughTheMonitor);
            VcpuExit exit = RunWatched(_guest);
            Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.InvalidOpcode)), exit.Failure);
            Assert.That((Segments->Cs, Segments->Ss), Is.EqualTo((selector, selector == GuestCode64 ? GuestData : FlatSelectors.Ring3Data)));
        }
    }

    /// <summary>32-bit code of a user process: the bytes 48 90 are one instruction in 64-bit mode and two here.</summary>
    [Test]
    public void CompatibilityMode([Values(GuestCode32, FlatSelectors.Ring3Cs32)] ushort selector, [Values] bool throughTheMonitor)
    {
        InstallGdt();
        _guest.Load(code =>
        {
            code.db(0x48);
            code.nop();
            code.ud2();
        });
        Registers->Rax = 5;
        Segments->Cs = selector;
        Queue(throughTheMonitor);
        VcpuExit exit = RunWatched(_guest);
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.InvalidOpcode)), exit.Failure);
        Assert.That(Registers->Rax, Is.EqualTo(4), "DEC EAX was executed.");
        Assert.That((Segments->Cs, Registers->Rip), Is.EqualTo((selector, ScratchGuest.CodeAddress + 2)));

        // And back to 64-bit code, as the bounce to the kernel does.
        _guest.Load(code =>
        {
            code.db(0x48);
            code.nop();
            code.syscall();
        });
        Registers->Rax = 5;
        Queue(throughTheMonitor);
        AssertSyscall(RunWatched(_guest));
        Assert.That(Registers->Rax, Is.EqualTo(5));
    }

    /// <summary>Wherever the processor takes it: to the entry, or to #UD, but never past the monitor into the guest's own memory.</summary>
    [Test]
    public void SystemCallOf32BitCode([Values] bool throughTheMonitor)
    {
        _guest.Load(code => code.syscall());
        Registers->Rflags |= (ulong)(Rflags.Carry | Rflags.Direction);
        CpuRegisters before = *Registers;
        Segments->Cs = FlatSelectors.Ring3Cs32;
        Queue(throughTheMonitor);
        VcpuExit exit = RunWatched(_guest);
        Assert.That(Segments->Cs, Is.EqualTo(FlatSelectors.Ring3Cs32), exit.Failure);
        Assert.That(Registers->Rsp, Is.EqualTo(before.Rsp));
        if (exit.Kind == VcpuExitKind.Syscall)
        {
            Assert.That((Registers->Rip, Registers->Rcx, Registers->Rflags), Is.EqualTo((before.Rip + 2, before.Rip + 2, before.Rflags)));
        }
        else
        {
            Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.InvalidOpcode)), exit.Failure);

            // The frame of a fault has RF.
            Registers->Rflags &= ~(ulong)Rflags.Resume;
            Assert.That(*Registers, Is.EqualTo(before));
        }
    }

    /// <summary>Floating point and vectors of 32-bit code, where KVM's interpreter does not know them too.</summary>
    [Test]
    public void FloatingPointAndVectorsOf32BitCode()
    {
        InstallGdt();
        *(double*)HostAddress(_guest, ScratchGuest.DataAddress) = 1.5;
        _guest.Load(code =>
        {
            // fld qword [ecx]; fadd st, st; fstp qword [ecx+8]; movd xmm0, eax; paddd xmm0, xmm0; movd [address], xmm0; ud2.
            code.db(0xdd, 0x01, 0xd8, 0xc0, 0xdd, 0x59, 0x08);
            code.db(0x66, 0x0f, 0x6e, 0xc0, 0x66, 0x0f, 0xfe, 0xc0, 0x66, 0x0f, 0x7e, 0x05);
            code.dd((uint)ScratchGuest.DataAddress + 16);
            code.db(0x0f, 0x0b);
        });
        (Registers->Rcx, Registers->Rax) = (ScratchGuest.DataAddress, 0x1234_5678);
        (Segments->Cs, Segments->Ss, Segments->Ds, Segments->Es) = (GuestCode32, GuestData, GuestData, GuestData);
        VcpuExit exit = RunWatched(_guest);
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.InvalidOpcode)), exit.Failure);
        Assert.That((Segments->Cs, Registers->Rip), Is.EqualTo((GuestCode32, ScratchGuest.CodeAddress + 23)));
        Assert.That(*(double*)HostAddress(_guest, ScratchGuest.DataAddress + 8), Is.EqualTo(3.0));
        Assert.That(*(uint*)HostAddress(_guest, ScratchGuest.DataAddress + 16), Is.EqualTo(2 * 0x1234_5678U));
    }

    /// <summary>A fault of such an instruction is the guest's, at the instruction.</summary>
    [Test]
    public void FaultOfAVectorInstructionOf32BitCode()
    {
        InstallGdt();
        const uint nowhere = 0x7000_0000;
        _guest.Load(code =>
        {
            // nop; paddd xmm0, [address].
            code.nop();
            code.db(0x66, 0x0f, 0xfe, 0x05);
            code.dd(nowhere);
        });
        (Segments->Cs, Segments->Ss, Segments->Ds, Segments->Es) = (GuestCode32, GuestData, GuestData, GuestData);
        VcpuExit exit = RunWatched(_guest);
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.PageFault)), exit.Failure);
        Assert.That(_guest.Vcpu.FaultAddress.Value, Is.EqualTo(nowhere));
        Assert.That((Segments->Cs, Registers->Rip), Is.EqualTo((GuestCode32, ScratchGuest.CodeAddress + 1)));
    }

    /// <summary>A kernel loads its flat data selector for a 32-bit process: the process has it, also after other entries.</summary>
    [Test]
    public void DataSegmentLoadedFor32BitCode([Values] bool throughTheMonitor)
    {
        InstallGdt();
        *(uint*)HostAddress(_guest, ScratchGuest.DataAddress) = 0x7777;
        AssertSyscall(RunCode(_guest, code =>
        {
            code.mov(eax, GuestData);
            code.mov(ds, eax);
            code.mov(es, eax);
            code.syscall();
        }));
        SegmentRegisters loaded = *Segments;
        _guest.Load(code =>
        {
            // mov eax, [address]; ud2.
            code.db(0xa1);
            code.dd((uint)ScratchGuest.DataAddress);
            code.ud2();
        });
        (Segments->Ds, Segments->Es, Segments->Cs, Segments->Ss) = (loaded.Ds, loaded.Es, GuestCode32, GuestData);
        Queue(throughTheMonitor);
        VcpuExit exit = RunWatched(_guest);
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.InvalidOpcode)), exit.Failure);
        Assert.That(Registers->Rax, Is.EqualTo(0x7777));
        Assert.That((Segments->Ds, Segments->Es), Is.EqualTo((GuestData, GuestData)));
    }

    /// <summary>A thread's data, whose selector the kernel read as null and whose base it kept.</summary>
    [Test]
    public void ThreadDataOf32BitCodeByItsBase()
    {
        InstallGdt();
        *(uint*)HostAddress(_guest, BasedDataBase + 0x10) = 0x7777;
        _guest.Load(code =>
        {
            // mov eax, gs:[0x10]; ud2.
            code.db(0x65, 0xa1, 0x10, 0, 0, 0);
            code.ud2();
        });
        (Segments->Cs, Segments->Ss) = (GuestCode32, GuestData);
        (Segments->Gs, Segments->GsBase) = ((ushort)(Capabilities.HostDescriptorTable ? 0 : GuestBasedData), BasedDataBase);
        VcpuExit exit = RunWatched(_guest);
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.InvalidOpcode)), exit.Failure);
        Assert.That((Registers->Rax, Segments->Gs), Is.EqualTo((0x7777, GuestBasedData)));
    }

    /// <summary>Selectors that IRET would refuse: the guest gets the #GP, and the VM lives on.</summary>
    [Test]
    public void UnusableCodeOrStackSelector([Values] bool throughTheMonitor)
    {
        InstallGdt();
        foreach ((ushort code, ushort stack) in (ReadOnlySpan<(ushort, ushort)>)
            [(3, FlatSelectors.Ring3Data), (0x1003, FlatSelectors.Ring3Data), (0xe00b, FlatSelectors.Ring3Data), (GuestData, GuestData), (0xf003, GuestData),
                (0xfff3, GuestData), (0x37, GuestData), (GuestCode64, 0xe013), (GuestCode64, GuestCode64), (GuestCode64, 0x1003), (GuestCode64, NotPresentData)])
        {
            _guest.Load(assembler => assembler.syscall());
            CpuRegisters intended = *Registers;
            Segments->Cs = code;
            Segments->Ss = stack;
            Queue(throughTheMonitor);
            VcpuExit exit = RunWatched(_guest);
            Assert.That(exit.Kind, Is.EqualTo(VcpuExitKind.Exception), $"{code:x}:{stack:x} {exit.Failure}");
            Assert.That(
                exit.Vector,
                Is.EqualTo(stack == NotPresentData ? ExceptionVector.StackFault : ExceptionVector.GeneralProtection), $"{code:x}:{stack:x}");
            Assert.That(exit.ErrorCode, Is.EqualTo((uint)((stack is GuestData or FlatSelectors.Ring3Data ? code : stack) & ~3)), $"{code:x}:{stack:x}");
            Assert.That(*Registers, Is.EqualTo(intended));
            _guest.Load(assembler => assembler.syscall());
            AssertSyscall(RunWatched(_guest));
        }
    }

    /// <summary>A guest loads a data segment whose base is not 0; exits and entries leave its hidden part alone.</summary>
    [Test]
    public void DataSegmentKeepsItsBase()
    {
        InstallGdt();
        *(uint*)HostAddress(_guest, BasedDataBase + 0x10) = 0x7777;
        _guest.Load(code =>
        {
            // 32-bit code: mov ds, ecx; ud2; then mov eax, ds:[0x10]; ud2.
            code.db(0x8e, 0xd9, 0x0f, 0x0b, 0xa1, 0x10, 0, 0, 0, 0x0f, 0x0b);
        });
        Registers->Rcx = GuestBasedData;
        Segments->Cs = GuestCode32;
        VcpuExit exit = RunWatched(_guest);
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.InvalidOpcode)), exit.Failure);
        Assert.That((Segments->Ds, Registers->Rip), Is.EqualTo((GuestBasedData, ScratchGuest.CodeAddress + 2)));
        Registers->Rip += 2;
        exit = RunWatched(_guest);
        Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.InvalidOpcode)), exit.Failure);
        Assert.That(Registers->Rax, Is.EqualTo(0x7777));
    }

    /// <summary>A selector beyond what set_gdt installed: #GP with the selector, as from Xen, and never a fault at a monitor address.</summary>
    [Test]
    public void SelectorWithoutADescriptorFrame()
    {
        foreach (ushort selector in (ReadOnlySpan<ushort>)[0x1000, 0x53, 0xdff8])
        {
            VcpuExit exit = RunCode(
                _guest,
                code =>
                {
                    code.mov(ds, eax);
                    code.syscall();
                },
                (ref CpuRegisters registers) => registers.Rax = selector);
            Assert.That((exit.Kind, exit.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.GeneralProtection)), exit.Failure);
            Assert.That(exit.ErrorCode, Is.EqualTo((uint)(selector & ~7)));
            Assert.That(Registers->Rip, Is.EqualTo(ScratchGuest.CodeAddress));
        }
    }

    /// <summary>
    /// Selectors of the local table: a page that is not mapped yet is a page fault in the window, by an entry as by a load, and once it
    /// is there they lead to its descriptors.
    /// </summary>
    [Test]
    public void SelectorsOfTheLocalTable([Values] bool throughTheMonitor)
    {
        const ushort code64 = (GuestCode64 & ~7) | 7;
        const ushort data = (GuestData & ~7) | 7;
        const ushort basedData = (GuestBasedData & ~7) | 7;
        VcpuExit Load(ushort selector) => RunCode(
            _guest,
            code =>
            {
                code.mov(fs, eax);
                code.syscall();
            },
            (ref CpuRegisters registers) => registers.Rax = selector);
        void AssertRefused(VcpuExit exit, ushort selector) => Assert.That(
            (exit.Kind, exit.Vector, exit.ErrorCode), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.GeneralProtection, (uint)(selector & ~3))), exit.Failure);
        void AssertNoPage(VcpuExit exit, ushort selector)
        {
            Assert.That((exit.Kind, exit.Vector, exit.ErrorCode), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.PageFault, 0U)), exit.Failure);
            Assert.That(_guest.Vcpu.FaultAddress, Is.EqualTo(_guest.Vcpu.DescriptorWindow.Ldt + (ulong)(selector & ~7)));
        }

        VcpuExit Enter(ushort code, ushort stack)
        {
            _guest.Load(static assembler => assembler.ud2());
            Segments->Cs = code;
            Segments->Ss = stack;
            Queue(throughTheMonitor);
            VcpuExit exit = RunWatched(_guest);
            (Segments->Cs, Segments->Ss) = (FlatSelectors.Ring3Cs64, FlatSelectors.Ring3Data);
            return exit;
        }

        AssertRefused(Load(basedData), basedData);
        AssertRefused(Enter(code64, FlatSelectors.Ring3Data), code64);
        _guest.Vcpu.LdtEntries = (GuestBasedData >> 3) + 1;
        AssertNoPage(Load(basedData), basedData);
        AssertNoPage(Enter(code64, FlatSelectors.Ring3Data), code64);
        AssertNoPage(Enter(FlatSelectors.Ring3Cs64, data), data);

        InstallTable(DescriptorWindow.GdtPages);
        AssertSyscall(Load(basedData));
        Assert.That((Segments->Fs, Segments->FsBase), Is.EqualTo((basedData, BasedDataBase)));
        VcpuExit entered = Enter(code64, data);
        Assert.That((entered.Kind, entered.Vector), Is.EqualTo((VcpuExitKind.Exception, ExceptionVector.InvalidOpcode)), entered.Failure);
        AssertRefused(Load(NotPresentData | 7), (NotPresentData & ~7) | 7);
        _guest.Vcpu.LdtEntries = 0;
        AssertRefused(Load(basedData), basedData);
    }

    [Test]
    public void VectorRegistersSurviveExits()
    {
        if (!Avx.IsSupported)
            Assert.Pass("This processor has no AVX: the state that SSE has is kept by the same means.");
        _guest.Vcpu.SetXcr0(7);
        byte* data = HostAddress(_guest, ScratchGuest.DataAddress);
        new Random(7).NextBytes(new Span<byte>(data, 64));
        _guest.Load(code =>
        {
            code.vmovups(ymm0, __ymmword_ptr[ScratchGuest.DataAddress]);
            code.vmovups(ymm15, __ymmword_ptr[ScratchGuest.DataAddress + 32]);
            code.syscall();
            code.int3();
            code.vmovups(__ymmword_ptr[ScratchGuest.DataAddress + 64], ymm0);
            code.vmovups(__ymmword_ptr[ScratchGuest.DataAddress + 96], ymm15);
            code.xor(ecx, ecx);
            code.xgetbv();
            code.syscall();
        });
        AssertSyscall(RunWatched(_guest));
        Trample();
        _guest.Vcpu.PageTableWrites->Flush();
        Assert.That(RunWatched(_guest).Vector, Is.EqualTo(ExceptionVector.Breakpoint));
        Trample();
        AssertSyscall(RunWatched(_guest));
        Assert.That(new ReadOnlySpan<byte>(data + 64, 64).SequenceEqual(new ReadOnlySpan<byte>(data, 64)));
        Assert.That(Registers->Rax & 7, Is.EqualTo(7), "XCR0; a page-table KVM shows the host's own.");

        // The host's own use of the registers in between.
        static void Trample()
        {
            Span<byte> noise = stackalloc byte[256];
            noise.Fill(0xa5);
            Assert.That(noise.IndexOfAnyExcept((byte)0xa5), Is.EqualTo(-1));
        }
    }

    [Test]
    public void XcrIsChecked()
        => Assert.That(() => _guest.Vcpu.SetXcr0(2), Throws.TypeOf<KvmException>().With.Message.Contains("KVM_SET_XCRS"));

    private void Queue(bool throughTheMonitor)
    {
        if (throughTheMonitor)
            _guest.Vcpu.PageTableWrites->Flush();
    }

    private void InstallGdt() => InstallTable(0);

    /// <summary>One frame of descriptors, in the place of the second data page, at a page of the window.</summary>
    private void InstallTable(int page)
    {
        ulong* table = (ulong*)_guest.Machine.Memory.Page(_guest.SecondDataFrame);
        table[GuestCode32 >> 3] = 0x00cf_fb00_0000_ffff;
        table[GuestData >> 3] = 0x00cf_f300_0000_ffff;
        table[GuestCode64 >> 3] = 0x00af_fb00_0000_ffff;
        table[GuestBasedData >> 3] = 0x00cf_f300_0000_ffff | ((BasedDataBase & 0xff_ffff) << 16);
        table[NotPresentData >> 3] = 0x00cf_7300_0000_ffff;
        var entries = (PageTableEntry*)_guest.Vcpu.DescriptorWindow.Entries;
        const PageFlags flags = PageFlags.Present | PageFlags.Writable | PageFlags.Accessed | PageFlags.Dirty | PageFlags.NoExecute;
        _guest.Vcpu.PageTableWrites->Store(
            entries + page, _guest.Vcpu.DescriptorWindow.Address + ((ulong)page * sizeof(ulong)), new PageTableEntry(_guest.SecondDataFrame, flags));
    }
}
