// What is counted of a vif's traffic.
namespace XenSharp.Devices.Network;

/// <summary>What went through a network interface since it was attached. Directions are the guest's.</summary>
/// <param name="TransmittedFrames">Frames that the guest sent; one that is to be cut counts as one.</param>
/// <param name="TransmittedBytes">Bytes of those.</param>
/// <param name="TransmitDrops">Frames of those that went nowhere, for nobody took them.</param>
/// <param name="TransmitErrors">Requests of the guest that made no sense, or named pages that cannot be read.</param>
/// <param name="ReceivedFrames">Frames that the guest was given.</param>
/// <param name="ReceivedBytes">Bytes of those.</param>
/// <param name="ReceiveDrops">Frames for the guest that had to be dropped: it is not connected, or too slow, or wants no such.</param>
/// <param name="ReceiveErrors">Frames that the guest was given without their contents, for its pages cannot be written to.</param>
/// <param name="GrantCopies">Copies from and to the guest's pages, for frames that came through.</param>
/// <param name="Notifications">Events that were sent to the guest.</param>
public readonly record struct NetworkDeviceStatistics(
    long TransmittedFrames, long TransmittedBytes, long TransmitDrops, long TransmitErrors,
    long ReceivedFrames, long ReceivedBytes, long ReceiveDrops, long ReceiveErrors,
    long GrantCopies, long Notifications);

/// <summary>Counts <see cref="NetworkDeviceStatistics"/>; the queues of a vif, and its connections one after the other, share one.</summary>
internal sealed class VifCounters
{
    private long _transmittedFrames;
    private long _transmittedBytes;
    private long _transmitDrops;
    private long _transmitErrors;
    private long _receivedFrames;
    private long _receivedBytes;
    private long _receiveDrops;
    private long _receiveErrors;
    private long _grantCopies;
    private long _notifications;

    public NetworkDeviceStatistics Read() => new(
        Volatile.Read(ref _transmittedFrames), Volatile.Read(ref _transmittedBytes),
        Volatile.Read(ref _transmitDrops), Volatile.Read(ref _transmitErrors),
        Volatile.Read(ref _receivedFrames), Volatile.Read(ref _receivedBytes),
        Volatile.Read(ref _receiveDrops), Volatile.Read(ref _receiveErrors),
        Volatile.Read(ref _grantCopies), Volatile.Read(ref _notifications));

    public void Transmitted(int bytes, int copies, bool dropped)
    {
        _ = Interlocked.Increment(ref _transmittedFrames);
        _ = Interlocked.Add(ref _transmittedBytes, bytes);
        _ = Interlocked.Add(ref _grantCopies, copies);
        if (dropped)
            _ = Interlocked.Increment(ref _transmitDrops);
    }

    public void TransmitFailed() => _ = Interlocked.Increment(ref _transmitErrors);

    public void Received(int bytes, int copies, bool failed)
    {
        _ = Interlocked.Increment(ref _receivedFrames);
        _ = Interlocked.Add(ref _receivedBytes, bytes);
        _ = Interlocked.Add(ref _grantCopies, copies);
        if (failed)
            _ = Interlocked.Increment(ref _receiveErrors);
    }

    public void ReceiveDropped() => _ = Interlocked.Increment(ref _receiveDrops);

    public void Notified() => _ = Interlocked.Increment(ref _notifications);
}
