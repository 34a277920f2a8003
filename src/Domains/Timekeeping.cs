// The domain's clock: system time, the pvclock that lets the guest read it by itself, and the wall clock.
using System.Diagnostics;
using System.Runtime.CompilerServices;
using XenSharp.Core;

namespace XenSharp.Domains;

/// <summary>
/// System time is nanoseconds since the domain was made, by the TSC as each vCPU's vcpu_time_info says; it follows CLOCK_MONOTONIC. The
/// manager reads it just as the guest does: no timer fires before its time on the guest's own clock.
/// </summary>
public sealed class Timekeeping
{
    /// <summary>Nanoseconds between two corrections of the TSC rate.</summary>
    public const long CalibrationPeriod = 1_000_000_000;

    /// <summary>The first correction comes after this, and corrections are as far apart as the domain is old until then.</summary>
    private const long ShortestPeriod = 20_000_000;

    /// <summary>Reading both clocks takes longer than a rate measured over less can bear.</summary>
    private const long ShortestMeasurement = 10_000_000;

    private const double MaxCorrection = 500e-6;

    /// <summary>How far a measured rate may be from the one that the host says: more is a host that was suspended.</summary>
    private const double MaxRateError = 0.01;

    private readonly Lock _lock = new();
    private readonly TimeStampCounter _counter;
    private readonly Func<ulong> _hostTsc;
    private readonly Func<long> _monotonic;
    private long _bootTime;

    /// <summary>System time from which on this has kept the clock.</summary>
    private long _startTime;
    private readonly double _nominalRate;

    /// <summary>Odd while the anchor changes: who reads it then reads again.</summary>
    private uint _version;
    private ulong _anchorTsc;
    private ulong _anchorSystemTime;
    private double _anchorFraction;
    private double _nanosecondsPerTick;
    private uint _multiplier;
    private sbyte _shift;
    private bool _calibrated;
    private double _rate;
    private ulong _measuredTsc;
    private long _measuredTime;

    /// <summary>Frequency of the TSC.</summary>
    public uint TscKiloHertz => _counter.KiloHertz;

    /// <param name="counter">The guest-visible TSC.</param>
    /// <param name="hostTsc">Reads the host's TSC.</param>
    public Timekeeping(TimeStampCounter counter, Func<ulong> hostTsc)
        : this(counter, hostTsc, Stopwatch.GetTimestamp, DateTime.UtcNow)
    {
    }

    /// <param name="counter">The guest-visible TSC.</param>
    /// <param name="hostTsc">Reads the host's TSC.</param>
    /// <param name="monotonic">Reads CLOCK_MONOTONIC in nanoseconds.</param>
    /// <param name="utc">What the time is.</param>
    internal Timekeeping(TimeStampCounter counter, Func<ulong> hostTsc, Func<long> monotonic, DateTime utc)
    {
        _counter = counter;
        _hostTsc = hostTsc;
        _monotonic = monotonic;
        _bootTime = monotonic();
        BootUtc = utc;
        _nominalRate = _rate = _nanosecondsPerTick = 1_000_000.0 / counter.KiloHertz;
        (_measuredTsc, _measuredTime) = ReadBoth();
        _anchorTsc = _measuredTsc;
        _anchorSystemTime = (ulong)_measuredTime;
        UpdateFraction();
    }

    /// <summary>Nanoseconds until <see cref="Calibrate"/> should be called again.</summary>
    public long Period { get; private set; } = ShortestPeriod;

    /// <summary>CLOCK_MONOTONIC at system time 0.</summary>
    public long BootTime => _bootTime;

    /// <summary>UTC at system time 0.</summary>
    public DateTime BootUtc { get; private set; }

    /// <summary>
    /// Lets the clock go on from another system time, as that of a domain that was saved: system time 0 was that long ago. Before any vCPU
    /// runs.
    /// </summary>
    /// <param name="systemTime">Nanoseconds, not negative; not so many that UTC at system time 0 would be before 1970.</param>
    public void ContinueFrom(long systemTime)
    {
        lock (_lock)
        {
            long step = systemTime - TrueTime;
            _bootTime -= step;
            BootUtc -= TimeSpan.FromTicks(step / TimeSpan.NanosecondsPerTick);
            _measuredTime += step;
            _anchorSystemTime = (ulong)((long)_anchorSystemTime + step);
            _startTime = systemTime;
        }
    }

    /// <summary>Nanoseconds since the domain was made, as the guest computes them.</summary>
    public long SystemTime
    {
        get
        {
            while (true)
            {
                uint version = Volatile.Read(ref _version);
                (ulong anchor, ulong time, uint multiplier, int shift) = (_anchorTsc, _anchorSystemTime, _multiplier, _shift);
                Thread.MemoryBarrier();
                if ((version & 1) != 0 || version != _version)
                    continue;

                // The counter of another processor may be some ticks behind the one that the anchor is from.
                ulong delta = (ulong)Math.Max((long)(GuestTsc - anchor), 0);
                delta = shift < 0 ? delta >> -shift : delta << shift;
                return (long)time + (long)(ulong)(((UInt128)delta * multiplier) >> 32);
            }
        }
    }

    /// <summary>The counter and true time at one moment: of several readings that between which the least passes.</summary>
    private (ulong Tsc, long Time) ReadBoth()
    {
        const int readings = 8;
        (ulong Tsc, long Time) best = default;
        ulong tightest = ulong.MaxValue;
        for (int i = 0; i < readings; i++)
        {
            ulong before = GuestTsc;
            long time = TrueTime;
            ulong bracket = GuestTsc - before;
            if (bracket >= tightest)
                continue;
            tightest = bracket;
            best = (before + (bracket / 2), time);
        }

        return best;
    }

    private long TrueTime => _monotonic() - _bootTime;

    /// <summary>CLOCK_MONOTONIC at a system time, as far as can be said now; saturates.</summary>
    public long ToMonotonic(long systemTime)
    {
        long now = SystemTime;
        long monotonic = _monotonic();
        if (systemTime <= now)
            return monotonic;
        return systemTime - now > long.MaxValue - monotonic ? long.MaxValue : monotonic + (systemTime - now);
    }

    /// <summary>The TSC as the guest reads it now.</summary>
    public ulong GuestTsc => _hostTsc() + (ulong)_counter.Offset;

    /// <summary>
    /// Takes a new anchor on the line that the guest sees now, and turns its slope so that it meets true time at the end of the
    /// next period: the guest's clock never jumps and never runs backwards. All vCPUs share the line: the first that comes when the
    /// period is nearly over does it.
    /// </summary>
    public void Calibrate()
    {
        lock (_lock)
        {
            if (_calibrated && SystemTime - (long)_anchorSystemTime < Period / 2)
                return;
            _calibrated = true;
            Volatile.Write(ref _version, _version + 1);
            Thread.MemoryBarrier();
            TakeAnchor();
            Volatile.Write(ref _version, _version + 1);
        }
    }

    private void TakeAnchor()
    {
        (ulong tsc, long now) = ReadBoth();
        MeasureRate(tsc, now);

        // The guest is given whole nanoseconds; what is left of one must not be lost each time.
        double elapsed = _anchorFraction + ((tsc - _anchorTsc) * _nanosecondsPerTick);
        Period = Math.Clamp(now - _startTime, ShortestPeriod, CalibrationPeriod);
        double correction = (now - (long)_anchorSystemTime - elapsed) / Period;
        _anchorTsc = tsc;
        _anchorSystemTime += (ulong)elapsed;
        _anchorFraction = elapsed - Math.Floor(elapsed);
        _nanosecondsPerTick = _rate * (1 + Math.Clamp(correction, -MaxCorrection, MaxCorrection));
        UpdateFraction();
    }

    /// <summary>tsc_to_system_mul is a 32-bit fraction: brings the factor into [0.5, 1) and remembers by how much in the shift.</summary>
    private void UpdateFraction()
    {
        double factor = _nanosecondsPerTick;
        _shift = 0;
        for (; factor >= 1; _shift++)
            factor /= 2;
        for (; factor < 0.5; _shift--)
            factor *= 2;
        _multiplier = (uint)Math.Min(factor * 4294967296.0, uint.MaxValue);
    }

    /// <summary>The true length of a tick over the last period: what the host says of it may be some hundred millionths wrong.</summary>
    private void MeasureRate(ulong tsc, long now)
    {
        long time = now - _measuredTime;
        if (time < ShortestMeasurement)
            return;
        double rate = time / (double)(tsc - _measuredTsc);
        _rate = Math.Abs((rate / _nominalRate) - 1) < MaxRateError ? rate : _nominalRate;
        _measuredTsc = tsc;
        _measuredTime = now;
    }

    /// <summary>Stores the current parameters under the version protocol.</summary>
    public unsafe void Update(VcpuTimeInfo* info)
    {
        lock (_lock)
        {
            uint version = Volatile.Read(ref info->Version);
            Volatile.Write(ref info->Version, version | 1);
            Thread.MemoryBarrier();
            info->TscTimestamp = _anchorTsc;
            info->SystemTime = _anchorSystemTime;
            info->TscToSystemMul = _multiplier;
            info->TscShift = _shift;
            Thread.MemoryBarrier();
            Volatile.Write(ref info->Version, (version | 1) + 1);
        }
    }

    /// <summary>What the domain's wall clock is ahead of UTC (XEN_DOMCTL_settimeoffset).</summary>
    public TimeSpan WallClockOffset { get; init; }

    /// <summary>Stores the wall clock, UTC with the domain's offset at system time 0, into shared_info.</summary>
    public unsafe void UpdateWallClock(byte* sharedInfo)
    {
        long ticks = Math.Max(0, (BootUtc - DateTime.UnixEpoch + WallClockOffset).Ticks);
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
