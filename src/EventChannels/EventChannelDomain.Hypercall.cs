// The hypercalls event_channel_op (32) and event_channel_op_compat (16): arguments in, operation, results out.
using XenSharp.Core;

namespace XenSharp.EventChannels;

public sealed unsafe partial class EventChannelDomain
{
    /// <summary>event_channel_op(A0: EVTCHNOP_*, A1: guest address of the operation's structure).</summary>
    /// <param name="vcpu">The caller, one of this domain's.</param>
    /// <param name="arguments">The hypercall's.</param>
    /// <returns>0 or a negative errno; -EFAULT for a structure that cannot be read or written, -ENOSYS for no such operation.
    /// What stopped for an event, or for another vCPU, is left as a
    /// continuation.</returns>
    public long Execute(VcpuContext* vcpu, in HypercallArguments arguments)
    {
        ulong address = arguments.A1;
        int caller = vcpu->State->Id;
        VcpuMask wake = default;
        long result;
        switch ((EventChannelOperation)(int)arguments.A0)
        {
            case EventChannelOperation.Send:
                return GuestAccess.Read(vcpu, address, out uint sendPort) ? Send(sendPort, caller) : -(long)Errno.EFAULT;

            case EventChannelOperation.Unmask:
                if (!GuestAccess.Read(vcpu, address, out uint unmaskPort))
                    return -(long)Errno.EFAULT;
                result = EventDelivery.Unmask(_context, unmaskPort, &wake);
                Deliver(wake, caller);
                return result;

            case EventChannelOperation.AllocUnbound:
                if (!GuestAccess.Read(vcpu, address, out EvtchnAllocUnbound unbound))
                    return -(long)Errno.EFAULT;
                return Answer(vcpu, address, AllocUnbound(ref unbound), unbound);

            case EventChannelOperation.BindInterdomain:
                if (!GuestAccess.Read(vcpu, address, out EvtchnBindInterdomain interdomain))
                    return -(long)Errno.EFAULT;
                return Answer(vcpu, address, BindInterdomain(ref interdomain, caller), interdomain);

            case EventChannelOperation.BindVirq:
                if (!GuestAccess.Read(vcpu, address, out EvtchnBindVirq virq))
                    return -(long)Errno.EFAULT;
                return Answer(vcpu, address, BindVirq(ref virq), virq);

            case EventChannelOperation.BindIpi:
                if (!GuestAccess.Read(vcpu, address, out EvtchnBindIpi ipi))
                    return -(long)Errno.EFAULT;
                return Answer(vcpu, address, BindIpi(ref ipi), ipi);

            case EventChannelOperation.BindPirq:
                return GuestAccess.Read(vcpu, address, out EvtchnBindPirq pirq) ? BindPirq(pirq) : -(long)Errno.EFAULT;

            case EventChannelOperation.Close:
                return GuestAccess.Read(vcpu, address, out uint closePort) ? Close(closePort) : -(long)Errno.EFAULT;

            case EventChannelOperation.Status:
                if (!GuestAccess.Read(vcpu, address, out EvtchnStatus status))
                    return -(long)Errno.EFAULT;
                return Answer(vcpu, address, Status(ref status), status);

            case EventChannelOperation.BindVcpu:
                return GuestAccess.Read(vcpu, address, out EvtchnBindVcpu bindVcpu) ? BindVcpu(bindVcpu) : -(long)Errno.EFAULT;

            case EventChannelOperation.Reset:
            case EventChannelOperation.ResetContinue:
                return ResetOf(vcpu, arguments);

            case EventChannelOperation.InitControl:
                if (!GuestAccess.Read(vcpu, address, out EvtchnInitControl control))
                    return -(long)Errno.EFAULT;
                result = InitControl(vcpu, ref control);
                return result == -(long)Errno.ERESTART ? Continuation.Create(vcpu, arguments) : Answer(vcpu, address, result, control);

            case EventChannelOperation.ExpandArray:
                if (!GuestAccess.Read(vcpu, address, out ulong frame))
                    return -(long)Errno.EFAULT;
                result = ExpandArray(vcpu, new Mfn(frame));
                return result == -(long)Errno.ERESTART ? Continuation.Create(vcpu, arguments) : result;

            case EventChannelOperation.SetPriority:
                return GuestAccess.Read(vcpu, address, out EvtchnSetPriority priority)
                    ? EventDelivery.SetPriority(_context, priority.Port, priority.Priority) : -(long)Errno.EFAULT;

            default:
                return -(long)Errno.ENOSYS;
        }
    }

    /// <summary>event_channel_op_compat(A0: guest address of a struct evtchn_op, its operation and arguments in one).</summary>
    /// <returns>As <see cref="Execute"/>; -ENOSYS for operations that came after this hypercall was superseded.</returns>
    public long ExecuteCompat(VcpuContext* vcpu, in HypercallArguments arguments)
    {
        if (!GuestAccess.Read(vcpu, arguments.A0, out EvtchnOp operation))
            return -(long)Errno.EFAULT;
        if (operation.Command > (uint)EventChannelOperation.Unmask)
            return -(long)Errno.ENOSYS;
        return Execute(vcpu, new HypercallArguments { A0 = operation.Command, A1 = arguments.A0 + EvtchnOp.ArgumentOffset });
    }

    private long ResetOf(VcpuContext* vcpu, in HypercallArguments arguments)
    {
        if (!GuestAccess.Read(vcpu, arguments.A1, out ushort id))
            return -(long)Errno.EFAULT;
        var domain = new DomainId(id);
        if (domain != DomainId.Self && domain != Id)
            return Exists(domain) ? -(long)Errno.EPERM : -(long)Errno.ESRCH;
        long result = Reset(vcpu, (EventChannelOperation)(int)arguments.A0 == EventChannelOperation.ResetContinue);
        if (result != -(long)Errno.ERESTART)
            return result;
        return Continuation.Create(
            vcpu, new HypercallArguments { A0 = (ulong)EventChannelOperation.ResetContinue, A1 = arguments.A1 });
    }

    /// <summary>Writes an operation's structure back when it succeeded; what it made stays made when that fails, as on Xen.</summary>
    private static long Answer<T>(VcpuContext* vcpu, ulong address, long result, T structure)
        where T : unmanaged
        => result != 0 || GuestAccess.Write(vcpu, address, structure) ? result : -(long)Errno.EFAULT;
}
