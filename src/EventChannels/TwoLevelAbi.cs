// The 2-level ABI: which bits in shared_info and vcpu_info say that an event is pending. The only file that touches them.
using XenSharp.Core;

namespace XenSharp.EventChannels;

/// <summary>
/// Pending and mask bits of a port in shared_info, selector and upcall flag in vcpu_info (xen/xen.h).
/// </summary>
/// <remarks>Called through <see cref="EventAbi"/>, whose remarks hold.</remarks>
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
        EventAbi.WakePollers(context, port, wake);
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

    /// <summary>Tells the vCPU of a port that is pending and not masked.</summary>
    internal static void RaiseSelector(EventChannelContext* context, uint port, VcpuMask* wake)
    {
        int vcpu = Volatile.Read(ref context->Ports[port].NotifyVcpu);
        VcpuInfo* info = EventAbi.InfoOf(context, (uint)vcpu);
        if (info != null && !GuestBits.TestAndSet(&info->EvtchnPendingSel, 1UL << (int)(port / 64)))
            EventAbi.MarkEventsPending(context, vcpu, wake);
    }

    private static ulong* PendingWord(EventChannelContext* context, uint port)
        => (ulong*)(context->Domain->SharedInfo + SharedInfoLayout.EvtchnPending) + (port / 64);

    private static ulong* MaskWord(EventChannelContext* context, uint port)
        => (ulong*)(context->Domain->SharedInfo + SharedInfoLayout.EvtchnMask) + (port / 64);

    private static ulong Bit(uint port) => 1UL << (int)(port & 63);
}
