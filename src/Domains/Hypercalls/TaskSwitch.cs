// stack_switch (3) and set_segment_base (25).
using XenSharp.Core;
using XenSharp.Domains.Emulation;

namespace XenSharp.Domains.Hypercalls;

/// <summary>What a kernel sets anew with every task that it switches to. Static over the vCPU's context: hot code of both places.</summary>
internal static unsafe class TaskSwitch
{
    /// <summary>SEGBASE_* of xen/arch-x86/xen-x86_64.h.</summary>
    private enum SegmentBase : uint
    {
        Fs = 0,
        GsUser = 1,
        GsKernel = 2,
        GsUserSelector = 3,
    }

    /// <summary>stack_switch(ss, esp).</summary>
    public static long StackSwitch(VcpuContext* vcpu, in HypercallArguments arguments)
    {
        vcpu->State->KernelSs = arguments.A0 | 3;
        vcpu->State->KernelSp = arguments.A1;
        return 0;
    }

    /// <summary>set_segment_base(which, base).</summary>
    public static long SetSegmentBase(VcpuContext* vcpu, in HypercallArguments arguments)
    {
        ulong address = arguments.A1;
        var which = (SegmentBase)(uint)arguments.A0;
        if (which == SegmentBase.GsUserSelector)
        {
            LoadUserGs(vcpu, (ushort)address);
            return 0;
        }

        if (which > SegmentBase.GsUserSelector || !new VirtualAddress(address).IsCanonical)
            return -(long)Errno.EINVAL;
        switch (which)
        {
            case SegmentBase.Fs:
                vcpu->Segments->FsBase = address;
                break;
            case SegmentBase.GsUser:
                vcpu->State->InactiveGsBase = address;
                break;
            default:
                vcpu->Segments->GsBase = address;
                break;
        }

        return 0;
    }

    /// <summary>Loads a selector as user mode's GS; one that cannot be loaded becomes the null selector, without an error.</summary>
    private static void LoadUserGs(VcpuContext* vcpu, ushort selector)
    {
        if (selector > 3)
            selector |= 3;
        else if (vcpu->State->SelectorsReadNull != 0 && IsThreadData(vcpu, vcpu->State->InactiveGsBase))
            return;
        bool loads = SegmentDescriptor.TryRead(vcpu, selector, out SegmentDescriptor descriptor)
            && (selector <= 3 || (descriptor.IsPresent && descriptor.IsUser && descriptor.IsReadable));
        vcpu->Segments->Gs = loads ? selector : (ushort)0;
        vcpu->State->InactiveGsBase = loads ? descriptor.Base : 0;
    }

    /// <summary>
    /// Whether a base is that of a descriptor among the first of the guest's global table, where 32-bit threads have their data: what has
    /// such a base is not null, but a selector that the guest could not read, and now puts back (as Linux does after a signal).
    /// </summary>
    private static bool IsThreadData(VcpuContext* vcpu, ulong segmentBase)
    {
        const int considered = 32;
        for (int index = 1; segmentBase != 0 && index < considered; index++)
        {
            if (SegmentDescriptor.TryRead(vcpu, (ushort)((index << 3) | 3), out SegmentDescriptor descriptor) && descriptor.IsPresent
                && descriptor.Base == segmentBase)
            {
                return true;
            }
        }

        return false;
    }
}
