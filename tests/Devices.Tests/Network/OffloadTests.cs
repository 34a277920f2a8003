// Checksums and segments done in software, against a slow reference.
using System.Buffers.Binary;
using CsCheck;
using XenSharp.Devices.Network;

namespace XenSharp.Devices.Tests.Network;

public sealed class OffloadTests
{
    private static readonly Gen<int> Versions = Gen.Bool.Select(static isNew => isNew ? 6 : 4);

    [Test]
    public void Sums_are_those_of_the_naive_way()
        => Gen.Byte.Array[0, 300].Sample(bytes => InternetChecksum.Fold(InternetChecksum.Add(bytes, 0)) == TestFrames.Sum([bytes]), iter: 3000);

    [Test]
    public void A_sum_of_64_KiB_of_ones_does_not_overflow()
    {
        byte[] bytes = new byte[65536];
        bytes.AsSpan().Fill(0xff);
        Assert.That(InternetChecksum.Fold(InternetChecksum.Add(bytes, ulong.MaxValue >> 16)), Is.EqualTo(0xffff));
    }

    [Test]
    public void Segments_are_the_packet_again()
        => Gen.Select(Versions, Gen.Byte.Array[1, 5000], Gen.Int[1, 1500], Gen.Int[0, 10], Gen.Byte, Gen.UInt, Gen.Int[0, 2])
            .Sample((version, payload, size, options, flags, sequence, vlans) =>
            {
                size = Math.Max(size, (payload.Length / 1000) + 1);
                byte[] frame = TestFrames.Tcp(version, payload, options * 4, flags, sequence, vlans);
                var receiver = new Collector(AcceptedOffloads.None, Math.Min(frame.Length, frame.Length - payload.Length + size));
                NetworkFrame sent = TestFrames.ToFrame(frame, Cut(version, size, frame.Length - payload.Length, options * 4));
                FrameDelivery.Result result = FrameDelivery.Deliver(sent, receiver);
                sent.Release();

                int expected = (payload.Length + size - 1) / size;
                Assert.That(result, Is.EqualTo(new FrameDelivery.Result(expected, receiver.Frames.Sum(static item => item.Data.Length), false)));
                Assert.That(receiver.Frames, Has.Count.EqualTo(expected));
                int network = 14 + (vlans * 4);
                int header = frame.Length - payload.Length;
                int tcp = network + (version == 4 ? 20 : 40);
                Assert.That(receiver.Frames.SelectMany(item => item.Data[header..]), Is.EqualTo(payload));
                for (int i = 0; i < expected; i++)
                {
                    byte[] segment = receiver.Frames[i].Data;
                    Assert.That(receiver.Frames[i].Offload, Is.EqualTo(new FrameOffload { Checksum = ChecksumState.Validated }));
                    Assert.That(segment.Length - header, Is.EqualTo(i < expected - 1 ? size : payload.Length - (size * (expected - 1))));
                    Assert.That(TestFrames.HasRightChecksums(segment, vlans), Is.True);
                    Assert.That(BinaryPrimitives.ReadUInt32BigEndian(segment.AsSpan(tcp + 4)), Is.EqualTo(unchecked(sequence + (uint)(i * size))));
                    byte last = (byte)(i == expected - 1 ? 0x09 : 0);
                    byte first = (byte)(i == 0 ? 0x80 : 0);
                    Assert.That(segment[tcp + 13], Is.EqualTo(flags & (0x76 | last | first)), "FIN and PSH end the packet, CWR begins it");
                    if (version == 4)
                        Assert.That(BinaryPrimitives.ReadUInt16BigEndian(segment.AsSpan(network + 4)), Is.EqualTo((ushort)(0xfffe + i)));
                    Assert.That(segment.AsSpan(0, network).SequenceEqual(frame.AsSpan(0, network)), Is.True);
                    Assert.That(segment.AsSpan(tcp, 4).SequenceEqual(frame.AsSpan(tcp, 4)), Is.True);
                }
            }, iter: 400);

    [Test]
    public void A_blank_checksum_is_filled_in_for_those_that_need_it()
        => Gen.Select(Versions, Gen.Byte.Array[0, 3000], Gen.Bool).Sample((version, payload, isTcp) =>
        {
            byte[] frame = isTcp ? TestFrames.Tcp(version, payload) : TestFrames.Udp(version, payload);
            int field = isTcp ? 16 : 6;
            int transport = version == 4 ? 34 : 54;
            byte[] partial = [.. frame];

            // What a kernel leaves there: the pseudo header's sum.
            byte[] rest = partial[transport..];
            rest[field] = rest[field + 1] = 0;
            ushort whole = BinaryPrimitives.ReadUInt16BigEndian(frame.AsSpan(transport + field));
            int pseudo = (ushort)~whole - TestFrames.Sum([rest]);
            BinaryPrimitives.WriteUInt16BigEndian(partial.AsSpan(transport + field), (ushort)(pseudo < 0 ? pseudo - 1 : pseudo));
            var offload = new FrameOffload
            {
                Checksum = version == 4 ? ChecksumState.BlankIpv4 : ChecksumState.BlankIpv6,
                ChecksumStart = (ushort)transport,
                ChecksumOffset = (ushort)field,
            };

            var able = new Collector();
            var unable = new Collector(version == 4 ? AcceptedOffloads.All & ~AcceptedOffloads.BlankIpv4 : AcceptedOffloads.BlankIpv4);
            NetworkFrame sent = TestFrames.ToFrame(partial, offload);
            Assert.That(FrameDelivery.Deliver(sent, able), Is.EqualTo(new FrameDelivery.Result(1, frame.Length, false)));
            Assert.That(FrameDelivery.Deliver(sent, unable), Is.EqualTo(new FrameDelivery.Result(1, frame.Length, false)));
            sent.Release();
            Assert.That(able.Frames[0].Data, Is.EqualTo(partial), "others hold the frame as it is");
            Assert.That(able.Frames[0].Offload, Is.EqualTo(offload));
            Assert.That(TestFrames.HasRightChecksums(unable.Frames[0].Data), Is.True);
            Assert.That(unable.Frames[0].Offload.Checksum, Is.EqualTo(ChecksumState.Validated));
        }, iter: 500);

    [Test]
    public void What_is_too_long_is_dropped()
    {
        NetworkFrame frame = TestFrames.ToFrame(TestFrames.Plain(TestFrames.Bob, TestFrames.Alice, 1515));
        Assert.That(FrameDelivery.Deliver(frame, new Collector(maximumLength: 1514)).Dropped, Is.True);
        Assert.That(FrameDelivery.Deliver(frame, null).Dropped, Is.True);
        frame.Release();

        // Segments that would not fit either.
        byte[] tcp = TestFrames.Tcp(4, new byte[4000]);
        frame = TestFrames.ToFrame(tcp, Cut(4, 1461, 54, 0));
        Assert.That(FrameDelivery.Deliver(frame, new Collector(AcceptedOffloads.None, 1514)).Dropped, Is.True);
        frame.Release();
    }

    [Test]
    public void A_look_at_any_bytes_stays_within_them()
        => Gen.Select(Gen.Byte.Array[0, 120], Gen.Int[0, 4]).Sample((bytes, kind) =>
        {
            // Mostly headers that go on for a while.
            if (kind > 0 && bytes.Length > 20)
            {
                (bytes[12], bytes[13], bytes[14]) = kind switch
                {
                    1 => ((byte)0x08, (byte)0x00, (byte)(0x40 | (bytes[14] & 7))),
                    2 => ((byte)0x86, (byte)0xdd, (byte)0x60),
                    _ => ((byte)0x81, (byte)0x00, bytes[14]),
                };
                if (kind == 2)
                    bytes[20] = (byte)(bytes[20] % 3 * 43 % 61);
            }

            FrameHeaders headers = FrameHeaders.Parse(bytes);
            if (headers.IpVersion != 0)
                Assert.That(headers.NetworkOffset + (headers.IpVersion == 4 ? 20 : 40) <= headers.NetworkEnd && headers.NetworkEnd <= bytes.Length);
            if (headers.Transport != 0)
            {
                Assert.That(headers.PayloadOffset <= headers.NetworkEnd && headers.TransportOffset + headers.ChecksumOffset + 2 <= headers.PayloadOffset);
                _ = headers.PseudoHeaderSum(bytes);
            }

            if (bytes.Length >= 14)
                _ = FlowHash.Of(bytes);
        }, iter: 20_000);

    [Test]
    public void A_flow_stays_in_one_queue_and_flows_spread()
    {
        uint first = FlowHash.Of(TestFrames.Udp(4, [1, 2, 3]));
        Assert.That(FlowHash.Of(TestFrames.Udp(4, [9])), Is.EqualTo(first));
        var queues = new HashSet<uint>();
        for (ushort port = 1; port < 100; port++)
            queues.Add(FlowHash.Of(TestFrames.Udp(6, [], sourcePort: port)) % 8);
        Assert.That(queues, Has.Count.EqualTo(8));
    }

    [Test]
    public void Frames_that_claim_more_than_they_are_cannot_be_cut()
    {
        byte[] tcp = TestFrames.Tcp(4, new byte[3000]);
        Assert.That(CanCut(tcp, SegmentationKind.TcpV4, 1000), Is.True);
        Assert.That(CanCut(tcp, SegmentationKind.TcpV6, 1000), Is.False);
        Assert.That(CanCut(tcp, SegmentationKind.TcpV4, 1), Is.False, "three thousand segments of a byte");
        Assert.That(CanCut([.. tcp, 0], SegmentationKind.TcpV4, 1000), Is.False, "padding");
        Assert.That(CanCut(tcp[..^1], SegmentationKind.TcpV4, 1000), Is.False, "truncated");
        Assert.That(CanCut(TestFrames.Udp(4, new byte[3000]), SegmentationKind.TcpV4, 1000), Is.False);
        tcp[20] = 0x20;
        Assert.That(CanCut(tcp, SegmentationKind.TcpV4, 1000), Is.False, "a fragment");
    }

    private static bool CanCut(byte[] frame, SegmentationKind kind, int size)
        => TcpSegmenter.CanCut(FrameHeaders.Parse(frame), frame.Length, kind, size);

    internal static FrameOffload Cut(int version, int size, int header, int options) => new()
    {
        Checksum = version == 4 ? ChecksumState.BlankIpv4 : ChecksumState.BlankIpv6,
        ChecksumStart = (ushort)(header - 20 - options),
        ChecksumOffset = 16,
        Segmentation = version == 4 ? SegmentationKind.TcpV4 : SegmentationKind.TcpV6,
        SegmentSize = (ushort)size,
        HeaderLength = (ushort)header,
    };
}
