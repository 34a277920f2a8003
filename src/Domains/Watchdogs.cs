using XenSharp.Core;

namespace XenSharp.Domains;

/// <summary>The domain's two watchdog timers (SCHEDOP_watchdog): one that runs out ends the domain.</summary>
internal sealed class Watchdogs : IDisposable
{
    /// <summary>NR_DOMAIN_WATCHDOG_TIMERS.</summary>
    private const int Count = 2;

    /// <summary>What a timer can count to, 49 days; the guest may name 136 years.</summary>
    private const uint MaxSeconds = (uint.MaxValue - 1) / 1000;

    private readonly Lock _lock = new();
    private readonly Timer?[] _timers = new Timer?[Count];
    private readonly Action _expired;

    public Watchdogs(Action expired) => _expired = expired;

    /// <summary>Arms, re-arms or disarms one.</summary>
    /// <param name="id">1-based; 0 takes a free one.</param>
    /// <param name="seconds">Time to run; 0 disarms one that was taken, and lets a new one run out at once.</param>
    /// <returns>0, the id taken, or a negative errno; where none is free, -ENOSPC as an unsigned 32-bit number, as Xen has it.</returns>
    public long Set(uint id, uint seconds)
    {
        if (id > Count)
            return -(long)Errno.EINVAL;
        lock (_lock)
            return SetLocked(id, seconds);
    }

    private long SetLocked(uint id, uint seconds)
    {
        if (id == 0)
        {
            int free = Array.IndexOf(_timers, null);
            if (free < 0)
                return unchecked((uint)-(int)Errno.ENOSPC);
            Start(free, seconds);
            return free + 1;
        }

        int index = (int)id - 1;
        if (_timers[index] == null)
            return -(long)Errno.EINVAL;
        _timers[index]?.Dispose();
        _timers[index] = null;
        if (seconds != 0)
            Start(index, seconds);
        return 0;
    }

    /// <summary>Disarms all. Once this returns none is running out any more.</summary>
    public void Dispose()
    {
        foreach (Timer? timer in _timers)
            timer?.DisposeAsync().AsTask().GetAwaiter().GetResult();
    }

    private void Start(int index, uint seconds)
        => _timers[index] = new Timer(
            static self => ((Watchdogs)self!)._expired(), this, TimeSpan.FromSeconds(Math.Min(seconds, MaxSeconds)), Timeout.InfiniteTimeSpan);
}
