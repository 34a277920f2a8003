// The host's thread that a vCPU runs on, as the host's scheduler counts it.
using System.Runtime.InteropServices;

namespace XenSharp.Domains;

/// <summary>Tells how much processor time a vCPU's thread has had; any thread may ask, and also after it has ended.</summary>
internal sealed partial class VcpuThread
{
    /// <summary>CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED of the kernel's posix-timers.h.</summary>
    private const int ThreadClock = 4 | 2;

    private int _id;
    private long _ended;

    /// <summary>Linux's number of the thread; 0 where there is none.</summary>
    public int Id => Volatile.Read(ref _id);

    /// <summary>What it has had by now.</summary>
    public TimeSpan ProcessorTime
    {
        get
        {
            int id = Id;
            return id != 0 && Read(id) is { } time ? time : new TimeSpan(Volatile.Read(ref _ended));
        }
    }

    /// <summary>The calling thread is the vCPU's.</summary>
    public void Begin() => Volatile.Write(ref _id, gettid());

    /// <summary>The calling thread is about to end.</summary>
    public void End()
    {
        Volatile.Write(ref _ended, ProcessorTime.Ticks);
        Volatile.Write(ref _id, 0);
    }

    /// <summary>Null where the thread is gone.</summary>
    private static TimeSpan? Read(int id)
        => clock_gettime((~id << 3) | ThreadClock, out TimeSpec time) == 0
            ? new TimeSpan((time.Seconds * TimeSpan.TicksPerSecond) + (time.Nanoseconds / TimeSpan.NanosecondsPerTick)) : null;

    [LibraryImport("libc")]
    private static partial int gettid();

    [LibraryImport("libc")]
    private static partial int clock_gettime(int clock, out TimeSpec time);

    [StructLayout(LayoutKind.Sequential)]
    private struct TimeSpec
    {
        public long Seconds;
        public long Nanoseconds;
    }
}
