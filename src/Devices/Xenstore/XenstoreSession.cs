// What the store knows about one client, whatever it is connected by: who it is, its watches, its transactions, and the
// messages it has not taken yet.
using System.Text;

namespace XenSharp.Devices.Xenstore;

/// <summary>
/// The store's end of a client. All members belong to the store's lock (<see cref="XenstoreDatabase.Gate"/>) unless they say
/// otherwise.
/// </summary>
internal abstract class XenstoreSession
{
    private readonly LinkedList<XenstoreMessage> _outgoing = new();
    private readonly HashSet<XenstoreWatchEvent> _pendingEvents = [];
    private ITimer? _expiry;
    private int _queuedEvents;

    protected XenstoreSession(XenstoreDatabase database, XenstoreDomain domain, bool privileged)
    {
        Database = database;
        Domain = domain;
        Privileged = privileged;
        Folder = XenstorePath.OfDomain(domain.Id);
        Sequence = database.NextSequence();
    }

    public XenstoreDatabase Database { get; }

    /// <summary>The domain the client belongs to, whose accounts it uses.</summary>
    public XenstoreDomain Domain { get; }

    /// <summary>Domain 0 and connections of the host: no quotas, no permission checks, every request.</summary>
    public bool Privileged { get; }

    /// <summary>What relative paths start from.</summary>
    public string Folder { get; }

    /// <summary>The order of clients, for the order of events.</summary>
    public ulong Sequence { get; }

    /// <summary>The domain for which XS_SET_TARGET gave this one full access.</summary>
    public ushort? Target { get; set; }

    /// <summary>Set for good when the client is gone; nothing is queued for it any longer.</summary>
    public bool Closed { get; private set; }

    public List<XenstoreWatch> Watches { get; } = [];

    public Dictionary<uint, XenstoreTransactionState> Transactions { get; } = [];

    /// <summary>The identifier tried first for the next transaction.</summary>
    public uint NextTransactionId { get; set; } = 1;

    /// <summary>Requests of this client that still occupy a reply or events to others.</summary>
    public int Outstanding { get; set; }

    /// <summary>Messages waiting to be taken.</summary>
    public int QueuedMessages => _outgoing.Count;

    /// <summary>Whether no further request is read until some of what was caused has been taken.</summary>
    public bool Throttled => !Privileged && Outstanding >= Database.Quotas.Outstanding;

    /// <summary>Tells the client's loop that there is something to do. Called with the lock held: must not block.</summary>
    public abstract void Wake();

    /// <summary>Watch events that may wait.</summary>
    protected virtual int EventLimit => int.MaxValue;

    /// <summary>More than <see cref="EventLimit"/> would wait. Called with the lock held: must not block.</summary>
    protected virtual void Overrun()
    {
    }

    /// <summary>Queues a reply or a watch event.</summary>
    /// <returns><see langword="false"/> when it was dropped, as the client is gone, has the same event pending, or exhausted its
    /// memory quota.</returns>
    public bool Enqueue(XenstoreMessage message)
    {
        if (Closed)
            return false;
        if (message.Event is { } pending)
        {
            if (_queuedEvents >= EventLimit)
            {
                Overrun();
                return false;
            }

            // The same event twice in the queue tells nothing more than once. Special events are counted by their takers.
            if (!XenstorePath.IsSpecial(pending.Path) && !_pendingEvents.Add(pending))
                return false;
            if (!Privileged && Domain.Memory + message.Size > Database.Quotas.Memory)
            {
                _pendingEvents.Remove(pending);
                return false;
            }
            _queuedEvents++;
        }
        Domain.Memory += message.Size;
        message.Ticket?.Hold();
        _outgoing.AddLast(message);
        ArmExpiry(message);
        Wake();
        return true;
    }

    /// <summary>Takes the next message to deliver. <see cref="Delivered"/> is due when that is done.</summary>
    public XenstoreMessage? Dequeue()
    {
        if (_outgoing.First is not { } first)
            return null;
        Unlink(first);
        return first.Value;
    }

    /// <summary>Gives back what a dequeued message occupied.</summary>
    public void Delivered(XenstoreMessage message)
    {
        Domain.Memory -= message.Size;
        message.Ticket?.Drop();
    }

    /// <summary>Forgets all undelivered messages.</summary>
    public void DropMessages()
    {
        while (Dequeue() is { } message)
            Delivered(message);
    }

    /// <summary>Drops the undelivered events of a watch that was removed in-process.</summary>
    public void DropEventsOf(XenstoreWatch watch)
    {
        for (LinkedListNode<XenstoreMessage>? node = _outgoing.First, next; node is not null; node = next)
        {
            next = node.Next;
            if (node.Value.Event?.Watch == watch)
                Discard(node);
        }
    }

    /// <summary>Ends the session after the database has removed its watches and transactions.</summary>
    public void Close()
    {
        DropMessages();
        Closed = true;
        _expiry?.Dispose();
        _expiry = null;
    }

    private void Discard(LinkedListNode<XenstoreMessage> node)
    {
        Unlink(node);
        Delivered(node.Value);
    }

    private void Unlink(LinkedListNode<XenstoreMessage> node)
    {
        _outgoing.Remove(node);
        if (node.Value.Event is { } pending)
        {
            _pendingEvents.Remove(pending);
            _queuedEvents--;
        }
    }

    // Only events that another guest pays for expire: they would hold that guest up. Those that the host caused are worth
    // keeping for a guest that is merely paused, and the memory quota bounds them.
    private bool CanExpire(XenstoreMessage message) =>
        !Privileged && message.Event is not null && message.Ticket is { } ticket && ticket.Owner != this;

    private void ArmExpiry(XenstoreMessage message)
    {
        TimeSpan timeout = Database.Options.WatchEventTimeout;
        if (timeout <= TimeSpan.Zero || !CanExpire(message))
            return;
        TimeProvider time = Database.Options.Time;
        message.Deadline = time.GetTimestamp() + (long)(timeout.TotalSeconds * time.TimestampFrequency);
        _expiry ??= time.CreateTimer(static state => ((XenstoreSession)state!).Expire(), this, timeout, Timeout.InfiniteTimeSpan);
    }

    private void Expire()
    {
        lock (Database.Gate)
        {
            if (Closed)
                return;
            _expiry?.Dispose();
            _expiry = null;
            TimeProvider time = Database.Options.Time;
            long now = time.GetTimestamp();
            long nearest = long.MaxValue;
            for (LinkedListNode<XenstoreMessage>? node = _outgoing.First, next; node is not null; node = next)
            {
                next = node.Next;
                if (!CanExpire(node.Value))
                    continue;
                if (node.Value.Deadline <= now)
                    Discard(node);
                else
                    nearest = Math.Min(nearest, node.Value.Deadline);
            }
            if (nearest != long.MaxValue)
            {
                // A millisecond more, as timers count whole ones and must not fire just before the deadline.
                TimeSpan due = time.GetElapsedTime(now, nearest) + TimeSpan.FromMilliseconds(1);
                _expiry = time.CreateTimer(static state => ((XenstoreSession)state!).Expire(), this, due, Timeout.InfiniteTimeSpan);
            }
        }
    }
}

/// <summary>A watch event on its way: which watch fired, and the path as the watch's owner writes it.</summary>
internal sealed record XenstoreWatchEvent(XenstoreWatch Watch, string Path);

/// <summary>A reply or a watch event waiting for its client.</summary>
internal sealed class XenstoreMessage
{
    private readonly byte[]? _reply;

    private XenstoreMessage(XenstoreHeader header, byte[]? reply, XenstoreWatchEvent? watchEvent, XenstoreTicket? ticket)
    {
        Header = header;
        _reply = reply;
        Event = watchEvent;
        Ticket = ticket;
    }

    public XenstoreHeader Header { get; }

    /// <summary>What is delivered, unless this is a reply.</summary>
    public XenstoreWatchEvent? Event { get; }

    /// <summary>The request that this message is a consequence of, when an unprivileged client made it.</summary>
    public XenstoreTicket? Ticket { get; }

    /// <summary>When to give up, in timestamps of the options' clock.</summary>
    public long Deadline { get; set; } = long.MaxValue;

    /// <summary>Bytes on the wire.</summary>
    public int Size => XenstoreWire.HeaderSize + (int)Header.Length;

    public static XenstoreMessage Reply(XenstoreHeader header, byte[] payload, XenstoreTicket? ticket) =>
        new(header with { Length = (uint)payload.Length }, payload, null, ticket);

    public static XenstoreMessage OfEvent(XenstoreWatchEvent watchEvent, XenstoreTicket? ticket) =>
        new(new(XenstoreMessageType.WatchEvent, 0, 0, (uint)(watchEvent.Path.Length + watchEvent.Watch.Token.Length + 2)),
            null, watchEvent, ticket);

    /// <summary>The header and the payload as they travel.</summary>
    public byte[] Encode()
    {
        byte[] bytes = new byte[Size];
        Header.Encode(bytes);
        Span<byte> payload = bytes.AsSpan(XenstoreWire.HeaderSize);
        if (Event is { } watchEvent)
        {
            int length = Encoding.Latin1.GetBytes(watchEvent.Path, payload);
            Encoding.Latin1.GetBytes(watchEvent.Watch.Token, payload[(length + 1)..]);
        }
        else
        {
            _reply.CopyTo(payload);
        }
        return bytes;
    }
}

/// <summary>
/// Counts what one request of an unprivileged client still occupies. While too many are open, that client's requests are not
/// read, so that nobody can fill the queue of a slow reader faster than it is emptied.
/// </summary>
internal sealed class XenstoreTicket
{
    private int _holds;

    public XenstoreTicket(XenstoreSession owner)
    {
        Owner = owner;
        owner.Outstanding++;
        _holds = 1;
    }

    public XenstoreSession Owner { get; }

    public void Hold() => _holds++;

    public void Drop()
    {
        if (--_holds != 0)
            return;
        bool wasThrottled = Owner.Throttled;
        Owner.Outstanding--;
        if (wasThrottled)
            Owner.Wake();
    }
}
