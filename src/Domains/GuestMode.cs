// Moving a vCPU between guest-kernel and guest-user mode, and the frames that carry it there: Xen's bounce frames and iret.
using System.Runtime.InteropServices;
using XenSharp.Core;

namespace XenSharp.Domains;

/// <summary>What a bounce into the guest kernel carries.</summary>
/// <param name="Address">Where the guest continues.</param>
/// <param name="MasksEvents">The handler starts with events masked (TBF_INTERRUPT).</param>
/// <param name="HasErrorCode">An error code is pushed.</param>
/// <param name="ErrorCode">The code.</param>
public readonly record struct TrapBounce(ulong Address, bool MasksEvents, bool HasErrorCode = false, uint ErrorCode = 0);

/// <summary>
/// Guest-kernel and guest-user mode are both CPL 3; what differs is the page-table root, the GS base and which stack a bounce
/// uses. Static over the vCPU's context: hot code of both places.
/// </summary>
public static unsafe class GuestMode
{
    private const ulong ClearedOnTrap = (ulong)(Rflags.AlignmentCheck | Rflags.Virtual8086 | Rflags.Resume | Rflags.NestedTask | Rflags.Trap);

    /// <summary>struct iret_context: what HYPERVISOR_iret finds on the guest's stack.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct IretContext
    {
        public ulong Rax, R11, Rcx, Flags, Rip, Cs, Rflags, Rsp, Ss;
    }

    /// <summary>VGCF_in_syscall: return as SYSRET does, RCX and R11 are not restored.</summary>
    private const ulong InSyscall = 1 << 8;

    /// <summary>Switches to the other mode, as SWAPGS and a CR3 load would (toggle_guest_mode).</summary>
    public static void Toggle(VcpuContext* vcpu)
    {
        VcpuState* state = vcpu->State;
        state->KernelMode ^= 1;
        (vcpu->Segments->GsBase, state->InactiveGsBase) = (state->InactiveGsBase, vcpu->Segments->GsBase);
    }

    /// <summary>Pushes a frame on the guest kernel's stack and continues at its handler (create_bounce_frame).</summary>
    /// <returns>False when the guest cannot take it: no handler, or a stack that cannot be written. Crash the domain.</returns>
    public static bool Bounce(VcpuContext* vcpu, in TrapBounce bounce) => bounce.Address != 0 && Push(vcpu, bounce, withSelectors: false);

    /// <summary>
    /// Pushes the frame of the failsafe callback, which has DS, ES, FS and GS in the error code's place, and continues there; those that
    /// could not be loaded are null from then on.
    /// </summary>
    /// <returns>False for a stack that cannot be written. Crash the domain.</returns>
    public static bool Failsafe(VcpuContext* vcpu)
        => Push(
            vcpu,
            new TrapBounce(vcpu->State->FailsafeCallback, (vcpu->State->CallbackFlags & CallbackFlags.FailsafeDisablesEvents) != 0),
            withSelectors: true);

    private static bool Push(VcpuContext* vcpu, in TrapBounce bounce, bool withSelectors)
    {
        CpuRegisters* registers = vcpu->Registers;
        SegmentRegisters* segments = vcpu->Segments;
        ulong cs = segments->Cs;
        ulong stack;
        if (vcpu->State->KernelMode != 0)
        {
            stack = registers->Rsp;
            cs &= ~3UL;
        }
        else
        {
            Toggle(vcpu);
            stack = vcpu->State->KernelSp;
        }

        byte saved = Volatile.Read(ref vcpu->Info->EvtchnUpcallMask);
        if (bounce.MasksEvents)
            Volatile.Write(ref vcpu->Info->EvtchnUpcallMask, 1);
        ulong flags = registers->Rflags & ~(ulong)(Rflags.InterruptEnable | Rflags.Iopl);
        if (saved == 0)
            flags |= (ulong)Rflags.InterruptEnable;
        if (vcpu->Domain->State->Has(VmAssist.ArchitecturalIopl))
            flags |= vcpu->State->Iopl;

        ulong* frame = stackalloc ulong[11];
        int length = 0;
        frame[length++] = registers->Rcx;
        frame[length++] = registers->R11;
        if (bounce.HasErrorCode)
            frame[length++] = bounce.ErrorCode;
        if (withSelectors)
        {
            frame[length++] = segments->Ds;
            frame[length++] = segments->Es;
            frame[length++] = segments->Fs;
            frame[length++] = segments->Gs;
        }

        frame[length++] = registers->Rip;
        frame[length++] = cs | ((ulong)saved << 32);
        frame[length++] = flags;
        frame[length++] = registers->Rsp;
        frame[length++] = segments->Ss;
        ulong size = (ulong)length * sizeof(ulong);
        stack = (stack & ~0xfUL) - size;
        if (!GuestAccess.CopyTo(vcpu, stack, frame, size))
            return false;

        registers->Rsp = stack;
        registers->Rip = bounce.Address;
        registers->Rflags &= ~ClearedOnTrap;
        segments->Cs = FlatSelectors.Ring3Cs64;
        segments->Ss = FlatSelectors.Ring3Data;
        return true;
    }

    /// <summary>iret (23): undoes a bounce frame.</summary>
    /// <param name="vcpu">The calling vCPU.</param>
    /// <param name="result">The restored RAX.</param>
    /// <returns>False when the frame cannot be read or leads nowhere: crash the domain.</returns>
    public static bool Iret(VcpuContext* vcpu, out long result)
    {
        CpuRegisters* registers = vcpu->Registers;
        result = 0;
        if (!GuestAccess.Read(vcpu, registers->Rsp, out IretContext saved))
            return false;
        if ((saved.Cs & 3) == 3)
        {
            if (vcpu->State->UserRoot == 0)
                return false;
            Toggle(vcpu);
        }

        if (vcpu->Domain->State->Has(VmAssist.ArchitecturalIopl))
            vcpu->State->Iopl = saved.Rflags & (ulong)Rflags.Iopl;
        registers->Rip = saved.Rip;
        registers->Rflags = (saved.Rflags & ~(ulong)(Rflags.Iopl | Rflags.Virtual8086)) | (ulong)(Rflags.InterruptEnable | Rflags.Fixed);
        registers->Rsp = saved.Rsp;
        vcpu->Segments->Cs = (ushort)(saved.Cs | 3);
        vcpu->Segments->Ss = (ushort)(saved.Ss | 3);
        if ((saved.Flags & InSyscall) == 0)
        {
            registers->R11 = saved.R11;
            registers->Rcx = saved.Rcx;
        }
        else
        {
            // The way back is SYSRET's: it takes RIP and RFLAGS from these, and its own flat segments.
            registers->R11 = registers->Rflags;
            registers->Rcx = saved.Rip;
            vcpu->Segments->Cs = vcpu->Segments->Cs == FlatSelectors.Ring3Cs32 ? FlatSelectors.Ring3Cs32 : FlatSelectors.Ring3Cs64;
            vcpu->Segments->Ss = FlatSelectors.Ring3Data;
        }

        Volatile.Write(ref vcpu->Info->EvtchnUpcallMask, (saved.Rflags & (ulong)Rflags.InterruptEnable) != 0 ? (byte)0 : (byte)1);
        vcpu->State->NmiMasked = 0;
        result = (long)saved.Rax;
        return true;
    }
}
