// The small interface between what makes frames and what takes them: a vif, a switch's port, a TAP device.
namespace XenSharp.Devices.Network;

/// <summary>Takes frames. Any thread may give them, several at a time.</summary>
public interface IFrameReceiver
{
    /// <summary>What it takes as it is; may change at any time, and what it is given afterwards by mistake it drops.</summary>
    FrameCapabilities Capabilities { get; }

    /// <summary>
    /// Takes a frame that its capabilities cover, or drops it with a count. Never waits. The giver still holds the frame: a receiver
    /// that keeps it holds it for itself.
    /// </summary>
    void Receive(NetworkFrame frame);
}

/// <summary>
/// A place where a network interface is plugged in. What is received goes out to the world; what comes from there goes to the peer.
/// </summary>
public interface INetworkPort : IFrameReceiver, IDisposable
{
    /// <summary>What people know it by.</summary>
    string Name { get; }

    /// <summary>Says where frames from the world go from now on, instead of to an earlier one; null for nowhere.</summary>
    void Connect(IFrameReceiver? peer);

    /// <summary>What went through it so far.</summary>
    PortStatistics Statistics { get; }
}

/// <summary>What went through a port since it was made.</summary>
/// <param name="FramesIn">Frames that were given to the port, from the interface that is plugged in.</param>
/// <param name="BytesIn">Bytes of those.</param>
/// <param name="DropsIn">Frames among them that went nowhere.</param>
/// <param name="FramesOut">Frames that the port gave to the interface.</param>
/// <param name="BytesOut">Bytes of those.</param>
/// <param name="DropsOut">Frames that the port had for the interface, and did not give: there was none, or it takes no such frames.</param>
public readonly record struct PortStatistics(long FramesIn, long BytesIn, long DropsIn, long FramesOut, long BytesOut, long DropsOut);

/// <summary>Counts what <see cref="PortStatistics"/> says. Any thread.</summary>
internal sealed class PortCounters
{
    private long _framesIn;
    private long _bytesIn;
    private long _dropsIn;
    private long _framesOut;
    private long _bytesOut;
    private long _dropsOut;

    public PortStatistics Read() => new(
        Volatile.Read(ref _framesIn), Volatile.Read(ref _bytesIn), Volatile.Read(ref _dropsIn),
        Volatile.Read(ref _framesOut), Volatile.Read(ref _bytesOut), Volatile.Read(ref _dropsOut));

    public void In(int bytes)
    {
        _ = Interlocked.Increment(ref _framesIn);
        _ = Interlocked.Add(ref _bytesIn, bytes);
    }

    public void DropIn() => _ = Interlocked.Increment(ref _dropsIn);

    public void Out(in FrameDelivery.Result result)
    {
        if (result.Frames > 0)
        {
            _ = Interlocked.Add(ref _framesOut, result.Frames);
            _ = Interlocked.Add(ref _bytesOut, result.Bytes);
        }

        if (result.Dropped)
            _ = Interlocked.Increment(ref _dropsOut);
    }
}
