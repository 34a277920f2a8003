// A network front end on plain memory, written from io/netif.h and io/ring.h by itself.
using System.Buffers.Binary;
using System.Threading.Channels;
using Tmds.Linux;
using XenSharp.Core;
using XenSharp.Devices.Network;
using XenSharp.Domains.Grants;

namespace XenSharp.Devices.Tests.Network;

/// <summary>A page between two that fault: any access of the back end outside of it ends the test process.</summary>
internal sealed unsafe class GuardedPage : IDisposable
{
    public const int Size = 4096;

    private byte* _mapping;

    public GuardedPage()
    {
        _mapping = (byte*)LibC.mmap(null, 3 * Size, LibC.PROT_NONE, LibC.MAP_PRIVATE | LibC.MAP_ANONYMOUS, -1, 0);
        Assert.That((nint)_mapping, Is.Not.EqualTo((nint)(-1)));
        Assert.That(LibC.mprotect(Address, Size, LibC.PROT_READ | LibC.PROT_WRITE), Is.Zero);
    }

    public byte* Address => _mapping + Size;

    public Span<byte> Span => new(Address, Size);

    /// <summary>Once only: somebody else may have the addresses afterwards.</summary>
    public void Dispose()
    {
        if (_mapping != null)
            _ = LibC.munmap(_mapping, 3 * Size);
        _mapping = null;
    }
}

/// <summary>A front end's ring: indexes and slots, read and written as bytes.</summary>
internal sealed unsafe class FrontRing
{
    private readonly byte* _page;
    private readonly int _slot;
    private uint _produced;
    private uint _consumed;

    public FrontRing(byte* page, int slotSize, uint start = 0)
    {
        _page = page;
        (_slot, _produced, _consumed) = (slotSize, start, start);

        // SHARED_RING_INIT, but for indexes that have been round.
        RequestProducer = ResponseProducer = start;
        RequestEvent = ResponseEvent = start + 1;
    }

    public ref uint RequestProducer => ref ((uint*)_page)[0];

    public ref uint RequestEvent => ref ((uint*)_page)[1];

    public ref uint ResponseProducer => ref ((uint*)_page)[2];

    public ref uint ResponseEvent => ref ((uint*)_page)[3];

    /// <summary>Responses that have not been looked at.</summary>
    public int Responses => (int)(Volatile.Read(ref ResponseProducer) - _consumed);

    public Span<byte> Slot(uint index) => new(_page + 64 + (index % 256 * _slot), _slot);

    /// <summary>Fills the next slot, which nobody is told of yet.</summary>
    public void Put(ReadOnlySpan<byte> request) => request.CopyTo(Slot(_produced++));

    /// <summary>Shows what was put (RING_PUSH_REQUESTS_AND_CHECK_NOTIFY).</summary>
    /// <returns>Whether the back end is to be told.</returns>
    public bool Push()
    {
        uint old = RequestProducer;
        Volatile.Write(ref RequestProducer, _produced);
        Interlocked.MemoryBarrier();
        return _produced - Volatile.Read(ref RequestEvent) < _produced - old;
    }

    /// <summary>The next response.</summary>
    public byte[] Take()
    {
        Assert.That(Responses, Is.InRange(1, 256));
        return Slot(_consumed++).ToArray();
    }

    /// <summary>Asks to be told of the next response.</summary>
    public void Rearm() => Volatile.Write(ref ResponseEvent, _consumed + 1);
}

/// <summary>The guest: grants of pages by reference, a ring each way, and a channel that counts.</summary>
internal sealed unsafe class FakeNetfront : IGrantCopier, IDisposable
{
    private readonly GuardedPage _transmitPage = new();
    private readonly GuardedPage _receivePage = new();
    private readonly Dictionary<uint, byte[]> _pages = [];
    private readonly Lock _lock = new();
    private uint _nextReference = 8;
    private ushort _nextId = 100;

    public FakeNetfront(uint start = 0)
    {
        Transmit = new FrontRing(_transmitPage.Address, 12, start);
        Receive = new FrontRing(_receivePage.Address, 8, start);
    }

    public FrontRing Transmit { get; }

    public FrontRing Receive { get; }

    public byte* TransmitPage => _transmitPage.Address;

    public byte* ReceivePage => _receivePage.Address;

    public FakeChannel Channel { get; } = new();

    /// <summary>Grants a page.</summary>
    public uint Grant(out byte[] page)
    {
        page = new byte[4096];
        lock (_lock)
        {
            _pages.Add(_nextReference, page);
            return _nextReference++;
        }
    }

    public void Revoke(uint reference)
    {
        lock (_lock)
            _ = _pages.Remove(reference);
    }

    /// <summary>struct netif_tx_request.</summary>
    public static byte[] Request(uint reference, int offset, int flags, int id, int size)
    {
        byte[] slot = new byte[12];
        BinaryPrimitives.WriteUInt32LittleEndian(slot, reference);
        BinaryPrimitives.WriteUInt16LittleEndian(slot.AsSpan(4), (ushort)offset);
        BinaryPrimitives.WriteUInt16LittleEndian(slot.AsSpan(6), (ushort)flags);
        BinaryPrimitives.WriteUInt16LittleEndian(slot.AsSpan(8), (ushort)id);
        BinaryPrimitives.WriteUInt16LittleEndian(slot.AsSpan(10), (ushort)size);
        return slot;
    }

    /// <summary>struct netif_extra_info of a GSO info.</summary>
    public static byte[] Gso(int type, int size, bool more = false) => [1, more ? (byte)1 : (byte)0, (byte)size, (byte)(size >> 8), (byte)type, 0, 0, 0, 0, 0, 0, 0];

    /// <summary>Puts a frame into the transmit ring, in parts of at most so many bytes.</summary>
    /// <returns>The ids of its slots; -1 for an extra info's.</returns>
    public List<int> PutFrame(byte[] frame, int flags = 0, byte[][]? extras = null, int part = 4096, int offset = 0)
    {
        List<int> ids = [];
        extras ??= [];
        for (int at = 0; at == 0 || at < frame.Length; at += part)
        {
            byte[] data = frame[at..Math.Min(frame.Length, at + part)];
            uint reference = Grant(out byte[] page);
            data.CopyTo(page, offset);
            int more = at + part < frame.Length ? 4 : 0;
            ids.Add(_nextId);
            Transmit.Put(Request(reference, offset, more | (at == 0 ? flags | (extras.Length > 0 ? 8 : 0) : 0), _nextId++, at == 0 ? frame.Length : data.Length));
            if (at != 0)
                continue;
            foreach (byte[] extra in extras)
            {
                Transmit.Put(extra);
                ids.Add(-1);
            }
        }

        return ids;
    }

    /// <summary>The next response of the transmit ring.</summary>
    public (int Id, int Status) TakeTransmitted()
    {
        byte[] slot = Transmit.Take();
        return (BinaryPrimitives.ReadUInt16LittleEndian(slot), BinaryPrimitives.ReadInt16LittleEndian(slot.AsSpan(2)));
    }

    /// <summary>Gives pages to receive into.</summary>
    public void PutPages(int count)
    {
        for (int i = 0; i < count; i++)
        {
            byte[] slot = new byte[8];
            BinaryPrimitives.WriteUInt16LittleEndian(slot, _nextId++);
            uint reference = Grant(out _);
            BinaryPrimitives.WriteUInt32LittleEndian(slot.AsSpan(4), reference);
            _posted.Enqueue(reference);
            Receive.Put(slot);
        }

        _ = Receive.Push();
    }

    private readonly Queue<uint> _posted = [];

    /// <summary>The reference of the page that is filled next.</summary>
    public uint NextPage => _posted.Peek();

    /// <summary>Takes a frame out of the receive ring as netfront does.</summary>
    public ReceivedFrame TakeReceived()
    {
        List<byte> data = [];
        var result = new ReceivedFrame();
        bool extra = false;
        bool isFirst = true;
        bool more;
        do
        {
            byte[] slot = Receive.Take();
            uint reference = _posted.Dequeue();
            if (extra)
            {
                Assert.That((slot[0], slot[1], slot[5], slot[6], slot[7]), Is.EqualTo((1, 0, 0, 0, 0)), "a GSO info, and nothing after it");
                result = result with { SegmentSize = slot[2] | (slot[3] << 8), Segmentation = slot[4] };
                extra = false;
                more = result.More;
                continue;
            }

            int flags = BinaryPrimitives.ReadUInt16LittleEndian(slot.AsSpan(4));
            int status = BinaryPrimitives.ReadInt16LittleEndian(slot.AsSpan(6));
            Assert.That(BinaryPrimitives.ReadUInt16LittleEndian(slot.AsSpan(2)), Is.Zero);
            if (isFirst)
                result = result with { Flags = flags & 3 };
            else
                Assert.That(flags & ~4, Is.Zero);
            result = result with { Status = status, More = (flags & 4) != 0 };
            extra = (flags & 8) != 0;
            more = extra || result.More;
            isFirst = false;
            if (status > 0)
                data.AddRange(_pages[reference][..status]);
            Revoke(reference);
        }
        while (more);
        return result with { Data = [.. data] };
    }

    GrantStatus IGrantCopier.CopyFrom(uint reference, int offset, Span<byte> destination)
    {
        lock (_lock)
        {
            if (!_pages.TryGetValue(reference, out byte[]? page))
                return GrantStatus.BadReference;
            page.AsSpan(offset, destination.Length).CopyTo(destination);
            return GrantStatus.Okay;
        }
    }

    GrantStatus IGrantCopier.CopyTo(uint reference, int offset, ReadOnlySpan<byte> source)
    {
        lock (_lock)
        {
            if (!_pages.TryGetValue(reference, out byte[]? page))
                return GrantStatus.BadReference;
            source.CopyTo(page.AsSpan(offset));
            return GrantStatus.Okay;
        }
    }

    public void Dispose()
    {
        _transmitPage.Dispose();
        _receivePage.Dispose();
    }
}

/// <summary>A frame as netfront takes it apart.</summary>
internal readonly record struct ReceivedFrame(byte[] Data, int Flags, int Status, int Segmentation, int SegmentSize, bool More);

/// <summary>An event channel that counts what the back end sends.</summary>
internal sealed class FakeChannel : IEventChannelBackend
{
    private readonly Channel<bool> _sent = System.Threading.Channels.Channel.CreateBounded<bool>(
        new BoundedChannelOptions(1) { FullMode = BoundedChannelFullMode.DropWrite });

    private int _notifications;

    public int Notifications => Volatile.Read(ref _notifications);

    /// <summary>Set by each notification.</summary>
    public SemaphoreSlim Interrupt { get; } = new(0);

    public void Notify()
    {
        _ = Interlocked.Increment(ref _notifications);
        _ = Interrupt.Release();
    }

    public async ValueTask<bool> WaitAsync(CancellationToken cancellation = default)
    {
        while (await _sent.Reader.WaitToReadAsync(cancellation).ConfigureAwait(false))
        {
            if (_sent.Reader.TryRead(out _))
                return true;
        }

        return false;
    }

    /// <summary>The guest sends.</summary>
    public void Send() => _sent.Writer.TryWrite(true);

    public void Close() => _sent.Writer.TryComplete();
}
