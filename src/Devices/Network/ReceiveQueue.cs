// Puts frames for a guest into the pages of its receive ring.
using XenSharp.Core;
using XenSharp.Devices.Xenbus;
using XenSharp.Domains.Grants;

namespace XenSharp.Devices.Network;

/// <summary>
/// The back end of one receive ring, with the frames that wait for it. <see cref="TryEnqueue"/> is for any thread, the rest for one.
/// </summary>
internal sealed unsafe class ReceiveQueue
{
    /// <summary>Bytes of a slot.</summary>
    public const int SlotSize = 8;

    /// <summary>Frames that wait at most.</summary>
    public const int MaximumFrames = 1024;

    /// <summary>Memory that those have at most, in bytes: a guest that takes nothing costs no more.</summary>
    public const int MaximumMemory = 8 << 20;

    /// <summary>A frame that waited so long is of no use to anyone, in milliseconds (as netback's rx_drain_timeout_msecs).</summary>
    private const long MaximumWait = 10_000;

    private const int PageSize = 4096;

    private readonly Lock _lock = new();
    private readonly (NetworkFrame Frame, long Since)[] _waiting = new (NetworkFrame, long)[MaximumFrames];
    private readonly SharedRing<NetifRxRequest> _ring;
    private readonly IGrantCopier _grants;
    private readonly VifCounters _counters;
    private readonly TimeProvider _time;
    private int _first;
    private int _count;
    private int _memory;
    private bool _closed;

    /// <param name="page">The ring; has to stay mapped.</param>
    /// <param name="grants">The guest's grants.</param>
    /// <param name="counters">Counts.</param>
    /// <param name="time">The clock of waiting.</param>
    public ReceiveQueue(byte* page, IGrantCopier grants, VifCounters counters, TimeProvider time)
    {
        _ring = new SharedRing<NetifRxRequest>(page, SlotSize);
        (_grants, _counters, _time) = (grants, counters, time);
    }

    /// <summary>Whether frames wait.</summary>
    public bool HasFrames
    {
        get
        {
            lock (_lock)
                return _count != 0;
        }
    }

    /// <summary>Lets a frame wait for its turn.</summary>
    /// <returns>False if too many wait.</returns>
    public bool TryEnqueue(NetworkFrame frame)
    {
        long now = _time.GetTimestamp();
        lock (_lock)
        {
            if (_closed || _count == MaximumFrames || _memory + frame.Capacity > MaximumMemory)
                return false;
            frame.Hold();
            _waiting[(_first + _count++) % MaximumFrames] = (frame, now);
            _memory += frame.Capacity;
            return true;
        }
    }

    /// <summary>Takes no more frames, and lets go of those that wait.</summary>
    public void Close()
    {
        lock (_lock)
            _closed = true;
        while (Head() != null)
        {
            Drop();
            _counters.ReceiveDropped();
        }
    }

    /// <summary>Gives frames to the guest.</summary>
    /// <param name="budget">How many at most, before others have their turn.</param>
    /// <param name="channel">Tells the guest, if it wants to be told.</param>
    /// <returns><see cref="QueueStep.Idle"/> if there were no frames; <see cref="QueueStep.NoPages"/> if an event of the guest's was asked for.</returns>
    /// <exception cref="XenbusException">The guest has put something into the ring that no front end does.</exception>
    public QueueStep Process(int budget, IEventChannelBackend channel)
    {
        QueueStep step = QueueStep.More;
        for (int frames = 0; frames < budget; frames++)
        {
            NetworkFrame? frame = Head();
            if (frame == null || !HasRoom(SlotsOf(frame)))
            {
                step = frame == null ? QueueStep.Idle : QueueStep.NoPages;
                break;
            }

            Put(frame);
            Drop();
        }

        if (_ring.Publish())
        {
            _counters.Notified();
            channel.Notify();
        }

        return step;
    }

    private static uint SlotsOf(NetworkFrame frame)
        => (uint)((frame.Length + PageSize - 1) / PageSize) + (frame.Offload.Segmentation == SegmentationKind.None ? 0u : 1u);

    /// <summary>Whether there are so many pages; if not, the guest is asked to tell.</summary>
    private bool HasRoom(uint needed)
    {
        uint available;
        do
        {
            if (!_ring.TryCount(out available))
                throw new XenbusException(Errno.EINVAL, $"the receive ring says that there are {available} requests, but has {_ring.Size} slots");
            if (available >= needed)
                return true;
        }
        while (_ring.RequestEvent(available));
        return false;
    }

    /// <summary>The frame that is next, after those that are too old were dropped.</summary>
    private NetworkFrame? Head()
    {
        while (true)
        {
            lock (_lock)
            {
                if (_count == 0)
                    return null;
                if (_closed || _time.GetElapsedTime(_waiting[_first].Since).TotalMilliseconds < MaximumWait)
                    return _waiting[_first].Frame;
            }

            Drop();
            _counters.ReceiveDropped();
        }
    }

    private void Drop()
    {
        NetworkFrame frame;
        lock (_lock)
        {
            frame = _waiting[_first].Frame;
            _waiting[_first] = default;
            _first = (_first + 1) % MaximumFrames;
            _count--;
            _memory -= frame.Capacity;
        }

        frame.Release();
    }

    private void Put(NetworkFrame frame)
    {
        FrameOffload offload = frame.Offload;
        bool failed = false;
        int copies = 0;
        ReadOnlySpan<byte> rest = frame.Data;
        NetifRxFlags flags = (offload.IsBlank ? NetifRxFlags.ChecksumBlank | NetifRxFlags.DataValidated : 0)
            | (offload.Checksum == ChecksumState.Validated ? NetifRxFlags.DataValidated : 0)
            | (offload.Segmentation != SegmentationKind.None ? NetifRxFlags.ExtraInfo : 0);
        do
        {
            // Read before the response takes the place of it.
            NetifRxRequest request = _ring.Peek(_ring.Consumer);
            ReadOnlySpan<byte> part = rest[..Math.Min(rest.Length, PageSize)];
            rest = rest[part.Length..];
            copies++;
            GrantStatus status = _grants.CopyTo(request.Reference, 0, part);
            failed |= status != GrantStatus.Okay;
            Respond(new NetifRxResponse
            {
                Id = request.Id,
                Flags = flags | (rest.IsEmpty ? 0 : NetifRxFlags.MoreData),
                Status = status == GrantStatus.Okay ? (short)part.Length : (short)NetifStatus.Error,
            });
            if ((flags & NetifRxFlags.ExtraInfo) != 0)
                Respond(NetifExtraInfo.Segmentation(offload.Segmentation, offload.SegmentSize));
            flags = 0;
        }
        while (!rest.IsEmpty);
        _counters.Received(frame.Length, copies, failed);
    }

    private void Respond<T>(in T response)
        where T : unmanaged
    {
        _ring.Respond(response);
        _ring.Consume(1);
    }
}
