// The clock that a guest computes from its vcpu_time_info, against the truth, on clocks of the test's own.
using XenSharp.Core;

namespace XenSharp.Domains.Tests.Runtime;

public sealed unsafe class TimekeepingTests
{
    private const long Second = 1_000_000_000;

    /// <summary>True time, and a TSC that runs at another rate than is said.</summary>
    private sealed class Clocks(uint kiloHertz, double errorPerMillion)
    {
        private readonly double _ticksPerNanosecond = kiloHertz / 1e6 * (1 + (errorPerMillion / 1e6));

        public long Now { get; set; } = 987_654_321_012;

        public ulong Tsc => 0x1234_5678_9abc + (ulong)(Now * _ticksPerNanosecond);

        public Timekeeping Start() => new(new TimeStampCounter(kiloHertz, 0), () => Tsc, () => Now, DateTime.UnixEpoch);
    }

    [TestCase(1_000_000U, 0)]
    [TestCase(2_450_000U, 300)]
    [TestCase(2_450_000U, -300)]
    [TestCase(1_000_000U, 300)]
    [TestCase(999_999U, -300)]
    [TestCase(4_800_000U, 123)]
    [TestCase(100_000U, -77)]
    [TestCase(33_333U, 250, Description = "slower than a tick every 20 ns: the shift is positive")]
    public void A_guest_stays_within_a_microsecond_and_never_goes_back(uint kiloHertz, double errorPerMillion)
    {
        var clocks = new Clocks(kiloHertz, errorPerMillion);
        long boot = clocks.Now;
        Timekeeping time = clocks.Start();
        VcpuTimeInfo info = default;
        time.Update(&info);
        var random = new Random(5);
        ulong last = 0;
        long next = boot;
        long worst = 0;
        while (clocks.Now < boot + (240 * Second))
        {
            clocks.Now += random.Next(1, 3_000_000);
            if (clocks.Now >= next)
            {
                // A guest that reads at the very moment before and after must not see time go back either.
                ulong before = GuestTime(info, clocks.Tsc);
                time.Calibrate();
                time.Update(&info);
                Assert.That(GuestTime(info, clocks.Tsc), Is.GreaterThanOrEqualTo(before));
                next = clocks.Now + time.Period;
            }

            ulong now = GuestTime(info, clocks.Tsc);
            Assert.That(now, Is.GreaterThanOrEqualTo(last));
            last = now;
            long error = Math.Abs((long)now - (clocks.Now - boot));
            if (clocks.Now > boot + Second)
                worst = Math.Max(worst, error);
            else
                Assert.That(error, Is.LessThan(20_000), "in the first second, before anything was measured");
        }

        Assert.That(worst, Is.LessThan(1_000));
    }

    [Test]
    public void A_clock_that_is_slewed_is_followed()
    {
        // NTP slows CLOCK_MONOTONIC by 500 millionths from one minute to the next.
        const long boot = 987_654_321_012;
        VcpuTimeInfo info = default;
        ulong tsc = 5;
        long truth = boot;
        var slewed = new Timekeeping(new TimeStampCounter(2_000_000, 0), () => tsc, () => truth, DateTime.UnixEpoch);
        ulong last = 0;
        for (int second = 0; second < 240; second++)
        {
            slewed.Calibrate();
            slewed.Update(&info);
            double rate = (second / 60 % 2) == 0 ? 1 : 1 - 500e-6;
            for (int part = 0; part < 100; part++)
            {
                tsc += 20_000_000;
                truth += (long)(10_000_000 * rate);
                ulong now = GuestTime(info, tsc);
                Assert.That(now, Is.GreaterThanOrEqualTo(last));
                last = now;
                if (second % 60 > 2 && second > 0)
                    Assert.That(Math.Abs((long)now - (truth - boot)), Is.LessThan(2_000));
            }
        }
    }

    [Test]
    public void Calibrating_often_does_no_harm()
    {
        var clocks = new Clocks(2_450_000, 300);
        long boot = clocks.Now;
        Timekeeping time = clocks.Start();
        VcpuTimeInfo info = default;
        ulong last = 0;
        for (int i = 0; i < 200_000; i++)
        {
            clocks.Now += 37_000;
            time.Calibrate();
            time.Update(&info);
            ulong now = GuestTime(info, clocks.Tsc);
            Assert.That(now, Is.GreaterThanOrEqualTo(last));
            last = now;
        }

        Assert.That(Math.Abs((long)last - (clocks.Now - boot)), Is.LessThan(1_000));
    }

    [Test]
    public void A_host_that_slept_does_not_turn_time_back()
    {
        // The TSC went on for an hour, CLOCK_MONOTONIC did not.
        ulong tsc = 5_000_000;
        long now = 77;
        var time = new Timekeeping(new TimeStampCounter(1_000_000, 0), () => tsc, () => now, DateTime.UnixEpoch);
        VcpuTimeInfo info = default;
        time.Update(&info);
        tsc += 3600UL * 1_000_000_000;
        now += Second;
        ulong before = GuestTime(info, tsc);
        time.Calibrate();
        time.Update(&info);
        Assert.That(GuestTime(info, tsc), Is.GreaterThanOrEqualTo(before));
        Assert.That(GuestTime(info, tsc + 1_000_000_000) - GuestTime(info, tsc), Is.EqualTo(1_000_000_000).Within(1_000_000));
    }

    [Test]
    public void The_manager_reads_the_guest_s_own_clock()
    {
        var clocks = new Clocks(2_450_000, 300);
        Timekeeping time = clocks.Start();
        VcpuTimeInfo info = default;
        for (int i = 0; i < 100; i++)
        {
            time.Calibrate();
            time.Update(&info);
            clocks.Now += 77_777_777;
            Assert.That(time.SystemTime, Is.EqualTo((long)GuestTime(info, clocks.Tsc)));

            // However wrong the rate is, a deadline is as far off on the host's clock as it is on the guest's.
            Assert.That(time.ToMonotonic(time.SystemTime + Second) - clocks.Now, Is.EqualTo(Second));
        }

        Assert.That(time.ToMonotonic(long.MaxValue), Is.EqualTo(long.MaxValue));
        Assert.That(time.ToMonotonic(long.MinValue), Is.EqualTo(clocks.Now));
    }

    [Test]
    public void A_counter_that_is_a_little_behind_does_not_turn_time_over()
    {
        ulong tsc = 1_000_000;
        var time = new Timekeeping(new TimeStampCounter(1_000_000, 0), () => tsc, () => 500, DateTime.UnixEpoch);
        long before = time.SystemTime;
        tsc -= 20;
        Assert.That(time.SystemTime, Is.EqualTo(before));
    }

    [Test]
    public void The_version_is_even_and_grows()
    {
        Timekeeping time = new Clocks(2_000_000, 0).Start();
        VcpuTimeInfo info = default;
        time.Update(&info);
        Assert.That(info.Version, Is.EqualTo(2));
        time.Update(&info);
        Assert.That(info.Version, Is.EqualTo(4));
        info.Version = uint.MaxValue;
        time.Update(&info);
        Assert.That(info.Version & 1, Is.Zero);
    }

    [Test]
    public void The_TSC_offset_counts()
    {
        var time = new Timekeeping(new TimeStampCounter(1_000_000, -500), () => 1500, () => 0, DateTime.UnixEpoch);
        VcpuTimeInfo info = default;
        time.Update(&info);
        Assert.That(info.TscTimestamp, Is.EqualTo(1000));
    }

    [Test]
    public void Wall_clock_in_shared_info()
    {
        byte* page = stackalloc byte[4096];
        new Span<byte>(page, 4096).Clear();
        var utc = new DateTime(2107, 3, 4, 5, 6, 7, DateTimeKind.Utc).AddTicks(1234567);
        new Timekeeping(new TimeStampCounter(1_000_000, 0), () => 0, () => 0, utc).UpdateWallClock(page);
        ulong seconds = *(uint*)(page + SharedInfoLayout.WallClockSeconds) | ((ulong)*(uint*)(page + SharedInfoLayout.WallClockSecondsHigh) << 32);
        Assert.That(DateTime.UnixEpoch.AddSeconds(seconds).AddTicks(*(uint*)(page + SharedInfoLayout.WallClockNanoseconds) / 100), Is.EqualTo(utc));
        Assert.That(*(uint*)(page + SharedInfoLayout.WallClockVersion), Is.EqualTo(2));
    }

    [TestCase(7200, 1_000_007_200u)]
    [TestCase(-3600, 999_996_400u)]
    [TestCase(-2_000_000_000, 0u)]
    public void A_wall_clock_has_the_domains_offset(int offset, uint seconds)
    {
        byte* page = stackalloc byte[4096];
        new Span<byte>(page, 4096).Clear();
        var time = new Timekeeping(new TimeStampCounter(1_000_000, 0), () => 0, () => 0, DateTime.UnixEpoch.AddSeconds(1_000_000_000))
        {
            WallClockOffset = TimeSpan.FromSeconds(offset),
        };
        time.UpdateWallClock(page);
        Assert.That((*(uint*)(page + SharedInfoLayout.WallClockSeconds), *(uint*)(page + SharedInfoLayout.WallClockSecondsHigh)), Is.EqualTo((seconds, 0u)));
    }

    /// <summary>What xen/interface/xen.h tells a guest to compute.</summary>
    private static ulong GuestTime(in VcpuTimeInfo info, ulong tsc)
    {
        ulong delta = tsc - info.TscTimestamp;
        delta = info.TscShift < 0 ? delta >> -info.TscShift : delta << info.TscShift;
        return info.SystemTime + (ulong)(((UInt128)delta * info.TscToSystemMul) >> 32);
    }
}
