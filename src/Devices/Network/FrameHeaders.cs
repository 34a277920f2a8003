// Where the headers of a frame are: Ethernet with VLAN tags, IPv4, IPv6 with extension headers, TCP and UDP.
using System.Buffers.Binary;

namespace XenSharp.Devices.Network;

/// <summary>
/// What a look at a frame's headers finds. Nothing in a frame is believed: an offset that is given here lies within it, with the
/// shortest header of what is there.
/// </summary>
internal readonly struct FrameHeaders
{
    public const byte Tcp = 6;
    public const byte Udp = 17;

    public const int TcpChecksumOffset = 16;
    public const int UdpChecksumOffset = 6;

    private const ushort EtherTypeIpv4 = 0x0800;
    private const ushort EtherTypeIpv6 = 0x86dd;
    private const ushort EtherTypeVlan = 0x8100;
    private const ushort EtherTypeServiceVlan = 0x88a8;

    private const int Ipv6HeaderSize = 40;
    private const int TcpHeaderSize = 20;
    private const int UdpHeaderSize = 8;

    /// <summary>A guest can send any number of extension headers in 64 KiB; nobody sends more than these.</summary>
    private const int MaximumExtensions = 8;

    /// <summary>4 or 6; 0 for a frame that is neither, or whose header is not whole.</summary>
    public int IpVersion { get; private init; }

    /// <summary>Where the IP header begins.</summary>
    public int NetworkOffset { get; private init; }

    /// <summary>Where the IP packet ends by its own header, at most where the frame does.</summary>
    public int NetworkEnd { get; private init; }

    /// <summary>Whether the IP header says that the packet is longer than the frame.</summary>
    public bool IsTruncated { get; private init; }

    /// <summary>Whether it is a part of a packet, so that there is no transport header to look at.</summary>
    public bool IsFragment { get; private init; }

    /// <summary><see cref="Tcp"/> or <see cref="Udp"/>, where its header is whole and it is no fragment; else 0.</summary>
    public byte Transport { get; private init; }

    /// <summary>Where the transport header begins, if there is <see cref="Transport"/>.</summary>
    public int TransportOffset { get; private init; }

    /// <summary>Where the TCP or UDP header with its options ends, if there is <see cref="Transport"/>.</summary>
    public int PayloadOffset { get; private init; }

    /// <summary>Where the transport's checksum is, from <see cref="TransportOffset"/>.</summary>
    public int ChecksumOffset => Transport == Tcp ? TcpChecksumOffset : UdpChecksumOffset;

    /// <summary>Looks at a frame.</summary>
    public static FrameHeaders Parse(ReadOnlySpan<byte> frame)
    {
        int offset = NetworkFrame.HeaderSize;
        if (frame.Length < offset)
            return default;
        ushort type = BinaryPrimitives.ReadUInt16BigEndian(frame[(offset - 2)..]);
        for (int tags = 0; tags < 2 && type is EtherTypeVlan or EtherTypeServiceVlan; tags++)
        {
            if (frame.Length < offset + 4)
                return default;
            type = BinaryPrimitives.ReadUInt16BigEndian(frame[(offset + 2)..]);
            offset += 4;
        }

        return type switch
        {
            EtherTypeIpv4 => ParseIpv4(frame, offset),
            EtherTypeIpv6 => ParseIpv6(frame, offset),
            _ => default,
        };
    }

    /// <summary>The ones' complement sum of the pseudo header of TCP or UDP (RFC 793, RFC 8200), folded.</summary>
    public ushort PseudoHeaderSum(ReadOnlySpan<byte> frame)
    {
        int addresses = IpVersion == 4 ? 12 : 8;
        int length = NetworkEnd - TransportOffset;
        ulong sum = InternetChecksum.Add(frame.Slice(NetworkOffset + addresses, IpVersion == 4 ? 8 : 32), (ulong)Transport + (uint)length);
        return InternetChecksum.Fold(sum);
    }

    private static FrameHeaders ParseIpv4(ReadOnlySpan<byte> frame, int offset)
    {
        ReadOnlySpan<byte> header = frame[offset..];
        if (header.Length < 20 || header[0] >> 4 != 4)
            return default;
        int headerLength = (header[0] & 0xf) * 4;
        int total = BinaryPrimitives.ReadUInt16BigEndian(header[2..]);
        if (headerLength < 20 || headerLength > header.Length || total < headerLength)
            return default;
        var found = new FrameHeaders
        {
            IpVersion = 4,
            NetworkOffset = offset,
            NetworkEnd = offset + Math.Min(total, header.Length),
            IsTruncated = total > header.Length,

            // "More fragments", or an offset.
            IsFragment = (BinaryPrimitives.ReadUInt16BigEndian(header[6..]) & 0x3fff) != 0,
        };
        return found.WithTransport(frame, header[9], offset + headerLength);
    }

    private static FrameHeaders ParseIpv6(ReadOnlySpan<byte> frame, int offset)
    {
        const byte HopByHop = 0, Routing = 43, Fragment = 44, Authentication = 51, DestinationOptions = 60;

        ReadOnlySpan<byte> header = frame[offset..];
        if (header.Length < Ipv6HeaderSize || header[0] >> 4 != 6)
            return default;
        int total = Ipv6HeaderSize + BinaryPrimitives.ReadUInt16BigEndian(header[4..]);
        var found = new FrameHeaders
        {
            IpVersion = 6,
            NetworkOffset = offset,
            NetworkEnd = offset + Math.Min(total, header.Length),
            IsTruncated = total > header.Length,
        };
        byte next = header[6];
        int at = offset + Ipv6HeaderSize;
        for (int extensions = 0; extensions <= MaximumExtensions && at + 8 <= found.NetworkEnd; extensions++)
        {
            switch (next)
            {
                case HopByHop or Routing or DestinationOptions:
                    next = frame[at];
                    at += (frame[at + 1] + 1) * 8;
                    break;
                case Authentication:
                    next = frame[at];
                    at += (frame[at + 1] + 2) * 4;
                    break;
                case Fragment:
                    return found with { IsFragment = true };
                default:
                    return found.WithTransport(frame, next, at);
            }
        }

        return found;
    }

    private FrameHeaders WithTransport(ReadOnlySpan<byte> frame, byte protocol, int offset)
    {
        int room = NetworkEnd - offset;
        if (IsFragment)
            return this;
        if (protocol == Udp && room >= UdpHeaderSize)
            return this with { Transport = Udp, TransportOffset = offset, PayloadOffset = offset + UdpHeaderSize };
        if (protocol == Tcp && room >= TcpHeaderSize)
        {
            int length = (frame[offset + 12] >> 4) * 4;
            if (length >= TcpHeaderSize && length <= room)
                return this with { Transport = Tcp, TransportOffset = offset, PayloadOffset = offset + length };
        }

        return this;
    }
}
