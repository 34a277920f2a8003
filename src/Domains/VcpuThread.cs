// The host's thread that a vCPU runs on, as the host's scheduler counts it.
using System.Runtime.InteropServices;

namespace XenSharp.Domains;

/// <summary>Tells how much processor time a vCPU's thread has had, and says where it may run; for any thread, also after it has ended.</summary>
internal sealed partial class VcpuThread
{
    /// <summary>CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED of the kernel's posix-timers.h.</summary>
    private const int ThreadClock = 4 | 2;

    private const int MaskBits = 64;

    /// <summary>Room for the 8192 processors that Linux can have on x86.</summary>
    private const int MaskWords = 8192 / MaskBits;

    private int _id;
    private long _ended;
    private ulong[]? _processors;

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
    public void Begin()
    {
        int id = gettid();
        _ = Interlocked.Exchange(ref _id, id);

        // It may have been started by another vCPU's, and begin where that one was put.
        if ((Volatile.Read(ref _processors) ?? ReadAffinity(Environment.ProcessId)) is { } processors)
            _ = WriteAffinity(id, processors);
    }

    /// <summary>Says which of the host's processors it may run on; also before there is a thread.</summary>
    /// <returns>False where the host does not let it.</returns>
    public bool SetProcessors(IReadOnlyList<int> processors)
    {
        var mask = new ulong[(processors.Max() / MaskBits) + 1];
        foreach (int processor in processors)
            mask[processor / MaskBits] |= 1UL << (processor % MaskBits);
        ulong[]? before = Interlocked.Exchange(ref _processors, mask);
        int id = Id;
        if (id == 0 || WriteAffinity(id, mask))
            return true;
        _ = Interlocked.Exchange(ref _processors, before);
        return false;
    }

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

    private static ulong[]? ReadAffinity(int thread)
    {
        var mask = new ulong[MaskWords];
        return sched_getaffinity(thread, (nuint)(mask.Length * sizeof(ulong)), mask) == 0 ? mask : null;
    }

    private static bool WriteAffinity(int thread, ulong[] mask) => sched_setaffinity(thread, (nuint)(mask.Length * sizeof(ulong)), mask) == 0;

    [LibraryImport("libc")]
    private static partial int gettid();

    [LibraryImport("libc")]
    private static partial int sched_getaffinity(int thread, nuint size, [Out] ulong[] mask);

    [LibraryImport("libc")]
    private static partial int sched_setaffinity(int thread, nuint size, ulong[] mask);

    [LibraryImport("libc")]
    private static partial int clock_gettime(int clock, out TimeSpec time);

    [StructLayout(LayoutKind.Sequential)]
    private struct TimeSpec
    {
        public long Seconds;
        public long Nanoseconds;
    }
}
