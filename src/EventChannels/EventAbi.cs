// Which of the two ABIs a domain's events go by, and what the two have in common: the upcall flag, and vCPUs that poll.
using XenSharp.Core;

namespace XenSharp.EventChannels;

/// <summary>What can be done to the event of a port, by the ABI that its domain uses (evtchn_port_ops).</summary>
/// <remarks>
/// Callers have checked that the port is valid and usable, and hold a lock that keeps it so. vCPUs to be woken are added to
/// <c>wake</c>; waking them is the caller's, after it has released its port lock.
/// </remarks>
public static unsafe class EventAbi
{
    /// <summary>Sets a port pending and tells its vCPU, or those that poll for it.</summary>
    public static void SetPending(EventChannelContext* context, uint port, VcpuMask* wake)
    {
        if (IsFifo(context))
            FifoAbi.SetPending(context, port, wake);
        else
            TwoLevelAbi.SetPending(context, port, wake);
    }

    public static void ClearPending(EventChannelContext* context, uint port)
    {
        if (IsFifo(context))
            FifoAbi.ClearPending(context, port);
        else
            TwoLevelAbi.ClearPending(context, port);
    }

    /// <summary>Unmasks a port; when it is pending, its vCPU is told now.</summary>
    public static void Unmask(EventChannelContext* context, uint port, VcpuMask* wake)
    {
        if (IsFifo(context))
            FifoAbi.Unmask(context, port, wake);
        else
            TwoLevelAbi.Unmask(context, port, wake);
    }

    public static bool IsPending(EventChannelContext* context, uint port)
        => IsFifo(context) ? FifoAbi.IsPending(context, port) : TwoLevelAbi.IsPending(context, port);

    /// <summary>Whether a free port cannot be given away yet.</summary>
    public static bool IsBusy(EventChannelContext* context, uint port) => IsFifo(context) && FifoAbi.IsBusy(context, port);

    /// <summary>
    /// Makes everything of a vCPU pending: what a sender put into the place where vcpu_info lay before must not be lost.
    /// </summary>
    public static void RaiseAll(EventChannelContext* context, int vcpu, VcpuMask* wake)
    {
        VcpuInfo* info = InfoOf(context, (uint)vcpu);
        if (info == null)
            return;
        Volatile.Write(ref info->EvtchnPendingSel, ulong.MaxValue);
        MarkEventsPending(context, vcpu, wake);
    }

    public static bool IsFifo(EventChannelContext* context) => Volatile.Read(ref context->Fifo->InUse) != 0;

    /// <summary>Raises a vCPU's upcall (vcpu_mark_events_pending).</summary>
    internal static void MarkEventsPending(EventChannelContext* context, int vcpu, VcpuMask* wake)
    {
        // Bit 0 is the flag; nothing else of the byte has a meaning to preserve.
        VcpuInfo* info = InfoOf(context, (uint)vcpu);
        if (info == null || (Interlocked.Exchange(ref info->EvtchnUpcallPending, 1) & 1) != 0)
            return;

        // Being unblocked ends a poll, whatever port it was for.
        _ = VcpuMask.AtomicRemove(&context->State->Polling, vcpu);
        wake->Add(vcpu);
    }

    /// <summary>Ends the polls for a port that became pending (evtchn_check_pollers).</summary>
    internal static void WakePollers(EventChannelContext* context, uint port, VcpuMask* wake)
    {
        VcpuMask polling = VcpuMask.Snapshot(&context->State->Polling);
        for (int vcpu = polling.TakeLowest(); vcpu >= 0; vcpu = polling.TakeLowest())
        {
            int awaited = Volatile.Read(ref context->Vcpus[vcpu].PollPort);
            if ((awaited <= 0 || awaited == port) && VcpuMask.AtomicRemove(&context->State->Polling, vcpu))
                wake->Add(vcpu);
        }
    }

    /// <summary>The vcpu_info of a vCPU; null when there is none.</summary>
    internal static VcpuInfo* InfoOf(EventChannelContext* context, uint vcpu)
    {
        // Read after the port's bit was set: a vcpu_info that moves after this read has everything raised after the move.
        VcpuContext* target = context->Vcpu(vcpu);
        return target == null ? null : (VcpuInfo*)Volatile.Read(ref *(nint*)&target->Info);
    }
}
