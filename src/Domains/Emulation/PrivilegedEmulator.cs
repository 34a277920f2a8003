// Executes for a PV kernel at CPL 3 the privileged instructions that the PV ABI lets it keep.
using Iced.Intel;
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Emulation;

/// <summary>
/// Emulates what raised #GP or #UD at CPL 3, by the rules of Xen 4.17's emulation of privileged operations: what that list lacks
/// goes back to the guest as the exception it is. One per vCPU, on the vCPU's thread; allocates nothing per instruction.
/// </summary>
public sealed unsafe partial class PrivilegedEmulator
{
    // Selector error codes (Intel SDM volume 3, 6.13).
    private const uint ErrorExternal = 1;
    private const uint ErrorIdt = 2;

    private const byte LegacySyscallVector = 0x80;

    private readonly VcpuContext* _vcpu;
    private readonly IPrivilegedState _machine;
    private readonly GuestMsrs _msrs;
    private readonly InstructionWindow _window = new();
    private readonly Decoder _decoder16;
    private readonly Decoder _decoder32;
    private readonly Decoder _decoder64;
    private Instruction _instruction;
    private int _bitness;

    /// <summary>Prepares for one vCPU.</summary>
    /// <param name="vcpu">Its state; must stay where it is.</param>
    /// <param name="machine">What instructions reach beyond it.</param>
    public PrivilegedEmulator(VcpuContext* vcpu, IPrivilegedState machine)
    {
        _vcpu = vcpu;
        _machine = machine;
        _msrs = new GuestMsrs(vcpu, machine);
        _decoder16 = Decoder.Create(16, _window);
        _decoder32 = Decoder.Create(32, _window);
        _decoder64 = Decoder.Create(64, _window);
    }

    /// <summary>The vCPU's model-specific registers.</summary>
    public GuestMsrs Msrs => _msrs;

    private CpuRegisters* Registers => _vcpu->Registers;

    private VcpuState* State => _vcpu->State;

    private bool KernelMode => State->KernelMode != 0;

    /// <summary>A #GP that the guest raised at CPL 3; RIP is on the instruction.</summary>
    /// <param name="errorCode">Its error code.</param>
    public EmulationResult GeneralProtection(uint errorCode)
    {
        if ((errorCode & ErrorExternal) != 0)
            return EmulationResult.NotHandled;

        if (!Fetch(out EmulationResult failure))
            return failure;

        // The IDT lets no int n through, so that the guest's own table decides. The vector is the instruction's: QEMU's software
        // CPU gets it wrong in the error code.
        if ((errorCode & ErrorIdt) != 0)
            return _instruction.Code == Code.Int_imm8 ? Interrupt() : EmulationResult.NotHandled;
        return errorCode == 0 ? Execute() : LoadSegment(errorCode);
    }

    /// <summary>A #UD that the guest raised; RIP is on the instruction.</summary>
    /// <remarks>
    /// Knows Xen's forced-emulation prefix before CPUID, and <c>int n</c>, INT3, INTO and BOUND for hosts that raise #UD where
    /// hardware goes through the IDT.
    /// </remarks>
    public EmulationResult InvalidOpcode()
    {
        if (!Fetch(out EmulationResult failure))
            return failure;
        switch (_instruction.Code)
        {
            case Code.Ud2:
                return ForcedEmulation();

            // Where the host raises #UD for them, too; in 64-bit code INTO is one.
            case Code.Int3:
                return SoftwareInterrupt((byte)ExceptionVector.Breakpoint, NextRip);
            case Code.Into:
                return (Registers->Rflags & (ulong)Rflags.Overflow) != 0
                    ? SoftwareInterrupt((byte)ExceptionVector.Overflow, NextRip)
                    : Retire();

            case Code.Bound_r16_m1616:
                return CheckBounds(sizeof(short));
            case Code.Bound_r32_m3232:
                return CheckBounds(sizeof(int));

            case Code.Int_imm8:
                return Interrupt();

            // Outside 64-bit code each vendor's processors have one of the two: so it is here, where the host has neither.
            case Code.Syscall when _bitness != 64 && _machine.Cpuid.Vendor == CpuVendor.Amd:
                return SystemCall();
            case Code.Sysenter when _machine.Cpuid.Vendor == CpuVendor.Intel:
                return SystemEnter();

            default:
                return EmulationResult.NotHandled;
        }
    }

    /// <summary>
    /// An I/O instruction that the VM let through; RIP is on it. Where the guest may not access the port, the answer is the
    /// #GP that the VM did not raise.
    /// </summary>
    public EmulationResult GuestIo()
    {
        if (!Fetch(out EmulationResult failure))
            return failure.Outcome == EmulationOutcome.NotHandled ? EmulationResult.GeneralProtection : failure;
        EmulationResult result = ExecuteIo();
        return result.Outcome == EmulationOutcome.NotHandled ? EmulationResult.GeneralProtection : result;
    }

    private EmulationResult Execute()
    {
        switch (_instruction.Code)
        {
            case Code.Cli or Code.Sti:
                // With IOPL they do nothing: the upcall mask is what stands for IF, and POPF, which cannot be caught, would not
                // bring it back. Nor do they trap after themselves: a single step ends behind the next instruction.
                return IoplAllows ? Retire(holdsOffTraps: true) : EmulationResult.NotHandled;
            case Code.Cpuid:
                return ExecuteCpuid();
            case Code.Rdtsc:
                return ReadTsc(withAux: false);
            case Code.Rdtscp:
                return ReadTsc(withAux: true);
            case Code.Mov_Sreg_rm16 or Code.Mov_Sreg_r32m16 or Code.Mov_Sreg_r64m16:
                return LoadSegment(0);
            case Code.Xsetbv:
                return SetExtendedControl();

            // The VM's own entry is closed: the processor has no code segment for it.
            case Code.Sysenter:
                return _machine.Cpuid.Vendor == CpuVendor.Intel ? SystemEnter() : EmulationResult.InvalidOpcode;
        }

        EmulationResult io = ExecuteIo();
        if (io.Outcome != EmulationOutcome.NotHandled || !KernelMode)
            return io;
        switch (_instruction.Code)
        {
            case Code.Wbinvd or Code.Wbnoinvd:
                // A domain without devices has no business with the caches; kernels time themselves with it, so it passes.
                return Retire();
            case Code.Clts:
                return SetTaskSwitched(false);
            case Code.Rdmsr:
                if (!_msrs.TryRead((uint)Registers->Rcx, out ulong value))
                    return EmulationResult.GeneralProtection;
                Registers->Rax = (uint)value;
                Registers->Rdx = value >> 32;
                if ((uint)Registers->Rcx == Msr.KernelGsBase)
                    _machine.NoteGsBaseRead(Registers->Rip, _instruction.Length);
                return Retire();
            case Code.Wrmsr:
                return _msrs.TryWrite((uint)Registers->Rcx, (uint)Registers->Rax | (Registers->Rdx << 32))
                    ? Retire()
                    : EmulationResult.GeneralProtection;
            case Code.Mov_r64_cr or Code.Mov_r32_cr:
                return ReadControlRegister();
            case Code.Mov_cr_r64 or Code.Mov_cr_r32:
                return WriteControlRegister();
            case Code.Mov_r64_dr or Code.Mov_r32_dr:
                return ReadDebugRegister();
            case Code.Mov_dr_r64 or Code.Mov_dr_r32:
                return WriteDebugRegister();
            default:
                return EmulationResult.NotHandled;
        }
    }

    // A CPUID that faulted: the host has CPUID faulting, and shows user and kernel the same.
    private EmulationResult ExecuteCpuid()
    {
        Cpuid(forcedInKernel: false);
        return Retire();
    }

    // "ud2; .ascii xen" and then CPUID, the only instruction that may follow.
    private EmulationResult ForcedEmulation()
    {
        const int length = 7;
        ReadOnlySpan<byte> signature = [0x0f, 0x0b, (byte)'x', (byte)'e', (byte)'n'];
        ReadOnlySpan<byte> cpuid = [0x0f, 0xa2];
        Span<byte> bytes = stackalloc byte[length];
        fixed (byte* to = bytes)
        {
            if (!TryRead(Registers->Rip, to, (uint)signature.Length, PageFaultError.InstructionFetch, out EmulationResult fault))
                return fault;
            if (!bytes.StartsWith(signature))
                return EmulationResult.NotHandled;
            ulong next = Registers->Rip + (uint)signature.Length;
            if (!TryRead(next, to + signature.Length, (uint)cpuid.Length, PageFaultError.InstructionFetch, out fault))
                return fault;
        }

        if (!bytes.EndsWith(cpuid))
            return EmulationResult.NotHandled;
        Cpuid(forcedInKernel: KernelMode);
        return Retire(Registers->Rip + length);
    }

    private void Cpuid(bool forcedInKernel)
    {
        var context = new CpuidContext(State->Id, State->Cr4, State->Xcr0, forcedInKernel);
        CpuidLeaf leaf = _machine.Cpuid.Query((uint)Registers->Rax, (uint)Registers->Rcx, context);
        Registers->Rax = leaf.Eax;
        Registers->Rbx = leaf.Ebx;
        Registers->Rcx = leaf.Ecx;
        Registers->Rdx = leaf.Edx;
    }

    // int 0x80 has a gate of its own on Xen, open to everybody as soon as the guest has a handler.
    private bool MayInterrupt(byte vector)
    {
        TrapInfo entry = State->Traps[vector];
        if (vector == LegacySyscallVector && entry.Address != 0)
            return true;
        return entry.PrivilegeLevel >= (KernelMode ? 1 : 3);
    }

    /// <summary><c>int n</c>, by the guest's trap table.</summary>
    private EmulationResult Interrupt()
    {
        // Gates 3 and 4 are open to CPL 3 on hardware: the guest's DPL for them is not looked at.
        byte vector = _instruction.Immediate8;
        return vector is (byte)ExceptionVector.Breakpoint or (byte)ExceptionVector.Overflow || MayInterrupt(vector)
            ? SoftwareInterrupt(vector, NextRip)
            : EmulationResult.Raise(ExceptionVector.GeneralProtection, ((uint)vector << 3) | ErrorIdt);
    }

    /// <summary>SYSCALL in 32-bit code: the return address and the flags go where that of 64-bit code leaves them.</summary>
    private EmulationResult SystemCall()
    {
        Registers->Rcx = NextRip;
        Registers->R11 = Registers->Rflags;
        Registers->Rip = Registers->Rcx;
        _vcpu->Segments->Cs = FlatSelectors.Ring3Cs32;
        _vcpu->Segments->Ss = FlatSelectors.Ring3Data;
        return EmulationResult.SystemCall;
    }

    /// <summary>SYSENTER keeps neither the return address nor the stack pointer: zeros, and a null selector, stand for them.</summary>
    private EmulationResult SystemEnter()
    {
        Registers->Rip = 0;
        Registers->Rsp = 0;
        _vcpu->Segments->Cs = FlatSelectors.NullRing3;
        _vcpu->Segments->Ss = FlatSelectors.Ring3Data;
        return EmulationResult.SystemEnter;
    }

    private EmulationResult SoftwareInterrupt(byte vector, ulong next)
    {
        Registers->Rip = next;
        return EmulationResult.SoftwareInterrupt(vector);
    }

    // BOUND, which is in 32-bit and 16-bit code only: a signed index against two bounds in memory.
    private EmulationResult CheckBounds(int size)
    {
        long bounds;
        if (!TryAddressOperand((uint)size * 2, out ulong address, out EmulationResult failure)
            || !TryRead(address, &bounds, (uint)size * 2, PageFaultError.None, out failure))
            return failure;
        ulong register = RegisterFile.Read(Registers, _instruction.Op0Register);
        (int index, int lower, int upper) = size == sizeof(short)
            ? ((short)register, (short)bounds, (short)(bounds >> 16))
            : ((int)register, (int)bounds, (int)(bounds >> 32));
        return index < lower || index > upper ? EmulationResult.Raise(ExceptionVector.BoundRange) : Retire();
    }

    private ulong NextRip
    {
        get
        {
            ulong next = Registers->Rip + (uint)_instruction.Length;
            return _bitness == 64 ? next : (uint)next;
        }
    }

    private EmulationResult Retire(uint breakpoints = 0, bool holdsOffTraps = false)
        => Retire(NextRip, breakpoints, holdsOffTraps);

    // The instruction is complete: RF ends with it, TF and I/O breakpoints trap after it.
    private EmulationResult Retire(ulong next, uint breakpoints = 0, bool holdsOffTraps = false)
    {
        Registers->Rip = next;
        Registers->Rflags &= ~(ulong)Rflags.Resume;
        ulong status = breakpoints;
        if ((Registers->Rflags & (ulong)Rflags.Trap) != 0 && !holdsOffTraps)
            status |= DebugRegisters.SingleStep;
        if (status == 0)
            return EmulationResult.Done;
        State->DebugRegisters[6] |= status | DebugRegisters.StatusOnes;
        return EmulationResult.Raise(ExceptionVector.Debug);
    }

    // Reads and decodes the instruction at RIP. The next page is touched only if the instruction really goes on there.
    private bool Fetch(out EmulationResult failure)
    {
        failure = EmulationResult.NotHandled;
        ushort selector = _vcpu->Segments->Cs;
        if (!SegmentDescriptor.TryRead(_vcpu, selector, out SegmentDescriptor code)
            || !code.IsUser || !code.IsPresent || !code.IsCode)
            return false;
        _bitness = code.Bitness;
        ulong address = Registers->Rip;
        if (_bitness != 64)
        {
            if (address > code.Limit)
            {
                failure = EmulationResult.GeneralProtection;
                return false;
            }

            address = (uint)(code.Base + address);
        }

        _window.Clear();
        uint inPage = (uint)(Paging.PageSize - (address & Paging.PageOffsetMask));
        if (!Append(address, Math.Min(inPage, InstructionWindow.Capacity), out failure))
            return false;
        Decoder decoder = _bitness switch { 64 => _decoder64, 32 => _decoder32, _ => _decoder16 };
        decoder.IP = Registers->Rip;
        decoder.Decode(out _instruction);
        if (_instruction.IsInvalid && decoder.LastError == DecoderError.NoMoreBytes && inPage < InstructionWindow.Capacity)
        {
            if (!Append(address + inPage, InstructionWindow.Capacity - inPage, out failure))
                return false;
            decoder.IP = Registers->Rip;
            decoder.Decode(out _instruction);
        }

        failure = EmulationResult.NotHandled;
        return !_instruction.IsInvalid;
    }

    private bool Append(ulong address, uint count, out EmulationResult failure)
    {
        fixed (byte* to = _window.Free)
        {
            if (!TryRead(address, to, count, PageFaultError.InstructionFetch, out failure))
                return false;
        }

        _window.Append((int)count);
        return true;
    }

    // Guest memory by linear address. All of it can be accessed, or nothing is and the answer is the exception.
    private bool TryRead(ulong address, void* to, uint count, PageFaultError access, out EmulationResult failure)
    {
        if (!CanAccess(address, count, access, out failure))
            return false;
        return GuestAccess.CopyFrom(_vcpu, address, to, count);
    }

    private bool TryWrite(ulong address, void* from, uint count, out EmulationResult failure)
    {
        if (!CanAccess(address, count, PageFaultError.Write, out failure))
            return false;
        return GuestAccess.CopyTo(_vcpu, address, from, count);
    }

    private bool CanAccess(ulong address, uint count, PageFaultError access, out EmulationResult failure)
    {
        failure = EmulationResult.GeneralProtection;
        if (!new VirtualAddress(address).IsGuest)
            return false;
        bool write = (access & PageFaultError.Write) != 0;
        ulong last = address + count - 1;
        for (ulong at = address; ; at = (at & ~Paging.PageOffsetMask) + Paging.PageSize)
        {
            if (GuestAccess.Translate(_vcpu, at, write) == null)
            {
                failure = PageFault(at, access);
                return false;
            }

            if ((at | Paging.PageOffsetMask) == (last | Paging.PageOffsetMask))
            {
                // Only what changed between the two looks at the tables can still fail: the guest runs into it again.
                failure = EmulationResult.Done;
                return true;
            }
        }
    }

    // Xen does not look at the tables for why an access of the emulator's failed: its error code names a write and nothing else.
    private static EmulationResult PageFault(ulong address, PageFaultError access)
        => EmulationResult.PageFault(address, (access & PageFaultError.Write) | PageFaultError.User);
}
