// The ways into the guest kernel: traps, page faults, upcalls and system calls of user mode, each with its bounce frame.
using XenSharp.Core;
using XenSharp.Domains.Emulation;

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

    /// <summary>
    /// Loads the data segments of a vCPU that is about to run for the first time, as Xen does on a switch to it (load_segments): if one of
    /// them cannot be, the guest comes to its failsafe callback.
    /// </summary>
    public static bool LoadSegments(VcpuContext* vcpu)
    {
        SegmentRegisters* segments = vcpu->Segments;
        bool ds = LoadsData(vcpu, segments->Ds, out ushort loadedDs);
        bool es = LoadsData(vcpu, segments->Es, out ushort loadedEs);
        bool fs = LoadsData(vcpu, segments->Fs, out ushort loadedFs);
        bool gs = LoadsData(vcpu, segments->Gs, out ushort loadedGs);
        if (!(ds && es && fs && gs) && !GuestMode.Failsafe(vcpu))
            return false;
        segments->Ds = loadedDs;
        segments->Es = loadedEs;
        segments->Fs = loadedFs;
        segments->Gs = loadedGs;
        return true;
    }

    /// <summary>Loads a data segment at CPL 0, to be used at CPL 3: one that is not for that becomes null on the way there.</summary>
    /// <param name="vcpu">Whose tables count.</param>
    /// <param name="selector">The selector.</param>
    /// <param name="loaded">The selector, or 0.</param>
    /// <returns>False where the load itself faults.</returns>
    private static bool LoadsData(VcpuContext* vcpu, ushort selector, out ushort loaded)
    {
        const int requestedLevelMask = 3;
        loaded = selector;
        if (selector <= requestedLevelMask)
            return true;
        bool loads = SegmentDescriptor.TryRead(vcpu, selector, out SegmentDescriptor descriptor) && descriptor.IsUser && descriptor.IsReadable
            && descriptor.IsPresent && (descriptor.IsConforming || descriptor.PrivilegeLevel >= (selector & requestedLevelMask));
        if (!loads || (!descriptor.IsConforming && descriptor.PrivilegeLevel != requestedLevelMask))
            loaded = 0;
        return loads;
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
