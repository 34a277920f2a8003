// The state that sending and unmasking an event work on: blittable, without managed references, addresses kept apart.
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using XenSharp.Core;

namespace XenSharp.EventChannels;

/// <summary>One entry of a domain's port table.</summary>
[StructLayout(LayoutKind.Explicit, Size = 32)]
public unsafe struct EventChannelPortState
{
    /// <summary>The port's own lock: see <see cref="PortLock"/>.</summary>
    [FieldOffset(0)] public int Lock;

    [FieldOffset(4)] public ChannelState State;

    /// <summary>FIFO ABI: the priority of the queue that it is put on, 0..15.</summary>
    [FieldOffset(5)] public byte Priority;

    /// <summary>The vCPU that gets the upcall.</summary>
    [FieldOffset(6)] public ushort NotifyVcpu;

    /// <summary>Interdomain: the port at the far end.</summary>
    [FieldOffset(8)] public uint RemotePort;

    /// <summary>Virq: which.</summary>
    [FieldOffset(8)] public int Virq;

    /// <summary>Unbound: the domain that may bind. Interdomain: the domain at the far end.</summary>
    [FieldOffset(12)] public ushort RemoteDomain;

    /// <summary>FIFO ABI: the queue that it was put on last, vCPU * 16 + priority. Changes under the locks of the old queue and the new.</summary>
    [FieldOffset(14)] public ushort LastQueue;

    /// <summary>FIFO ABI: 1 when it was pending before its event word was there. Stays so, as on Xen.</summary>
    [FieldOffset(16)] public int WasPending;

    /// <summary>Interdomain: the domain at the far end, this one included; null for a back end. Changes with the state, under the same locks.</summary>
    [FieldOffset(24)] public EventChannelContext* FarEnd;

    /// <summary>A guest may use it: not free, not reserved (evtchn_usable).</summary>
    public readonly bool IsUsable => State > ChannelState.Reserved;
}

/// <summary>What events need to know of one vCPU.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct EventChannelVcpuState
{
    /// <summary>While the vCPU polls: the one port that it waits for, or 0 or less for any.</summary>
    public int PollPort;

    /// <summary>The port that each VIRQ is bound to; 0 for none. Global VIRQs are in vCPU 0's.</summary>
    public VirqPorts Virqs;

    [InlineArray(Virq.Count)]
    public struct VirqPorts
    {
        private uint _element;
    }
}

/// <summary>What all ports of a domain share.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct EventChannelState
{
    /// <summary>vCPUs that a domain can have.</summary>
    public const int MaxVcpus = 128;

    /// <summary>Ports grow by so many (EVTCHNS_PER_BUCKET): a guest can tell a free port from one that never was.</summary>
    public const uint PortsPerBucket = 64;

    /// <summary>Ports below this exist, free or not (valid_evtchns).</summary>
    public uint ValidPorts;

    /// <summary>Ports in use (active_evtchns).</summary>
    public uint ActivePorts;

    /// <summary>Where a reset goes on; 0 while none is under way (next_evtchn).</summary>
    public uint NextReset;

    /// <summary>The vCPUs that wait in SCHEDOP_poll (poll_mask).</summary>
    public VcpuMask Polling;
}

/// <summary>One queue of the FIFO ABI, as far as it is the manager's.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct FifoQueue
{
    /// <summary>See <see cref="PortLock"/>.</summary>
    public int Lock;

    /// <summary>The port that was appended last; 0 for none. The guest may have taken it since.</summary>
    public uint Tail;
}

/// <summary>What the FIFO ABI needs to know of one vCPU (struct evtchn_fifo_vcpu).</summary>
[StructLayout(LayoutKind.Sequential)]
public struct FifoVcpu
{
    /// <summary>The frame of its control block, set after the offset; 0 for none.</summary>
    public ulong ControlFrame;

    /// <summary>Where in the frame, in bytes, a multiple of 8.</summary>
    public uint ControlOffset;

    /// <summary>By priority.</summary>
    public PriorityQueues Queues;

    [InlineArray(FifoAbi.Priorities)]
    public struct PriorityQueues
    {
        private FifoQueue _element;
    }
}

/// <summary>What a domain's ports share under the FIFO ABI (struct evtchn_fifo_domain).</summary>
[StructLayout(LayoutKind.Sequential)]
public struct FifoDomain
{
    /// <summary>1 from the first control block to the next reset; else the 2-level ABI is in use.</summary>
    public int InUse;

    /// <summary>Event words that there are, 1024 for each page; raised after the page's frame is set.</summary>
    public uint Words;

    /// <summary>Frames of the event array.</summary>
    public PageFrames Pages;

    [InlineArray(FifoAbi.MaxPages)]
    public struct PageFrames
    {
        private ulong _element;
    }
}

/// <summary>A set of vCPU numbers, 0..127.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct VcpuMask
{
    private ulong _low;
    private ulong _high;

    public readonly bool IsEmpty => (_low | _high) == 0;

    public void Add(int vcpu) => WordOf(ref this, vcpu) |= BitOf(vcpu);

    /// <summary>Removes the lowest member.</summary>
    /// <returns>Its number, or -1 when the set is empty.</returns>
    public int TakeLowest()
    {
        ref ulong word = ref this._low;
        int first = 0;
        if (_low == 0)
        {
            word = ref this._high;
            first = 64;
        }

        if (word == 0)
            return -1;
        int bit = System.Numerics.BitOperations.TrailingZeroCount(word);
        word &= word - 1;
        return first + bit;
    }

    /// <summary>A copy of a set that other threads change; each half is read once.</summary>
    public static unsafe VcpuMask Snapshot(VcpuMask* mask)
        => new() { _low = Volatile.Read(ref mask->_low), _high = Volatile.Read(ref mask->_high) };

    /// <summary>Is in a set that other threads change.</summary>
    public static unsafe bool Contains(VcpuMask* mask, int vcpu)
        => (Volatile.Read(ref WordOf(ref *mask, vcpu)) & BitOf(vcpu)) != 0;

    /// <summary>Adds to a set that other threads change; a full barrier.</summary>
    public static unsafe void AtomicAdd(VcpuMask* mask, int vcpu)
        => Interlocked.Or(ref WordOf(ref *mask, vcpu), BitOf(vcpu));

    /// <summary>Removes from a set that other threads change; a full barrier.</summary>
    /// <returns>True for the one caller that removed it.</returns>
    public static unsafe bool AtomicRemove(VcpuMask* mask, int vcpu)
        => (Interlocked.And(ref WordOf(ref *mask, vcpu), ~BitOf(vcpu)) & BitOf(vcpu)) != 0;

    private static ref ulong WordOf(ref VcpuMask mask, int vcpu) => ref vcpu < 64 ? ref mask._low : ref mask._high;

    private static ulong BitOf(int vcpu) => 1UL << (vcpu & 63);
}

/// <summary>Where a domain's event channel state lies for code that runs here; holds nothing but addresses.</summary>
public unsafe struct EventChannelContext
{
    public DomainContext* Domain;
    public EventChannelState* State;

    /// <summary>An entry for each port that can be had, and for 0; not fewer than a bucket has.</summary>
    public EventChannelPortState* Ports;

    /// <summary><see cref="EventChannelState.MaxVcpus"/> entries.</summary>
    public EventChannelVcpuState* Vcpus;

    /// <summary>As many addresses; null for a vCPU that does not exist.</summary>
    public VcpuContext** VcpuContexts;

    public FifoDomain* Fifo;

    /// <summary>As many entries as there are of <see cref="Vcpus"/>.</summary>
    public FifoVcpu* FifoVcpus;

    public readonly bool IsValid(uint port) => port < Volatile.Read(ref State->ValidPorts);

    public readonly VcpuContext* Vcpu(uint vcpu)
        => vcpu < EventChannelState.MaxVcpus ? (VcpuContext*)Volatile.Read(ref *(nint*)(VcpuContexts + vcpu)) : null;
}
