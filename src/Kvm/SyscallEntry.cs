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

/// <summary>Bytes from the start of what HYPERVISOR_iret finds on the guest's stack (struct iret_context), which begins with RAX.</summary>
internal static class IretFrame
{
    public const int R11 = 8;
    public const int Rcx = 16;
    public const int Flags = 24;
    public const int Rip = 32;
    public const int Cs = 40;
    public const int Rflags = 48;
    public const int Rsp = 56;
    public const int Ss = 64;

    /// <summary>VGCF_in_syscall in the flags: RCX and R11 become RIP and RFLAGS, and the selectors the flat ones, as SYSRET has it.</summary>
    public const int InSyscall = 1 << 8;
}

/// <summary>The pages of a SYSCALL entry: where the guest has them, and the host's views of them.</summary>
internal readonly unsafe struct EntryPages
{
    /// <summary>The entry's.</summary>
    public ulong Entry { get; init; }

    /// <summary>What kernel mode sees there, or both modes where the entry serves nothing.</summary>
    public byte* KernelEntry { get; init; }

    /// <summary>What user mode sees there; null where the entry serves nothing, as is what follows.</summary>
    public byte* UserEntry { get; init; }

    /// <summary>The page of <see cref="EntryReport"/>.</summary>
    public ulong Report { get; init; }

    /// <inheritdoc cref="Report"/>
    public byte* ReportPage { get; init; }
}

/// <summary>
/// A vCPU's page with the SYSCALL entries of 32-bit and of 64-bit code: a page of its own, because some KVMs enter it at CPL 3.
/// </summary>
/// <remarks>
/// There the 64-bit entry serves what it is told to (<see cref="Core.EntryService"/>) with the guest's own rights: what it must not touch, it
/// faults on. The two modes of the guest each have a page of their own at the same address, so that none can make use of the other's. Whatever
/// interrupts the entry before it is done, a fault or a kick, has the hypercall served by the manager instead
/// (<see cref="TakeOver"/>): until its last instruction it changes nothing that the hypercall itself needs or does not change, but for RAX,
/// which is known by where it is, and for what <see cref="ModeSwitch"/> knows of. What lies below the guest kernel's stack is free to be used,
/// as for every bounce frame.
/// </remarks>
internal sealed unsafe class SyscallEntry
{
    /// <summary>Bytes from the start of the page to what the entry serves.</summary>
    private const int ServiceOffset = 0x800;

    /// <summary>Bytes from the start of both pages to a zero.</summary>
    private const int ZeroOffset = 0xff8;

    /// <summary>Bytes from the start of both pages to a byte that is 1 in kernel mode's, and 0 in user mode's.</summary>
    private const int KernelMarkOffset = 0xff0;

    /// <summary>evtchn_upcall_mask in vcpu_info, which begins with evtchn_upcall_pending.</summary>
    internal const int UpcallMask = 1;
    private const uint SetSingleshotTimer = 8;
    private const uint SegmentBaseGsUser = 1;

    /// <summary>Bytes of an IRETQ frame.</summary>
    private const int FrameSize = 5 * sizeof(ulong);

    private readonly Served[] _served;
    private readonly Page* _page;
    private readonly UserPage* _userPage;

    /// <summary>A hypercall that the entry serves.</summary>
    /// <param name="Number">Its number.</param>
    /// <param name="Start">Where that begins.</param>
    /// <param name="Last">The instruction that takes what was put on the guest kernel's stack.</param>
    /// <param name="OnStack">How many bytes that are.</param>
    private readonly record struct Served(HypercallNumber Number, ulong Start, ulong Last, int OnStack);

    /// <summary>What the entry of kernel mode reads, at <see cref="ServiceOffset"/>.</summary>
    private struct Page
    {
        public EntryService Service;
        public uint Vcpu;
        public int LinuxSegments;
        public ulong VcpuInfo;
        public ulong ReservedStart;
        public ulong ReservedSize;
    }

    /// <summary>What the entry of user mode reads, in the same place.</summary>
    private struct UserPage
    {
        public int ModeSwitch;
    }

    /// <param name="kind">What the host wants.</param>
    /// <param name="pages">The pages.</param>
    /// <param name="vcpu">The vCPU's number.</param>
    public SyscallEntry(SyscallEntryKind kind, in EntryPages pages, int vcpu)
    {
        Of32BitCode = pages.Entry;
        Of64BitCode = pages.Entry + MonitorLayout.StubSize;
        _page = (Page*)(pages.KernelEntry + ServiceOffset);
        *_page = new Page
        {
            Vcpu = (uint)vcpu,
            ReservedStart = Paging.HypervisorVirtualStart,
            ReservedSize = Paging.HypervisorVirtualEnd - Paging.HypervisorVirtualStart,
        };
        if (!kind.Serves)
        {
            var exits = new Assembler(64);
            EmitExit(exits);
            EmitExit(exits);
            byte[] both = MonitorCode.Emit(exits, pages.Entry, out _);
            both.CopyTo(new Span<byte>(pages.KernelEntry, ServiceOffset));
            End = pages.Entry + (ulong)both.Length;
            _served = [];
            return;
        }

        Switch = new ModeSwitch(pages.Report, pages.ReportPage);
        pages.KernelEntry[KernelMarkOffset] = 1;
        var code = new Assembler(64);
        EmitExit(code);
        Label exit = code.CreateLabel();
        HypercallNumber[] numbers = [HypercallNumber.Iret, HypercallNumber.VcpuOp, HypercallNumber.StackSwitch, HypercallNumber.SetSegmentBase];
        Label[] starts = [.. numbers.Select(_ => code.CreateLabel())];
        for (int i = 0; i < numbers.Length; i++)
        {
            code.cmp(rax, (int)numbers[i]);
            code.je(starts[i]);
        }

        code.Label(ref exit);
        EmitExit(code);
        var lasts = new Label[numbers.Length];
        for (int i = 0; i < numbers.Length; i++)
        {
            code.Label(ref starts[i]);
            lasts[i] = numbers[i] switch
            {
                HypercallNumber.Iret => EmitIret(code, kind, exit),
                HypercallNumber.VcpuOp => EmitTimer(code, pages.Report, exit),
                HypercallNumber.StackSwitch => EmitStackSwitch(code, pages.Report, exit),
                _ => EmitUserGsBase(code, pages.Report, exit),
            };
        }

        Switch.EmitSystemCall(code, this);
        byte[] bytes = MonitorCode.Emit(code, pages.Entry, out AssemblerResult result);
        bytes.CopyTo(new Span<byte>(pages.KernelEntry, ServiceOffset));
        End = pages.Entry + (ulong)bytes.Length;
        _served = [.. numbers.Select((number, i) => new Served(
            number, result.GetLabelRIP(starts[i]), result.GetLabelRIP(lasts[i]), number == HypercallNumber.Iret ? FrameSize : sizeof(ulong)))];
        Switch.Resolve(result);
        _userPage = (UserPage*)(pages.UserEntry + ServiceOffset);
        EmitUserEntry(pages);
        Service = &_page->Service;
    }

    /// <summary>CSTAR.</summary>
    public ulong Of32BitCode { get; }

    /// <summary>LSTAR.</summary>
    public ulong Of64BitCode { get; }

    /// <summary>Where the 64-bit entry ends.</summary>
    public ulong End { get; }

    /// <summary>Host view of kernel mode's page.</summary>
    public Span<byte> Code => new((byte*)_page - ServiceOffset, (int)Paging.PageSize);

    /// <summary>What the entry is to serve; null where it cannot.</summary>
    public EntryService* Service { get; }

    /// <summary>Whether it may serve anything.</summary>
    public bool Serves => _served.Length != 0;

    /// <summary>Its ways between the guest's modes; null where it serves nothing.</summary>
    public ModeSwitch? Switch { get; }

    /// <summary>Operand: the guest address of vcpu_info.</summary>
    public MemoryOperand VcpuInfo => At(&_page->VcpuInfo);

    /// <summary>Operand: <see cref="EntryService.SyscallCallback"/>.</summary>
    public MemoryOperand SyscallCallback => At(&_page->Service.SyscallCallback);

    /// <summary>Operand: <see cref="EntryService.ModeSwitch"/>.</summary>
    public MemoryOperand ModeSwitchServed => At(&_page->Service.ModeSwitch);

    /// <summary>Operand: whether Linux's selectors of 64-bit user mode are flat segments, as they are on the host.</summary>
    public MemoryOperand LinuxSegments => At(&_page->LinuxSegments);

    /// <summary>The instruction that leads to <see cref="ModeGate"/>.</summary>
    public Instruction DivideByZero => Instruction.Create(Iced.Intel.Code.Div_rm8, At(Of32BitCode + ZeroOffset));

    /// <summary>Address of a byte that tells by which mode's page is shown which mode's root is loaded: 1 for kernel mode.</summary>
    public ulong KernelMark => Of32BitCode + KernelMarkOffset;

    /// <summary>Guest address of vcpu_info in the kernel's window.</summary>
    public void SetVcpuInfo(ulong address) => _page->VcpuInfo = address;

    /// <summary>Says what is served of the ways between the guest's modes.</summary>
    /// <param name="serves">System calls of user mode go to kernel mode by themselves.</param>
    /// <param name="linuxSegments">iret may go to user mode with Linux's selectors.</param>
    public void ServeModeSwitch(bool serves, bool linuxSegments)
    {
        _page->LinuxSegments = linuxSegments ? 1 : 0;
        _userPage->ModeSwitch = serves ? 1 : 0;
    }

    /// <summary>Whether an <c>out</c> that RIP is on, or behind, is the 32-bit entry's.</summary>
    public bool IsExitOf32BitCode(ulong rip) => rip - Of32BitCode <= 2;

    /// <summary>Whether an address is within the 64-bit entry, or behind an <c>out</c> that is.</summary>
    public bool Contains(ulong rip) => rip - Of64BitCode < End - Of64BitCode;

    /// <summary>Whether nothing is left to do at an address but to leave the VM.</summary>
    public bool IsLeaving(ulong rip) => rip == Of32BitCode || (rip == Of64BitCode && !Serves);

    /// <summary>
    /// Makes of registers that were found within the 64-bit entry, at CPL 3, those that it was entered with, but for the flags; or those
    /// that it was about to go on with.
    /// </summary>
    /// <param name="registers">The registers, which <see cref="Contains"/> the entry.</param>
    /// <param name="gsBase">GS's base.</param>
    /// <param name="switchesModes">Whether the entry may have gone to the other mode.</param>
    /// <param name="inUserMode">User mode's root is loaded.</param>
    public ModeSwitch.Outcome TakeOver(CpuRegisters* registers, ref ulong gsBase, bool switchesModes, bool inUserMode)
    {
        ulong rip = registers->Rip;
        ModeSwitch.Outcome outcome = switchesModes
            ? Switch!.TakeOver(registers, ref gsBase, inUserMode, _page->Service.SyscallCallback)
            : ModeSwitch.Outcome.Syscall;
        if (outcome != ModeSwitch.Outcome.Syscall || inUserMode)
            return outcome;
        foreach (ref readonly Served served in _served.AsSpan())
        {
            if (rip >= served.Start)
                registers->Rax = (ulong)served.Number;
            if (rip == served.Last)
                registers->Rsp += (ulong)served.OnStack;
        }

        return outcome;
    }

    /// <summary>Leaves the VM, and does not come back behind it.</summary>
    internal static void EmitExit(Assembler code)
    {
        code.@out(MonitorLayout.SyscallPort, al);
        code.ud2();
    }

    /// <summary>
    /// User mode's page: system calls go to the instruction that leads to kernel mode, if that serves them. All else faults.
    /// </summary>
    private void EmitUserEntry(in EntryPages pages)
    {
        const byte hlt = 0xf4; // of one byte, so that there is nothing between two of them
        var page = new Span<byte>(pages.UserEntry, (int)Paging.PageSize);
        page[..ServiceOffset].Fill(hlt);
        var code = new Assembler(64);
        Label exit = code.CreateLabel();
        EmitExit(code);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Cmp_rm32_imm8, At(Of32BitCode + ServiceOffset), 0));
        code.je(exit);

        // A single step would end within the kernel.
        code.test(r11d, (int)Rflags.Trap);
        code.jne(exit);
        code.jmp(Switch!.Enter);
        code.Label(ref exit);
        EmitExit(code);
        byte[] bytes = MonitorCode.Emit(code, Of32BitCode, out _);
        int enter = (int)(Switch.Enter - Of32BitCode);
        bytes.CopyTo(page[..enter]);
        var switches = new Assembler(64);
        switches.AddInstruction(DivideByZero);
        MonitorCode.Emit(switches, Switch.Enter, out _).CopyTo(page[enter..]);
    }

    /// <summary>HYPERVISOR_iret: RSP is on { RAX, R11, RCX, flags, RIP, CS, RFLAGS, RSP, SS }.</summary>
    private Label EmitIret(Assembler code, SyscallEntryKind kind, Label exit)
    {
        Label give = code.CreateLabel();
        Label masked = code.CreateLabel();
        Label build = code.CreateLabel();
        Label user = code.CreateLabel();
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Cmp_rm32_imm8, At(&_page->Service.Iret), 0));
        code.je(exit);
        RefuseForeign(code, rsp, give);
        code.cmp(__word_ptr[rsp + IretFrame.Cs], (short)KvmVirtualCpu.HostUserCode);
        code.je(user);
        code.cmp(__word_ptr[rsp + IretFrame.Cs], unchecked((short)FlatSelectors.Ring3Cs64));
        code.je(user);
        code.test(__dword_ptr[rsp + IretFrame.Flags], IretFrame.InSyscall);
        code.jne(give);
        code.cmp(__word_ptr[rsp + IretFrame.Cs], unchecked((short)FlatSelectors.KernelCs64));
        code.jne(give);
        code.cmp(__word_ptr[rsp + IretFrame.Ss], unchecked((short)FlatSelectors.Ring3Data));
        code.jne(give);

        code.test(__dword_ptr[rsp + IretFrame.Rflags], (int)Rflags.InterruptEnable);
        code.je(masked);
        EmitUnmask(code, give);

        code.Label(ref build);
        code.mov(rax, __qword_ptr[rsp + IretFrame.Rip]);
        code.mov(__qword_ptr[rsp - FrameSize], rax);
        code.mov(__qword_ptr[rsp - 32], kind.Code);
        code.mov(rax, __qword_ptr[rsp + IretFrame.Rflags]);
        code.mov(__qword_ptr[rsp - 24], rax);
        code.mov(rax, __qword_ptr[rsp + IretFrame.Rsp]);
        code.mov(__qword_ptr[rsp - 16], rax);
        code.mov(__qword_ptr[rsp - 8], kind.Stack);
        code.mov(rcx, __qword_ptr[rsp + IretFrame.Rcx]);
        code.mov(r11, __qword_ptr[rsp + IretFrame.R11]);
        code.mov(rax, __qword_ptr[rsp]);
        code.lea(rsp, __qword_ptr[rsp - FrameSize]);
        Label last = MonitorCode.Here(code);
        code.iretq();

        code.Label(ref masked);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Mov_r64_rm64, Register.RAX, VcpuInfo));
        code.mov(__byte_ptr[rax + UpcallMask], 1);
        code.jmp(build);

        code.Label(ref user);
        Switch!.EmitIret(code, this, give);

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
        code.mov(__qword_ptr[rax + Offset(&layout, &layout.InactiveGsBase)], rsi);
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

    /// <summary>Unmasks upcalls, and goes elsewhere if one is due; RAX is used. Whoever raises one afterwards kicks.</summary>
    internal void EmitUnmask(Assembler code, Label due)
    {
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Mov_r64_rm64, Register.RAX, VcpuInfo));
        code.mov(__byte_ptr[rax + UpcallMask], 0);
        code.cmp(__byte_ptr[rax], 0);
        code.jne(due);
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
    internal void RefuseForeign(Assembler code, AssemblerRegister64 pointer, Label refusal)
    {
        EmitCanonicalCheck(code, pointer, refusal);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Sub_r64_rm64, Register.RAX, At(&_page->ReservedStart)));
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Cmp_r64_rm64, Register.RAX, At(&_page->ReservedSize)));
        code.jb(refusal);
    }

    /// <summary>Makes RAX the address, and goes elsewhere if it is not canonical.</summary>
    internal static void EmitCanonicalCheck(Assembler code, AssemblerRegister64 pointer, Label refusal)
    {
        const byte notTranslated = 16;
        code.mov(rax, pointer);
        code.shl(rax, notTranslated);
        code.sar(rax, notTranslated);
        code.cmp(rax, pointer);
        code.jne(refusal);
    }

    /// <summary>An operand relative to RIP: where the guest has what the host has at an address of the page.</summary>
    private MemoryOperand At(void* field) => At(Of32BitCode + ServiceOffset + (ulong)((byte*)field - (byte*)_page));

    /// <summary>An operand relative to RIP, at an address of the guest's.</summary>
    internal static MemoryOperand At(ulong address)
    {
        const int wholeDisplacement = 8; // Iced's name for it in 64-bit code
        return new MemoryOperand(Register.RIP, (long)address, wholeDisplacement);
    }
}
