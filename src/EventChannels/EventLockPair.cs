namespace XenSharp.EventChannels;

/// <summary>Holds the event locks of one or two domains.</summary>
internal readonly ref struct EventLockPair
{
    private readonly Lock _first;
    private readonly Lock? _second;

    private EventLockPair(Lock first, Lock? second)
    {
        _first = first;
        _second = second;
        first.Enter();
        second?.Enter();
    }

    /// <summary>Takes both locks, or the one of them if they are the same or there is no second.</summary>
    internal static EventLockPair Enter(EventChannelDomain domain, EventChannelDomain? other)
        => other == null || other == domain ? new EventLockPair(domain.EventLock, null)
            : domain.Sequence < other.Sequence ? new EventLockPair(domain.EventLock, other.EventLock)
            : new EventLockPair(other.EventLock, domain.EventLock);

    public void Dispose()
    {
        _second?.Exit();
        _first.Exit();
    }
}
