// The argument structures of event_channel_op (xen/event_channel.h), 64-bit form.
using System.Runtime.InteropServices;

namespace XenSharp.EventChannels;

/// <summary>struct evtchn_alloc_unbound.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct EvtchnAllocUnbound
{
    public ushort Domain, RemoteDomain;

    /// <summary>Out.</summary>
    public uint Port;
}

/// <summary>struct evtchn_bind_interdomain.</summary>
[StructLayout(LayoutKind.Explicit, Size = 12)]
public struct EvtchnBindInterdomain
{
    [FieldOffset(0)] public ushort RemoteDomain;
    [FieldOffset(4)] public uint RemotePort;

    /// <summary>Out.</summary>
    [FieldOffset(8)] public uint LocalPort;
}

/// <summary>struct evtchn_bind_virq.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct EvtchnBindVirq
{
    public uint Virq, Vcpu;

    /// <summary>Out.</summary>
    public uint Port;
}

/// <summary>struct evtchn_bind_pirq.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct EvtchnBindPirq
{
    public uint Pirq, Flags;

    /// <summary>Out.</summary>
    public uint Port;
}

/// <summary>struct evtchn_bind_ipi.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct EvtchnBindIpi
{
    public uint Vcpu;

    /// <summary>Out.</summary>
    public uint Port;
}

/// <summary>struct evtchn_bind_vcpu.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct EvtchnBindVcpu
{
    public uint Port, Vcpu;
}

/// <summary>struct evtchn_status.</summary>
[StructLayout(LayoutKind.Explicit, Size = 24)]
public struct EvtchnStatus
{
    [FieldOffset(0)] public ushort Domain;
    [FieldOffset(4)] public uint Port;

    /// <summary>Out: EVTCHNSTAT_*, from here on.</summary>
    [FieldOffset(8)] public uint Status;
    [FieldOffset(12)] public uint Vcpu;

    /// <summary>Of an unbound or interdomain port.</summary>
    [FieldOffset(16)] public ushort RemoteDomain;

    /// <summary>Of an interdomain port.</summary>
    [FieldOffset(20)] public uint RemotePort;

    /// <summary>Of a port bound to a VIRQ.</summary>
    [FieldOffset(16)] public uint Virq;

    public const uint Closed = 0;
    public const uint Unbound = 1;
    public const uint Interdomain = 2;
    public const uint BoundToPirq = 3;
    public const uint BoundToVirq = 4;
    public const uint BoundToIpi = 5;
}

/// <summary>struct evtchn_init_control.</summary>
[StructLayout(LayoutKind.Sequential, Size = 24)]
public struct EvtchnInitControl
{
    public ulong Frame;
    public uint Offset, Vcpu;

    /// <summary>Out: <see cref="FifoAbi.LinkBits"/>.</summary>
    public byte LinkBits;
}

/// <summary>struct evtchn_set_priority.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct EvtchnSetPriority
{
    public uint Port, Priority;
}

/// <summary>struct evtchn_op of the older hypercall.</summary>
[StructLayout(LayoutKind.Explicit, Size = 28)]
public struct EvtchnOp
{
    /// <summary>Bytes before the operation's own structure.</summary>
    public const ulong ArgumentOffset = 4;

    [FieldOffset(0)] public uint Command;
}
