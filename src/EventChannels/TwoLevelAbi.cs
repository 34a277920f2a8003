// The 2-level ABI: which bits in shared_info and vcpu_info say that an event is pending. The only file that touches them.
using XenSharp.Core;

namespace XenSharp.EventChannels;

/// <summary>
/// Pending and mask bits of a port in shared_info, selector and upcall flag in vcpu_info (xen/xen.h). The FIFO ABI would be
/// a second class with the same five methods.
/// </summary>
/// <remarks>
/// Callers have checked that the port is valid and usable, and hold a lock that keeps it so. vCPUs to be woken are added to
/// <c>wake</c>; waking them is the caller's, after it has released its port lock.
/// </remarks>
public static unsafe class TwoLevelAbi
{
    /// <summary>Sets a port pending and tells its vCPU, or those that poll for it.</summary>
    public static void SetPending(EventChannelContext* context, uint port, VcpuMask* wake)
    {
        // The order is the protocol: whoever clears a later bit looks at the earlier ones afterwards.
        if (GuestBits.TestAndSet(PendingWord(context, port), Bit(port)))
            return;
        if (!GuestBits.Test(MaskWord(context, port), Bit(port)))
            RaiseSelector(context, port, wake);
        WakePollers(context, port, wake);
    }

    public static void ClearPending(EventChannelContext* context, uint port)
        => _ = Interlocked.And(ref *PendingWord(context, port), ~Bit(port));

    /// <summary>Unmasks a port; when it is pending, its vCPU is told now.</summary>
    public static void Unmask(EventChannelContext* context, uint port, VcpuMask* wake)
    {
        if (GuestBits.TestAndClear(MaskWord(context, port), Bit(port)) && IsPending(context, port))
            RaiseSelector(context, port, wake);
    }

    public static bool IsPending(EventChannelContext* context, uint port)
        => GuestBits.Test(PendingWord(context, port), Bit(port));

    public static bool IsMasked(EventChannelContext* context, uint port)
        => GuestBits.Test(MaskWord(context, port), Bit(port));

    /// <summary>
    /// Makes everything of a vCPU pending: what a sender put into the place where vcpu_info lay before must not be lost.
    /// </summary>
    public static void RaiseAll(EventChannelContext* context, int vcpu, VcpuMask* wake)
    {
        VcpuInfo* info = InfoOf(context, (uint)vcpu);
        if (info == null)
            return;
        Volatile.Write(ref info->EvtchnPendingSel, ulong.MaxValue);
        MarkEventsPending(context, vcpu, info, wake);
    }

    /// <summary>Tells the vCPU of a port that is pending and not masked.</summary>
    internal static void RaiseSelector(EventChannelContext* context, uint port, VcpuMask* wake)
    {
        int vcpu = Volatile.Read(ref context->Ports[port].NotifyVcpu);
        VcpuInfo* info = InfoOf(context, (uint)vcpu);
        if (info != null && !GuestBits.TestAndSet(&info->EvtchnPendingSel, 1UL << (int)(port / 64)))
            MarkEventsPending(context, vcpu, info, wake);
    }

    private static void MarkEventsPending(EventChannelContext* context, int vcpu, VcpuInfo* info, VcpuMask* wake)
    {
        // Bit 0 is the flag; nothing else of the byte has a meaning to preserve.
        if ((Interlocked.Exchange(ref info->EvtchnUpcallPending, 1) & 1) != 0)
            return;

        // Being unblocked ends a poll, whatever port it was for.
        _ = VcpuMask.AtomicRemove(&context->State->Polling, vcpu);
        wake->Add(vcpu);
    }

    private static void WakePollers(EventChannelContext* context, uint port, VcpuMask* wake)
    {
        VcpuMask polling = VcpuMask.Snapshot(&context->State->Polling);
        for (int vcpu = polling.TakeLowest(); vcpu >= 0; vcpu = polling.TakeLowest())
        {
            int awaited = Volatile.Read(ref context->Vcpus[vcpu].PollPort);
            if ((awaited <= 0 || awaited == port) && VcpuMask.AtomicRemove(&context->State->Polling, vcpu))
                wake->Add(vcpu);
        }
    }

    private static VcpuInfo* InfoOf(EventChannelContext* context, uint vcpu)
    {
        // Read after the port's bit was set: a vcpu_info that moves after this read has everything raised after the move.
        VcpuContext* target = context->Vcpu(vcpu);
        return target == null ? null : (VcpuInfo*)Volatile.Read(ref *(nint*)&target->Info);
    }

    private static ulong* PendingWord(EventChannelContext* context, uint port)
        => (ulong*)(context->Domain->SharedInfo + SharedInfoLayout.EvtchnPending) + (port / 64);

    private static ulong* MaskWord(EventChannelContext* context, uint port)
        => (ulong*)(context->Domain->SharedInfo + SharedInfoLayout.EvtchnMask) + (port / 64);

    private static ulong Bit(uint port) => 1UL << (int)(port & 63);
}
