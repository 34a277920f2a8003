// Tells whoever listens what happens to domains.

using System.Runtime.CompilerServices;
using System.Threading.Channels;
using XenSharp.Api;

namespace XenSharp.Toolstack.Management;

/// <summary>Spreads events to any number of listeners; one that does not keep up loses some, and is told.</summary>
public sealed class DomainEvents
{
    private const int Capacity = 256;

    private readonly Lock _lock = new();
    private readonly List<Listener> _listeners = [];
    private bool _ended;

    /// <summary>Everything that happens from the call on; the first is <see cref="DomainEventKind.Ready"/>.</summary>
    /// <param name="cancellation">Ends the listening.</param>
    public async IAsyncEnumerable<DomainEvent> FollowAsync([EnumeratorCancellation] CancellationToken cancellation = default)
    {
        var listener = new Listener();
        _ = listener.Queue.Writer.TryWrite(new DomainEvent { Kind = DomainEventKind.Ready, Time = DateTimeOffset.UtcNow });
        lock (_lock)
        {
            if (_ended)
                yield break;
            _listeners.Add(listener);
        }

        try
        {
            await foreach (DomainEvent happened in listener.Queue.Reader.ReadAllAsync(cancellation).ConfigureAwait(false))
                yield return happened;
        }
        finally
        {
            lock (_lock)
                _ = _listeners.Remove(listener);
        }
    }

    /// <summary>Ends all listening.</summary>
    public void End()
    {
        lock (_lock)
        {
            _ended = true;
            foreach (Listener listener in _listeners)
                _ = listener.Queue.Writer.TryComplete();
        }
    }

    internal void Publish(DomainEvent happened)
    {
        lock (_lock)
        {
            foreach (Listener listener in _listeners)
                listener.Give(happened);
        }
    }

    private sealed class Listener
    {
        private bool _overrun;

        public Channel<DomainEvent> Queue { get; } = Channel.CreateBounded<DomainEvent>(Capacity);

        public void Give(DomainEvent happened)
        {
            // Once some are lost there is a gap until half of the queue is free, so that it is told of once and not with each event.
            if (_overrun)
            {
                if (Queue.Reader.Count > Capacity / 2 || !Queue.Writer.TryWrite(happened with { Kind = DomainEventKind.Overrun, Id = 0, Name = string.Empty }))
                    return;
                _overrun = false;
            }

            _overrun = !Queue.Writer.TryWrite(happened);
        }
    }
}
