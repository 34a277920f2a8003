// What is kept about a domain, checked while it runs.
using System.Diagnostics;

namespace XenSharp.Domains;

/// <summary>
/// Checks a domain's frame table every so many exits, between two operations: the vCPU that came out has done what it came out for, and
/// the others are brought to rest at the top of their loops, or asleep, for as long as the check takes.
/// </summary>
/// <param name="interval">Exits between two checks.</param>
internal sealed unsafe class DomainAudit(int interval)
{
    /// <summary>A vCPU that takes longer to come to rest is let go on, and nothing is checked.</summary>
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(1);

    private readonly object _gate = new();
    private long _exits;
    private long _count;

    /// <summary>Threads of vCPUs that are not at rest.</summary>
    private int _busy;
    private bool _wanted;

    /// <summary>Checks that were made.</summary>
    public long Count => Volatile.Read(in _count);

    /// <summary>A vCPU is to <see cref="Rest"/> before it does anything else.</summary>
    public bool Wanted => Volatile.Read(in _wanted);

    /// <summary>The calling thread is a vCPU's that goes on from rest; it waits for a check that is under way.</summary>
    public void Resume()
    {
        lock (_gate)
        {
            while (_wanted)
                _ = Monitor.Wait(_gate);
            _busy++;
        }
    }

    /// <summary>The calling thread, a vCPU's, changes nothing about the domain before it calls <see cref="Resume"/>.</summary>
    public void Pause()
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
        Pause();
        Resume();
    }

    /// <summary>Counts an exit, and checks when it is time to; crashes the domain where something is wrong.</summary>
    public void AfterExit(Vcpu vcpu)
    {
        if (Interlocked.Increment(ref _exits) % interval != 0)
            return;
        string? trouble;
        lock (_gate)
        {
            if (_wanted)
                return;
            Volatile.Write(ref _wanted, true);
            vcpu.Domain.KickOthers(vcpu);
            long start = Stopwatch.GetTimestamp();
            while (_busy > 1 && Patience - Stopwatch.GetElapsedTime(start) is { Ticks: > 0 } left)
                _ = Monitor.Wait(_gate, left);
            bool atRest = _busy == 1;
            trouble = atRest ? vcpu.Domain.AuditFrames() : null;
            _count += atRest ? 1 : 0;
            Volatile.Write(ref _wanted, false);
            Monitor.PulseAll(_gate);
        }

        if (trouble != null)
            vcpu.Domain.Crash(vcpu, $"The domain's books do not agree: {trouble}");
    }
}
