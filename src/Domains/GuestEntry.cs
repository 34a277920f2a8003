// The ways into the guest kernel: traps, page faults, upcalls and system calls of user mode, each with its bounce frame.
using XenSharp.Core;

namespace XenSharp.Domains;

/// <summary>
/// Which handler is entered, and what it finds. Static over the vCPU's context: hot code of both places. Each answers false when the
/// guest cannot take it: no handler, or a kernel stack that cannot be written. Crash the domain then.
/// </summary>
public static unsafe class GuestEntry
{
    /// <summary>An exception or a software interrupt, through the trap table.</summary>
    public static bool Trap(VcpuContext* vcpu, ExceptionVector vector, bool hasErrorCode, uint errorCode)
    {
        ref TrapInfo trap = ref vcpu->State->Traps[(int)vector];
        return GuestMode.Bounce(vcpu, new TrapBounce(trap.Address, trap.MasksEvents, hasErrorCode, errorCode));
    }

    /// <summary>
    /// What a page fault leaves beside its frame: the address, in CR2 and in vcpu_info. The frame is <see cref="Trap"/>'s.
    /// </summary>
    /// <param name="vcpu">The vCPU that faulted.</param>
    /// <param name="address">Where.</param>
    /// <param name="errorCode">The processor's error code; the guest's, when this returns.</param>
    public static void NotePageFault(VcpuContext* vcpu, ulong address, ref uint errorCode)
    {
        vcpu->State->Cr2 = address;
        vcpu->Info->Cr2 = address;
        errorCode &= ~(uint)PageFaultError.User;
        if (vcpu->State->KernelMode == 0)
            errorCode |= (uint)PageFaultError.User;
    }

    /// <summary>An event upcall. The caller has seen that one is due.</summary>
    public static bool Upcall(VcpuContext* vcpu) => GuestMode.Bounce(vcpu, new TrapBounce(vcpu->State->EventCallback, MasksEvents: true));

    /// <summary>Where the SYSCALL that user mode executed is taken, 0 for nowhere: then it is an undefined instruction.</summary>
    public static ulong SyscallCallback(VcpuContext* vcpu)
        => vcpu->Segments->Cs == FlatSelectors.Ring3Cs32 ? vcpu->State->Syscall32Callback : vcpu->State->SyscallCallback;

    /// <summary>A SYSENTER of the guest's, where it has a callback for it. Without one it is a #GP(0).</summary>
    public static bool Sysenter(VcpuContext* vcpu)
    {
        bool masks = (vcpu->State->CallbackFlags & CallbackFlags.SysenterDisablesEvents) != 0;
        return GuestMode.Bounce(vcpu, new TrapBounce(vcpu->State->SysenterCallback, masks));
    }

    /// <summary>A system call of user mode.</summary>
    public static bool Syscall(VcpuContext* vcpu)
    {
        // 32-bit code has a callback of its own, but not a flag of its own.
        bool masks = (vcpu->State->CallbackFlags & CallbackFlags.SyscallDisablesEvents) != 0;
        if (!GuestMode.Bounce(vcpu, new TrapBounce(SyscallCallback(vcpu), masks)))
            return false;

        // The mask of the guest's virtual SYSCALL clears this flag and no other.
        vcpu->Registers->Rflags &= ~(ulong)Rflags.Direction;
        return true;
    }
}
