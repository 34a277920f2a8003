// Sending, unmasking and polling: the operations that a guest makes thousands of times a second. Static, over pointers,
// without allocation, exception or call through an interface.
using XenSharp.Core;

namespace XenSharp.EventChannels;

/// <summary>The hot operations on a domain's own ports.</summary>
public static unsafe class EventDelivery
{
    /// <summary>What <see cref="Send"/> returns for a port whose far end is a back end, to which nothing was done.</summary>
    public const long AtBackend = 1;

    /// <summary>Sends on a port.</summary>
    /// <param name="context">The sender's domain.</param>
    /// <param name="port">A valid port, whose lock the caller holds.</param>
    /// <param name="target">Gets the domain that the event is for: the sender's own or, at the far end, another, which stays only for as
    /// long as the lock is held.</param>
    /// <param name="wake">Gets its vCPUs to be woken.</param>
    /// <returns>0, <see cref="AtBackend"/>, or -EINVAL for a port that cannot be sent on.</returns>
    public static long Send(EventChannelContext* context, uint port, EventChannelContext** target, VcpuMask* wake)
    {
        EventChannelPortState* state = context->Ports + port;
        *target = context;
        switch (state->State)
        {
            case ChannelState.Interdomain when state->FarEnd == null:
                return AtBackend;
            case ChannelState.Interdomain:
                // No lock of the far end's is taken: the connection cannot go away under this one.
                *target = state->FarEnd;
                EventAbi.SetPending(state->FarEnd, state->RemotePort, wake);
                return 0;
            case ChannelState.Ipi:
                EventAbi.SetPending(context, port, wake);
                return 0;
            case ChannelState.Unbound:
                // Whoever binds later finds the channel pending, so this one is not lost.
                return 0;
            default:
                return -(long)Errno.EINVAL;
        }
    }

    /// <summary>Unmasks a port (EVTCHNOP_unmask).</summary>
    /// <returns>0, also for a port that is not in use; -EINVAL for one that does not exist.</returns>
    public static long Unmask(EventChannelContext* context, uint port, VcpuMask* wake)
    {
        if (!context->IsValid(port))
            return -(long)Errno.EINVAL;
        EventChannelPortState* state = context->Ports + port;
        PortLock.Enter(state);
        if (state->IsUsable)
            EventAbi.Unmask(context, port, wake);
        PortLock.Exit(state);
        return 0;
    }

    /// <summary>Raises a virtual interrupt, if it is bound.</summary>
    /// <param name="context">The domain.</param>
    /// <param name="vcpu">An existing vCPU; of no importance for a global VIRQ.</param>
    /// <param name="virq">0..23.</param>
    /// <param name="wake">Gets the vCPUs to be woken.</param>
    public static void RaiseVirq(EventChannelContext* context, int vcpu, int virq, VcpuMask* wake)
    {
        int owner = Virq.IsGlobal(virq) ? 0 : vcpu;
        uint port = Volatile.Read(ref context->Vcpus[owner].Virqs[virq]);
        if (port == 0)
            return;
        EventChannelPortState* state = context->Ports + port;
        PortLock.Enter(state);

        // The port may have been closed and used for something else since the table was read.
        if (state->State == ChannelState.Virq && state->Virq == virq && (Virq.IsGlobal(virq) || state->NotifyVcpu == vcpu))
            EventAbi.SetPending(context, port, wake);
        PortLock.Exit(state);
    }

    /// <summary>Gives a port the priority of what it raises from now on (EVTCHNOP_set_priority).</summary>
    /// <returns>0; -EINVAL for a port that does not exist, or no such priority; -ENOSYS under the 2-level ABI; -EACCES for a port that is
    /// not in use.</returns>
    public static long SetPriority(EventChannelContext* context, uint port, uint priority)
    {
        if (!context->IsValid(port))
            return -(long)Errno.EINVAL;
        EventChannelPortState* state = context->Ports + port;
        PortLock.Enter(state);
        long result = !EventAbi.IsFifo(context) ? -(long)Errno.ENOSYS
            : !state->IsUsable ? -(long)Errno.EACCES
            : priority >= FifoAbi.Priorities ? -(long)Errno.EINVAL : 0;
        if (result == 0)
            Volatile.Write(ref state->Priority, (byte)priority);
        PortLock.Exit(state);
        return result;
    }

    /// <summary>Whether a port is pending (evtchn_port_poll).</summary>
    /// <returns>1 or 0; -EINVAL for a port that does not exist or is not in use.</returns>
    public static long Poll(EventChannelContext* context, uint port)
    {
        if (!context->IsValid(port))
            return -(long)Errno.EINVAL;
        EventChannelPortState* state = context->Ports + port;
        PortLock.Enter(state);
        long result = !state->IsUsable ? -(long)Errno.EINVAL : EventAbi.IsPending(context, port) ? 1 : 0;
        PortLock.Exit(state);
        return result;
    }
}
