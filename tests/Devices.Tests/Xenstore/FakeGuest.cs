// The guest's end of a xenstore ring, as a kernel has it: rings the store only where Linux's xenbus does, so that a wake-up the
// store forgets shows as a test that gets no answer.
using System.Buffers.Binary;
using System.Text;
using Tmds.Linux;
using XenSharp.Core;
using XenSharp.Devices.Xenstore;
using static Tmds.Linux.LibC;

namespace XenSharp.Devices.Tests.Xenstore;

/// <summary>An event channel between the store (this interface) and the fake guest (the other members).</summary>
internal sealed class FakeEventChannel : IEventChannelBackend
{
    private readonly SemaphoreSlim _toStore = new(0);
    private readonly object _toGuest = new();
    private int _pending;
    private volatile bool _closed;
    private int _notifications;

    /// <summary>How often the store has rung. Taken before looking at the ring, it is what <see cref="WaitBeyond"/> wants.</summary>
    public int Notifications
    {
        get
        {
            lock (_toGuest)
                return _notifications;
        }
    }

    public void Notify()
    {
        lock (_toGuest)
        {
            _notifications++;
            Monitor.PulseAll(_toGuest);
        }
    }

    public async ValueTask<bool> WaitAsync(CancellationToken cancellation = default)
    {
        await _toStore.WaitAsync(cancellation);
        Interlocked.Exchange(ref _pending, 0);
        return !_closed;
    }

    public void Send()
    {
        if (Interlocked.Exchange(ref _pending, 1) == 0)
            _toStore.Release();
    }

    public void Close()
    {
        _closed = true;
        _toStore.Release();
    }

    /// <summary>Waits for a notification after that many.</summary>
    public bool WaitBeyond(int notifications, TimeSpan timeout)
    {
        long end = Environment.TickCount64 + (long)timeout.TotalMilliseconds;
        lock (_toGuest)
        {
            while (_notifications == notifications)
            {
                long left = end - Environment.TickCount64;
                if (left <= 0 || !Monitor.Wait(_toGuest, (int)left))
                    return false;
            }
            return true;
        }
    }
}

/// <summary>One page with an inaccessible page on either side.</summary>
internal sealed unsafe class GuardedPage : IDisposable
{
    public const int Size = 4096;
    public const int InterfaceEnd = 2076;
    private const byte Canary = 0xa5;

    private readonly byte* _mapping;

    public GuardedPage()
    {
        _mapping = (byte*)mmap(null, 3 * Size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        Assert.That((nint)_mapping, Is.Not.EqualTo(-1), "no memory for the test's page");
        Assert.That(mprotect(_mapping + Size, Size, PROT_READ | PROT_WRITE), Is.Zero);
        new Span<byte>(Start + InterfaceEnd, Size - InterfaceEnd).Fill(Canary);
    }

    public byte* Start => _mapping + Size;

    public Span<byte> Bytes => new(Start, Size);

    public bool RestUntouched => Bytes[InterfaceEnd..].IndexOfAnyExcept(Canary) < 0;

    public ref uint Word(int offset) => ref *(uint*)(Start + offset);

    public void Dispose() => munmap(_mapping, 3 * Size);
}

internal sealed record Reply(XenstoreMessageType Type, uint RequestId, uint TransactionId, byte[] Payload)
{
    public string Text => Encoding.Latin1.GetString(Payload);

    /// <summary>The name of the error, or "" if this is none.</summary>
    public string Error => Type == XenstoreMessageType.Error ? Text.TrimEnd('\0') : "";

    public string[] Strings => Payload.Length == 0 ? [] : Text[..^1].Split('\0');
}

/// <summary>A guest with a xenstore page.</summary>
internal sealed unsafe class FakeGuest
{
    public const int RequestConsumer = 2048;
    public const int RequestProducer = 2052;
    public const int ReplyConsumer = 2056;
    public const int ReplyProducer = 2060;
    public const int Features = 2064;
    public const int Connection = 2068;
    public const int Error = 2072;

    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(20);
    private readonly List<byte> _received = [];
    private uint _nextRequest = 1;

    public FakeGuest(bool poison = true)
    {
        if (poison)
        {
            // A page fresh from the builder may hold anything; introduction must put it in order.
            for (int offset = RequestConsumer; offset <= ReplyProducer; offset += 4)
                Page.Word(offset) = 0xdeadbeef;
        }
        Ring = new XenstoreRing(Page.Start, Channel);
    }

    public GuardedPage Page { get; } = new();

    public FakeEventChannel Channel { get; } = new();

    public XenstoreRing Ring { get; }

    /// <summary>Watch events received so far, as "path|token".</summary>
    public Queue<string> Events { get; } = [];

    /// <summary>Puts the ring's indexes elsewhere, both directions empty: free-running counters can be anywhere.</summary>
    public void MoveIndexes(uint position)
    {
        for (int offset = RequestConsumer; offset <= ReplyProducer; offset += 4)
            Volatile.Write(ref Page.Word(offset), position);
    }

    public void SendRaw(ReadOnlySpan<byte> bytes)
    {
        while (!bytes.IsEmpty)
        {
            int notifications = Channel.Notifications;
            uint consumer = Volatile.Read(ref Page.Word(RequestConsumer));
            uint producer = Page.Word(RequestProducer);
            uint room = 1024 - (producer - consumer);
            if (room == 0)
            {
                WaitForStore(notifications);
                continue;
            }
            int count = Math.Min((int)room, bytes.Length);
            for (int index = 0; index < count; index++)
                Page.Start[(producer + (uint)index) % 1024] = bytes[index];
            Volatile.Write(ref Page.Word(RequestProducer), producer + (uint)count);
            Interlocked.MemoryBarrier();
            bytes = bytes[count..];

            // As Linux: the store is rung only if it may have been through with what was there before.
            if ((int)(producer - Volatile.Read(ref Page.Word(RequestConsumer))) <= 0)
                Channel.Send();
        }
    }

    public static byte[] Message(XenstoreMessageType type, uint requestId, uint transaction, ReadOnlySpan<byte> payload)
    {
        byte[] message = new byte[16 + payload.Length];
        new XenstoreHeader(type, requestId, transaction, (uint)payload.Length).Encode(message);
        payload.CopyTo(message.AsSpan(16));
        return message;
    }

    public uint Send(XenstoreMessageType type, uint transaction, string payload)
    {
        uint id = _nextRequest++;
        SendRaw(Message(type, id, transaction, Encoding.Latin1.GetBytes(payload)));
        return id;
    }

    public Reply Call(XenstoreMessageType type, string payload, uint transaction = 0)
    {
        uint id = Send(type, transaction, payload);
        Reply reply = ReceiveReply();
        Assert.That(reply.RequestId, Is.EqualTo(id), "the reply belongs to another request");
        Assert.That(reply.TransactionId, Is.EqualTo(transaction));
        Assert.That(reply.Type, Is.EqualTo(type).Or.EqualTo(XenstoreMessageType.Error));
        return reply;
    }

    /// <summary>Calls and returns "" or the error's name.</summary>
    public string Do(XenstoreMessageType type, string payload, uint transaction = 0)
    {
        Reply reply = Call(type, payload, transaction);
        if (reply.Error.Length == 0)
            Assert.That(reply.Text, Is.EqualTo("OK\0"));
        return reply.Error;
    }

    public string Write(string path, string value, uint transaction = 0) =>
        Do(XenstoreMessageType.Write, path + "\0" + value, transaction);

    public string Read(string path, uint transaction = 0) => Call(XenstoreMessageType.Read, path + "\0", transaction).Text.TrimEnd('\0');

    public string Watch(string path, string token) => Do(XenstoreMessageType.Watch, $"{path}\0{token}\0");

    public uint Begin() => uint.Parse(Call(XenstoreMessageType.TransactionStart, "\0").Text.TrimEnd('\0'));

    public string End(uint transaction, bool commit = true) =>
        Do(XenstoreMessageType.TransactionEnd, commit ? "T\0" : "F\0", transaction);

    /// <summary>The next message that is not a watch event; events on the way are kept in <see cref="Events"/>.</summary>
    public Reply ReceiveReply()
    {
        while (true)
        {
            Reply reply = Receive();
            if (reply.Type != XenstoreMessageType.WatchEvent)
                return reply;
            Events.Enqueue(reply.Text[..^1].Replace('\0', '|'));
        }
    }

    public string NextEvent()
    {
        while (Events.Count == 0)
        {
            Reply reply = Receive();
            Assert.That(reply.Type, Is.EqualTo(XenstoreMessageType.WatchEvent), "a reply nobody waits for");
            Events.Enqueue(reply.Text[..^1].Replace('\0', '|'));
        }
        return Events.Dequeue();
    }

    /// <summary>All events caused so far: a round trip makes sure that they are there, as messages keep their order.</summary>
    public string[] AllEvents()
    {
        Call(XenstoreMessageType.GetDomainPath, "0\0");
        string[] events = [.. Events];
        Events.Clear();
        return events;
    }

    public Reply Receive()
    {
        while (true)
        {
            if (_received.Count >= 16)
            {
                byte[] all = [.. _received];
                int length = BinaryPrimitives.ReadInt32LittleEndian(all.AsSpan(12));
                Assert.That(length, Is.InRange(0, 4096));
                if (all.Length >= 16 + length)
                {
                    _received.RemoveRange(0, 16 + length);
                    XenstoreHeader header = XenstoreHeader.Decode(all);
                    return new Reply(header.Type, header.RequestId, header.TransactionId, all[16..(16 + length)]);
                }
            }
            int notifications = Channel.Notifications;
            if (!TakeBytes())
                WaitForStore(notifications);
        }
    }

    private void WaitForStore(int notifications) =>
        Assert.That(Channel.WaitBeyond(notifications, Patience), Is.True, "the store does not answer");

    /// <summary>Waits until a condition on the page or the store holds.</summary>
    public static void Until(Func<bool> condition, string what)
    {
        long end = Environment.TickCount64 + (long)Patience.TotalMilliseconds;
        while (!condition())
        {
            Assert.That(Environment.TickCount64, Is.LessThan(end), "waited in vain: " + what);
            Thread.Sleep(1);
        }
    }

    /// <summary>Unmaps the page, when the store is through with it.</summary>
    public void Free() => Page.Dispose();

    private bool TakeBytes()
    {
        uint consumer = Page.Word(ReplyConsumer);
        uint producer = Volatile.Read(ref Page.Word(ReplyProducer));
        uint available = producer - consumer;
        Assert.That(available, Is.LessThanOrEqualTo(1024u));
        if (available == 0)
            return false;
        for (uint index = 0; index < available; index++)
            _received.Add(Page.Start[1024 + ((consumer + index) % 1024)]);
        Volatile.Write(ref Page.Word(ReplyConsumer), producer);
        Interlocked.MemoryBarrier();

        // As Linux: the store is rung only if it may wait for room.
        if (Volatile.Read(ref Page.Word(ReplyProducer)) - consumer >= 1024)
            Channel.Send();
        return true;
    }
}

/// <summary>A store with guests, taken down in order.</summary>
internal sealed class StoreFixture : IDisposable
{
    private readonly List<FakeGuest> _guests = [];

    public StoreFixture(XenstoreOptions? options = null)
    {
        Server = new XenstoreServer(options);
    }

    public XenstoreServer Server { get; }

    public XenstoreClient Domain0 => Server.Domain0;

    public List<XenstoreConnection> Connections { get; } = [];

    /// <summary>A guest that somebody else introduces; the fixture frees it.</summary>
    public FakeGuest Stranger()
    {
        FakeGuest guest = new();
        _guests.Add(guest);
        return guest;
    }

    /// <summary>A guest with a folder of its own that it owns.</summary>
    public FakeGuest Guest(ushort domainId)
    {
        FakeGuest guest = Stranger();
        Server.AnnounceDomain(domainId);
        Domain0.Write($"/local/domain/{domainId}", "", new XenstorePermissions(new XenstorePermission(domainId, XenstoreAccess.None)));
        Connections.Add(Server.IntroduceDomain(domainId, guest.Ring));
        return guest;
    }

    /// <summary>A privileged client on the wire, as a tool on a socket is.</summary>
    /// <param name="position">Where the indexes of its ring begin; nobody may move them once the store looks at them.</param>
    public FakeGuest Tool(uint position = 0)
    {
        FakeGuest tool = Stranger();
        tool.Ring.Reset();
        tool.MoveIndexes(position);
        Connections.Add(Server.Accept(tool.Ring));
        return tool;
    }

    public void Dispose()
    {
        Server.DisposeAsync().AsTask().GetAwaiter().GetResult();
        foreach (FakeGuest guest in _guests)
        {
            Assert.That(guest.Page.RestUntouched, Is.True, "the store wrote behind its part of the page");
            guest.Free();
        }
        foreach (XenstoreConnection connection in Connections)
            Assert.That(connection.Fault, Is.Null);
        lock (Server.Database.Gate)
            Assert.That(Server.Database.IsConsistent(), Is.True, "the accounts do not agree with the tree");
    }
}
