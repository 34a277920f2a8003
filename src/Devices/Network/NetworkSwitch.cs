// A learning switch within the process: the bridge of guests that need none of the host's.
namespace XenSharp.Devices.Network;

/// <summary>
/// An Ethernet switch between the ports that are made of it. Any thread; a frame is passed on in the thread that gives it.
/// </summary>
/// <remarks>
/// <para>It learns who is where from the frames' sources, as IEEE 802.1D says, with ageing (<see cref="MacTable{TPort}"/>). What is for
/// nobody known, for groups and for all goes to all ports but the one it came from; no frame goes back there.</para>
/// <para>Nobody waits for a slow receiver: it has a queue of its own, or drops. Frames that are to be cut, or have blank checksums, go as
/// they are to ports that take such; for others that is done here.</para>
/// </remarks>
public sealed class NetworkSwitch
{
    private readonly Lock _lock = new();
    private readonly MacTable<SwitchPort> _stations;
    private SwitchPort[] _ports = [];
    private long _flooded;

    /// <param name="name">What people know it by, as in <c>bridge=</c>.</param>
    /// <param name="time">The clock of ageing; null for the system's.</param>
    public NetworkSwitch(string name, TimeProvider? time = null)
    {
        ArgumentException.ThrowIfNullOrEmpty(name);
        Name = name;
        _stations = new MacTable<SwitchPort>(time ?? TimeProvider.System);
    }

    public string Name { get; }

    /// <summary>Its ports, as they are now.</summary>
    public IReadOnlyList<INetworkPort> Ports => Volatile.Read(ref _ports);

    /// <summary>Stations that it knows.</summary>
    public int StationCount
    {
        get
        {
            lock (_lock)
                return _stations.Count;
        }
    }

    /// <summary>Frames that went to all ports.</summary>
    public long FloodedFrames => Volatile.Read(ref _flooded);

    /// <summary>Makes a port; disposing it takes it away.</summary>
    /// <param name="name">What people know it by; several may have the same.</param>
    public INetworkPort AddPort(string name)
    {
        ArgumentException.ThrowIfNullOrEmpty(name);
        var port = new SwitchPort(this, name);
        lock (_lock)
            Volatile.Write(ref _ports, [.. _ports, port]);
        return port;
    }

    private void Remove(SwitchPort port)
    {
        lock (_lock)
        {
            _stations.Forget(port);
            Volatile.Write(ref _ports, [.. _ports.Where(other => other != port)]);
        }
    }

    /// <summary>Passes a frame on.</summary>
    /// <returns>False if it is one that no switch passes on.</returns>
    private bool Forward(NetworkFrame frame, SwitchPort from)
    {
        MacAddress source = frame.Source;
        MacAddress destination = frame.Destination;
        if (!source.IsStation || destination.IsLinkLocal)
            return false;
        SwitchPort? known;
        lock (_lock)
        {
            // A frame that is on its way while its port is taken away teaches nothing.
            if (!from.IsRemoved)
                _ = _stations.Learn(source, from);
            known = destination.IsMulticast ? null : _stations.Find(destination);
        }

        if (known == from)
            return true;
        if (known != null)
        {
            known.Give(frame);
            return true;
        }

        _ = Interlocked.Increment(ref _flooded);
        foreach (SwitchPort port in Volatile.Read(ref _ports))
        {
            if (port != from)
                port.Give(frame);
        }

        return true;
    }

    private sealed class SwitchPort(NetworkSwitch owner, string name) : INetworkPort
    {
        private readonly PortCounters _counters = new();
        private volatile IFrameReceiver? _peer;
        private volatile bool _removed;

        public string Name { get; } = name;

        public bool IsRemoved => _removed;

        public PortStatistics Statistics => _counters.Read();

        public FrameCapabilities Capabilities => new(AcceptedOffloads.All, NetworkFrame.MaximumLength);

        public void Connect(IFrameReceiver? peer) => _peer = peer;

        public void Receive(NetworkFrame frame)
        {
            ArgumentNullException.ThrowIfNull(frame);
            _counters.In(frame.Length);
            if (frame.Length < NetworkFrame.HeaderSize || _removed || !owner.Forward(frame, this))
                _counters.DropIn();
        }

        public void Give(NetworkFrame frame) => _counters.Out(FrameDelivery.Deliver(frame, _peer));

        public void Dispose()
        {
            _removed = true;
            _peer = null;
            owner.Remove(this);
        }
    }
}

/// <summary>The process's switches by name. A switch is there as long as it has ports.</summary>
public sealed class NetworkSwitches
{
    private readonly Lock _lock = new();
    private readonly Dictionary<string, NetworkSwitch> _switches = new(StringComparer.Ordinal);

    /// <summary>Those that there are, in the order of their names.</summary>
    public IReadOnlyList<NetworkSwitch> All
    {
        get
        {
            lock (_lock)
                return [.. _switches.Values.OrderBy(static item => item.Name, StringComparer.Ordinal)];
        }
    }

    /// <summary>Makes a port of the switch of a name, and the switch if there is none.</summary>
    public INetworkPort AddPort(string switchName, string portName)
    {
        lock (_lock)
        {
            if (!_switches.TryGetValue(switchName, out NetworkSwitch? found))
            {
                found = new NetworkSwitch(switchName);
                _switches.Add(switchName, found);
            }

            return new CountedPort(this, found, found.AddPort(portName));
        }
    }

    private void Removed(NetworkSwitch from, INetworkPort port)
    {
        lock (_lock)
        {
            port.Dispose();
            if (from.Ports.Count == 0)
                _ = _switches.Remove(from.Name);
        }
    }

    private sealed class CountedPort(NetworkSwitches owner, NetworkSwitch from, INetworkPort port) : INetworkPort
    {
        public string Name => port.Name;

        public FrameCapabilities Capabilities => port.Capabilities;

        public PortStatistics Statistics => port.Statistics;

        public void Connect(IFrameReceiver? peer) => port.Connect(peer);

        public void Receive(NetworkFrame frame) => port.Receive(frame);

        public void Dispose() => owner.Removed(from, port);
    }
}
