// Brings a domain's vCPUs to rest: to be paused, or for a look at what they work on.
using System.Diagnostics;

namespace XenSharp.Domains;

/// <summary>
/// Counts the threads of a domain's vCPUs that may change something about it, and keeps them at the top of their loops, or asleep, while
/// somebody wants that. Wishes add up.
/// </summary>
/// <param name="time">The domain's clock, which is kept right meanwhile.</param>
internal sealed class VcpuRest(Timekeeping time)
{
    private static readonly TimeSpan CalibrationPeriod = TimeSpan.FromTicks(Timekeeping.CalibrationPeriod / TimeSpan.NanosecondsPerTick);

    private readonly object _gate = new();

    /// <summary>Threads of vCPUs that are not at rest.</summary>
    private int _busy;
    private int _wishes;
    private bool _ended;

    /// <summary>A vCPU is to <see cref="Rest"/> before it does anything else.</summary>
    public bool Wanted => Volatile.Read(in _wishes) != 0;

    /// <summary>The calling thread is a vCPU's that goes on from rest; it waits while that is <see cref="Wanted"/>.</summary>
    public void Leave()
    {
        lock (_gate)
        {
            while (_wishes != 0 && !_ended)
            {
                if (!Monitor.Wait(_gate, CalibrationPeriod))
                    time.Calibrate();
            }

            _busy++;
        }
    }

    /// <summary>The calling thread, a vCPU's, changes nothing about the domain before it calls <see cref="Leave"/>.</summary>
    public void Enter()
    {
        lock (_gate)
        {
            _busy--;
            Monitor.PulseAll(_gate);
        }
    }

    /// <summary>Stays at rest while that is <see cref="Wanted"/>.</summary>
    public void Rest()
    {
        Enter();
        Leave();
    }

    /// <summary>Wants the vCPUs at rest, until <see cref="Release"/>; they have to be kicked afterwards.</summary>
    public void Want()
    {
        lock (_gate)
            _wishes++;
    }

    /// <summary>Wants the vCPUs at rest, unless somebody does already.</summary>
    public bool TryWant()
    {
        lock (_gate)
            return _wishes == 0 && ++_wishes != 0;
    }

    /// <summary>Waits until vCPUs are at rest, or the domain has ended.</summary>
    /// <param name="busy">Threads of vCPUs that need not be: 1 where the caller is one.</param>
    /// <param name="patience">How long to wait; null for ever.</param>
    /// <returns>Whether they are.</returns>
    public bool Await(int busy = 0, TimeSpan? patience = null)
    {
        long start = Stopwatch.GetTimestamp();
        lock (_gate)
        {
            while (_busy > busy)
            {
                TimeSpan left = patience is { } most ? most - Stopwatch.GetElapsedTime(start) : Timeout.InfiniteTimeSpan;
                if (_ended || (patience != null && left <= TimeSpan.Zero))
                    return false;
                _ = Monitor.Wait(_gate, left);
            }

            return true;
        }
    }

    /// <summary>Takes a wish back.</summary>
    public void Release()
    {
        lock (_gate)
        {
            Volatile.Write(ref _wishes, _wishes - 1);
            Monitor.PulseAll(_gate);
        }
    }

    /// <summary>Takes <see cref="End"/> back: the domain goes on.</summary>
    public void BeginAnew()
    {
        lock (_gate)
            _ended = false;
    }

    /// <summary>The domain stops: nobody is kept any more.</summary>
    public void End()
    {
        lock (_gate)
        {
            _ended = true;
            Monitor.PulseAll(_gate);
        }
    }
}
