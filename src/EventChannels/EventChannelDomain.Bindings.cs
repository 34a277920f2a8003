// Allocating, binding and closing ports: everything that changes what a port is, under the event lock.
using XenSharp.Core;

namespace XenSharp.EventChannels;

public sealed unsafe partial class EventChannelDomain
{
    /// <summary>Interrupt lines: the pins of one interrupt controller.</summary>
    public const uint LineCount = 24;

    /// <summary>Pirqs that a domain without hardware can name: the lines, and Xen's 32 extra for guests.</summary>
    public const uint PirqCount = LineCount + 32;

    private static readonly DomainId s_domainZero = new(0);

    private static int s_domainZeroPort;

    /// <summary>No port below this is free.</summary>
    private uint _firstFree = 1;

    /// <summary>Allocates a port that <paramref name="remote"/> may bind to, as a domain builder does.</summary>
    /// <returns>0; -ENOSPC when no port is free; -EINVAL when the domain is going away.</returns>
    public long AllocateUnbound(DomainId remote, out EventChannelPort port)
    {
        port = default;
        lock (EventLock)
        {
            long found = FindFreePort();
            if (found < 0)
                return found;
            EventChannelPortState* state = _context->Ports + found;
            PortLock.Enter(state);
            state->RemoteDomain = remote == DomainId.Self ? Id.Value : remote.Value;
            Occupy(state, ChannelState.Unbound);
            PortLock.Exit(state);
            port = new EventChannelPort((uint)found);
            return 0;
        }
    }

    /// <summary>
    /// Binds a back end, in domain 0's name, to a port that the guest or the builder allocated for domain 0. The first
    /// <see cref="EventChannelBackend.WaitAsync"/> completes at once: the guest may have sent before.
    /// </summary>
    /// <param name="guestPort">May come from the guest.</param>
    /// <param name="backend">The far end.</param>
    /// <returns>0; -EINVAL for a port that does not exist or does not wait for domain 0; -ESRCH when the domain is going away; -ENOSPC when
    /// domain 0 has no port left.</returns>
    public long TryBindBackend(EventChannelPort guestPort, out EventChannelBackend? backend)
    {
        backend = null;
        uint port = guestPort.Value;
        lock (EventLock)
        {
            if (_dying)
                return -(long)Errno.ESRCH;
            if (!_context->IsValid(port))
                return -(long)Errno.EINVAL;
            EventChannelPortState* state = _context->Ports + port;
            if (state->State != ChannelState.Unbound || state->RemoteDomain != s_domainZero.Value)
                return -(long)Errno.EINVAL;
            if (_backends.Count == EventChannelPort.TwoLevelCount - 1)
                return -(long)Errno.ENOSPC;
            uint own = NextDomainZeroPort();
            while (_backends.ContainsKey(own))
                own = NextDomainZeroPort();
            backend = new EventChannelBackend(this, new EventChannelPort(own), guestPort);
            _backends.Add(own, backend);
            PortLock.Enter(state);
            state->RemotePort = own;
            state->State = ChannelState.Interdomain;
            SetFarEnd(port, backend);
            PortLock.Exit(state);
        }

        backend.Signal();
        return 0;
    }

    /// <summary>As <see cref="TryBindBackend"/>, for a port that the caller allocated itself.</summary>
    /// <exception cref="InvalidOperationException">The port cannot be bound.</exception>
    public EventChannelBackend BindBackend(EventChannelPort guestPort)
    {
        long error = TryBindBackend(guestPort, out EventChannelBackend? backend);
        return backend ?? throw new InvalidOperationException(
            $"No back end can be bound to {guestPort} of domain {Id.Value} ({(Errno)(-error)}): allocate the port unbound for domain 0 first.");
    }

    /// <summary>Allocates a port of the guest that is connected to a new back end from the start.</summary>
    /// <exception cref="InvalidOperationException">No port is free.</exception>
    public EventChannelBackend AllocateBackend(out EventChannelPort guestPort)
    {
        long error = AllocateUnbound(s_domainZero, out guestPort);
        return error == 0 ? BindBackend(guestPort) : throw new InvalidOperationException(
            $"Domain {Id.Value} has no port left for a back end ({(Errno)(-error)}): raise its limit of event channels, now {_maxPort}.");
    }

    /// <summary>A back end closes its end: the guest's port waits for domain 0 again.</summary>
    internal void Disconnect(EventChannelBackend backend)
    {
        if (_rundown.TryEnter())
        {
            lock (EventLock)
            {
                _ = _backends.Remove(backend.Port.Value);
                uint port = backend.GuestPort.Value;
                EventChannelPortState* state = _context->Ports + port;
                if (ReferenceEquals(_farEnds[port], backend))
                {
                    PortLock.Enter(state);
                    BecomeUnbound(port, s_domainZero);
                    PortLock.Exit(state);
                }
            }

            _rundown.Exit();
        }

        backend.Complete();
    }

    private long AllocUnbound(ref EvtchnAllocUnbound arguments)
    {
        var domain = new DomainId(arguments.Domain);
        if (domain != DomainId.Self && domain != Id)
            return Exists(domain) ? -(long)Errno.EPERM : -(long)Errno.ESRCH;
        long result = AllocateUnbound(new DomainId(arguments.RemoteDomain), out EventChannelPort port);
        if (result == 0)
            arguments.Port = port.Value;
        return result;
    }

    private long BindInterdomain(ref EvtchnBindInterdomain arguments, int callingVcpu)
    {
        EventChannelDomain? remote = Find(new DomainId(arguments.RemoteDomain));
        if (remote == null)
        {
            return arguments.RemoteDomain == s_domainZero.Value ? BindToBackend(ref arguments, callingVcpu) : -(long)Errno.ESRCH;
        }

        VcpuMask wake = default;
        using (EventLockPair.Enter(this, remote))
        {
            long found = FindFreePort();
            if (found < 0)
                return found;

            // One that is going away has no ports any more.
            if (remote._dying)
                return -(long)Errno.EINVAL;
            uint localPort = (uint)found;
            uint remotePort = arguments.RemotePort;
            if (!remote._context->IsValid(remotePort))
                return -(long)Errno.EINVAL;
            EventChannelPortState* local = _context->Ports + localPort;
            EventChannelPortState* far = remote._context->Ports + remotePort;
            if (far->State != ChannelState.Unbound || far->RemoteDomain != Id.Value)
                return -(long)Errno.EINVAL;

            LockEnds(localPort, remote, remotePort);
            local->RemoteDomain = remote.Id.Value;
            local->RemotePort = remotePort;
            SetFarEnd(localPort, remote);
            Occupy(local, ChannelState.Interdomain);
            far->RemotePort = localPort;
            far->State = ChannelState.Interdomain;
            remote.SetFarEnd(remotePort, this);

            // What the far end sent before there was anyone to send to.
            EventAbi.SetPending(_context, localPort, &wake);
            UnlockEnds(localPort, remote, remotePort);
            arguments.LocalPort = localPort;
        }

        Deliver(wake, callingVcpu);
        return 0;
    }

    /// <summary>
    /// To a port of domain 0's. Those are made by being bound to the guest's; one waits for the guest when the guest has closed its end.
    /// </summary>
    private long BindToBackend(ref EvtchnBindInterdomain arguments, int callingVcpu)
    {
        VcpuMask wake = default;
        lock (EventLock)
        {
            long found = FindFreePort();
            if (found < 0)
                return found;
            if (!_backends.TryGetValue(arguments.RemotePort, out EventChannelBackend? backend) || backend.GuestPort.Value != 0)
                return -(long)Errno.EINVAL;
            EventChannelPortState* state = _context->Ports + found;
            PortLock.Enter(state);
            state->RemoteDomain = s_domainZero.Value;
            state->RemotePort = arguments.RemotePort;
            SetFarEnd((uint)found, backend);
            backend.GuestPort = new EventChannelPort((uint)found);
            Occupy(state, ChannelState.Interdomain);
            EventAbi.SetPending(_context, (uint)found, &wake);
            PortLock.Exit(state);
            arguments.LocalPort = (uint)found;
        }

        Deliver(wake, callingVcpu);
        return 0;
    }

    private long BindVirq(ref EvtchnBindVirq arguments)
    {
        if (arguments.Virq >= Virq.Count)
            return -(long)Errno.EINVAL;
        int virq = (int)arguments.Virq;
        if (Virq.IsGlobal(virq) && arguments.Vcpu != 0)
            return -(long)Errno.EINVAL;
        if (_context->Vcpu(arguments.Vcpu) == null)
            return -(long)Errno.ENOENT;
        lock (EventLock)
        {
            ref uint bound = ref _context->Vcpus[arguments.Vcpu].Virqs[virq];
            if (bound != 0)
                return -(long)Errno.EEXIST;
            long found = FindFreePort();
            if (found < 0)
                return found;
            EventChannelPortState* state = _context->Ports + found;
            PortLock.Enter(state);
            state->Virq = virq;
            state->NotifyVcpu = (ushort)arguments.Vcpu;
            Occupy(state, ChannelState.Virq);
            PortLock.Exit(state);
            arguments.Port = (uint)found;
            Volatile.Write(ref bound, (uint)found);
            return 0;
        }
    }

    private long BindIpi(ref EvtchnBindIpi arguments)
    {
        if (_context->Vcpu(arguments.Vcpu) == null)
            return -(long)Errno.ENOENT;
        lock (EventLock)
        {
            long found = FindFreePort();
            if (found < 0)
                return found;
            EventChannelPortState* state = _context->Ports + found;
            PortLock.Enter(state);
            state->NotifyVcpu = (ushort)arguments.Vcpu;
            Occupy(state, ChannelState.Ipi);
            PortLock.Exit(state);
            arguments.Port = (uint)found;
            return 0;
        }
    }

    private static long BindPirq(in EvtchnBindPirq arguments)
        => arguments.Pirq >= PirqCount ? -(long)Errno.EINVAL : -(long)Errno.EPERM;

    private long BindVcpu(in EvtchnBindVcpu arguments)
    {
        if (_context->Vcpu(arguments.Vcpu) == null)
            return -(long)Errno.ENOENT;
        if (!_context->IsValid(arguments.Port))
            return -(long)Errno.EINVAL;
        lock (EventLock)
        {
            EventChannelPortState* state = _context->Ports + arguments.Port;
            bool movable = state->State is ChannelState.Unbound or ChannelState.Interdomain
                || (state->State == ChannelState.Virq && Virq.IsGlobal(state->Virq));
            if (!movable)
                return -(long)Errno.EINVAL;

            // As Xen, which moves later notifications only; one that was made stays where it was made.
            Volatile.Write(ref state->NotifyVcpu, (ushort)arguments.Vcpu);
            return 0;
        }
    }

    private long Status(ref EvtchnStatus arguments)
    {
        var domain = new DomainId(arguments.Domain);
        if (domain != DomainId.Self && domain != Id)
            return StatusOfOther(domain, arguments.Port);
        if (!_context->IsValid(arguments.Port))
            return -(long)Errno.EINVAL;
        lock (EventLock)
        {
            EventChannelPortState* state = _context->Ports + arguments.Port;
            switch (state->State)
            {
                case ChannelState.Unbound:
                    arguments.Status = EvtchnStatus.Unbound;
                    arguments.RemoteDomain = state->RemoteDomain;
                    break;
                case ChannelState.Interdomain:
                    arguments.Status = EvtchnStatus.Interdomain;
                    arguments.RemoteDomain = state->RemoteDomain;
                    arguments.RemotePort = state->RemotePort;
                    break;
                case ChannelState.Virq:
                    arguments.Status = EvtchnStatus.BoundToVirq;
                    arguments.Virq = (uint)state->Virq;
                    break;
                case ChannelState.Ipi:
                    arguments.Status = EvtchnStatus.BoundToIpi;
                    break;
                default:
                    arguments.Status = EvtchnStatus.Closed;
                    break;
            }

            arguments.Vcpu = state->NotifyVcpu;
            return 0;
        }
    }

    /// <summary>Never granted; but whether the port exists is answered first.</summary>
    private long StatusOfOther(DomainId domain, uint port)
    {
        EventChannelDomain? other = Find(domain);
        if (other == null || !other._rundown.TryEnter())
        {
            return other == null && domain != s_domainZero ? -(long)Errno.ESRCH
                : port < EventChannelPort.TwoLevelCount ? -(long)Errno.EPERM : -(long)Errno.EINVAL;
        }

        bool valid = other._context->IsValid(port);
        other._rundown.Exit();
        return valid ? -(long)Errno.EPERM : -(long)Errno.EINVAL;
    }

    /// <summary>Closes a port (EVTCHNOP_close). The far end becomes unbound.</summary>
    /// <returns>0; -EINVAL for a port that does not exist or is not in use.</returns>
    private long Close(uint port)
    {
        if (!_context->IsValid(port))
            return -(long)Errno.EINVAL;
        EventChannelPortState* state = _context->Ports + port;
        EventChannelDomain? peer = null;
        while (true)
        {
            using (EventLockPair.Enter(this, peer))
            {
                // The far end is known only under the lock, but both locks have to be taken in order: look, and look again.
                var current = _farEnds[port] as EventChannelDomain;
                if (current != null && current != this && current != peer)
                {
                    peer = current;
                    continue;
                }

                switch (state->State)
                {
                    case ChannelState.Free or ChannelState.Reserved:
                        return -(long)Errno.EINVAL;
                    case ChannelState.Virq:
                        int owner = Virq.IsGlobal(state->Virq) ? 0 : state->NotifyVcpu;
                        Volatile.Write(ref _context->Vcpus[owner].Virqs[state->Virq], 0);
                        break;
                    case ChannelState.Interdomain when current != null:
                        uint remotePort = state->RemotePort;
                        LockEnds(port, current, remotePort);
                        Free(port);
                        current.BecomeUnbound(remotePort, Id);
                        UnlockEnds(port, current, remotePort);
                        return 0;
                }

                var backend = _farEnds[port] as EventChannelBackend;
                PortLock.Enter(state);
                Free(port);
                if (backend != null)
                    backend.GuestPort = default;
                PortLock.Exit(state);
                return 0;
            }
        }
    }

    /// <summary>Closes all ports and goes back to the 2-level ABI (EVTCHNOP_reset), or goes on with it.</summary>
    /// <returns>0; -EBUSY when another vCPU's is under way, or none to be continued; -EAGAIN when ports were bound meanwhile;
    /// -ERESTART to be continued.</returns>
    private long Reset(VcpuContext* vcpu, bool resuming)
    {
        EventChannelState* state = _context->State;
        uint port;
        lock (EventLock)
        {
            if (resuming == (state->NextReset == 0))
                return -(long)Errno.EBUSY;
            if (!resuming)
                state->NextReset = 1;
            port = state->NextReset;
        }

        for (; _context->IsValid(port) && Volatile.Read(ref state->ActivePorts) > 0; port++)
        {
            _ = Close(port);
            if (port % 64 == 0 && vcpu->PreemptionDue)
            {
                lock (EventLock)
                    state->NextReset = port + 1;
                return -(long)Errno.ERESTART;
            }
        }

        lock (EventLock)
        {
            state->NextReset = 0;
            if (state->ActivePorts > 0)
                return -(long)Errno.EAGAIN;
            LeaveFifo(vcpu);
            return 0;
        }
    }

    private EventChannelDomain? Find(DomainId domain) => domain == DomainId.Self || domain == Id ? this : _directory(domain.Value);

    /// <summary>Domain 0 always exists for a guest: the manager is it.</summary>
    private bool Exists(DomainId domain) => domain == s_domainZero || Find(domain) != null;

    private static uint NextDomainZeroPort()
        => ((uint)Interlocked.Increment(ref s_domainZeroPort) % (EventChannelPort.TwoLevelCount - 1)) + 1;

    /// <summary>The lowest port that is free; with the event lock held.</summary>
    /// <returns>Its number; -ENOSPC; -EINVAL when the domain is going away.</returns>
    private long FindFreePort()
    {
        if (_dying)
            return -(long)Errno.EINVAL;
        uint last = EventAbi.IsFifo(_context) ? _maxPort : Math.Min(_maxPort, EventChannelPort.TwoLevelCount - 1);
        for (uint port = _firstFree; port <= last; port++)
        {
            if (port >= _context->State->ValidPorts)
                Volatile.Write(ref _context->State->ValidPorts, _context->State->ValidPorts + EventChannelState.PortsPerBucket);
            bool free = _context->Ports[port].State == ChannelState.Free;
            if (free && !EventAbi.IsBusy(_context, port))
                return port;

            // One that is busy may not be so the next time.
            if (!free && port == _firstFree)
                _firstFree++;
        }

        return -(long)Errno.ENOSPC;
    }

    private void Occupy(EventChannelPortState* port, ChannelState state)
    {
        Volatile.Write(ref port->Priority, FifoAbi.DefaultPriority);
        port->State = state;
        Volatile.Write(ref _context->State->ActivePorts, _context->State->ActivePorts + 1);
    }

    private void Free(uint port)
    {
        EventChannelPortState* state = _context->Ports + port;

        // Whoever gets the port next must not see its events.
        EventAbi.ClearPending(_context, port);
        state->State = ChannelState.Free;
        state->NotifyVcpu = 0;
        SetFarEnd(port, null);
        _firstFree = Math.Min(_firstFree, port);
        Volatile.Write(ref _context->State->ActivePorts, _context->State->ActivePorts - 1);
    }

    private void BecomeUnbound(uint port, DomainId remote)
    {
        _context->Ports[port].State = ChannelState.Unbound;
        _context->Ports[port].RemoteDomain = remote.Value;
        SetFarEnd(port, null);
    }

    /// <summary>Locks both ends of a connection in the order that <see cref="PortLock"/> gives.</summary>
    private void LockEnds(uint port, EventChannelDomain remote, uint remotePort)
    {
        bool localFirst = remote == this ? port < remotePort : Sequence < remote.Sequence;
        PortLock.Enter(localFirst ? _context->Ports + port : remote._context->Ports + remotePort);
        PortLock.Enter(localFirst ? remote._context->Ports + remotePort : _context->Ports + port);
    }

    private void UnlockEnds(uint port, EventChannelDomain remote, uint remotePort)
    {
        PortLock.Exit(_context->Ports + port);
        PortLock.Exit(remote._context->Ports + remotePort);
    }
}
