// Where a vif's bridge= leads: into a bridge of the host, through a TAP device, or to a switch of this process.
namespace XenSharp.Devices.Network;

/// <summary>Makes the ports of network interfaces. Any thread.</summary>
public sealed class HostNetwork
{
    /// <summary>The switches of this process.</summary>
    public NetworkSwitches Switches { get; } = new();

    /// <summary>
    /// Makes the port that an interface asks for: where the host has an interface of the bridge's name, a TAP device in that bridge; else a
    /// port of this process's switch of that name, which needs no right on the host.
    /// </summary>
    /// <param name="bridge">The bridge's name.</param>
    /// <param name="interfaceName">The name of the TAP device, and of the switch's port (<see cref="NetworkBackend.InterfaceName"/>).</param>
    /// <param name="report">Takes a sentence for people if a TAP device is lost.</param>
    /// <exception cref="HostNetworkException">That cannot be done here; the message says why and what to do.</exception>
    public INetworkPort Open(string bridge, string interfaceName, Action<string>? report = null)
    {
        ArgumentException.ThrowIfNullOrEmpty(bridge);
        ArgumentException.ThrowIfNullOrEmpty(interfaceName);
        return HostInterface.IsName(bridge) && HostInterface.Exists(bridge)
            ? TapDevice.Open(interfaceName, bridge, report: report)
            : Switches.AddPort(bridge, interfaceName);
    }

    /// <summary>Gives the host an interface on a switch of this process, so that the host and the switch's guests reach each other.</summary>
    /// <param name="switchName">The switch.</param>
    /// <param name="interfaceName">The interface's name on the host.</param>
    /// <param name="persistent">Whether it stays when it is disposed.</param>
    /// <param name="report">Takes a sentence for people if the TAP device is lost.</param>
    /// <returns>Dispose it to take the interface away.</returns>
    /// <exception cref="HostNetworkException">That cannot be done here; the message says why and what to do.</exception>
    public IDisposable OpenHostInterface(string switchName, string interfaceName, bool persistent = false, Action<string>? report = null)
    {
        TapDevice device = TapDevice.Open(interfaceName, bridge: null, persistent, report);
        return new PortLink(device, Switches.AddPort(switchName, interfaceName));
    }
}

/// <summary>A cable between two ports: what comes out of one goes into the other.</summary>
public sealed class PortLink : IDisposable
{
    private readonly INetworkPort _first;
    private readonly INetworkPort _second;

    /// <summary>Joins two ports, which belong to the link from here on.</summary>
    public PortLink(INetworkPort first, INetworkPort second)
    {
        ArgumentNullException.ThrowIfNull(first);
        ArgumentNullException.ThrowIfNull(second);
        (_first, _second) = (first, second);
        first.Connect(second);
        second.Connect(first);
    }

    /// <summary>Takes both ports away.</summary>
    public void Dispose()
    {
        _first.Dispose();
        _second.Dispose();
    }
}
