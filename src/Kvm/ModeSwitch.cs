// The parts of a vCPU's SYSCALL entry that go from one of the guest's modes to the other: a system call, and iret to user mode.
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm;

/// <summary>
/// Guest-user and guest-kernel mode are both CPL 3. What differs is done here at that level, all but the root: for that both go through
/// <see cref="ModeGate"/>. A system call comes out in the page that kernel mode's root shows at the same address, an iret where it leads.
/// </summary>
/// <remarks>
/// What user mode brings along is not trusted, nor is what it can jump to: it only gets into kernel mode at one instruction, with the registers
/// of a system call. The kernel's own stack and GS base come from its own page, which it may spoil for itself, and which user mode does not
/// see: not even where another vCPU's process goes on. Interrupted anywhere, by a kick or by a fault, the call or iret is as if it had not
/// begun, and the manager makes it (<see cref="TakeOver"/>); but for the last instructions, where all is done but to load registers that are
/// known.
/// </remarks>
internal sealed unsafe class ModeSwitch
{
    /// <summary>Bytes from the start of the report's page to <see cref="Kept"/>.</summary>
    private const int KeptOffset = 0x100;

    private const int StackAlignment = -16;

    private readonly ulong _report;
    private readonly EntryReport* _reportPage;
    private readonly Kept* _kept;
    private readonly List<(int Instruction, Stage Stage)> _marks = [];
    private (ulong From, Stage Stage)[] _stages = [];
    private int _enter;
    private int _leave;

    /// <summary>How far a switch has come.</summary>
    private enum Stage
    {
        /// <summary>A system call with all registers that it was made with.</summary>
        SystemCall,

        /// <summary>A system call whose RAX is kept.</summary>
        SystemCallRaxKept,

        /// <summary>One whose RSP is kept too; the GS base of kernel mode is in RAX, and that of user mode both loaded and reported.</summary>
        SystemCallBaseInRax,

        /// <summary>One with kernel mode's GS base.</summary>
        SystemCallBaseLoaded,

        /// <summary>In kernel mode, but for RAX and RIP.</summary>
        Entered,

        /// <summary>An iret that has changed nothing that it needs.</summary>
        Iret,

        /// <summary>An iret with the GS base of user mode in RAX, and that of kernel mode both loaded and reported.</summary>
        IretBaseInRax,

        /// <summary>One with user mode's GS base.</summary>
        IretBaseLoaded,

        /// <summary>One that has put the flags on the kernel's stack besides.</summary>
        IretFlagsPushed,

        /// <summary>In user mode, but for RIP and the root.</summary>
        Left,
    }

    /// <summary>What the entry keeps for the time of a switch. The guest's kernel can write to it.</summary>
    private struct Kept
    {
        public ulong Rax;
        public ulong Rsp;

        /// <summary>Where user mode goes on.</summary>
        public ulong UserRip;

        /// <summary>The CS that it has gone to user mode with, as the kernel has it; 0 if it has not.</summary>
        public ulong UserCode;
    }

    /// <param name="report">Where the guest's kernel has the page of the vCPU's <see cref="EntryReport"/>.</param>
    /// <param name="reportPage">Host view of it.</param>
    public ModeSwitch(ulong report, byte* reportPage)
    {
        _report = report;
        _reportPage = (EntryReport*)reportPage;
        _kept = (Kept*)(reportPage + KeptOffset);
    }

    /// <summary>What an interrupted entry comes to.</summary>
    public enum Outcome
    {
        /// <summary>A SYSCALL of the mode that the vCPU is in.</summary>
        Syscall,

        /// <summary>A SYSCALL of user mode, whatever mode's root is loaded.</summary>
        SystemCall,

        /// <summary>Kernel mode goes on with the registers as they are now.</summary>
        InKernelMode,

        /// <summary>User mode does.</summary>
        InUserMode,
    }

    /// <summary>User mode's instruction that leads to kernel mode, and where kernel mode goes on.</summary>
    public ulong Enter { get; private set; }

    /// <summary>Kernel mode's instruction that leads to user mode, which goes on at an address that kernel mode keeps.</summary>
    public ulong Leave { get; private set; }

    /// <summary>Bytes from the start of the report's page to the address at which user mode goes on.</summary>
    public int UserRipOffset => (int)((byte*)&_kept->UserRip - (byte*)_reportPage);

    /// <summary>
    /// The selectors that the kernel has last sent the vCPU to user mode with since <see cref="BeginEntry"/>; zeroes if it has not.
    /// </summary>
    public (ushort Code, ushort Stack) UserSelectors => Volatile.Read(ref _kept->UserCode) switch
    {
        0 => default,
        KvmVirtualCpu.HostUserCode => (KvmVirtualCpu.HostUserCode, KvmVirtualCpu.HostUserData),
        _ => (FlatSelectors.Ring3Cs64, FlatSelectors.Ring3Data),
    };

    /// <summary>Before an entry.</summary>
    public void BeginEntry() => _kept->UserCode = 0;

    /// <summary>
    /// From <see cref="Enter"/> on, in kernel mode: RCX and R11 are those of SYSCALL, all else user mode's. Pushes the bounce frame of a
    /// system call for a callback that masks events.
    /// </summary>
    /// <param name="code">The page's code.</param>
    /// <param name="entry">The page.</param>
    public void EmitSystemCall(Assembler code, SyscallEntry entry)
    {
        Label giveEarly = code.CreateLabel();
        Label give = code.CreateLabel();
        _enter = code.Instructions.Count;
        Mark(code, Stage.SystemCall);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Mov_rm64_r64, InReport(&_kept->Rax), Register.RAX));
        Mark(code, Stage.SystemCallRaxKept);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Mov_r64_rm64, Register.RAX, entry.VcpuInfo));
        code.cmp(__byte_ptr[rax + SyscallEntry.UpcallMask], 0);
        code.jne(giveEarly);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Mov_rm64_r64, InReport(&_kept->Rsp), Register.RSP));
        EmitBases(code, Stage.SystemCallBaseInRax, Stage.SystemCallBaseLoaded);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Mov_r64_rm64, Register.RSP, InReport(&_reportPage->KernelSp)));
        entry.RefuseForeign(code, rsp, give);
        code.and(rsp, StackAlignment);
        code.push(FlatSelectors.Ring3Data);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Push_rm64, InReport(&_kept->Rsp)));

        // Whoever jumped here has R11 as he liked.
        code.mov(eax, r11d);
        EmitGuestFlags(code, eax);
        code.push(rax);
        code.push(FlatSelectors.Ring3Cs64);
        code.push(rcx);
        code.push(r11);
        code.push(rcx);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Mov_r64_rm64, Register.RAX, entry.VcpuInfo));
        code.mov(__byte_ptr[rax + SyscallEntry.UpcallMask], 1);
        Mark(code, Stage.Entered);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Mov_r64_rm64, Register.RAX, InReport(&_kept->Rax)));
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Jmp_rm64, entry.SyscallCallback));

        Mark(code, Stage.SystemCallBaseLoaded);
        code.Label(ref give);
        SyscallEntry.EmitExit(code);
        Mark(code, Stage.SystemCallRaxKept);
        code.Label(ref giveEarly);
        SyscallEntry.EmitExit(code);
    }

    /// <summary>
    /// iret to user mode: RSP is on { RAX, R11, RCX, flags, RIP, CS, RFLAGS, RSP, SS }, and CS is known to be Linux's or Xen's flat one.
    /// </summary>
    /// <param name="code">The page's code.</param>
    /// <param name="entry">The page.</param>
    /// <param name="give">Where what is not served goes.</param>
    public void EmitIret(Assembler code, SyscallEntry entry, Label give)
    {
        Label flat = code.CreateLabel();
        Label restored = code.CreateLabel();
        Label reported = code.CreateLabel();
        Mark(code, Stage.Iret);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Cmp_rm32_imm8, entry.ModeSwitchServed, 0));
        code.je(give);
        code.movzx(eax, __word_ptr[rsp + IretFrame.Cs]);
        code.cmp(eax, (int)KvmVirtualCpu.HostUserCode);
        code.jne(flat);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Cmp_rm32_imm8, entry.LinuxSegments, 0));
        code.je(give);
        code.Label(ref flat);

        // Both pairs are as far apart.
        code.sub(ax, __word_ptr[rsp + IretFrame.Ss]);
        code.cmp(ax, KvmVirtualCpu.HostUserCode - KvmVirtualCpu.HostUserData);
        code.jne(give);
        code.mov(rcx, __qword_ptr[rsp + IretFrame.Rip]);
        SyscallEntry.EmitCanonicalCheck(code, rcx, give);

        // A single step would begin within the entry.
        const Rflags looked = Rflags.InterruptEnable | Rflags.Trap | Rflags.NestedTask;
        code.mov(eax, __dword_ptr[rsp + IretFrame.Rflags]);
        code.and(eax, (int)looked);
        code.cmp(eax, (int)Rflags.InterruptEnable);
        code.jne(give);
        entry.EmitUnmask(code, give);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Mov_rm64_r64, InReport(&_kept->UserRip), Register.RCX));
        code.movzx(eax, __word_ptr[rsp + IretFrame.Cs]);
        code.test(__dword_ptr[rsp + IretFrame.Flags], IretFrame.InSyscall);
        code.je(reported);
        code.mov(eax, FlatSelectors.Ring3Cs64);
        code.Label(ref reported);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Mov_rm64_r64, InReport(&_kept->UserCode), Register.RAX));
        EmitBases(code, Stage.IretBaseInRax, Stage.IretBaseLoaded);
        code.mov(rcx, __qword_ptr[rsp + IretFrame.Rcx]);
        code.mov(r11, __qword_ptr[rsp + IretFrame.R11]);
        code.test(__dword_ptr[rsp + IretFrame.Flags], IretFrame.InSyscall);
        code.je(restored);
        code.mov(rcx, __qword_ptr[rsp + IretFrame.Rip]);
        code.mov(r11d, __dword_ptr[rsp + IretFrame.Rflags]);
        EmitGuestFlags(code, r11d);
        code.Label(ref restored);
        code.push(__qword_ptr[rsp + IretFrame.Rflags]);
        Mark(code, Stage.IretFlagsPushed);
        code.popfq();
        Mark(code, Stage.IretBaseLoaded);
        code.mov(rax, __qword_ptr[rsp]);
        code.mov(rsp, __qword_ptr[rsp + IretFrame.Rsp]);
        _leave = code.Instructions.Count;
        Mark(code, Stage.Left);
        code.AddInstruction(entry.DivideByZero);
        Mark(code, Stage.Iret);
    }

    /// <summary>Takes the addresses from the assembled page.</summary>
    public void Resolve(in AssemblerResult result)
    {
        BlockEncoderResult block = result.Result[0];
        Enter = AddressOf(_enter);
        Leave = AddressOf(_leave);
        _stages = [.. _marks.Select(mark => (AddressOf(mark.Instruction), mark.Stage))];

        ulong AddressOf(int instruction) => block.RIP + block.NewInstructionOffsets[instruction];
    }

    /// <summary>
    /// Makes of registers that were found in the entry those with which a SYSCALL is made, or those with which its switch ends.
    /// </summary>
    /// <param name="registers">The registers, at CPL 3 and in the entry.</param>
    /// <param name="gsBase">GS's base.</param>
    /// <param name="inUserMode">User mode's root is loaded.</param>
    /// <param name="callback">Where the guest's kernel takes system calls.</param>
    public Outcome TakeOver(CpuRegisters* registers, ref ulong gsBase, bool inUserMode, ulong callback)
    {
        if (inUserMode)
            return Outcome.Syscall;
        Stage stage = StageAt(registers->Rip);
        switch (stage)
        {
            case Stage.SystemCallBaseInRax or Stage.IretBaseInRax:
                _reportPage->InactiveGsBase = registers->Rax;
                break;
            case Stage.SystemCallBaseLoaded or Stage.IretBaseLoaded or Stage.IretFlagsPushed:
                ulong inactive = Volatile.Read(ref _reportPage->InactiveGsBase);
                _reportPage->InactiveGsBase = gsBase;

                // The host's processor would fault on it.
                gsBase = new VirtualAddress(inactive).IsCanonical ? inactive : 0;
                break;
            case Stage.Entered:
                registers->Rax = _kept->Rax;
                registers->Rip = callback;
                return Outcome.InKernelMode;
            case Stage.Left:
                registers->Rip = _kept->UserRip;
                return Outcome.InUserMode;
        }

        if (stage == Stage.IretFlagsPushed)
            registers->Rsp += sizeof(ulong);
        if (stage is Stage.SystemCallBaseInRax or Stage.SystemCallBaseLoaded)
            registers->Rsp = _kept->Rsp;
        if (stage is Stage.SystemCallRaxKept or Stage.SystemCallBaseInRax or Stage.SystemCallBaseLoaded)
            registers->Rax = _kept->Rax;
        return stage <= Stage.SystemCallBaseLoaded ? Outcome.SystemCall : Outcome.Syscall;
    }

    private Stage StageAt(ulong rip)
    {
        Stage stage = Stage.Iret;
        foreach ((ulong from, Stage begun) in _stages)
        {
            if (rip < from)
                break;
            stage = begun;
        }

        return stage;
    }

    /// <summary>Makes flags those that CPL 3 may have, with interrupts on, as user mode always has them.</summary>
    private static void EmitGuestFlags(Assembler code, AssemblerRegister32 flags)
    {
        code.and(flags, (int)KvmVirtualCpu.UserFlags);
        code.or(flags, (int)(Rflags.Fixed | Rflags.InterruptEnable));
    }

    /// <summary>Loads the other mode's GS base, and reports this one's as the one that is not loaded.</summary>
    private void EmitBases(Assembler code, Stage inRax, Stage loaded)
    {
        code.rdgsbase(rax);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Xchg_rm64_r64, InReport(&_reportPage->InactiveGsBase), Register.RAX));
        Mark(code, inRax);
        code.wrgsbase(rax);
        Mark(code, loaded);
    }

    /// <summary>From the next instruction on it has come so far.</summary>
    private void Mark(Assembler code, Stage stage) => _marks.Add((code.Instructions.Count, stage));

    private MemoryOperand InReport(ulong* field) => SyscallEntry.At(_report + (ulong)((byte*)field - (byte*)_reportPage));
}
