// Gives a frame to a receiver, after doing in software what the receiver cannot.
namespace XenSharp.Devices.Network;

/// <summary>The one way in which frames come to receivers.</summary>
internal static class FrameDelivery
{
    /// <summary>What became of a frame.</summary>
    /// <param name="Frames">Frames that were given: several if it was cut.</param>
    /// <param name="Bytes">Bytes of those.</param>
    /// <param name="Dropped">Whether it was not, or not all of it.</param>
    public readonly record struct Result(int Frames, int Bytes, bool Dropped);

    /// <summary>Gives a frame, which the caller goes on holding.</summary>
    /// <param name="frame">The frame.</param>
    /// <param name="receiver">Where to; null for nowhere.</param>
    public static Result Deliver(NetworkFrame frame, IFrameReceiver? receiver)
    {
        if (receiver == null)
            return new Result(0, 0, Dropped: true);
        FrameCapabilities capabilities = receiver.Capabilities;
        if (capabilities.Cover(frame.Offload, frame.Length))
        {
            receiver.Receive(frame);
            return new Result(1, frame.Length, Dropped: false);
        }

        return frame.Offload.Segmentation != SegmentationKind.None && !Takes(capabilities, frame.Offload.Segmentation, frame.Length)
            ? Cut(frame, receiver, capabilities)
            : Complete(frame, receiver, capabilities);
    }

    private static bool Takes(in FrameCapabilities capabilities, SegmentationKind kind, int length)
        => capabilities.Cover(new FrameOffload { Segmentation = kind }, length);

    private static Result Cut(NetworkFrame frame, IFrameReceiver receiver, in FrameCapabilities capabilities)
    {
        ReadOnlySpan<byte> data = frame.Data;
        FrameHeaders headers = FrameHeaders.Parse(data);
        int size = frame.Offload.SegmentSize;
        if (!TcpSegmenter.CanCut(headers, data.Length, frame.Offload.Segmentation, size)
            || Math.Min(headers.PayloadOffset + size, data.Length) > capabilities.MaximumLength)
            return new Result(0, 0, Dropped: true);

        int count = TcpSegmenter.SegmentCount(data.Length - headers.PayloadOffset, size);
        int bytes = 0;
        for (int i = 0; i < count; i++)
        {
            NetworkFrame segment = TcpSegmenter.Cut(data, headers, size, i, FramePool.Shared);
            bytes += segment.Length;
            receiver.Receive(segment);
            segment.Release();
        }

        return new Result(count, bytes, Dropped: false);
    }

    /// <summary>Fills in the checksum, in a copy: others may hold the frame.</summary>
    private static Result Complete(NetworkFrame frame, IFrameReceiver receiver, in FrameCapabilities capabilities)
    {
        FrameOffload offload = frame.Offload;

        // What is to be cut by the receiver is summed up by it, too: one that does not take the one cannot be given the other.
        if (frame.Length > capabilities.MaximumLength || offload.Segmentation != SegmentationKind.None)
            return offload.Segmentation != SegmentationKind.None ? Cut(frame, receiver, capabilities) : new Result(0, 0, Dropped: true);
        if (offload.ChecksumStart + offload.ChecksumOffset + sizeof(ushort) > frame.Length)
            return new Result(0, 0, Dropped: true);
        NetworkFrame copy = FramePool.Shared.Take(frame.Length);
        frame.Data.CopyTo(copy.Writable);
        InternetChecksum.Complete(copy.Writable[offload.ChecksumStart..], offload.ChecksumOffset);
        copy.Offload = new FrameOffload { Checksum = ChecksumState.Validated };
        receiver.Receive(copy);
        copy.Release();
        return new Result(1, frame.Length, Dropped: false);
    }
}
