// What a guest's requests to flush translations mean on each kind of KVM.
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>Flushing translations of the calling domain.</summary>
/// <remarks>
/// Where KVM shadows the guest's tables, a store that takes rights away is repeated inside the VM and KVM itself drops what
/// it made from the old entry, on every vCPU: nothing is left for a flush to do. Where the processor walks the guest's
/// tables, the next entry drops this vCPU's translations.
/// </remarks>
internal static unsafe class TlbFlush
{
    private const ulong FlushTypeMask = 3;
    private const ulong FlushTlb = 1;
    private const ulong InvalidatePage = 2;
    private const ulong Local = 0;
    private const ulong All = 4;

    /// <summary>Drops the calling vCPU's translations.</summary>
    public static void OnThisVcpu(VcpuContext* vcpu)
    {
        if (vcpu->PageTableWrites->InGuest == 0)
            vcpu->PageTableWrites->Flush();
    }

    /// <summary>
    /// A frame becomes something that the guest must not write: what may still map it writable goes first. Nothing is checked
    /// before that has happened, as the guest does not run meanwhile.
    /// </summary>
    public static void BeforeTypeChange(VcpuContext* vcpu, PageType before)
    {
        if (before == PageType.Writable)
            OnThisVcpu(vcpu);
    }

    /// <summary>An entry above L1 was replaced: parts of walks that went through it may be cached.</summary>
    public static void AfterUnlink(VcpuContext* vcpu) => OnThisVcpu(vcpu);

    /// <summary>
    /// Drops translations on the vCPUs of a bitmap in guest memory: one bit a vCPU, read in words of 64.
    /// </summary>
    public static Errno OnVcpus(VcpuContext* vcpu, ulong bitmap)
    {
        int count = vcpu->Domain->State->VcpuCount;
        for (int first = 0; first < count; first += 64)
        {
            if (!GuestAccess.Read(vcpu, bitmap + ((ulong)first / 8), out ulong bits))
                return Errno.EFAULT;
            if (vcpu->State->Id / 64 == first / 64 && (bits & (1UL << (vcpu->State->Id % 64))) != 0)
                OnThisVcpu(vcpu);
        }

        return Errno.None;
    }

    /// <summary>The UVMF_* flags of update_va_mapping.</summary>
    public static long AfterUpdateVaMapping(VcpuContext* vcpu, ulong flags)
    {
        if ((flags & FlushTypeMask) is not (FlushTlb or InvalidatePage))
            return 0;
        ulong target = flags & ~FlushTypeMask;
        if (target is Local or All)
        {
            OnThisVcpu(vcpu);
            return 0;
        }

        return -(long)OnVcpus(vcpu, target);
    }
}
