// What a block device has done, as Xen's tools count it.
namespace XenSharp.Devices.Block;

/// <summary>Counts since the device was made (oo_req, rd_req, wr_req, … of xen-blkback's statistics).</summary>
public sealed record BlockStatistics
{
    public long ReadRequests { get; init; }

    public long ReadBytes { get; init; }

    public long WriteRequests { get; init; }

    public long WrittenBytes { get; init; }

    /// <summary>Flushes, and barriers too.</summary>
    public long FlushRequests { get; init; }

    public long DiscardRequests { get; init; }

    /// <summary>Requests that failed: because they made no sense, or because of the image.</summary>
    public long Errors { get; init; }

    /// <summary>Times that the guest was notified.</summary>
    public long Notifications { get; init; }

    /// <summary>Times that the guest has notified the back end, those that came together counted once.</summary>
    public long Wakeups { get; init; }
}

/// <summary>The running counts behind <see cref="BlockStatistics"/>; any thread may add to them.</summary>
internal sealed class BlockCounters
{
    private long _readRequests;
    private long _readBytes;
    private long _writeRequests;
    private long _writtenBytes;
    private long _flushes;
    private long _discards;
    private long _errors;
    private long _notifications;
    private long _wakeups;

    internal void Count(BlkifOperation operation, ulong bytes)
    {
        switch (operation)
        {
            case BlkifOperation.Read:
                _ = Interlocked.Increment(ref _readRequests);
                _ = Interlocked.Add(ref _readBytes, (long)bytes);
                break;
            case BlkifOperation.Write:
                _ = Interlocked.Increment(ref _writeRequests);
                _ = Interlocked.Add(ref _writtenBytes, (long)bytes);
                break;
            case BlkifOperation.FlushDiskCache or BlkifOperation.WriteBarrier:
                _ = Interlocked.Increment(ref _flushes);
                _ = Interlocked.Add(ref _writtenBytes, (long)bytes);
                break;
            case BlkifOperation.Discard:
                _ = Interlocked.Increment(ref _discards);
                break;
        }
    }

    internal void CountError() => Interlocked.Increment(ref _errors);

    internal void CountNotification() => Interlocked.Increment(ref _notifications);

    internal void CountWakeup() => Interlocked.Increment(ref _wakeups);

    internal BlockStatistics Snapshot() => new()
    {
        ReadRequests = Volatile.Read(ref _readRequests),
        ReadBytes = Volatile.Read(ref _readBytes),
        WriteRequests = Volatile.Read(ref _writeRequests),
        WrittenBytes = Volatile.Read(ref _writtenBytes),
        FlushRequests = Volatile.Read(ref _flushes),
        DiscardRequests = Volatile.Read(ref _discards),
        Errors = Volatile.Read(ref _errors),
        Notifications = Volatile.Read(ref _notifications),
        Wakeups = Volatile.Read(ref _wakeups),
    };
}
