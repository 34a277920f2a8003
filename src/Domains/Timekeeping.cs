// The domain's clock: system time, the pvclock that lets the guest read it by itself, and the wall clock.
using System.Diagnostics;
using System.Runtime.CompilerServices;
using XenSharp.Core;

namespace XenSharp.Domains;

/// <summary>
/// System time is nanoseconds of CLOCK_MONOTONIC since the domain was made; each vCPU's vcpu_time_info says how to get it from
/// the guest-visible TSC.
/// </summary>
public sealed class Timekeeping
{
    /// <summary>Nanoseconds between two corrections of the TSC rate.</summary>
    public const long CalibrationPeriod = 1_000_000_000;

    private const uint MaxCorrectionPerMillion = 500;

    private readonly TimeStampCounter _counter;
    private readonly Func<ulong> _hostTsc;
    private readonly long _bootTime;
    private readonly double _nominalNanosecondsPerTick;
    private ulong _anchorTsc;
    private ulong _anchorSystemTime;
    private double _nanosecondsPerTick;

    /// <param name="counter">The guest-visible TSC.</param>
    /// <param name="hostTsc">Reads the host's TSC.</param>
    public Timekeeping(TimeStampCounter counter, Func<ulong> hostTsc)
    {
        _counter = counter;
        _hostTsc = hostTsc;
        _bootTime = Stopwatch.GetTimestamp();
        BootUtc = DateTime.UtcNow;
        _nominalNanosecondsPerTick = _nanosecondsPerTick = 1_000_000.0 / counter.KiloHertz;
        _anchorTsc = GuestTsc;
        _anchorSystemTime = (ulong)SystemTime;
    }

    /// <summary>UTC at system time 0.</summary>
    public DateTime BootUtc { get; }

    /// <summary>Nanoseconds since the domain was made.</summary>
    public long SystemTime => Stopwatch.GetTimestamp() - _bootTime;

    /// <summary>CLOCK_MONOTONIC at a system time; saturates.</summary>
    public long ToMonotonic(long systemTime) => systemTime > long.MaxValue - _bootTime ? long.MaxValue : systemTime + _bootTime;

    /// <summary>The TSC as the guest reads it now.</summary>
    public ulong GuestTsc => _hostTsc() + (ulong)_counter.Offset;

    /// <summary>
    /// Takes a new anchor on the line that the guest sees now, and turns its slope so that it meets true time at the end of the
    /// next period: the guest's clock never jumps and never runs backwards.
    /// </summary>
    public void Calibrate()
    {
        ulong before = GuestTsc;
        long now = SystemTime;
        ulong tsc = before + ((GuestTsc - before) / 2);
        double seen = _anchorSystemTime + ((tsc - _anchorTsc) * _nanosecondsPerTick);
        double correction = (now - seen) / CalibrationPeriod;
        double limit = MaxCorrectionPerMillion / 1e6;
        _anchorTsc = tsc;
        _anchorSystemTime = (ulong)seen;
        _nanosecondsPerTick = _nominalNanosecondsPerTick * (1 + Math.Clamp(correction, -limit, limit));
    }

    /// <summary>Stores the current parameters under the version protocol.</summary>
    public unsafe void Update(VcpuTimeInfo* info)
    {
        // tsc_to_system_mul is a 32-bit fraction: bring the factor into [0.5, 1) and remember by how much in the shift.
        double factor = _nanosecondsPerTick;
        sbyte shift = 0;
        for (; factor >= 1; shift++)
            factor /= 2;
        for (; factor < 0.5; shift--)
            factor *= 2;

        uint version = Volatile.Read(ref info->Version);
        Volatile.Write(ref info->Version, version | 1);
        Thread.MemoryBarrier();
        info->TscTimestamp = _anchorTsc;
        info->SystemTime = _anchorSystemTime;
        info->TscToSystemMul = (uint)Math.Min(factor * 4294967296.0, uint.MaxValue);
        info->TscShift = shift;
        Thread.MemoryBarrier();
        Volatile.Write(ref info->Version, (version | 1) + 1);
    }

    /// <summary>Stores the wall clock, UTC at system time 0, into shared_info.</summary>
    public unsafe void UpdateWallClock(byte* sharedInfo)
    {
        long ticks = (BootUtc - DateTime.UnixEpoch).Ticks;
        ulong seconds = (ulong)(ticks / TimeSpan.TicksPerSecond);
        ref uint version = ref Unsafe.AsRef<uint>(sharedInfo + SharedInfoLayout.WallClockVersion);
        uint old = Volatile.Read(ref version);
        Volatile.Write(ref version, old | 1);
        Thread.MemoryBarrier();
        *(uint*)(sharedInfo + SharedInfoLayout.WallClockSeconds) = (uint)seconds;
        *(uint*)(sharedInfo + SharedInfoLayout.WallClockSecondsHigh) = (uint)(seconds >> 32);
        *(uint*)(sharedInfo + SharedInfoLayout.WallClockNanoseconds) = (uint)(ticks % TimeSpan.TicksPerSecond * 100);
        Thread.MemoryBarrier();
        Volatile.Write(ref version, (old | 1) + 1);
    }
}
