// sched_op (29), sched_op_compat (6), set_timer_op (15).
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.EventChannels;

namespace XenSharp.Domains.Hypercalls;

/// <summary>Giving up the processor, waiting, and stopping the domain.</summary>
internal static unsafe class SchedOp
{
    private const uint MaxPollPorts = 128;
    private const long HugeTimeout = 1L << 50;
    private const long InsteadOfHugeTimeout = 100_000_000;

    private enum Command : uint
    {
        Yield = 0,
        Block = 1,
        Shutdown = 2,
        Poll = 3,
        RemoteShutdown = 4,
        ShutdownCode = 5,
        Watchdog = 6,
        PinOverride = 7,
    }

    /// <summary>struct sched_poll.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct PollRequest
    {
        public ulong Ports;
        public uint PortCount;
        private uint _padding;

        /// <summary>System time at which to give up; 0 for never.</summary>
        public long Timeout;
    }

    /// <summary>struct sched_watchdog.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct WatchdogRequest
    {
        public uint Id;

        /// <summary>Seconds; 0 disarms.</summary>
        public uint Timeout;
    }

    /// <summary>sched_op(command, argument).</summary>
    public static long Execute(Vcpu vcpu, in HypercallArguments arguments)
    {
        VcpuContext* context = vcpu.Context;
        switch ((Command)(uint)arguments.A0)
        {
            case Command.Yield:
                _ = Thread.Yield();
                return 0;
            case Command.Block:
                Block(vcpu);
                return 0;
            case Command.Shutdown:
                if (!GuestAccess.Read(context, arguments.A1, out uint reason))
                    return -(long)Errno.EFAULT;
                vcpu.Domain.Shutdown(vcpu, (ShutdownReason)(byte)reason);
                return 0;
            case Command.ShutdownCode:
                if (!GuestAccess.Read(context, arguments.A1, out uint code))
                    return -(long)Errno.EFAULT;
                vcpu.Domain.SetShutdownCode((ShutdownReason)(byte)code);
                return 0;
            case Command.Poll:
                return GuestAccess.Read(context, arguments.A1, out PollRequest poll) ? Poll(vcpu, poll) : -(long)Errno.EFAULT;
            case Command.RemoteShutdown:
                if (!GuestAccess.Read(context, arguments.A1, out ushort domain))
                    return -(long)Errno.EFAULT;
                return -(long)(domain == context->Domain->State->Id || domain == 0 ? Errno.EPERM : Errno.ESRCH);
            case Command.Watchdog:
                return GuestAccess.Read(context, arguments.A1, out WatchdogRequest watchdog)
                    ? vcpu.Domain.Watchdogs.Set(watchdog.Id, watchdog.Timeout)
                    : -(long)Errno.EFAULT;
            case Command.PinOverride:
                return -(long)Errno.EPERM;
            default:
                return -(long)Errno.ENOSYS;
        }
    }

    /// <summary>sched_op_compat(command, argument): the same three commands with the reason by value.</summary>
    public static long ExecuteCompat(Vcpu vcpu, in HypercallArguments arguments)
    {
        switch ((Command)(uint)arguments.A0)
        {
            case Command.Yield:
            case Command.Block:
                return Execute(vcpu, arguments);
            case Command.Shutdown:
                vcpu.Domain.Shutdown(vcpu, (ShutdownReason)(byte)arguments.A1);
                return 0;
            default:
                return -(long)Errno.ENOSYS;
        }
    }

    /// <summary>
    /// set_timer_op(system time): 0 disarms. A time that cannot be meant, negative or more than 13 days ahead, fires after 100 ms:
    /// old Linux says so both where work is due and where none is.
    /// </summary>
    public static long SetTimer(Vcpu vcpu, in HypercallArguments arguments)
    {
        long deadline = (long)arguments.A0;
        long now = vcpu.Domain.Time.SystemTime;
        vcpu.Timers.Singleshot = deadline == 0 ? long.MaxValue
            : deadline < 0 || deadline - now >= HugeTimeout ? now + InsteadOfHugeTimeout
            : deadline;
        return 0;
    }

    private static void Block(Vcpu vcpu)
    {
        Volatile.Write(ref vcpu.Context->Info->EvtchnUpcallMask, 0);
        if (!vcpu.Context->UpcallDue)
            vcpu.Waiting = WaitState.Blocked;
    }

    private static long Poll(Vcpu vcpu, in PollRequest request)
    {
        if (request.PortCount > MaxPollPorts)
            return -(long)Errno.EINVAL;
        if (!new VirtualAddress(request.Ports).IsGuest)
            return -(long)Errno.EFAULT;

        // Announce, then look: an event in between ends the poll.
        vcpu.Domain.Events.BeginPoll(vcpu.Id);
        long result = vcpu.Context->UpcallDue ? 1 : AnyPending(vcpu, request);
        if (result != 0)
        {
            vcpu.Domain.Events.EndPoll(vcpu.Id);
            return Math.Min(result, 0);
        }

        vcpu.Timers.Poll = request.Timeout == 0 ? long.MaxValue : request.Timeout;
        vcpu.Waiting = WaitState.Polling;
        return 0;
    }

    /// <summary>Looks at the ports in their order until one is pending or wrong; those behind it are not even read.</summary>
    /// <returns>1, 0, or a negative errno.</returns>
    private static long AnyPending(Vcpu vcpu, in PollRequest request)
    {
        EventChannelDomain events = vcpu.Domain.Events;
        uint port = 0;
        for (uint i = 0; i < request.PortCount; i++)
        {
            if (!GuestAccess.Read(vcpu.Context, request.Ports + (i * sizeof(uint)), out port))
                return -(long)Errno.EFAULT;
            long result = events.IsPending(port);
            if (result != 0)
                return result;
        }

        if (request.PortCount == 1)
            events.NarrowPoll(vcpu.Id, port);
        return 0;
    }
}
