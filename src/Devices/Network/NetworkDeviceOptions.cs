// What a network interface of a guest is to be: a vif specification of xl, parsed.
namespace XenSharp.Devices.Network;

/// <summary>A network interface, as a <c>vif</c> entry of xl.cfg(5) describes one (xl-network-configuration(5)).</summary>
public sealed record NetworkDeviceOptions
{
    /// <summary>Bytes of a packet without an Ethernet header where nothing else is said.</summary>
    public const int DefaultMtu = 1500;

    /// <summary>The name of the bridge where nothing else is said, as of Xen 4.17.</summary>
    public const string DefaultBridge = "xenbr0";

    /// <summary>The device's number among the guest's; <see cref="NetworkBackend.NextId"/> gives the next one.</summary>
    public uint DeviceId { get; init; }

    /// <summary>The guest's address; null for a random one with Xen's prefix.</summary>
    public MacAddress? Mac { get; init; }

    /// <summary>The bridge: one of the host's, or else the switch of that name.</summary>
    public string Bridge { get; init; } = DefaultBridge;

    /// <summary>How much the guest may send; null for as much as it can.</summary>
    public TransmitRate? Rate { get; init; }

    /// <summary>The name of the interface on the host; null for "vifDOMID.DEVID".</summary>
    public string? InterfaceName { get; init; }

    /// <summary>Addresses of the guest, for who looks into the store; nothing is done with them.</summary>
    public string? Ip { get; init; }

    /// <summary>The hotplug script, for who looks into the store; none is run: what vif-bridge does is done here.</summary>
    public string Script { get; init; } = "/etc/xen/scripts/vif-bridge";

    /// <summary>Bytes of a packet without an Ethernet header, which the guest is told: 68 to 65535.</summary>
    public int Mtu { get; init; } = DefaultMtu;

    /// <summary>Whether the guest may trust the back end, which it is told.</summary>
    public bool Trusted { get; init; } = true;

    /// <summary>Queues that the guest may use at most: 1 to 64.</summary>
    public int MaximumQueues { get; init; } = Math.Clamp(Environment.ProcessorCount, 1, 8);
}
