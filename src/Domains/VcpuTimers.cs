namespace XenSharp.Domains;

/// <summary>
/// One vCPU's timers, in system time (nanoseconds since the domain was made). Only its own thread waits for them; the periodic one may
/// be set from others, which then kick the vCPU.
/// </summary>
internal sealed class VcpuTimers
{
    private readonly Lock _lock = new();
    private long _singleshot = long.MaxValue;
    private long _periodicNext = long.MaxValue;
    private long _periodicLast = long.MinValue;
    private long _poll = long.MaxValue;

    /// <summary>The period that every vCPU of a PV domain starts with: 100 Hz.</summary>
    public const long InitialPeriod = 10_000_000;

    /// <summary>The earliest of all.</summary>
    public long Next { get; private set; } = long.MaxValue;

    /// <summary>The earliest of those that run while the vCPU waits: the periodic one rests, and ticks after the wait if it is due.</summary>
    public long NextWhileWaiting => Math.Min(_singleshot, _poll);

    /// <summary>When the one-shot timer fires; <see cref="long.MaxValue"/> for never.</summary>
    public long Singleshot
    {
        get => _singleshot;
        set
        {
            lock (_lock)
            {
                _singleshot = value;
                Rearm();
            }
        }
    }

    /// <summary>Nanoseconds between two ticks; 0 for none.</summary>
    public long Period { get; private set; }

    /// <summary>When SCHEDOP_poll gives up.</summary>
    public long Poll
    {
        get => _poll;
        set
        {
            lock (_lock)
            {
                _poll = value;
                PollExpired = false;
                Rearm();
            }
        }
    }

    /// <summary>Whether <see cref="Poll"/> has passed since it was set.</summary>
    public bool PollExpired { get; private set; }

    /// <summary>Starts or stops the periodic timer. It ticks at once unless it did within the last period.</summary>
    public void SetPeriodic(long period, long now)
    {
        lock (_lock)
        {
            Period = period;
            _periodicNext = period == 0 ? long.MaxValue : _periodicLast > now - period ? _periodicLast + period : now;
            Rearm();
        }
    }

    /// <summary>Takes note of the timers that are due.</summary>
    /// <returns>True when VIRQ_TIMER is to be raised. Missed periods are not made up for.</returns>
    public bool Expire(long now)
    {
        lock (_lock)
            return ExpireLocked(now);
    }

    private bool ExpireLocked(long now)
    {
        bool virq = false;
        if (now >= _singleshot)
        {
            _singleshot = long.MaxValue;
            virq = true;
        }

        if (now >= _periodicNext)
        {
            _periodicLast = now;
            _periodicNext = now + Period;
            virq = true;
        }

        if (now >= _poll)
        {
            _poll = long.MaxValue;
            PollExpired = true;
        }

        Rearm();
        return virq;
    }

    private void Rearm() => Next = Math.Min(Math.Min(_singleshot, _periodicNext), _poll);
}
