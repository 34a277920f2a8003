// The event channel state of a domain on plain memory, and the hot operations on it from either side.
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.EventChannels;

namespace XenSharp.Freestanding.Tests;

/// <summary>A domain of a few vCPUs whose ports are in all the states there are.</summary>
internal sealed unsafe class EventDomain : IDisposable
{
    public const int Vcpus = 4;
    public const uint Ports = 256;

    /// <summary>This port is an IPI in every domain.</summary>
    public const uint IpiPort = 64;

    private const ulong FirstFrame = 0x100;

    private readonly List<nint> _blocks = [];

    /// <summary>Pages of the guest's that the FIFO ABI is kept in: control blocks, and event words of all ports but the last.</summary>
    private const int FifoPages = 2;

    /// <param name="seed">Of what ports there are.</param>
    /// <param name="fifo">Whether the FIFO ABI is in use; then vCPU 2 has no control block.</param>
    public EventDomain(int seed, bool fifo)
    {
        var random = new Random(seed);
        Context = (EventChannelContext*)Allocate((nuint)sizeof(EventChannelContext));
        Context->Domain = (DomainContext*)Allocate((nuint)sizeof(DomainContext));
        Context->Domain->SharedInfo = (byte*)Allocate(4096);
        Context->State = (EventChannelState*)Allocate((nuint)sizeof(EventChannelState));
        Context->State->ValidPorts = Ports;
        Context->Ports = (EventChannelPortState*)Allocate(EventChannelPort.TwoLevelCount * (nuint)sizeof(EventChannelPortState));
        Context->Vcpus = (EventChannelVcpuState*)Allocate(EventChannelState.MaxVcpus * (nuint)sizeof(EventChannelVcpuState));
        Context->VcpuContexts = (VcpuContext**)Allocate(EventChannelState.MaxVcpus * (nuint)sizeof(VcpuContext*));

        Context->Fifo = (FifoDomain*)Allocate((nuint)sizeof(FifoDomain));
        Context->FifoVcpus = (FifoVcpu*)Allocate(EventChannelState.MaxVcpus * (nuint)sizeof(FifoVcpu));
        FifoMemory = (byte*)Allocate(FifoPages * 4096);
        if (fifo)
        {
            Context->Domain->Memory = new MachineMemory(FifoMemory, new Mfn(FirstFrame), FifoPages);
            Context->Fifo->InUse = 1;
            Context->Fifo->Pages[0] = FirstFrame + 1;
            Context->Fifo->Words = Ports - 1;
            for (int i = 0; i < Vcpus; i++)
            {
                Context->FifoVcpus[i].ControlOffset = (uint)i * 128;
                Context->FifoVcpus[i].ControlFrame = i == 2 ? 0 : FirstFrame;
            }
        }

        // The last of them has no vcpu_info, and one port is for a vCPU that does not exist.
        for (int i = 0; i < Vcpus; i++)
        {
            Context->VcpuContexts[i] = (VcpuContext*)Allocate((nuint)sizeof(VcpuContext));
            if (i != Vcpus - 1)
                Context->VcpuContexts[i]->Info = (VcpuInfo*)Context->Domain->SharedInfo + i;
        }

        ChannelState[] states = Enum.GetValues<ChannelState>();
        for (uint port = 1; port < Ports; port++)
        {
            EventChannelPortState* state = Context->Ports + port;
            state->State = port == IpiPort ? ChannelState.Ipi : states[random.Next(states.Length)];
            state->NotifyVcpu = (ushort)random.Next(Vcpus + 1);
            state->Priority = (byte)random.Next(FifoAbi.Priorities);
            if (state->State != ChannelState.Virq)
                continue;
            state->Virq = random.Next(Virq.Count);
            if (Virq.IsGlobal(state->Virq))
                state->NotifyVcpu = 0;
            if (state->NotifyVcpu < Vcpus)
                Context->Vcpus[state->NotifyVcpu].Virqs[state->Virq] = port;
        }
    }

    public EventChannelContext* Context { get; }

    /// <summary>Control blocks and event words, 8192 bytes.</summary>
    public byte* FifoMemory { get; }

    /// <summary>Leads the interdomain ports to another domain, to this one, or to a back end, whose port is none of either's.</summary>
    public void Connect(EventDomain far, int seed)
    {
        var random = new Random(seed);
        for (uint port = 1; port < Ports; port++)
        {
            if (Context->Ports[port].State != ChannelState.Interdomain)
                continue;
            Context->Ports[port].FarEnd = random.Next(4) switch { 0 => null, 1 => Context, _ => far.Context };
            Context->Ports[port].RemotePort = (uint)random.Next(1, (int)Ports);
        }
    }

    /// <summary>The guest takes all events of its queues.</summary>
    public void TakeAll()
    {
        NativeMemory.Clear(FifoMemory, FifoPages * 4096);
        for (int i = 0; i < Vcpus; i++)
            ((VcpuInfo*)Context->Domain->SharedInfo)[i].EvtchnUpcallPending = 0;
    }

    /// <summary>All that operations may change, none of which is an address.</summary>
    public byte[] Snapshot()
    {
        var ports = new EventChannelPortState[Ports];
        new ReadOnlySpan<EventChannelPortState>(Context->Ports, (int)Ports).CopyTo(ports);
        for (int port = 0; port < ports.Length; port++)
            ports[port].FarEnd = null;
        return
        [
            .. new ReadOnlySpan<byte>(Context->Domain->SharedInfo, 4096),
            .. new ReadOnlySpan<byte>(Context->State, sizeof(EventChannelState)),
            .. MemoryMarshal.AsBytes<EventChannelPortState>(ports),
            .. new ReadOnlySpan<byte>(Context->Vcpus, Vcpus * sizeof(EventChannelVcpuState)),
            .. new ReadOnlySpan<byte>(Context->FifoVcpus, (Vcpus + 1) * sizeof(FifoVcpu)),
            .. new ReadOnlySpan<byte>(FifoMemory, FifoPages * 4096),
        ];
    }

    public void Dispose()
    {
        foreach (nint block in _blocks)
            NativeMemory.AlignedFree((void*)block);
        _blocks.Clear();
    }

    private void* Allocate(nuint size)
    {
        size = (size + 63) & ~(nuint)63;
        void* block = NativeMemory.AlignedAlloc(size, 64);
        NativeMemory.Clear(block, size);
        _blocks.Add((nint)block);
        return block;
    }
}

/// <summary>Send, unmask, raise a VIRQ, poll: 0 to 3.</summary>
internal static unsafe class EventCodeOutside
{
    public static long Call(
        int operation, EventChannelContext* context, uint port, int vcpu, int virq, EventChannelContext** target, VcpuMask* wake)
    {
        *target = context;
        switch (operation)
        {
            case 0:
                if (!context->IsValid(port))
                    return -(long)Errno.EINVAL;
                PortLock.Enter(context->Ports + port);
                long result = EventDelivery.Send(context, port, target, wake);
                PortLock.Exit(context->Ports + port);
                return result;
            case 1:
                return EventDelivery.Unmask(context, port, wake);
            case 2:
                EventDelivery.RaiseVirq(context, vcpu, virq, wake);
                return 0;
            default:
                return EventDelivery.Poll(context, port);
        }
    }
}

/// <inheritdoc cref="EventCodeOutside"/>
internal sealed unsafe class EventCodeInside(HotImage image)
{
    private readonly nint _send = (nint)image.AddressOf("xensharp_event_send");
    private readonly nint _unmask = (nint)image.AddressOf("xensharp_event_unmask");
    private readonly nint _raiseVirq = (nint)image.AddressOf("xensharp_event_raise_virq");
    private readonly nint _poll = (nint)image.AddressOf("xensharp_event_poll");

    public long Call(int operation, EventChannelContext* context, uint port, int vcpu, int virq, EventChannelContext** target, VcpuMask* wake)
    {
        *target = context;
        switch (operation)
        {
            case 0:
                return ((delegate* unmanaged<EventChannelContext*, uint, EventChannelContext**, VcpuMask*, long>)_send)(context, port, target, wake);
            case 1:
                return ((delegate* unmanaged<EventChannelContext*, uint, VcpuMask*, long>)_unmask)(context, port, wake);
            case 2:
                ((delegate* unmanaged<EventChannelContext*, int, int, VcpuMask*, void>)_raiseVirq)(context, vcpu, virq, wake);
                return 0;
            default:
                return Poll(context, port);
        }
    }

    public long Poll(EventChannelContext* context, uint port)
        => ((delegate* unmanaged<EventChannelContext*, uint, long>)_poll)(context, port);
}
