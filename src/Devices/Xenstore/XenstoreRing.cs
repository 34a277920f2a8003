// The ring page between a guest and the store (struct xenstore_domain_interface of io/xs_wire.h, docs/misc/xenstore-ring.txt).
using XenSharp.Core;

namespace XenSharp.Devices.Xenstore;

/// <summary>
/// The store's end of a guest's xenstore page. The guest can write anything there at any time, so every index is read once
/// and checked, and no access leaves the page.
/// </summary>
/// <remarks>
/// Layout, offsets in bytes: 0 requests (1024), 1024 replies (1024), 2048 req_cons, 2052 req_prod, 2056 rsp_cons, 2060 rsp_prod,
/// 2064 server_features, 2068 connection, 2072 error. Indexes run freely modulo 2^32.
/// </remarks>
public sealed unsafe class XenstoreRing : IXenstoreTransport
{
    /// <summary>XENSTORE_RING_SIZE: bytes of each direction.</summary>
    public const int Size = 1024;

    /// <summary>XENSTORE_SERVER_FEATURE_RECONNECTION.</summary>
    public const uint FeatureReconnection = 1;

    /// <summary>XENSTORE_SERVER_FEATURE_ERROR.</summary>
    public const uint FeatureError = 2;

    private const int Requests = 0;
    private const int Replies = 1024;
    private const int RequestConsumer = 2048;
    private const int RequestProducer = 2052;
    private const int ReplyConsumer = 2056;
    private const int ReplyProducer = 2060;
    private const int ServerFeatures = 2064;
    private const int Connection = 2068;
    private const int Error = 2072;

    // XENSTORE_CONNECTED and XENSTORE_RECONNECT.
    private const uint Connected = 0;
    private const uint Reconnect = 1;

    private readonly byte* _page;
    private readonly IEventChannelBackend _channel;
    private bool _unannounced;

    /// <param name="page">The page, 4096 bytes, mapped until the domain is released.</param>
    /// <param name="channel">The store's end of the event channel whose other end the guest knows as store_evtchn.</param>
    /// <exception cref="ArgumentException">The page is missing or not aligned.</exception>
    public XenstoreRing(byte* page, IEventChannelBackend channel)
    {
        ArgumentNullException.ThrowIfNull(channel);
        if (page is null || ((nuint)page & 3) != 0)
            throw new ArgumentException("The xenstore page must be mapped and aligned; pass the start of a page of 4096 bytes.", nameof(page));
        _page = page;
        _channel = channel;
    }

    /// <inheritdoc/>
    public bool ResetRequested => Volatile.Read(ref Word(Connection)) == Reconnect;

    /// <inheritdoc/>
    public bool TryRead(Span<byte> destination, out int count)
    {
        count = 0;
        uint consumer = Volatile.Read(ref Word(RequestConsumer));
        uint producer = Volatile.Read(ref Word(RequestProducer));
        uint available = producer - consumer;
        if (available > Size)
            return false;
        if (available == 0)
            return true;

        // Reading the producer was an acquire: the bytes below it are visible. In two pieces where the ring wraps.
        count = (int)Math.Min(available, (uint)destination.Length);
        int start = (int)(consumer % Size);
        int first = Math.Min(count, Size - start);
        new ReadOnlySpan<byte>(_page + Requests + start, first).CopyTo(destination);
        new ReadOnlySpan<byte>(_page + Requests, count - first).CopyTo(destination[first..]);
        Publish(RequestConsumer, consumer + (uint)count);
        return true;
    }

    /// <inheritdoc/>
    public bool TryWrite(ReadOnlySpan<byte> source, out int count)
    {
        count = 0;
        uint consumer = Volatile.Read(ref Word(ReplyConsumer));
        uint producer = Volatile.Read(ref Word(ReplyProducer));
        uint used = producer - consumer;
        if (used > Size)
            return false;
        if (used == Size)
            return true;

        // The guest has read the old bytes before it moved the consumer; ours must be there before the producer moves.
        count = (int)Math.Min(Size - used, (uint)source.Length);
        int start = (int)(producer % Size);
        int first = Math.Min(count, Size - start);
        source[..first].CopyTo(new Span<byte>(_page + Replies + start, first));
        source[first..count].CopyTo(new Span<byte>(_page + Replies, count - first));
        Publish(ReplyProducer, producer + (uint)count);
        return true;
    }

    /// <inheritdoc/>
    public void Flush()
    {
        if (!_unannounced)
            return;
        _unannounced = false;
        _channel.Notify();
    }

    /// <inheritdoc/>
    public ValueTask<bool> WaitAsync(CancellationToken cancellation) => _channel.WaitAsync(cancellation);

    /// <inheritdoc/>
    public void Reset()
    {
        bool asked = ResetRequested;
        Volatile.Write(ref Word(RequestConsumer), 0);
        Volatile.Write(ref Word(RequestProducer), 0);
        Volatile.Write(ref Word(ReplyConsumer), 0);
        Volatile.Write(ref Word(ReplyProducer), 0);
        Volatile.Write(ref Word(Error), (uint)XenstoreConnectionError.None);
        Volatile.Write(ref Word(ServerFeatures), FeatureReconnection | FeatureError);

        // Last: a guest that waits for its reconnection looks at nothing else before.
        Volatile.Write(ref Word(Connection), Connected);
        _unannounced = false;
        if (asked)
            _channel.Notify();
    }

    /// <inheritdoc/>
    public void Fail(XenstoreConnectionError error)
    {
        Volatile.Write(ref Word(Error), (uint)error);
        _unannounced = false;
        _channel.Notify();
    }

    private ref uint Word(int offset) => ref *(uint*)(_page + offset);

    private void Publish(int offset, uint index)
    {
        Volatile.Write(ref Word(offset), index);

        // The guest decides by the index we just moved whether to ring us, and we decide by the index it moves whether to
        // sleep: without a full barrier between our store and our next load both could see the old one.
        Interlocked.MemoryBarrier();
        _unannounced = true;
    }
}
