// Takes the frames that a guest sends out of its transmit ring.
using System.Buffers.Binary;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Devices.Xenbus;
using XenSharp.Domains.Grants;

namespace XenSharp.Devices.Network;

/// <summary>Where a queue stands after it was looked at.</summary>
internal enum QueueStep
{
    /// <summary>There is nothing to do; an event will say when there is.</summary>
    Idle,

    /// <summary>There may be more to do: others should have their turn, then it goes on.</summary>
    More,

    /// <summary>It can go on after a while.</summary>
    Later,

    /// <summary>There are frames for the guest, which has given no pages for them; an event will say when it has.</summary>
    NoPages,
}

/// <summary>
/// The back end of one transmit ring. One thread at a time. Which requests only cost the guest a frame and which end the connection is
/// as in Linux's netback.
/// </summary>
internal sealed unsafe class TransmitQueue
{
    /// <summary>Bytes of a slot: the request is longer than the response.</summary>
    public const int SlotSize = 12;

    /// <summary>
    /// Parts of a frame beyond the first that every back end has to take (XEN_NETIF_NR_SLOTS_MIN); a frame of more is dropped.
    /// </summary>
    private const int MaximumParts = 18;

    /// <summary>A guest that uses so many means harm (fatal_skb_slots).</summary>
    private const int FatalParts = 20;

    /// <summary>Slots that are answered together: the guest can fill them again while the others are looked at.</summary>
    private const int SlotsPerAnswer = 64;

    private const int PageSize = 4096;

    private readonly SharedRing<NetifTxRequest> _ring;
    private readonly IGrantCopier _grants;
    private readonly IFrameReceiver _world;
    private readonly TransmitLimit? _limit;
    private readonly MulticastFilter _groups;
    private readonly VifCounters _counters;
    private uint _unanswered;

    [StructLayout(LayoutKind.Sequential)]
    private struct Response
    {
        public ushort Id;
        public NetifStatus Status;
    }

    /// <summary>Parts of a frame beyond the first.</summary>
    [InlineArray(MaximumParts)]
    private struct Parts
    {
        private NetifTxRequest _first;
    }

    /// <param name="page">The ring; has to stay mapped.</param>
    /// <param name="grants">The guest's grants.</param>
    /// <param name="world">Where the frames go.</param>
    /// <param name="limit">How much the guest may send; null for as much as it can.</param>
    /// <param name="groups">Takes what the guest says of groups.</param>
    /// <param name="counters">Counts.</param>
    public TransmitQueue(
        byte* page, IGrantCopier grants, IFrameReceiver world, TransmitLimit? limit, MulticastFilter groups, VifCounters counters)
    {
        _ring = new SharedRing<NetifTxRequest>(page, SlotSize);
        (_grants, _world, _limit, _groups, _counters) = (grants, world, limit, groups, counters);
    }

    /// <summary>Takes frames out of the ring.</summary>
    /// <param name="budget">How many at most, before others have their turn.</param>
    /// <param name="channel">Tells the guest of the answers, if it wants to be told.</param>
    /// <param name="wait">With <see cref="QueueStep.Later"/>: how long.</param>
    /// <exception cref="XenbusException">The guest has put something into the ring that no front end does.</exception>
    public QueueStep Process(int budget, IEventChannelBackend channel, out TimeSpan wait)
    {
        wait = TimeSpan.Zero;
        QueueStep step = QueueStep.More;
        for (int frames = 0; frames < budget; frames++)
        {
            if (!_ring.TryCount(out uint available))
                throw Fatal($"the transmit ring says that there are {available} requests, but has {_ring.Size} slots");
            if (available == 0)
            {
                if (_ring.RequestEvent(0))
                    continue;
                step = QueueStep.Idle;
                break;
            }

            NetifTxRequest first = _ring.Peek(_ring.Consumer);
            if (_limit != null && !_limit.TryTake(first.Size, out wait))
            {
                step = QueueStep.Later;
                break;
            }

            uint before = _ring.Consumer;
            TakeFrame(first, available);
            _unanswered += _ring.Consumer - before;
            if (_unanswered >= SlotsPerAnswer)
                Answer(channel);
        }

        Answer(channel);
        return step;
    }

    private static XenbusException Fatal(string what) => new(Errno.EINVAL, what);

    private void Answer(IEventChannelBackend channel)
    {
        _unanswered = 0;
        if (!_ring.Publish())
            return;
        _counters.Notified();
        channel.Notify();
    }

    private void TakeFrame(NetifTxRequest first, uint available)
    {
        uint extras = 0;
        NetifExtraInfo segmentation = default;
        bool isMessage = false;
        bool accepted = true;
        for (bool more = (first.Flags & NetifTxFlags.ExtraInfo) != 0; more;)
        {
            if (++extras >= available)
                throw Fatal("a transmit request says that an extra info follows, and none does");
            var extra = new NetifExtraInfo(_ring.Peek<ulong>(_ring.Consumer + extras));
            more = extra.HasMore;
            switch (extra.Type)
            {
                case NetifExtraType.Segmentation:
                    segmentation = extra;
                    break;
                case NetifExtraType.MulticastAdd:
                    isMessage = true;
                    accepted &= extra.Address.IsMulticast && _groups.Add(extra.Address);
                    break;
                case NetifExtraType.MulticastDelete:
                    isMessage = true;
                    _groups.Delete(extra.Address);
                    break;
                case NetifExtraType.Hash:
                    // Of use to a back end that chooses by the front end's hashes; nothing was said of such.
                    break;
                default:
                    throw Fatal($"a transmit request has an extra info of type {(byte)extra.Type}");
            }
        }

        if (isMessage)
        {
            // No frame: the request only carries the extra info.
            Respond(first.Id, extras, accepted ? NetifStatus.Okay : NetifStatus.Error);
            _ring.Consume(1 + extras);
            return;
        }

        Parts parts = default;
        uint count = 0;
        int total = first.Size;
        bool sound = true;
        if ((first.Flags & NetifTxFlags.MoreData) != 0)
            count = ReadParts(ref first, available - 1 - extras, extras, ref parts, out sound);

        sound &= total >= NetworkFrame.HeaderSize;
        if (sound)
            CheckPage(first);
        if (sound && segmentation.Type != NetifExtraType.None)
            CheckSegmentation(segmentation);
        sound = sound && Send(first, parts, (int)count, total, segmentation);

        if (!sound)
            _counters.TransmitFailed();
        NetifStatus status = sound ? NetifStatus.Okay : NetifStatus.Error;
        Respond(first.Id, extras, status);
        for (uint i = 0; i < count; i++)
            Respond(i < MaximumParts ? parts[(int)i].Id : _ring.Peek(_ring.Consumer + 1 + extras + i).Id, 0, status);
        _ring.Consume(1 + extras + count);
    }

    /// <summary>Copies the requests of a frame's other parts, and makes the first one's size its own.</summary>
    /// <param name="first">The first request.</param>
    /// <param name="available">Slots that follow.</param>
    /// <param name="extras">Extra infos between the first request and the parts.</param>
    /// <param name="parts">Takes as many as a frame may have.</param>
    /// <param name="sound">Whether they make a frame.</param>
    /// <returns>How many there are.</returns>
    private uint ReadParts(ref NetifTxRequest first, uint available, uint extras, ref Parts parts, out bool sound)
    {
        sound = true;
        uint count = 0;
        NetifTxRequest part;
        do
        {
            if (count >= available)
                throw Fatal($"a frame has more parts than the {available} that are in the transmit ring");
            if (count >= FatalParts)
                throw Fatal($"a frame has more than {FatalParts} parts");
            part = _ring.Peek(_ring.Consumer + 1 + extras + count);
            CheckPage(part);

            // A front end that sends 64 KiB or more has its size wrap: no harm is meant, but there is no such frame.
            sound &= count < MaximumParts && part.Size <= first.Size;
            if (sound)
            {
                first.Size -= part.Size;
                parts[(int)count] = part;
            }

            count++;
        }
        while ((part.Flags & NetifTxFlags.MoreData) != 0);
        return count;
    }

    private static void CheckPage(in NetifTxRequest part)
    {
        if (part.Offset + part.Size > PageSize)
            throw Fatal($"a transmit request goes beyond its page: {part.Size} bytes from {part.Offset}");
    }

    private static void CheckSegmentation(NetifExtraInfo segmentation)
    {
        if (segmentation.SegmentSize == 0)
            throw Fatal("a frame is to be cut into segments of 0 bytes");
        if (segmentation.SegmentationType is not ((byte)SegmentationKind.TcpV4 or (byte)SegmentationKind.TcpV6))
            throw Fatal($"a frame is to be cut by the unknown type {segmentation.SegmentationType}");
    }

    /// <summary>Puts a frame together and sends it.</summary>
    /// <returns>False if it cannot be read, or is not what its flags say.</returns>
    private bool Send(in NetifTxRequest first, in Parts parts, int count, int total, NetifExtraInfo segmentation)
    {
        NetworkFrame frame = FramePool.Shared.Take(total);
        try
        {
            Span<byte> rest = frame.Writable;
            bool sound = Copy(first, ref rest);
            for (int i = 0; i < count && sound; i++)
                sound = Copy(parts[i], ref rest);
            if (!sound || !TrySetOffload(frame, first.Flags, segmentation))
                return false;

            bool taken = !FrameDelivery.Deliver(frame, _world).Dropped;
            _counters.Transmitted(total, 1 + count, dropped: !taken);
            return true;
        }
        finally
        {
            frame.Release();
        }
    }

    private bool Copy(in NetifTxRequest part, ref Span<byte> rest)
    {
        if (part.Size != 0 && _grants.CopyFrom(part.Reference, part.Offset, rest[..part.Size]) != GrantStatus.Okay)
            return false;
        rest = rest[part.Size..];
        return true;
    }

    /// <summary>Finds out what the flags mean for this frame: where the checksum is, and how it is to be cut.</summary>
    /// <returns>False if the frame is not such that there is a checksum, or that it can be cut so.</returns>
    private static bool TrySetOffload(NetworkFrame frame, NetifTxFlags flags, NetifExtraInfo segmentation)
    {
        // A frame that is to be cut has a blank checksum even where the guest forgot to say so.
        if ((flags & NetifTxFlags.ChecksumBlank) == 0 && segmentation.Type == NetifExtraType.None)
        {
            if ((flags & NetifTxFlags.DataValidated) != 0)
                frame.Offload = new FrameOffload { Checksum = ChecksumState.Validated };
            return true;
        }

        FrameHeaders headers = FrameHeaders.Parse(frame.Data);
        if (headers.Transport == 0 || headers.IsTruncated)
            return false;
        var kind = segmentation.Type == NetifExtraType.None ? SegmentationKind.None : (SegmentationKind)segmentation.SegmentationType;
        if (kind != SegmentationKind.None && !TcpSegmenter.CanCut(headers, frame.Length, kind, segmentation.SegmentSize))
            return false;
        if (frame.Length - headers.PayloadOffset <= segmentation.SegmentSize)
            kind = SegmentationKind.None;

        // What follows the packet is padding, which the checksum does not cover.
        frame.SetLength(headers.NetworkEnd);

        // The guest's word for the pseudo header's sum is not needed.
        BinaryPrimitives.WriteUInt16BigEndian(
            frame.Writable[(headers.TransportOffset + headers.ChecksumOffset)..], headers.PseudoHeaderSum(frame.Data));
        frame.Offload = new FrameOffload
        {
            Checksum = headers.IpVersion == 4 ? ChecksumState.BlankIpv4 : ChecksumState.BlankIpv6,
            ChecksumStart = (ushort)headers.TransportOffset,
            ChecksumOffset = (ushort)headers.ChecksumOffset,
            Segmentation = kind,
            SegmentSize = kind == SegmentationKind.None ? (ushort)0 : segmentation.SegmentSize,
            HeaderLength = kind == SegmentationKind.None ? (ushort)0 : (ushort)headers.PayloadOffset,
        };
        return true;
    }

    /// <summary>Answers a request, and says of the slots of its extra infos that they are none.</summary>
    private void Respond(ushort id, uint extras, NetifStatus status)
    {
        _ring.Respond(new Response { Id = id, Status = status });
        for (uint i = 0; i < extras; i++)
            _ring.Respond(new Response { Status = NetifStatus.Null });
    }
}
