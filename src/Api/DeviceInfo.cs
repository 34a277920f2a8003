// What the daemon says of a domain's devices: what xl block-list, network-list and channel-list show.

namespace XenSharp.Api;

/// <summary>A device to be plugged in.</summary>
public sealed record AttachDeviceRequest
{
    /// <summary>
    /// What xl takes: for disks xl-disk-configuration(5), as "/images/a.img,raw,xvdb,w"; for interfaces xl-network-configuration(5), as
    /// "mac=00:16:3e:00:00:01,bridge=lan". The parts may be given one by one, as xl's arguments are.
    /// </summary>
    public IReadOnlyList<string> Specification
    {
        get => field ?? [];
        init;
    }

    /// <summary>The folder that relative names of files start from; must be absolute. Null: names of files must be absolute.</summary>
    public string? Folder { get; init; }
}

/// <summary>What every device says of its front end and its back end.</summary>
public abstract record FrontEndInfo
{
    /// <summary>The domain of the back end: 0, the host.</summary>
    public int BackendId { get; init; }

    /// <summary>The front end's state (XenbusState of xen/include/public/io/xenbus.h: 4 is connected); 0 where it says none.</summary>
    public int State { get; init; }

    /// <summary>The guest's event channel port; null while it is not connected.</summary>
    public long? EventChannel { get; init; }

    /// <summary>Its folder in xenstore.</summary>
    public string BackendPath { get; init; } = string.Empty;
}

/// <summary>One block device: a row of xl block-list.</summary>
public sealed record BlockDeviceInfo : FrontEndInfo
{
    /// <summary>Its number (51712 for xvda).</summary>
    public required int VirtualDevice { get; init; }

    /// <summary>Its name in the guest ("xvda").</summary>
    public required string Name { get; init; }

    /// <summary>The grant of its ring's first page; null while it is not connected.</summary>
    public long? RingReference { get; init; }

    /// <summary>The image's file or device; empty for a drive without a medium.</summary>
    public string Target { get; init; } = string.Empty;

    /// <summary>The image's format ("raw", "qcow2").</summary>
    public string Format { get; init; } = string.Empty;

    public bool ReadOnly { get; init; }

    public bool CdRom { get; init; }

    /// <summary>Requests to read, by now.</summary>
    public ulong Reads { get; init; }

    /// <summary>Requests to write.</summary>
    public ulong Writes { get; init; }

    /// <summary>Requests to flush.</summary>
    public ulong Flushes { get; init; }

    /// <summary>Bytes read.</summary>
    public ulong BytesRead { get; init; }

    /// <summary>Bytes written.</summary>
    public ulong BytesWritten { get; init; }

    /// <summary>Requests that failed.</summary>
    public ulong Errors { get; init; }
}

/// <summary>One channel, a further console with a name: a row of xl channel-list.</summary>
public sealed record ChannelInfo : FrontEndInfo
{
    /// <summary>Its number among the guest's consoles, from 1 on; channel-list's index is one less.</summary>
    public required int DeviceId { get; init; }

    /// <summary>What the guest finds it by.</summary>
    public required string Name { get; init; }

    /// <summary>The grant of its ring's page; null while it is not connected.</summary>
    public long? RingReference { get; init; }

    /// <summary>What it leads to on the host: "pty" or "socket".</summary>
    public required string Connection { get; init; }

    /// <summary>The path of that terminal or socket.</summary>
    public string? Path { get; init; }
}

/// <summary>One network interface: a row of xl network-list.</summary>
public sealed record NetworkDeviceInfo : FrontEndInfo
{
    /// <summary>Its index, from 0 on.</summary>
    public required int DeviceId { get; init; }

    /// <summary>The guest's address ("00:16:3e:00:00:01").</summary>
    public required string Mac { get; init; }

    /// <summary>The grant of the ring that the guest sends with; null while it is not connected.</summary>
    public long? TransmitRingReference { get; init; }

    /// <summary>The grant of the ring that the guest receives with; null while it is not connected.</summary>
    public long? ReceiveRingReference { get; init; }

    /// <summary>The switch or the host's bridge that it is on.</summary>
    public string Bridge { get; init; } = string.Empty;

    /// <summary>The host's end, where it is a device of the host's ("vif1.0").</summary>
    public string? HostInterface { get; init; }

    /// <summary>Packets that the guest has sent.</summary>
    public ulong PacketsSent { get; init; }

    /// <summary>Packets that the guest has received.</summary>
    public ulong PacketsReceived { get; init; }

    /// <summary>Bytes that the guest has sent.</summary>
    public ulong BytesSent { get; init; }

    /// <summary>Bytes that the guest has received.</summary>
    public ulong BytesReceived { get; init; }

    /// <summary>Packets that were dropped, either way.</summary>
    public ulong Dropped { get; init; }
}
