// What a switch has learnt: which station is behind which port.
namespace XenSharp.Devices.Network;

/// <summary>
/// Stations and their ports. Bounded as a whole and for each port, so that a guest that makes up addresses forgets only what is
/// its own. One thread at a time.
/// </summary>
/// <typeparam name="TPort">What a port is.</typeparam>
internal sealed class MacTable<TPort>
    where TPort : class
{
    /// <summary>Stations that are known behind one port at most.</summary>
    public const int StationsPerPort = 512;

    /// <summary>How long a station is known that says nothing: 300 seconds, as IEEE 802.1D recommends and Linux's bridge does.</summary>
    public static readonly TimeSpan Age = TimeSpan.FromSeconds(300);

    private static readonly TimeSpan ClearInterval = TimeSpan.FromSeconds(1);

    private readonly Dictionary<MacAddress, Entry> _stations = [];
    private readonly Dictionary<TPort, int> _counts = [];
    private readonly TimeProvider _time;
    private long _cleared;

    public MacTable(TimeProvider time) => _time = time;

    /// <summary>Stations that are known, the old ones among them that nobody has asked for since.</summary>
    public int Count => _stations.Count;

    /// <summary>A station has sent from a port: it is there from now on, wherever it was.</summary>
    /// <returns>False if the port has too many stations for one more.</returns>
    public bool Learn(MacAddress station, TPort port)
    {
        long now = _time.GetTimestamp();
        if (_stations.TryGetValue(station, out Entry? entry))
        {
            entry.Seen = now;
            if (entry.Port == port)
                return true;
            if (!MakeRoom(port))
                return false;
            CountOff(entry.Port);
            entry.Port = port;
        }
        else
        {
            if (!MakeRoom(port))
                return false;
            _stations.Add(station, new Entry { Port = port, Seen = now });
        }

        _counts[port] = _counts.GetValueOrDefault(port) + 1;
        return true;
    }

    /// <summary>Where a station is; null if that is not known, or not any more.</summary>
    public TPort? Find(MacAddress station)
    {
        if (!_stations.TryGetValue(station, out Entry? entry))
            return null;
        if (_time.GetElapsedTime(entry.Seen) <= Age)
            return entry.Port;
        _ = _stations.Remove(station);
        CountOff(entry.Port);
        return null;
    }

    /// <summary>Forgets the stations of a port that is gone.</summary>
    public void Forget(TPort port)
    {
        foreach ((MacAddress station, Entry entry) in _stations)
        {
            if (entry.Port == port)
                _ = _stations.Remove(station);
        }

        _ = _counts.Remove(port);
    }

    /// <summary>Sees to it that a port can have one more station: those that are old go, if there is no room.</summary>
    /// <remarks>Not for each frame: a guest that makes up addresses would have all of the table looked at each time.</remarks>
    private bool MakeRoom(TPort port)
    {
        if (_counts.GetValueOrDefault(port) < StationsPerPort)
            return true;
        if (_cleared != 0 && _time.GetElapsedTime(_cleared) < ClearInterval)
            return false;
        _cleared = _time.GetTimestamp();
        foreach ((MacAddress station, Entry entry) in _stations)
        {
            if (entry.Port != port || _time.GetElapsedTime(entry.Seen) <= Age)
                continue;
            _ = _stations.Remove(station);
            CountOff(port);
        }

        return _counts[port] < StationsPerPort;
    }

    private void CountOff(TPort port) => _counts[port]--;

    private sealed class Entry
    {
        public required TPort Port { get; set; }

        public required long Seen { get; set; }
    }
}
