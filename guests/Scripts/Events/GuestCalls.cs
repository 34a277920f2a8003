// Hypercall numbers as values, for steps whose text is written by hand.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Events;

/// <summary>Numbers of the hypercalls of this folder's scripts.</summary>
internal static class GuestCalls
{
    public static readonly Value EventChannelOp = Number(GuestHypercall.EventChannelOp);
    public static readonly Value EventChannelOpCompat = Number(GuestHypercall.EventChannelOpCompat);
    public static readonly Value SchedOp = Number(GuestHypercall.SchedOp);
    public static readonly Value SchedOpCompat = Number(GuestHypercall.SchedOpCompat);
    public static readonly Value SetTimerOp = Number(GuestHypercall.SetTimerOp);
    public static readonly Value VcpuOp = Number(GuestHypercall.VcpuOp);
    public static readonly Value Multicall = Number(GuestHypercall.Multicall);
    public static readonly Value XenVersion = Number(GuestHypercall.XenVersion);
    public static readonly Value ConsoleIo = Number(GuestHypercall.ConsoleIo);
    public static readonly Value PhysdevOp = Number(GuestHypercall.PhysdevOp);
    public static readonly Value PhysdevOpCompat = Number(GuestHypercall.PhysdevOpCompat);
    public static readonly Value GrantTableOp = Number(GuestHypercall.GrantTableOp);

    public static Value Number(GuestHypercall number) => (ulong)number;
}
