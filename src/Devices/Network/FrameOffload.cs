// What is left to do on a frame that one side would have others do: checksums to fill in, segments to cut.
namespace XenSharp.Devices.Network;

/// <summary>Protocols that a frame is to be cut by into segments.</summary>
public enum SegmentationKind : byte
{
    /// <summary>It is one frame.</summary>
    None,

    /// <summary>TCP over IPv4 (XEN_NETIF_GSO_TYPE_TCPV4, VIRTIO_NET_HDR_GSO_TCPV4).</summary>
    TcpV4,

    /// <summary>TCP over IPv6 (XEN_NETIF_GSO_TYPE_TCPV6, VIRTIO_NET_HDR_GSO_TCPV6).</summary>
    TcpV6,
}

/// <summary>What is known of a frame's transport checksum.</summary>
public enum ChecksumState : byte
{
    /// <summary>Nothing: whoever wants to know computes it.</summary>
    Unknown,

    /// <summary>It was checked, or never left this host: nobody need look at it.</summary>
    Validated,

    /// <summary>TCP or UDP over IPv4: the field holds the sum of the pseudo header, and the rest is to be added.</summary>
    BlankIpv4,

    /// <summary>The same over IPv6.</summary>
    BlankIpv6,

    /// <summary>The same of a protocol that netif.h has no word for; Linux's kernel understands it on a TAP device.</summary>
    BlankOther,
}

/// <summary>
/// What is left to do on a frame: the common part of netif.h's flags and extra infos and of <c>struct virtio_net_hdr</c>.
/// </summary>
public readonly record struct FrameOffload
{
    public ChecksumState Checksum { get; init; }

    public SegmentationKind Segmentation { get; init; }

    /// <summary>First byte that a blank checksum covers, from the start of the frame.</summary>
    public ushort ChecksumStart { get; init; }

    /// <summary>Where the 16-bit field is, from <see cref="ChecksumStart"/>.</summary>
    public ushort ChecksumOffset { get; init; }

    /// <summary>Bytes of payload of each segment but the last; not 0 where there is <see cref="Segmentation"/>.</summary>
    public ushort SegmentSize { get; init; }

    /// <summary>Bytes of all headers before the payload that is cut; only where there is <see cref="Segmentation"/>.</summary>
    public ushort HeaderLength { get; init; }

    /// <summary>Whether the checksum field holds only a part.</summary>
    public bool IsBlank => Checksum >= ChecksumState.BlankIpv4;
}

/// <summary>What a receiver of frames takes as it is.</summary>
[Flags]
public enum AcceptedOffloads
{
    None = 0,

    /// <summary><see cref="ChecksumState.BlankIpv4"/>.</summary>
    BlankIpv4 = 1 << 0,

    /// <summary><see cref="ChecksumState.BlankIpv6"/>.</summary>
    BlankIpv6 = 1 << 1,

    /// <summary><see cref="ChecksumState.BlankOther"/>.</summary>
    BlankOther = 1 << 2,

    /// <summary><see cref="SegmentationKind.TcpV4"/>.</summary>
    TcpV4 = 1 << 3,

    /// <summary><see cref="SegmentationKind.TcpV6"/>.</summary>
    TcpV6 = 1 << 4,

    All = BlankIpv4 | BlankIpv6 | BlankOther | TcpV4 | TcpV6,
}

/// <summary>What a receiver can take.</summary>
/// <param name="Offloads">What need not be done before.</param>
/// <param name="MaximumLength">The longest frame, in bytes with the Ethernet header.</param>
public readonly record struct FrameCapabilities(AcceptedOffloads Offloads, int MaximumLength)
{
    /// <summary>Whether a frame can be given as it is.</summary>
    public bool Cover(in FrameOffload offload, int length)
        => length <= MaximumLength && (Offloads & NeededFor(offload)) == NeededFor(offload);

    private static AcceptedOffloads NeededFor(in FrameOffload offload)
    {
        AcceptedOffloads needed = offload.Checksum switch
        {
            ChecksumState.BlankIpv4 => AcceptedOffloads.BlankIpv4,
            ChecksumState.BlankIpv6 => AcceptedOffloads.BlankIpv6,
            ChecksumState.BlankOther => AcceptedOffloads.BlankOther,
            _ => AcceptedOffloads.None,
        };
        return needed | offload.Segmentation switch
        {
            SegmentationKind.TcpV4 => AcceptedOffloads.TcpV4,
            SegmentationKind.TcpV6 => AcceptedOffloads.TcpV6,
            _ => AcceptedOffloads.None,
        };
    }
}
