// Which of a guest's queues a frame goes to.
namespace XenSharp.Devices.Network;

/// <summary>Hashes what all frames of a flow have in common, so that they stay in order in one queue.</summary>
internal static class FlowHash
{
    /// <summary>The same number for all frames of a TCP or UDP flow; for all others between two hosts; for all that are not IP between two stations.</summary>
    public static uint Of(ReadOnlySpan<byte> frame)
    {
        FrameHeaders headers = FrameHeaders.Parse(frame);
        var hash = default(HashCode);
        if (headers.IpVersion == 0)
            hash.AddBytes(frame[..(2 * MacAddress.Size)]);
        else if (headers.IpVersion == 4)
            hash.AddBytes(frame.Slice(headers.NetworkOffset + 12, 8));
        else
            hash.AddBytes(frame.Slice(headers.NetworkOffset + 8, 32));
        if (headers.Transport != 0)
            hash.AddBytes(frame.Slice(headers.TransportOffset, 4));
        return (uint)hash.ToHashCode();
    }
}
