// One domain's event channels: what it is made of, how events get to its vCPUs, and how it ends.
using System.Runtime.InteropServices;
using XenSharp.Core;

namespace XenSharp.EventChannels;

/// <summary>
/// The event channels of one domain: the hypercall, virtual interrupts, back ends in the manager, and what SCHEDOP_poll needs.
/// </summary>
/// <remarks>
/// Threads: hypercalls, polling and <see cref="AddVcpu"/> come from the domain's own threads and must have ended before
/// <see cref="Dispose"/>; <see cref="SendVirq"/> and everything of a back end may come from any thread at any time. Locks: see
/// <see cref="PortLock"/>. Guest memory is written and read as bits only; nothing found in it becomes an index.
/// </remarks>
public sealed unsafe partial class EventChannelDomain : IDisposable
{
    private static long s_created;

    private readonly EventChannelContext* _context;
    private readonly Func<ushort, EventChannelDomain?> _directory;
    private readonly IWritableFrames _frames;
    private readonly uint _maxPort;
    private readonly VcpuNotificationQueue?[] _queues = new VcpuNotificationQueue?[EventChannelState.MaxVcpus];

    /// <summary>
    /// What an interdomain port is connected to: an <see cref="EventChannelDomain"/> or an <see cref="EventChannelBackend"/>.
    /// Changes with the port's state, under the same locks.
    /// </summary>
    private readonly object?[] _farEnds;

    /// <summary>The back ends by the numbers of their ends, those that no port of the guest's is connected to included.</summary>
    private readonly Dictionary<uint, EventChannelBackend> _backends = [];

    private Rundown _rundown;
    private bool _dying;

    /// <param name="domain">The domain. Its shared_info must stay mapped until <see cref="Dispose"/>.</param>
    /// <param name="id">Its id.</param>
    /// <param name="directory">Finds a domain of this manager by id, this one included; null for none.</param>
    /// <param name="frames">Holds the frames that the FIFO ABI is kept in.</param>
    /// <param name="maxPort">Highest port that can be allocated, 1..131071 (max_evtchn_port; Xen's toolstack gives a guest 1023
    /// unless its configuration says otherwise). Under the 2-level ABI it is 4095 at most.</param>
    public EventChannelDomain(
        DomainContext* domain, ushort id, Func<ushort, EventChannelDomain?> directory, IWritableFrames frames,
        uint maxPort = EventChannelPort.TwoLevelCount - 1)
    {
        ArgumentNullException.ThrowIfNull(domain);
        ArgumentNullException.ThrowIfNull(directory);
        ArgumentNullException.ThrowIfNull(frames);
        ArgumentOutOfRangeException.ThrowIfZero(maxPort);
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual(maxPort, FifoAbi.PortCount);
        Id = new DomainId(id);
        Sequence = Interlocked.Increment(ref s_created);
        _directory = directory;
        _frames = frames;
        _maxPort = maxPort;
        _farEnds = new object?[PortTableSize(maxPort)];
        _context = (EventChannelContext*)NativeMemory.AllocZeroed((nuint)sizeof(EventChannelContext));
        _context->Domain = domain;
        _context->State = (EventChannelState*)NativeMemory.AllocZeroed((nuint)sizeof(EventChannelState));
        _context->Ports = (EventChannelPortState*)HostPages.Allocate(PortTableBytes);
        _context->Vcpus = (EventChannelVcpuState*)NativeMemory.AllocZeroed(
            EventChannelState.MaxVcpus, (nuint)sizeof(EventChannelVcpuState));
        _context->VcpuContexts = (VcpuContext**)NativeMemory.AllocZeroed(EventChannelState.MaxVcpus, (nuint)sizeof(VcpuContext*));
        _context->Fifo = (FifoDomain*)NativeMemory.AllocZeroed((nuint)sizeof(FifoDomain));
        _context->FifoVcpus = (FifoVcpu*)NativeMemory.AllocZeroed(EventChannelState.MaxVcpus, (nuint)sizeof(FifoVcpu));
        _context->State->ValidPorts = EventChannelState.PortsPerBucket;
        _context->Ports[0].State = ChannelState.Reserved;
    }

    public DomainId Id { get; }

    /// <summary>The domain's own lock, for all that changes ports.</summary>
    internal Lock EventLock { get; } = new();

    /// <summary>Orders the event locks of domains: an id may be used again, this is not.</summary>
    internal long Sequence { get; }

    /// <summary>The state, for code that works on it by itself.</summary>
    public EventChannelContext* Context => _context;

    /// <summary>Makes a vCPU known; its number is <c>vcpu->State->Id</c>.</summary>
    /// <param name="vcpu">Must stay in place until <see cref="Dispose"/>. Its <c>Info</c> may be null until the guest registers one.</param>
    /// <param name="cpu">Kicked when the vCPU has to look at its events; must outlive this object.</param>
    public void AddVcpu(VcpuContext* vcpu, IVirtualCpu cpu)
    {
        ArgumentNullException.ThrowIfNull(vcpu);
        ArgumentNullException.ThrowIfNull(cpu);
        int id = vcpu->State->Id;
        if ((uint)id >= EventChannelState.MaxVcpus)
        {
            throw new ArgumentException(
                $"vCPU {id} is out of range: use numbers from 0 to {EventChannelState.MaxVcpus - 1}.", nameof(vcpu));
        }

        VcpuMask wake = default;
        lock (EventLock)
        {
            if (_queues[id] != null)
                throw new ArgumentException($"vCPU {id} of domain {Id.Value} was added before: add each vCPU once.", nameof(vcpu));
            _queues[id] = new VcpuNotificationQueue(cpu);
            Interlocked.Exchange(ref *(nint*)(_context->VcpuContexts + id), (nint)vcpu);

            // Events that came before the vCPU did: their senders found nobody to tell. No guest has run, so they are in two levels.
            for (uint port = 1; port < _context->State->ValidPorts; port++)
            {
                EventChannelPortState* state = _context->Ports + port;
                if (state->IsUsable && state->NotifyVcpu == id && TwoLevelAbi.IsPending(_context, port)
                    && !TwoLevelAbi.IsMasked(_context, port))
                {
                    TwoLevelAbi.RaiseSelector(_context, port, &wake);
                }
            }
        }

        Deliver(wake, callingVcpu: -1);
    }

    /// <summary>The queue that a vCPU's thread drains when it has been kicked.</summary>
    public VcpuNotificationQueue NotificationQueue(int vcpu)
        => _queues[vcpu] ?? throw new ArgumentException($"Domain {Id.Value} has no vCPU {vcpu}: add it first.", nameof(vcpu));

    /// <summary>
    /// To be called when <c>Info</c> of a vCPU points to a new place, to which the old contents were copied: all selectors become
    /// pending and the upcall is raised, since a sender may have written to the old place after the copy.
    /// </summary>
    /// <param name="vcpu">The vCPU whose vcpu_info moved.</param>
    /// <param name="callingVcpu">The vCPU on whose thread this is called, or -1: it needs no kick.</param>
    public void VcpuInfoMoved(int vcpu, int callingVcpu = -1)
    {
        VcpuMask wake = default;
        EventAbi.RaiseAll(_context, vcpu, &wake);
        Deliver(wake, callingVcpu);
    }

    /// <summary>Raises a virtual interrupt; nothing happens while the guest has not bound it.</summary>
    /// <param name="vcpu">The vCPU that it is for; ignored for a global VIRQ.</param>
    /// <param name="virq">VIRQ_*, 0..23.</param>
    /// <param name="callingVcpu">The vCPU on whose thread this is called, or -1: it needs no kick.</param>
    public void SendVirq(int vcpu, int virq, int callingVcpu = -1)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((uint)virq, (uint)Virq.Count, nameof(virq));
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual((uint)vcpu, (uint)EventChannelState.MaxVcpus, nameof(vcpu));
        if (!_rundown.TryEnter())
            return;
        VcpuMask wake = default;
        EventDelivery.RaiseVirq(_context, vcpu, virq, &wake);
        Deliver(wake, callingVcpu);
        _rundown.Exit();
    }

    /// <summary>In a vCPU's PollPort: any port ends its poll.</summary>
    private const int AnyPort = -1;

    /// <summary>
    /// Says that a vCPU is about to wait in SCHEDOP_poll. Then look with <see cref="IsPending"/>, and sleep while
    /// <see cref="IsPolling"/>: a port that becomes pending, masked or not, ends the poll and kicks the vCPU.
    /// Any port does, until <see cref="NarrowPoll"/> names the one.
    /// </summary>
    /// <param name="vcpu">The vCPU on whose thread this is called.</param>
    public void BeginPoll(int vcpu)
    {
        Volatile.Write(ref _context->Vcpus[vcpu].PollPort, AnyPort);
        VcpuMask.AtomicAdd(&_context->State->Polling, vcpu);
    }

    /// <summary>False once an event has ended the poll.</summary>
    public bool IsPolling(int vcpu) => VcpuMask.Contains(&_context->State->Polling, vcpu);

    /// <summary>Ends a poll for another reason than an event.</summary>
    public void EndPoll(int vcpu)
    {
        _ = VcpuMask.AtomicRemove(&_context->State->Polling, vcpu);
        Volatile.Write(ref _context->Vcpus[vcpu].PollPort, 0);
    }

    /// <summary>Whether a port is pending, for a vCPU that began to poll.</summary>
    /// <param name="port">As the guest gave it.</param>
    /// <returns>1 or 0; -EINVAL for a port that does not exist or is not in use.</returns>
    public long IsPending(uint port) => EventDelivery.Poll(_context, port);

    /// <summary>Says that a vCPU that began to poll for any port waits for no other than this one.</summary>
    public void NarrowPoll(int vcpu, uint port) => Volatile.Write(ref _context->Vcpus[vcpu].PollPort, (int)port);

    /// <summary>
    /// Closes every port, completes every back end and frees the state. Ports of other domains that were connected become
    /// unbound. Threads of this domain's vCPUs must be out of here; shared_info must still be mapped.
    /// </summary>
    public void Dispose()
    {
        lock (EventLock)
        {
            if (_dying)
                return;
            _dying = true;
        }

        for (uint port = _context->State->ValidPorts - 1; port > 0; port--)
            _ = Close(port);
        _rundown.Close();
        foreach (EventChannelBackend backend in _backends.Values)
            backend.Complete();
        NativeMemory.Free(_context->State);
        HostPages.Free(_context->Ports, PortTableBytes);
        NativeMemory.Free(_context->Vcpus);
        NativeMemory.Free(_context->VcpuContexts);
        NativeMemory.Free(_context->Fifo);
        NativeMemory.Free(_context->FifoVcpus);
        NativeMemory.Free(_context);
    }

    /// <summary>Sends on a port (EVTCHNOP_send).</summary>
    /// <returns>0; -EINVAL for a port that does not exist or cannot be sent on.</returns>
    private long Send(uint port, int callingVcpu)
    {
        if (!_context->IsValid(port))
            return -(long)Errno.EINVAL;
        VcpuMask wake = default;
        EventChannelContext* target;
        EventChannelPortState* state = _context->Ports + port;
        PortLock.Enter(state);
        long result = EventDelivery.Send(_context, port, &target, &wake);
        object? farEnd = _farEnds[port];
        PortLock.Exit(state);
        if (result == EventDelivery.AtBackend)
        {
            (farEnd as EventChannelBackend)?.Signal();
            return 0;
        }

        if (target == _context)
            Deliver(wake, callingVcpu);
        else
            (farEnd as EventChannelDomain)?.DeliverFromOutside(wake);
        return result;
    }

    /// <summary>Says what a port is connected to, with its lock held; null for nothing.</summary>
    private void SetFarEnd(uint port, object? farEnd)
    {
        _farEnds[port] = farEnd;
        _context->Ports[port].FarEnd = farEnd is EventChannelDomain domain ? domain._context : null;
    }

    /// <summary>A back end has sent.</summary>
    internal void NotifyGuest(EventChannelBackend backend)
    {
        if (!_rundown.TryEnter())
            return;
        VcpuMask wake = default;
        uint port = backend.GuestPort.Value;
        EventChannelPortState* state = _context->Ports + port;
        PortLock.Enter(state);
        if (ReferenceEquals(_farEnds[port], backend))
            EventAbi.SetPending(_context, port, &wake);
        PortLock.Exit(state);
        Deliver(wake, callingVcpu: -1);
        _rundown.Exit();
    }

    private nuint PortTableBytes => PortTableSize(_maxPort) * (nuint)sizeof(EventChannelPortState);

    /// <summary>Entries of the port table: whole buckets.</summary>
    private static uint PortTableSize(uint maxPort) => (maxPort / EventChannelState.PortsPerBucket + 1) * EventChannelState.PortsPerBucket;

    private void DeliverFromOutside(VcpuMask wake)
    {
        // The domain may have gone since its bits were set under the sender's port lock.
        if (wake.IsEmpty || !_rundown.TryEnter())
            return;
        Deliver(wake, callingVcpu: -1);
        _rundown.Exit();
    }

    /// <summary>Wakes or kicks vCPUs whose bits are set by now. The calling one looks by itself on its way to the guest.</summary>
    private void Deliver(VcpuMask wake, int callingVcpu)
    {
        for (int vcpu = wake.TakeLowest(); vcpu >= 0; vcpu = wake.TakeLowest())
        {
            if (vcpu != callingVcpu)
                _queues[vcpu]?.Post();
        }
    }
}
