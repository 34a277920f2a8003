// Cuts a TCP packet of up to 64 KiB into the segments that a network card would make of it.
using System.Buffers.Binary;

namespace XenSharp.Devices.Network;

/// <summary>Segmentation in software, for receivers that cannot do it.</summary>
internal static class TcpSegmenter
{
    /// <summary>
    /// Most segments of one frame. Linux makes none below 48 bytes, so that there are at most 1366; a frame that asks for more asks for work
    /// and not for transport.
    /// </summary>
    public const int MaximumSegments = 2048;

    private const int SequenceOffset = 4;
    private const int FlagsOffset = 13;
    private const byte Fin = 0x01;
    private const byte Push = 0x08;
    private const byte CongestionWindowReduced = 0x80;

    /// <summary>Whether a frame is what its offload says: TCP of the right IP version, whose lengths agree, in not too many segments.</summary>
    /// <param name="headers">A look at it.</param>
    /// <param name="length">The frame's length in bytes.</param>
    /// <param name="kind">How it is to be cut.</param>
    /// <param name="segmentSize">Payload of a segment in bytes.</param>
    public static bool CanCut(in FrameHeaders headers, int length, SegmentationKind kind, int segmentSize)
        => headers.Transport == FrameHeaders.Tcp
            && headers.IpVersion == (kind == SegmentationKind.TcpV4 ? 4 : 6)
            && !headers.IsTruncated
            && headers.NetworkEnd == length
            && segmentSize > 0
            && SegmentCount(length - headers.PayloadOffset, segmentSize) <= MaximumSegments;

    /// <summary>How many segments a payload makes, at least one.</summary>
    public static int SegmentCount(int payload, int segmentSize) => Math.Max(1, (payload + segmentSize - 1) / segmentSize);

    /// <summary>Makes one segment, with all its checksums.</summary>
    /// <param name="frame">The frame; <see cref="CanCut"/> has said that it can be cut.</param>
    /// <param name="headers">A look at it.</param>
    /// <param name="segmentSize">Payload of a segment in bytes.</param>
    /// <param name="index">Which segment, from 0.</param>
    /// <param name="pool">Where its buffer comes from.</param>
    /// <returns>A frame that the caller holds.</returns>
    public static NetworkFrame Cut(ReadOnlySpan<byte> frame, in FrameHeaders headers, int segmentSize, int index, FramePool pool)
    {
        int headerLength = headers.PayloadOffset;
        int start = index * segmentSize;
        int length = Math.Min(segmentSize, frame.Length - headerLength - start);
        bool last = headerLength + start + length == frame.Length;

        NetworkFrame segment = pool.Take(headerLength + length);
        Span<byte> data = segment.Writable;
        frame[..headerLength].CopyTo(data);
        frame.Slice(headerLength + start, length).CopyTo(data[headerLength..]);
        FixNetworkHeader(data, headers, index);
        FixTransportHeader(data, headers, start, index == 0, last);
        segment.Offload = new FrameOffload { Checksum = ChecksumState.Validated };
        return segment;
    }

    private static void FixNetworkHeader(Span<byte> data, in FrameHeaders headers, int index)
    {
        Span<byte> header = data[headers.NetworkOffset..];
        if (headers.IpVersion == 6)
        {
            BinaryPrimitives.WriteUInt16BigEndian(header[4..], (ushort)(header.Length - 40));
            return;
        }

        BinaryPrimitives.WriteUInt16BigEndian(header[2..], (ushort)header.Length);
        BinaryPrimitives.WriteUInt16BigEndian(header[4..], (ushort)(BinaryPrimitives.ReadUInt16BigEndian(header[4..]) + index));
        header[10] = 0;
        header[11] = 0;
        int headerLength = (header[0] & 0xf) * 4;
        BinaryPrimitives.WriteUInt16BigEndian(header[10..], (ushort)~InternetChecksum.Fold(InternetChecksum.Add(header[..headerLength], 0)));
    }

    private static void FixTransportHeader(Span<byte> data, in FrameHeaders headers, int start, bool first, bool last)
    {
        Span<byte> tcp = data[headers.TransportOffset..];
        BinaryPrimitives.WriteUInt32BigEndian(tcp[SequenceOffset..], BinaryPrimitives.ReadUInt32BigEndian(tcp[SequenceOffset..]) + (uint)start);
        if (!last)
            tcp[FlagsOffset] &= unchecked((byte)~(Fin | Push));
        if (!first)
            tcp[FlagsOffset] &= unchecked((byte)~CongestionWindowReduced);

        // Parsed anew, for the length in the pseudo header is the segment's.
        ushort pseudo = FrameHeaders.Parse(data).PseudoHeaderSum(data);
        BinaryPrimitives.WriteUInt16BigEndian(tcp[FrameHeaders.TcpChecksumOffset..], pseudo);
        InternetChecksum.Complete(tcp, FrameHeaders.TcpChecksumOffset);
    }
}
