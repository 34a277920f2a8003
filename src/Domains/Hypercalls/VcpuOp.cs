// vcpu_op (24).
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Hypercalls;

/// <summary>vCPU life cycle, timers, and the areas that a vCPU shares.</summary>
internal static unsafe class VcpuOp
{
    private const ulong MinPeriod = 1_000_000;
    
    /// <summary>STIME_DELTA_MAX.</summary>
    private const ulong MaxPeriod = ulong.MaxValue >> 2;

    private enum Command : uint
    {
        Initialise = 0,
        Up = 1,
        Down = 2,
        IsUp = 3,
        GetRunstateInfo = 4,
        RegisterRunstateMemoryArea = 5,
        SetPeriodicTimer = 6,
        StopPeriodicTimer = 7,
        SetSingleshotTimer = 8,
        StopSingleshotTimer = 9,
        RegisterVcpuInfo = 10,
        SendNmi = 11,
        GetPhysid = 12,
        RegisterVcpuTimeMemoryArea = 13,
    }

    /// <summary>struct vcpu_set_singleshot_timer; its flag (VCPU_SSHOTTMR_future) was retired and is ignored.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct SingleshotTimer
    {
        public ulong Timeout;
        public uint Flags;
    }

    /// <summary>struct vcpu_register_vcpu_info.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct VcpuInfoRegistration
    {
        public ulong Frame;
        public uint Offset;
    }

    /// <summary>vcpu_op(command, vCPU, argument).</summary>
    public static long Execute(Vcpu caller, in HypercallArguments arguments)
    {
        VcpuContext* context = caller.Context;
        ulong argument = arguments.A2;
        Vcpu? target = caller.Domain.FindVcpu((uint)arguments.A1);
        if (target == null)
            return -(long)Errno.ENOENT;
        long now = caller.Domain.Time.SystemTime;
        switch ((Command)(uint)arguments.A0)
        {
            case Command.Initialise:
                return Initialise(caller, target, arguments);
            case Command.Up:
                if (!target.IsInitialised)
                    return -(long)Errno.EINVAL;
                target.BringUp();
                return 0;
            case Command.Down:
                // The last vCPU that goes down takes the domain with it.
                if (!caller.Domain.TakeDown(target))
                    caller.Domain.Shutdown(caller, ShutdownReason.PowerOff);
                return 0;
            case Command.IsUp:
                return target.IsUp ? 1 : 0;
            case Command.GetRunstateInfo:
                return GuestAccess.Write(context, argument, target.Runstate.Snapshot()) ? 0 : -(long)Errno.EFAULT;
            case Command.RegisterRunstateMemoryArea:
                if (!GuestAccess.Read(context, argument, out ulong runstateArea) || !new VirtualAddress(runstateArea).IsGuest)
                    return -(long)Errno.EFAULT;
                target.Runstate.Register(caller, runstateArea);
                return 0;
            case Command.RegisterVcpuTimeMemoryArea:
                if (!GuestAccess.Read(context, argument, out ulong timeArea) || !new VirtualAddress(timeArea).IsGuest)
                    return -(long)Errno.EFAULT;
                target.RegisterTimeArea(caller, timeArea);
                return 0;
            case Command.SetPeriodicTimer:
                if (!GuestAccess.Read(context, argument, out ulong period))
                    return -(long)Errno.EFAULT;
                if (period is < MinPeriod or > MaxPeriod)
                    return -(long)Errno.EINVAL;
                target.Timers.SetPeriodic((long)period, now);
                target.KickFrom(caller);
                return 0;
            case Command.StopPeriodicTimer:
                target.Timers.SetPeriodic(0, now);
                target.KickFrom(caller);
                return 0;
            case Command.SetSingleshotTimer:
                if (target != caller)
                    return -(long)Errno.EINVAL;
                if (!GuestAccess.Read(context, argument, out SingleshotTimer timer))
                    return -(long)Errno.EFAULT;

                // One that is past already fires on the way back to the guest.
                target.Timers.Singleshot = (long)Math.Min(timer.Timeout, long.MaxValue);
                return 0;
            case Command.StopSingleshotTimer:
                if (target != caller)
                    return -(long)Errno.EINVAL;
                target.Timers.Singleshot = long.MaxValue;
                return 0;
            case Command.RegisterVcpuInfo:
                if (!GuestAccess.Read(context, argument, out VcpuInfoRegistration registration))
                    return -(long)Errno.EFAULT;
                Errno error = target.RegisterInfo(caller, registration.Frame, registration.Offset);
                return error == Errno.ERESTART ? Continuation.Create(context, arguments) : -(long)error;
            case Command.SendNmi:
                if (argument != 0)
                    return -(long)Errno.EINVAL;
                Volatile.Write(ref target.Context->State->NmiPending, 1);
                target.KickFrom(caller);
                return 0;
            case Command.GetPhysid:
                return -(long)Errno.EINVAL;
            default:
                return -(long)Errno.ENOSYS;
        }
    }

    private static long Initialise(Vcpu caller, Vcpu target, in HypercallArguments arguments)
    {
        if (!target.HasInfo)
            return -(long)Errno.EINVAL;
        if (!GuestAccess.Read(caller.Context, arguments.A2, out VcpuInitialisation.GuestContext guest))
            return -(long)Errno.EFAULT;
        Errno error = target.Initialise(caller, guest);
        return error == Errno.ERESTART ? Continuation.Create(caller.Context, arguments) : -(long)error;
    }
}
