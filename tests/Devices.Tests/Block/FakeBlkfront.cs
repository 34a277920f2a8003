// A block front end on the memory of a domain that does not run, written from io/blkif.h by itself.
using System.Buffers.Binary;
using System.Globalization;
using XenSharp.Core;
using XenSharp.Devices.Xenbus;
using XenSharp.Devices.Xenstore;
using XenSharp.Domains.Grants;
using XenSharp.Domains.Tests.Grants;

namespace XenSharp.Devices.Tests.Block;

/// <summary>What a front end is to be.</summary>
internal sealed record FrontEndOptions
{
    public bool Is32Bit { get; init; }

    /// <summary>Null: the nodes of a front end that knows no larger rings.</summary>
    public int? RingPageOrder { get; init; }

    public int Queues { get; init; } = 1;

    public bool IsPersistent { get; init; }

    /// <summary>By how many pages, and references, the rings lie behind where they do otherwise.</summary>
    public uint RingOffset { get; init; }
}

/// <summary>A piece of a page, as in a request.</summary>
internal readonly record struct Piece(uint Reference, int First, int Last);

/// <summary>A response.</summary>
internal readonly record struct Response(ulong Id, int Operation, int Status);

/// <summary>
/// Rings, grants and event channels of a disk, and the nodes that a front end writes. Grant references from 100 on are data pages: page N
/// of them has reference 100 + N and is granted to be written; 300 + N grants the same page to be read.
/// </summary>
internal sealed unsafe class FakeBlkfront
{
    public const int DataPages = 64;
    public const uint FirstData = 100;
    public const uint FirstReadOnly = 300;
    public const int ReadOperation = 0;
    public const int WriteOperation = 1;
    public const int BarrierOperation = 2;
    public const int FlushOperation = 3;
    public const int DiscardOperation = 5;
    public const int IndirectOperation = 6;
    private const uint FirstRing = 400;
    private const ulong FirstRingPage = DataPages;
    private const ulong AllocUnbound = 6;
    private const ulong Send = 4;
    private const ulong Close = 3;

    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(20);

    private readonly GrantDomain _guest;
    private readonly XenstoreClient _store;
    private readonly FrontEndOptions _options;
    private readonly FakeRing[] _rings;
    private ulong _lastId;

    public FakeBlkfront(GrantDomain guest, XenstoreClient store, uint device, FrontEndOptions? options = null)
    {
        (_guest, _store) = (guest, store);
        _options = options ?? new FrontEndOptions();
        Folder = string.Create(CultureInfo.InvariantCulture, $"/local/domain/{GrantDomain.Id}/device/vbd/{device}");
        BackEnd = string.Create(CultureInfo.InvariantCulture, $"/local/domain/0/backend/vbd/{GrantDomain.Id}/{device}");
        for (uint i = 0; i < DataPages; i++)
        {
            guest.PutEntry(FirstData + i, GrantFlags.PermitAccess, GrantDomain.FrameOf(i), domain: 0);
            guest.PutEntry(FirstReadOnly + i, GrantFlags.PermitAccess | GrantFlags.ReadOnly, GrantDomain.FrameOf(i), domain: 0);
        }

        int pages = 1 << (_options.RingPageOrder ?? 0);
        _rings = new FakeRing[_options.Queues];
        for (int queue = 0; queue < _options.Queues; queue++)
        {
            var addresses = new nint[pages];
            for (int i = 0; i < pages; i++)
            {
                int number = (queue * pages) + i;

                // Backwards, so that the pages of a ring are not neighbours in memory.
                ulong page = FirstRingPage + _options.RingOffset + (ulong)((_options.Queues * pages) - 1 - number);
                guest.PutEntry(FirstRing + _options.RingOffset + (uint)number, GrantFlags.PermitAccess, GrantDomain.FrameOf(page), domain: 0);
                addresses[i] = (nint)guest.Fake.Host(GrantDomain.AddressOf(page));
            }

            _rings[queue] = new FakeRing(addresses, _options.Is32Bit);
        }
    }

    public string Folder { get; }

    public string BackEnd { get; }

    /// <summary>Entries of a ring.</summary>
    public int RingSize => _rings[0].Size;

    public FakeRing Ring(int queue = 0) => _rings[queue];

    public XenbusState BackState => (XenbusState)int.Parse(_store.Read(BackEnd + "/state") ?? "0", CultureInfo.InvariantCulture);

    public Span<byte> Data(int page) => new(_guest.Fake.Host(GrantDomain.AddressOf((ulong)page)), 4096);

    public void Write(string name, object value) => _store.Write($"{Folder}/{name}", string.Create(CultureInfo.InvariantCulture, $"{value}"));

    public void SetState(XenbusState state) => Write("state", (int)state);

    public void AwaitState(XenbusState state)
        => Assert.That(SpinWait.SpinUntil(() => BackState == state, Patience), Is.True, $"the back end comes from {BackState} to {state}");

    /// <summary>Does what a driver does when it finds the device.</summary>
    public void Connect()
    {
        AwaitState(XenbusState.InitWait);
        Publish();
        SetState(XenbusState.Initialised);
        AwaitState(XenbusState.Connected);
        SetState(XenbusState.Connected);
    }

    /// <summary>Makes new rings and writes the nodes about them.</summary>
    public void Publish()
    {
        int pages = 1 << (_options.RingPageOrder ?? 0);
        Write("protocol", _options.Is32Bit ? "x86_32-abi" : "x86_64-abi");
        Write("feature-persistent", _options.IsPersistent ? 1 : 0);
        if (_options.RingPageOrder is { } order)
            Write("ring-page-order", order);
        if (_options.Queues > 1)
            Write("multi-queue-num-queues", _options.Queues);
        for (int queue = 0; queue < _options.Queues; queue++)
        {
            string prefix = _options.Queues > 1 ? string.Create(CultureInfo.InvariantCulture, $"queue-{queue}/") : "";
            FakeRing ring = _rings[queue];
            ring.Reset();
            for (int i = 0; i < pages; i++)
                Write(prefix + (_options.RingPageOrder is null ? "ring-ref" : $"ring-ref{i}"), FirstRing + _options.RingOffset + (uint)((queue * pages) + i));
            ring.Port = AllocatePort();
            Write(prefix + "event-channel", ring.Port);
        }
    }

    public uint AllocatePort()
    {
        _guest.Fake.Write(GrantDomain.Request, (uint)GrantDomain.Self);
        Assert.That(_guest.Fake.Call(HypercallNumber.EventChannelOp, AllocUnbound, GrantDomain.Request), Is.Zero);
        return _guest.Fake.Read<uint>(GrantDomain.Request + 4);
    }

    /// <summary>Lets go of the device, as a driver that is unloaded.</summary>
    public void Disconnect()
    {
        SetState(XenbusState.Closing);
        AwaitState(XenbusState.Closing);
        SetState(XenbusState.Closed);
        AwaitState(XenbusState.Closed);
        foreach (FakeRing ring in _rings)
        {
            _guest.Fake.Write(GrantDomain.Request, ring.Port);
            Assert.That(_guest.Fake.Call(HypercallNumber.EventChannelOp, Close, GrantDomain.Request), Is.Zero);
        }
    }

    /// <summary>Puts a request into a ring.</summary>
    /// <returns>Its number.</returns>
    public ulong Put(int operation, ulong sector, ReadOnlySpan<Piece> pieces, int queue = 0)
    {
        Span<byte> request = stackalloc byte[112];
        request.Clear();
        request[0] = (byte)operation;
        request[1] = (byte)pieces.Length;
        ulong id = Begin(request, sector);
        int at = _options.Is32Bit ? 20 : 24;
        foreach (Piece piece in pieces)
        {
            Put(request[at..], piece);
            at += 8;
        }

        _rings[queue].Put(request);
        return id;
    }

    /// <summary>Puts an indirect request whose segments are in a data page.</summary>
    public ulong PutIndirect(int operation, ulong sector, ReadOnlySpan<Piece> pieces, int segmentPage)
    {
        Span<byte> request = stackalloc byte[112];
        request.Clear();
        request[0] = IndirectOperation;
        request[1] = (byte)operation;
        BinaryPrimitives.WriteUInt16LittleEndian(request[2..], (ushort)pieces.Length);
        ulong id = Begin(request, sector);
        BinaryPrimitives.WriteUInt32LittleEndian(request[(_options.Is32Bit ? 24 : 28)..], FirstData + (uint)segmentPage);
        for (int i = 0; i < pieces.Length; i++)
            Put(Data(segmentPage)[(i * 8)..], pieces[i]);
        _rings[0].Put(request);
        return id;
    }

    public ulong PutDiscard(ulong sector, ulong sectors, byte flag = 0)
    {
        Span<byte> request = stackalloc byte[112];
        request.Clear();
        request[0] = DiscardOperation;
        request[1] = flag;
        ulong id = Begin(request, sector);
        BinaryPrimitives.WriteUInt64LittleEndian(request[(_options.Is32Bit ? 20 : 24)..], sectors);
        _rings[0].Put(request);
        return id;
    }

    /// <summary>Shows the requests to the back end, and notifies it if it wants that.</summary>
    /// <returns>Whether it did.</returns>
    public bool Push(int queue = 0)
    {
        if (!_rings[queue].Push())
            return false;
        Notify(queue);
        return true;
    }

    public void Notify(int queue = 0)
    {
        _guest.Fake.Write(GrantDomain.Request, _rings[queue].Port);
        Assert.That(_guest.Fake.Call(HypercallNumber.EventChannelOp, Send, GrantDomain.Request), Is.Zero);
    }

    /// <summary>Waits for responses.</summary>
    public Response[] Await(int count, int queue = 0)
    {
        var responses = new List<Response>();
        bool all = SpinWait.SpinUntil(
            () =>
            {
                _rings[queue].Take(responses);
                return responses.Count >= count;
            },
            Patience);
        Assert.That(all, Is.True, $"{responses.Count} of {count} responses came");
        return [.. responses];
    }

    /// <summary>Puts one request, and waits for what comes of it.</summary>
    public int Do(int operation, ulong sector, params ReadOnlySpan<Piece> pieces)
    {
        ulong id = Put(operation, sector, pieces);
        return AwaitOne(id, operation);
    }

    public int AwaitOne(ulong id, int operation)
    {
        Push();
        Response response = Await(1).Single();
        Assert.That((response.Id, response.Operation), Is.EqualTo((id, operation)));
        return response.Status;
    }

    /// <summary>A whole page, granted to be written.</summary>
    public static Piece Page(int page) => new(FirstData + (uint)page, 0, 7);

    /// <summary>A whole page, granted to be read only.</summary>
    public static Piece ReadOnlyPage(int page) => new(FirstReadOnly + (uint)page, 0, 7);

    /// <summary>Whether the back end has any of the data pages mapped.</summary>
    public int MappedData() => Enumerable.Range(0, DataPages).Count(
        i => _guest.Table[FirstData + (uint)i].Pin != 0 || _guest.Table[FirstReadOnly + (uint)i].Pin != 0);

    private static void Put(Span<byte> segment, Piece piece)
    {
        BinaryPrimitives.WriteUInt32LittleEndian(segment, piece.Reference);
        (segment[4], segment[5]) = ((byte)piece.First, (byte)piece.Last);
    }

    private ulong Begin(Span<byte> request, ulong sector)
    {
        ulong id = 0xabcd_0000_0000_0000 + ++_lastId;
        BinaryPrimitives.WriteUInt64LittleEndian(request[(_options.Is32Bit ? 4 : 8)..], id);
        BinaryPrimitives.WriteUInt64LittleEndian(request[(_options.Is32Bit ? 12 : 16)..], sector);
        return id;
    }
}

/// <summary>The front end's side of a ring.</summary>
internal sealed unsafe class FakeRing(nint[] pages, bool is32Bit)
{
    private readonly int _entry = is32Bit ? 108 : 112;
    private uint _produced;
    private uint _pushed;
    private uint _consumed;

    public int Size { get; } = 1 << (int)Math.Log2(((pages.Length * 4096) - 64) / (is32Bit ? 108 : 112));

    public uint Port { get; set; }

    public ref uint RequestProducer => ref ((uint*)pages[0])[0];

    public ref uint RequestEvent => ref ((uint*)pages[0])[1];

    public ref uint ResponseProducer => ref ((uint*)pages[0])[2];

    public ref uint ResponseEvent => ref ((uint*)pages[0])[3];

    public void Reset()
    {
        foreach (nint page in pages)
            new Span<byte>((void*)page, 4096).Clear();
        (_produced, _pushed, _consumed) = (0, 0, 0);
        (RequestEvent, ResponseEvent) = (1, 1);
    }

    /// <summary>The bytes of all of it.</summary>
    public void Fill(Random random)
    {
        foreach (nint page in pages)
            random.NextBytes(new Span<byte>((void*)page, 4096));
    }

    public void Put(ReadOnlySpan<byte> request)
    {
        for (int i = 0; i < _entry; i++)
            Byte((int)(_produced % (uint)Size), i) = request[i];
        _produced++;
    }

    public bool Push()
    {
        uint old = _pushed;
        _pushed = _produced;
        Volatile.Write(ref RequestProducer, _produced);
        Interlocked.MemoryBarrier();
        return _produced - Volatile.Read(ref RequestEvent) < _produced - old;
    }

    public void Take(List<Response> responses)
    {
        Span<byte> bytes = stackalloc byte[16];
        while (_consumed != Volatile.Read(ref ResponseProducer))
        {
            for (int i = 0; i < 12; i++)
                bytes[i] = Byte((int)(_consumed % (uint)Size), i);
            responses.Add(new Response(
                BinaryPrimitives.ReadUInt64LittleEndian(bytes), bytes[8], BinaryPrimitives.ReadInt16LittleEndian(bytes[10..])));
            _consumed++;
            Volatile.Write(ref ResponseEvent, _consumed + 1);
            Interlocked.MemoryBarrier();
        }
    }

    private ref byte Byte(int entry, int offset)
    {
        int at = 64 + (entry * _entry) + offset;
        return ref ((byte*)pages[at / 4096])[at % 4096];
    }
}
