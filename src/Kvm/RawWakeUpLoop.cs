namespace XenSharp.Kvm;

/// <summary>What a thread's processor time a wake-up takes; means.</summary>
/// <param name="SleepNanoseconds">To sleep and be woken, and nothing else.</param>
/// <param name="EntryNanoseconds">To sleep, be woken, enter a guest and come back, and nothing else.</param>
public readonly record struct WakeUpCost(double SleepNanoseconds, double EntryNanoseconds);

/// <summary>
/// The floor of everything that happens when a sleeping domain is woken: a thread that sleeps as a vCPU's does, and makes one exit of
/// <see cref="RawExitLoop"/> each time. What a domain takes that has nothing to do but a tick is held against this, taken in the same run.
/// </summary>
public static class RawWakeUpLoop
{
    /// <summary>Wake-ups of one kind before it is the other's turn, so that what else the host does hits both.</summary>
    private const int Turn = 16;

    /// <summary>Measures on a thread of its own; waits until it is done.</summary>
    /// <param name="system">Where the guest is made.</param>
    /// <param name="capabilities">Of the same host.</param>
    /// <param name="period">From one wake-up to the next.</param>
    /// <param name="wakeUps">How many of each kind, at least 1.</param>
    /// <exception cref="KvmException">The guest cannot be made or entered.</exception>
    public static WakeUpCost Measure(KvmSystem system, HostCapabilities capabilities, TimeSpan period, int wakeUps)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(wakeUps);
        ArgumentOutOfRangeException.ThrowIfLessThanOrEqual(period, TimeSpan.Zero);
        WakeUpCost cost = default;
        KvmException? failure = null;
        var thread = new Thread(() =>
        {
            try
            {
                using var loop = new RawExitLoop(system, capabilities);
                cost = Measure(loop, (long)period.TotalNanoseconds, wakeUps);
            }
            catch (KvmException exception)
            {
                failure = exception;
            }
        }) { Name = "wake-ups", IsBackground = true };
        thread.Start();
        thread.Join();
        return failure == null ? cost : throw new KvmException(failure.Message, failure.Errno);
    }

    private static WakeUpCost Measure(RawExitLoop loop, long period, int wakeUps)
    {
        long sleeping = 0;
        long entering = 0;
        long next = Libc.MonotonicNow();
        for (int done = 0; done < wakeUps; done += Turn)
        {
            int turn = Math.Min(Turn, wakeUps - done);
            sleeping += Time(loop, ref next, period, turn, enters: false);
            entering += Time(loop, ref next, period, turn, enters: true);
        }

        return new WakeUpCost(sleeping / (double)wakeUps, entering / (double)wakeUps);
    }

    private static long Time(RawExitLoop loop, ref long next, long period, int wakeUps, bool enters)
    {
        long start = Libc.ThreadTime();
        for (int i = 0; i < wakeUps; i++)
        {
            // As a guest's tick: the next is due a period after this one was, or if that has passed, a period from now.
            next = Math.Max(next, Libc.MonotonicNow() - period) + period;
            loop.Sleep(next);
            if (enters)
                loop.EnterOnce();
        }

        return Libc.ThreadTime() - start;
    }
}
