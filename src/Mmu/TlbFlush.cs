// What a guest's requests to flush translations mean on each kind of KVM, and what changes of a frame's type need of the same kind.
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>Dropping translations of a domain's vCPUs.</summary>
/// <remarks>
/// Where the processor walks the guest's tables, a vCPU drops its translations on its next entry; one that is in the guest is kicked
/// out first, and only then does the request count as done. Where KVM shadows the tables, a store that takes rights away is repeated
/// inside the VM and KVM itself drops what it made from the old entry, on every vCPU: nothing is left for a flush to do, but until the
/// stores have been repeated the old translations count.
/// </remarks>
internal static unsafe class TlbFlush
{
    private const ulong FlushTypeMask = 3;
    private const ulong FlushTlb = 1;
    private const ulong InvalidatePage = 2;
    private const ulong Local = 0;
    private const ulong All = 4;

    /// <summary>Looks at another vCPU before this one's thread lets others have the processor.</summary>
    private const int SpinsBeforeYield = 100;

    /// <summary>Drops the calling vCPU's translations.</summary>
    public static void OnThisVcpu(VcpuContext* vcpu)
    {
        if (vcpu->PageTableWrites->InGuest == 0)
            vcpu->PageTableWrites->Flush();
    }

    /// <summary>Drops the calling vCPU's translations of one page.</summary>
    public static void OnThisVcpu(VcpuContext* vcpu, VirtualAddress page)
    {
        if (vcpu->PageTableWrites->InGuest == 0)
            vcpu->PageTableWrites->Invalidate(page);
    }

    /// <summary>Drops the translations of all vCPUs.</summary>
    public static void OnAllVcpus(VcpuContext* vcpu)
    {
        OnThisVcpu(vcpu);
        OnOtherVcpus(vcpu, everything: true, default);
    }

    /// <summary>Drops the translations of one page on all vCPUs.</summary>
    public static void OnAllVcpus(VcpuContext* vcpu, VirtualAddress page)
    {
        OnThisVcpu(vcpu, page);
        OnOtherVcpus(vcpu, everything: false, page);
    }

    /// <summary>Drops the translations of all vCPUs of a domain, on a thread that is none of them.</summary>
    public static void FromOutside(DomainContext* domain)
    {
        for (int i = 0; i < domain->State->VcpuCount; i++)
            OnOtherVcpu(null, domain->Vcpus + i, everything: true, default);
    }

    /// <summary>
    /// Drops translations on the vCPUs of a bitmap in guest memory: one bit a vCPU, read in words of 64.
    /// </summary>
    public static Errno OnVcpus(VcpuContext* vcpu, ulong bitmap) => OnVcpus(vcpu, bitmap, everything: true, default);

    /// <summary>As <see cref="OnVcpus(VcpuContext*, ulong)"/>, for those of one page.</summary>
    public static Errno OnVcpus(VcpuContext* vcpu, ulong bitmap, VirtualAddress page) => OnVcpus(vcpu, bitmap, everything: false, page);

    private static Errno OnVcpus(VcpuContext* vcpu, ulong bitmap, bool everything, VirtualAddress page)
    {
        int count = vcpu->Domain->State->VcpuCount;
        for (int first = 0; first < count; first += 64)
        {
            if (!GuestAccess.Read(vcpu, bitmap + ((ulong)first / 8), out ulong bits))
                return Errno.EFAULT;
            for (int i = 0; bits != 0 && i < 64 && first + i < count; i++, bits >>= 1)
            {
                if ((bits & 1) == 0)
                    continue;
                if (first + i == vcpu->State->Id)
                    OnThisVcpu(vcpu, everything, page);
                else
                    OnOtherVcpu(vcpu, vcpu->Domain->Vcpus + first + i, everything, page);
            }
        }

        return Errno.None;
    }

    /// <summary>What the UVMF_* flags of update_va_mapping ask for.</summary>
    public static long AfterUpdateVaMapping(VcpuContext* vcpu, VirtualAddress page, ulong flags)
    {
        if ((flags & FlushTypeMask) is not (FlushTlb or InvalidatePage))
            return 0;
        bool everything = (flags & FlushTypeMask) == FlushTlb;
        ulong target = flags & ~FlushTypeMask;
        if (target is not (Local or All))
            return -(long)OnVcpus(vcpu, target, everything, page);
        OnThisVcpu(vcpu, everything, page);
        if (target == All)
            OnOtherVcpus(vcpu, everything, page);
        return 0;
    }

    /// <summary>An entry above L1 was replaced: parts of walks that went through it may be cached.</summary>
    public static void AfterUnlink(VcpuContext* vcpu)
    {
        OnThisVcpu(vcpu);
        vcpu->PageTableWrites->UnlinkPending = 1;
    }

    /// <summary>Ends a batch of updates: what <see cref="AfterUnlink"/> noted is dropped on the other vCPUs.</summary>
    public static void AfterBatch(VcpuContext* vcpu)
    {
        if (vcpu->PageTableWrites->UnlinkPending == 0)
            return;
        vcpu->PageTableWrites->UnlinkPending = 0;
        OnAllVcpus(vcpu);
    }

    /// <summary>
    /// A frame that the caller has to itself is about to be used as something else. What may still reach it as what it was goes first:
    /// a page table must not be written through a translation of its earlier life, nor a page be walked as the table that it was.
    /// </summary>
    /// <returns>False when that takes longer: the type must not be given yet.</returns>
    public static bool TryBeforeTypeChange(VcpuContext* vcpu, PageType before)
    {
        PageTableWriteQueue* own = vcpu->PageTableWrites;
        if (before == PageType.Writable)
            OnThisVcpu(vcpu);
        if (vcpu->Domain->State->StartedVcpus <= 1 || before == PageType.None)
            return true;
        for (int i = 0; i < vcpu->Domain->State->VcpuCount; i++)
        {
            VcpuContext* other = vcpu->Domain->Vcpus + i;
            if (other == vcpu || Volatile.Read(ref other->State->Started) == 0)
                continue;
            for (int spins = 0; Volatile.Read(ref other->Accessing) != 0; spins++)
            {
                if (spins > SpinsBeforeYield)
                    return false;
            }

            if (own->InGuest == 0)
                OnOtherVcpu(vcpu, other, everything: true, default);
            else if (Volatile.Read(ref other->PageTableWrites->Count) != 0)
                return Hurry(other);
        }

        if (own->Count == 0)
            return true;
        own->EntryFirst = 1;
        return false;
    }

    /// <summary>Stores of another vCPU wait to be repeated, or were and it has not come back since: it is to come back.</summary>
    private static bool Hurry(VcpuContext* other)
    {
        if (Volatile.Read(ref other->PageTableWrites->Running) != 0)
            other->Kick(other);
        return false;
    }

    private static void OnThisVcpu(VcpuContext* vcpu, bool everything, VirtualAddress page)
    {
        if (everything)
            OnThisVcpu(vcpu);
        else
            OnThisVcpu(vcpu, page);
    }

    private static void OnOtherVcpus(VcpuContext* vcpu, bool everything, VirtualAddress page)
    {
        for (int i = 0; vcpu->Domain->State->StartedVcpus > 1 && i < vcpu->Domain->State->VcpuCount; i++)
            OnOtherVcpu(vcpu, vcpu->Domain->Vcpus + i, everything, page);
    }

    private static void OnOtherVcpu(VcpuContext* vcpu, VcpuContext* other, bool everything, VirtualAddress page)
    {
        PageTableWriteQueue* queue = other->PageTableWrites;
        if (other == vcpu || Volatile.Read(ref other->State->Started) == 0 || queue->InGuest != 0)
            return;
        if (everything)
            _ = Interlocked.Exchange(ref queue->FlushRequested, 1);
        else
            queue->RequestInvalidation(page);
        if (Volatile.Read(ref queue->Running) == 0)
            return;
        other->Kick(other);
        for (int spins = 0; Volatile.Read(ref queue->Running) != 0 && queue->IsRequested; spins++)
        {
            if (spins > SpinsBeforeYield)
                _ = Thread.Yield();
        }
    }
}
