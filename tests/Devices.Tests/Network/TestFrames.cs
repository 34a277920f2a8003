// Frames for tests, and the checksums of RFC 1071 computed word by word.
using System.Buffers.Binary;
using XenSharp.Devices.Network;

namespace XenSharp.Devices.Tests.Network;

/// <summary>Builds frames, by the protocols' documents and with none of the back end's code.</summary>
internal static class TestFrames
{
    public static readonly MacAddress Alice = new(0x00163e_000001);
    public static readonly MacAddress Bob = new(0x00163e_000002);

    /// <summary>An Ethernet frame of no known protocol.</summary>
    public static byte[] Plain(MacAddress destination, MacAddress source, int length, byte fill = 0x5a)
    {
        byte[] frame = new byte[length];
        frame.AsSpan().Fill(fill);
        destination.Write(frame);
        source.Write(frame.AsSpan(6));
        frame[12] = 0x88;
        frame[13] = 0xb5;
        return frame;
    }

    /// <summary>A TCP segment with right checksums.</summary>
    public static byte[] Tcp(int version, byte[] payload, int options = 0, byte flags = 0x18, uint sequence = 1000, int vlans = 0)
    {
        int network = 14 + (vlans * 4);
        int transport = network + (version == 4 ? 20 : 40);
        int header = transport + 20 + options;
        byte[] frame = new byte[header + payload.Length];
        Ethernet(frame, version, vlans);
        Network(frame.AsSpan(network), version, protocol: 6);
        Span<byte> tcp = frame.AsSpan(transport);
        BinaryPrimitives.WriteUInt16BigEndian(tcp, 1234);
        BinaryPrimitives.WriteUInt16BigEndian(tcp[2..], 80);
        BinaryPrimitives.WriteUInt32BigEndian(tcp[4..], sequence);
        tcp[12] = (byte)((20 + options) / 4 << 4);
        tcp[13] = flags;
        tcp.Slice(20, options).Fill(1);
        payload.CopyTo(frame.AsSpan(header));
        SetTransportChecksum(frame, network, version, 6, 16);
        return frame;
    }

    /// <summary>A UDP datagram with right checksums.</summary>
    public static byte[] Udp(int version, byte[] payload, ushort sourcePort = 4000, ushort destinationPort = 53)
    {
        int transport = 14 + (version == 4 ? 20 : 40);
        byte[] frame = new byte[transport + 8 + payload.Length];
        Ethernet(frame, version, 0);
        Network(frame.AsSpan(14), version, protocol: 17);
        Span<byte> udp = frame.AsSpan(transport);
        BinaryPrimitives.WriteUInt16BigEndian(udp, sourcePort);
        BinaryPrimitives.WriteUInt16BigEndian(udp[2..], destinationPort);
        BinaryPrimitives.WriteUInt16BigEndian(udp[4..], (ushort)udp.Length);
        payload.CopyTo(udp[8..]);
        SetTransportChecksum(frame, 14, version, 17, 6);
        return frame;
    }

    /// <summary>The frame with nothing right in the field of its transport's checksum.</summary>
    public static byte[] Blank(byte[] frame, int version, int checksumOffset = 16, int vlans = 0)
    {
        byte[] blank = [.. frame];
        int at = 14 + (vlans * 4) + (version == 4 ? 20 : 40) + checksumOffset;
        blank[at] = 0xab;
        blank[at + 1] = 0xcd;
        return blank;
    }

    /// <summary>Whether the IP and the transport's checksum of a frame without VLAN tags are right.</summary>
    public static bool HasRightChecksums(ReadOnlySpan<byte> frame, int vlans = 0)
    {
        int network = 14 + (vlans * 4);
        bool isIpv4 = frame[network] >> 4 == 4;
        int protocol = isIpv4 ? frame[network + 9] : frame[network + 6];
        return (!isIpv4 || Sum(frame.Slice(network, 20)) == 0xffff)
            && Sum(PseudoHeader(frame, network, isIpv4 ? 4 : 6, protocol), frame[(network + (isIpv4 ? 20 : 40))..].ToArray()) == 0xffff;
    }

    public static NetworkFrame ToFrame(byte[] data, FrameOffload offload = default)
    {
        NetworkFrame frame = FramePool.Shared.Take(data.Length);
        data.CopyTo(frame.Writable);
        frame.Offload = offload;
        return frame;
    }

    private static void Ethernet(byte[] frame, int version, int vlans)
    {
        Bob.Write(frame);
        Alice.Write(frame.AsSpan(6));
        for (int i = 0; i < vlans; i++)
            BinaryPrimitives.WriteUInt32BigEndian(frame.AsSpan(12 + (i * 4)), 0x8100_0005);
        BinaryPrimitives.WriteUInt16BigEndian(frame.AsSpan(12 + (vlans * 4)), (ushort)(version == 4 ? 0x0800 : 0x86dd));
    }

    private static void Network(Span<byte> packet, int version, byte protocol)
    {
        if (version == 6)
        {
            packet[0] = 0x60;
            BinaryPrimitives.WriteUInt16BigEndian(packet[4..], (ushort)(packet.Length - 40));
            packet[6] = protocol;
            packet[7] = 64;
            for (int i = 8; i < 40; i++)
                packet[i] = (byte)i;
            return;
        }

        packet[0] = 0x45;
        BinaryPrimitives.WriteUInt16BigEndian(packet[2..], (ushort)packet.Length);
        BinaryPrimitives.WriteUInt16BigEndian(packet[4..], 0xfffe);
        packet[8] = 64;
        packet[9] = protocol;
        BinaryPrimitives.WriteUInt32BigEndian(packet[12..], 0x0a00_0001);
        BinaryPrimitives.WriteUInt32BigEndian(packet[16..], 0x0a00_0002);
        BinaryPrimitives.WriteUInt16BigEndian(packet[10..], (ushort)~Sum(packet[..20]));
    }

    private static void SetTransportChecksum(byte[] frame, int network, int version, int protocol, int offset)
    {
        int transport = network + (version == 4 ? 20 : 40);
        ushort sum = (ushort)~Sum(PseudoHeader(frame, network, version, protocol), frame[transport..]);
        BinaryPrimitives.WriteUInt16BigEndian(frame.AsSpan(transport + offset), sum == 0 ? (ushort)0xffff : sum);
    }

    private static byte[] PseudoHeader(ReadOnlySpan<byte> frame, int network, int version, int protocol)
    {
        int length = frame.Length - network - (version == 4 ? 20 : 40);
        byte[] tail = [0, (byte)protocol, (byte)(length >> 8), (byte)length];
        return [.. version == 4 ? frame.Slice(network + 12, 8) : frame.Slice(network + 8, 32), .. tail];
    }

    /// <summary>The sum of all, each part beginning a word.</summary>
    public static ushort Sum(params byte[][] parts)
    {
        int sum = 0;
        foreach (byte[] part in parts)
        {
            for (int i = 0; i < part.Length; i += 2)
            {
                sum += (part[i] << 8) | (i + 1 < part.Length ? part[i + 1] : 0);
                sum = (sum & 0xffff) + (sum >> 16);
            }
        }

        return (ushort)sum;
    }

    private static ushort Sum(ReadOnlySpan<byte> bytes) => Sum([bytes.ToArray()]);
}

/// <summary>A receiver that keeps what it is given.</summary>
internal sealed class Collector(AcceptedOffloads offloads = AcceptedOffloads.All, int maximumLength = NetworkFrame.MaximumLength) : IFrameReceiver
{
    private readonly List<(byte[] Data, FrameOffload Offload)> _frames = [];

    public FrameCapabilities Capabilities { get; } = new(offloads, maximumLength);

    public IReadOnlyList<(byte[] Data, FrameOffload Offload)> Frames
    {
        get
        {
            lock (_frames)
                return [.. _frames];
        }
    }

    public void Receive(NetworkFrame frame)
    {
        Assert.That(Capabilities.Cover(frame.Offload, frame.Length), Is.True, "it is given only what it takes");
        lock (_frames)
            _frames.Add((frame.Data.ToArray(), frame.Offload));
    }

    public void Clear()
    {
        lock (_frames)
            _frames.Clear();
    }
}

/// <summary>A clock that a test sets.</summary>
internal sealed class ManualTime : TimeProvider
{
    private long _now = 1_000_000_000;

    public override long TimestampFrequency => TimeSpan.TicksPerSecond;

    public override long GetTimestamp() => Volatile.Read(ref _now);

    public void Advance(TimeSpan time) => Interlocked.Add(ref _now, time.Ticks);
}
