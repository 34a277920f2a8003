// Where SYSCALL comes to: the way out to the manager, and what is served without it.
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm;

/// <summary>What differs between the SYSCALL entries of hosts.</summary>
/// <param name="Serves">The entry runs at CPL 3 and may serve hypercalls by itself.</param>
/// <param name="Code">What IRETQ has to be given as CS for <see cref="FlatSelectors.Ring3Cs64"/>.</param>
/// <param name="Stack">What IRETQ has to be given as SS for <see cref="FlatSelectors.Ring3Data"/>.</param>
internal readonly record struct SyscallEntryKind(bool Serves, ushort Code, ushort Stack)
{
    /// <summary>What a host's entries are like.</summary>
    public static SyscallEntryKind Of(HostCapabilities capabilities) => capabilities.HostDescriptorTable
        ? new(capabilities.SyscallEntryLevel == 3, KvmVirtualCpu.HostUserCode, KvmVirtualCpu.HostUserData)
        : new(capabilities.SyscallEntryLevel == 3, FlatSelectors.Ring3Cs64, FlatSelectors.Ring3Data);
}

/// <summary>
/// A vCPU's page with the SYSCALL entries of 32-bit and of 64-bit code: a page of its own, because some KVMs enter it at CPL 3.
/// </summary>
/// <remarks>
/// There the 64-bit entry serves what it is told to (<see cref="Core.EntryService"/>) with the guest's own rights: what it must not touch, it
/// faults on. Whatever interrupts it before it is done, a fault or a kick, has the hypercall served by the manager instead
/// (<see cref="TryTakeOver"/>): until its last instruction it changes nothing that the hypercall itself needs or does not change, but for RAX,
/// which is known by where it is. What lies below the guest kernel's stack is free to be used, as for every bounce frame.
/// </remarks>
internal sealed unsafe class SyscallEntry
{
    /// <summary>Bytes from the start of the page to what the entry serves.</summary>
    private const int ServiceOffset = 0x800;

    /// <summary>evtchn_upcall_mask in vcpu_info, which begins with evtchn_upcall_pending.</summary>
    private const int UpcallMask = 1;
    private const uint SetSingleshotTimer = 8;
    private const uint SegmentBaseGsUser = 1;
    private const int InSyscall = 1 << 8;

    /// <summary>Bytes of an IRETQ frame.</summary>
    private const int FrameSize = 5 * sizeof(ulong);

    private readonly ulong _exit;
    private readonly Served[] _served;
    private readonly Page* _page;

    /// <summary>A hypercall that the entry serves.</summary>
    /// <param name="Number">Its number.</param>
    /// <param name="Start">Where that begins.</param>
    /// <param name="Last">The instruction that takes what was put on the guest kernel's stack.</param>
    /// <param name="OnStack">How many bytes that are.</param>
    private readonly record struct Served(HypercallNumber Number, ulong Start, ulong Last, int OnStack);

    /// <summary>What the entry reads, at <see cref="ServiceOffset"/>.</summary>
    private struct Page
    {
        public EntryService Service;
        public uint Vcpu;
        public ulong VcpuInfo;
        public ulong ReservedStart;
        public ulong ReservedSize;
    }

    /// <param name="kind">What the host wants.</param>
    /// <param name="address">Where the guest has the page.</param>
    /// <param name="page">Host view of the page.</param>
    /// <param name="vcpu">The vCPU's number.</param>
    /// <param name="report">Where the guest's kernel has the vCPU's <see cref="EntryReport"/>.</param>
    public SyscallEntry(SyscallEntryKind kind, ulong address, byte* page, int vcpu, ulong report)
    {
        Of32BitCode = address;
        Of64BitCode = address + MonitorLayout.StubSize;
        _page = (Page*)(page + ServiceOffset);
        *_page = new Page
        {
            Vcpu = (uint)vcpu,
            ReservedStart = Paging.HypervisorVirtualStart,
            ReservedSize = Paging.HypervisorVirtualEnd - Paging.HypervisorVirtualStart,
        };

        var code = new Assembler(64);
        code.@out(MonitorLayout.SyscallPort, al);
        code.ud2();
        Label exit = code.CreateLabel();
        HypercallNumber[] numbers = kind.Serves
            ? [HypercallNumber.Iret, HypercallNumber.VcpuOp, HypercallNumber.StackSwitch, HypercallNumber.SetSegmentBase]
            : [];
        Label[] starts = [.. numbers.Select(_ => code.CreateLabel())];
        for (int i = 0; i < numbers.Length; i++)
        {
            code.cmp(rax, (int)numbers[i]);
            code.je(starts[i]);
        }

        code.Label(ref exit);
        code.@out(MonitorLayout.SyscallPort, al);
        code.ud2();
        var lasts = new Label[numbers.Length];
        for (int i = 0; i < numbers.Length; i++)
        {
            code.Label(ref starts[i]);
            lasts[i] = numbers[i] switch
            {
                HypercallNumber.Iret => EmitIret(code, kind, exit),
                HypercallNumber.VcpuOp => EmitTimer(code, report, exit),
                HypercallNumber.StackSwitch => EmitStackSwitch(code, report, exit),
                _ => EmitUserGsBase(code, report, exit),
            };
        }

        byte[] bytes = MonitorCode.Emit(code, address, out AssemblerResult result);
        bytes.CopyTo(new Span<byte>(page, ServiceOffset));
        _exit = result.GetLabelRIP(exit);
        End = address + (ulong)bytes.Length;
        _served = [.. numbers.Select((number, i) => new Served(
            number, result.GetLabelRIP(starts[i]), result.GetLabelRIP(lasts[i]), number == HypercallNumber.Iret ? FrameSize : sizeof(ulong)))];
        Service = kind.Serves ? &_page->Service : null;
    }

    /// <summary>CSTAR.</summary>
    public ulong Of32BitCode { get; }

    /// <summary>LSTAR.</summary>
    public ulong Of64BitCode { get; }

    /// <summary>Where the 64-bit entry ends.</summary>
    public ulong End { get; }

    /// <summary>Host view of the page.</summary>
    public Span<byte> Code => new((byte*)_page - ServiceOffset, (int)Paging.PageSize);

    /// <summary>What the entry is to serve; null where it cannot.</summary>
    public EntryService* Service { get; }

    /// <summary>Guest address of vcpu_info in the kernel's window.</summary>
    public void SetVcpuInfo(ulong address) => _page->VcpuInfo = address;

    /// <summary>Whether an <c>out</c> that RIP is on, or behind, is the 32-bit entry's.</summary>
    public bool IsExitOf32BitCode(ulong rip) => rip - Of32BitCode <= 2;

    /// <summary>Whether an <c>out</c> that RIP is on, or behind, is the 64-bit entry's.</summary>
    public bool IsExitOf64BitCode(ulong rip) => rip - _exit <= 2;

    /// <summary>Whether nothing is left to do at an address but to leave the VM.</summary>
    public bool IsLeaving(ulong rip) => rip == Of32BitCode || (rip == Of64BitCode && _served.Length == 0);

    /// <summary>
    /// Makes of registers that were found within the 64-bit entry, at CPL 3, those that it was entered with, but for the flags.
    /// </summary>
    /// <returns>False where they were found elsewhere, or the entry serves nothing and is not at CPL 3.</returns>
    public bool TryTakeOver(CpuRegisters* registers)
    {
        ulong rip = registers->Rip;
        if (_served.Length == 0 || rip - Of64BitCode >= End - Of64BitCode)
            return false;
        foreach (ref readonly Served served in _served.AsSpan())
        {
            if (rip >= served.Start)
                registers->Rax = (ulong)served.Number;
            if (rip == served.Last)
                registers->Rsp += (ulong)served.OnStack;
        }

        return true;
    }

    /// <summary>HYPERVISOR_iret, of a frame of kernel mode: RSP is on { RAX, R11, RCX, flags, RIP, CS, RFLAGS, RSP, SS }.</summary>
    private Label EmitIret(Assembler code, SyscallEntryKind kind, Label exit)
    {
        const int savedR11 = 8, savedRcx = 16, savedFlags = 24, savedRip = 32, savedCs = 40, savedRflags = 48, savedRsp = 56, savedSs = 64;
        Label give = code.CreateLabel();
        Label masked = code.CreateLabel();
        Label build = code.CreateLabel();
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Cmp_rm32_imm8, At(&_page->Service.Iret), 0));
        code.je(exit);
        RefuseForeign(code, rsp, give);
        code.test(__dword_ptr[rsp + savedFlags], InSyscall);
        code.jne(give);
        code.cmp(__word_ptr[rsp + savedCs], unchecked((short)FlatSelectors.KernelCs64));
        code.jne(give);
        code.cmp(__word_ptr[rsp + savedSs], unchecked((short)FlatSelectors.Ring3Data));
        code.jne(give);

        // Whoever raises the upcall afterwards kicks.
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Mov_r64_rm64, Register.RAX, At(&_page->VcpuInfo)));
        code.test(__dword_ptr[rsp + savedRflags], (int)Rflags.InterruptEnable);
        code.je(masked);
        code.mov(__byte_ptr[rax + UpcallMask], 0);
        code.cmp(__byte_ptr[rax], 0);
        code.jne(give);

        code.Label(ref build);
        code.mov(rax, __qword_ptr[rsp + savedRip]);
        code.mov(__qword_ptr[rsp - FrameSize], rax);
        code.mov(__qword_ptr[rsp - 32], kind.Code);
        code.mov(rax, __qword_ptr[rsp + savedRflags]);
        code.mov(__qword_ptr[rsp - 24], rax);
        code.mov(rax, __qword_ptr[rsp + savedRsp]);
        code.mov(__qword_ptr[rsp - 16], rax);
        code.mov(__qword_ptr[rsp - 8], kind.Stack);
        code.mov(rcx, __qword_ptr[rsp + savedRcx]);
        code.mov(r11, __qword_ptr[rsp + savedR11]);
        code.mov(rax, __qword_ptr[rsp]);
        code.lea(rsp, __qword_ptr[rsp - FrameSize]);
        Label last = MonitorCode.Here(code);
        code.iretq();

        code.Label(ref masked);
        code.mov(__byte_ptr[rax + UpcallMask], 1);
        code.jmp(build);

        EmitGive(code, ref give, HypercallNumber.Iret, exit);
        return last;
    }

    /// <summary>VCPUOP_set_singleshot_timer: EDI is the command, ESI the vCPU, RDX on { timeout, flags }.</summary>
    private Label EmitTimer(Assembler code, ulong report, Label exit)
    {
        EntryReport layout;
        Label give = code.CreateLabel();
        LeaveUnless(code, &_page->Service.SingleshotTimer, exit);
        code.cmp(edi, SetSingleshotTimer);
        code.jne(exit);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Cmp_r32_rm32, Register.ESI, At(&_page->Vcpu)));
        code.jne(exit);
        RefuseForeign(code, rdx, give);
        code.mov(rax, __qword_ptr[rdx]);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Cmp_r64_rm64, Register.RAX, At(&_page->Service.NextLook)));
        code.jb(give);
        code.mov(__qword_ptr[report + (ulong)Offset(&layout, &layout.SingleshotTimeout)], rax);
        Label last = EmitSuccess(code);
        EmitGive(code, ref give, HypercallNumber.VcpuOp, exit);
        return last;
    }

    /// <summary>stack_switch: RDI is SS, RSI the stack.</summary>
    private Label EmitStackSwitch(Assembler code, ulong report, Label exit)
    {
        EntryReport layout;
        LeaveUnless(code, &_page->Service.TaskSwitch, exit);
        code.mov(rax, report);
        code.mov(__qword_ptr[rax + Offset(&layout, &layout.KernelSs)], rdi);
        code.mov(__qword_ptr[rax + Offset(&layout, &layout.KernelSp)], rsi);
        code.mov(__qword_ptr[rax + Offset(&layout, &layout.StackSwitched)], 1);
        return EmitSuccess(code);
    }

    /// <summary>set_segment_base(SEGBASE_GS_USER): EDI is the command, RSI the address.</summary>
    private Label EmitUserGsBase(Assembler code, ulong report, Label exit)
    {
        EntryReport layout;
        Label give = code.CreateLabel();
        LeaveUnless(code, &_page->Service.TaskSwitch, exit);
        code.cmp(edi, SegmentBaseGsUser);
        code.jne(exit);
        EmitCanonicalCheck(code, rsi, give);
        code.mov(rax, report);
        code.mov(__qword_ptr[rax + Offset(&layout, &layout.UserGsBase)], rsi);
        code.mov(__qword_ptr[rax + Offset(&layout, &layout.UserGsBaseSet)], 1);
        Label last = EmitSuccess(code);
        EmitGive(code, ref give, HypercallNumber.SetSegmentBase, exit);
        return last;
    }

    private static int Offset(EntryReport* report, ulong* field) => (int)((byte*)field - (byte*)report);

    /// <summary>Leaves a hypercall to the manager that is not to be served, or not now.</summary>
    private void LeaveUnless(Assembler code, int* served, Label exit)
    {
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Cmp_rm32_imm8, At(served), 0));
        code.je(exit);

        // POPFQ would have a single step end an instruction too early.
        code.test(r11d, (int)Rflags.Trap);
        code.jne(exit);
    }

    /// <summary>Returns 0 from a hypercall.</summary>
    /// <returns>The instruction that takes the flags from the stack.</returns>
    private static Label EmitSuccess(Assembler code)
    {
        code.xor(eax, eax);
        code.push(r11);
        Label last = MonitorCode.Here(code);
        code.popfq();
        code.jmp(rcx);
        return last;
    }

    /// <summary>Where a hypercall is left to the manager: RAX is its number again.</summary>
    private static void EmitGive(Assembler code, ref Label give, HypercallNumber number, Label exit)
    {
        code.Label(ref give);
        code.mov(eax, (int)number);
        code.jmp(exit);
    }

    /// <summary>
    /// Leaves to the manager what a guest cannot name as its own: what lies in the hypervisor's slots, though some of it can be read, and
    /// what is not canonical, because not every KVM survives a stack fault here with RSP there.
    /// </summary>
    private void RefuseForeign(Assembler code, AssemblerRegister64 pointer, Label refusal)
    {
        EmitCanonicalCheck(code, pointer, refusal);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Sub_r64_rm64, Register.RAX, At(&_page->ReservedStart)));
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Cmp_r64_rm64, Register.RAX, At(&_page->ReservedSize)));
        code.jb(refusal);
    }

    /// <summary>Makes RAX the address, and goes elsewhere if it is not canonical.</summary>
    private static void EmitCanonicalCheck(Assembler code, AssemblerRegister64 pointer, Label refusal)
    {
        const byte notTranslated = 16;
        code.mov(rax, pointer);
        code.shl(rax, notTranslated);
        code.sar(rax, notTranslated);
        code.cmp(rax, pointer);
        code.jne(refusal);
    }

    /// <summary>An operand relative to RIP: where the guest has what the host has at an address of the page.</summary>
    private MemoryOperand At(void* field)
    {
        const int wholeDisplacement = 8; // Iced's name for it in 64-bit code
        return new MemoryOperand(Register.RIP, (long)(Of32BitCode + ServiceOffset) + ((byte*)field - (byte*)_page), wholeDisplacement);
    }
}
