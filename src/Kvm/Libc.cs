// What the monitor's host side asks of the C library beyond Tmds.LibC's typed surface, and the errors made of its errno.
using System.Diagnostics;
using System.Runtime.InteropServices;
using Tmds.Linux;

namespace XenSharp.Kvm;

/// <summary>A system call failed; the message is a sentence for a person, with errno's own text.</summary>
public sealed class KvmException(string message, int errno = 0)
    : Exception(errno == 0 ? message : $"{message}: {Marshal.GetPInvokeErrorMessage(errno)}")
{
    /// <summary>Linux's errno, or 0.</summary>
    public int Errno { get; } = errno;
}

internal static unsafe class Libc
{
    private const int SysTimerCreate = 222;
    private const int SysTimerSettime = 223;
    private const int SysTimerDelete = 226;
    private const int SysClockGettime = 228;
    private const int SysTgkill = 234;
    private const int SysGettid = 186;
    private const int SysSigaction = 13;
    private const int TimerAbsolute = 1;
    private const int SigevThreadId = 4;
    private const int ClockMonotonicId = 1;
    private const int ClockThreadId = 3;

    /// <summary>A real-time signal that neither the .NET runtime (SIGRTMIN) nor the C library (32, 33) uses.</summary>
    public const int KickSignal = 41;

    /// <summary>The calling thread's kernel id.</summary>
    public static int CurrentThread => (int)(long)LibC.syscall(SysGettid);

    /// <summary>CLOCK_MONOTONIC in nanoseconds, which on Linux is what Stopwatch counts.</summary>
    public static long MonotonicNow() => Stopwatch.GetTimestamp();

    /// <summary>What the calling thread has had of the processors (CLOCK_THREAD_CPUTIME_ID), in nanoseconds.</summary>
    public static long ThreadTime()
    {
        long* time = stackalloc long[2];
        return (long)LibC.syscall(SysClockGettime, ClockThreadId, time) == 0
            ? (time[0] * 1_000_000_000) + time[1]
            : throw new KvmException("This host does not say what a thread takes of its processors", LibC.errno);
    }

    /// <summary>
    /// Makes a stray kick harmless: one that comes for a thread which has ended, and whose number another thread has by now.
    /// Threads that block the signal still get it, as a blocked signal is never thrown away.
    /// </summary>
    public static void IgnoreStrayKicks()
    {
        // The kernel's struct sigaction: handler, flags, restorer, mask.
        const ulong ignore = 1;
        ulong* action = stackalloc ulong[4] { ignore, 0, 0, 0 };
        if ((long)LibC.syscall(SysSigaction, KickSignal, action, (void*)null, sizeof(ulong)) != 0)
            throw new KvmException("Cannot set up the signal that interrupts virtual processors", LibC.errno);
    }

    /// <summary>Sends the kick signal to one thread of this process.</summary>
    public static void KickThread(int thread) => _ = LibC.syscall(SysTgkill, Environment.ProcessId, thread, KickSignal);

    /// <summary>The signal set that holds only the kick signal.</summary>
    public static sigset_t KickSet()
    {
        sigset_t set;
        _ = LibC.sigemptyset(&set);
        _ = LibC.sigaddset(&set, KickSignal);
        return set;
    }

    /// <summary>Creates a CLOCK_MONOTONIC timer that kicks the thread.</summary>
    public static int CreateKickTimer(int thread)
    {
        // struct sigevent: sigev_value, sigev_signo, sigev_notify, sigev_notify_thread_id.
        byte* sigevent = stackalloc byte[64];
        new Span<byte>(sigevent, 64).Clear();
        *(int*)(sigevent + 8) = KickSignal;
        *(int*)(sigevent + 12) = SigevThreadId;
        *(int*)(sigevent + 16) = thread;
        int timer = 0;
        if ((long)LibC.syscall(SysTimerCreate, ClockMonotonicId, sigevent, &timer) != 0)
            throw new KvmException("Cannot create a timer for a virtual processor", LibC.errno);
        return timer;
    }

    /// <summary>Arms (absolute nanoseconds) or disarms (0) a timer of <see cref="CreateKickTimer"/>.</summary>
    public static void ArmKickTimer(int timer, long deadline)
    {
        // struct itimerspec: interval, value.
        long* spec = stackalloc long[4];
        spec[0] = spec[1] = 0;
        spec[2] = deadline / 1_000_000_000;
        spec[3] = deadline % 1_000_000_000;
        _ = LibC.syscall(SysTimerSettime, timer, TimerAbsolute, spec, (void*)null);
    }

    public static void DeleteKickTimer(int timer) => _ = LibC.syscall(SysTimerDelete, timer);
}
