// The guest's clock against the host's, and what a domain costs that has nothing to do.
using System.Diagnostics;
using XenSharp.Core;
using XenSharp.Devices.Console;
using XenSharp.Domains;
using XenSharp.Guests;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Kvm;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

[TestFixture]
public sealed class TimeTests : KvmFixture
{
    /// <summary>The environment variable with the time that clocks are compared for, in seconds.</summary>
    private const string Variable = "XENSHARP_TIME_SECONDS";

    private const int DefaultSeconds = 10;
    private const long Second = 1_000_000_000;

    /// <summary>In how many nanoseconds both clocks and a counter are read where a reading is to count; less than that, if nothing comes between.</summary>
    private const long WidestBracket = 1_000;

    private static int Seconds => Durations.Seconds(Variable, DefaultSeconds);

    /// <summary>
    /// What a guest makes of its vcpu_time_info and the counter, within a microsecond of CLOCK_MONOTONIC: while it runs, and as soon as it
    /// goes on after a pause.
    /// </summary>
    [Test]
    [Category("Long")]
    public async Task The_guests_clock_is_the_hosts_to_a_microsecond()
    {
        await using RunningDomain running = RunningDomain.Create(Host, Tiny(TinyGuestBehaviour.SpinForever), new StreamSink(Stream.Null));
        Domain domain = running.Domain;
        running.Start();
        Thread.Sleep(3000);
        var deviations = new List<double>();
        double worstAfterPause = 0;
        long end = Stopwatch.GetTimestamp() + (Seconds * Second);
        long nextPause = Stopwatch.GetTimestamp() + (Seconds * Second / 4);
        while (Stopwatch.GetTimestamp() < end)
        {
            if (Stopwatch.GetTimestamp() >= nextPause)
            {
                domain.Pause();
                Thread.Sleep(Seconds * 1000 / 8);
                _ = domain.Unpause();
                Thread.Sleep(1);
                worstAfterPause = Math.Max(worstAfterPause, Math.Abs(Deviation(domain) ?? 0));
                nextPause = Stopwatch.GetTimestamp() + (Seconds * Second / 4);
            }

            if (Deviation(domain) is { } deviation)
                deviations.Add(deviation);
            Thread.Sleep(7);
        }

        running.Destroy();
        Assert.That(deviations, Is.Not.Empty, "The host is too busy to compare clocks on.");
        double worst = deviations.Max(Math.Abs);
        TestContext.Out.WriteLine(
            $"{deviations.Count} readings in {Seconds} s: at most {worst:0} ns off, {worstAfterPause:0} ns right after a pause, {deviations.Average():0} ns on average.");
        Assert.That(worst, Is.LessThanOrEqualTo(1000));
        Assert.That(worstAfterPause, Is.LessThanOrEqualTo(1000));
    }

    /// <summary>
    /// What of a core a Debian guest takes that sleeps, with a tick of 250 Hz and without one, beside a thread that is woken as often and makes
    /// one bare exit each time. The figures are printed: what a wake-up costs is the host's, and differs by what else that does. One that
    /// waits by looking takes all of a core.
    /// </summary>
    [TestCase("")]
    [TestCase("nohz=off")]
    [Category("Debian")]
    [CancelAfter(600_000)]
    public async Task A_domain_that_sleeps_costs_little(string parameter)
    {
        const int seconds = 10;
        const double most = 30;
        const int windows = 3;
        DomainImage image = await DebianGuest.ImageAsync(
            DebianKernelFlavour.CloudAmd64, new BusyboxInitramfsOptions { InitScript = "sleep 3; echo idle; sleep 1000\n" }, reusable: false);
        var console = new ConsoleLines();
        await using RunningDomain domain = RunningDomain.Create(
            Host,
            new DomainSpecification
            {
                Name = "idle",
                Image = image,
                MemoryMiB = 128,
                CommandLine = $"console=hvc0 quiet {parameter}",
            },
            console);
        domain.Start();
        while (!console.Text.Contains("idle\n") && !console.Text.Contains("idle\r\n"))
            await Task.Delay(100);
        await Task.Delay(2000);

        // What else the machine does only adds, and takes ticks away: a window in which it did little is enough.
        bool isLittle = false;
        bool ticks = false;
        for (int window = 0; window < windows && !(isLittle && ticks); window++)
        {
            (double before, ulong calls) = (VcpuThreads.ProcessorTime("idle"), domain.Domain.HypercallCount);
            await Task.Delay(seconds * 1000);
            double percent = (VcpuThreads.ProcessorTime("idle") - before) / seconds * 100;
            calls = domain.Domain.HypercallCount - calls;
            double rate = Math.Max(1, calls / (double)seconds);
            WakeUpCost bare = RawWakeUpLoop.Measure(Host.Kvm, Host.Capabilities, TimeSpan.FromSeconds(1 / rate), Math.Max(16, (int)rate));
            TestContext.Out.WriteLine(
                $"{percent:0.000} % of a core, {rate:0} hypercalls a second, {percent / 100 / rate * 1e6:0.0} µs each; a thread that sleeps as often takes "
                + $"{bare.SleepNanoseconds / 1000:0.0} µs, with one bare exit {bare.EntryNanoseconds / 1000:0.0} µs: {bare.EntryNanoseconds * rate / 1e7:0.000} % of a core.");
            ticks |= parameter.Length == 0 ? calls < 200UL * seconds : calls > 200UL * seconds;
            isLittle |= percent <= most;
        }

        Assert.That(ticks, "It has its tick, or has none.");
        Assert.That(isLittle, $"at most {most} % of a core in one of {windows} windows");
    }

    /// <summary>Guest time less host time, in nanoseconds, of the tightest of several readings; null where none was tight.</summary>
    private static double? Deviation(Domain domain)
    {
        double deviation = 0;
        long tightest = long.MaxValue;
        for (int i = 0; i < 1000 && tightest > WidestBracket / 4; i++)
        {
            long before = Stopwatch.GetTimestamp();
            VcpuTimeInfo info = Read(domain);
            ulong tsc = domain.Time.GuestTsc;
            long after = Stopwatch.GetTimestamp();
            if (after - before >= tightest)
                continue;
            tightest = after - before;
            ulong delta = tsc - info.TscTimestamp;
            delta = info.TscShift < 0 ? delta >> -info.TscShift : delta << info.TscShift;
            double guest = (double)(((UInt128)delta * info.TscToSystemMul) >> 32) + info.SystemTime;
            deviation = guest - (before + ((after - before) / 2.0) - domain.Time.BootTime);
        }

        return tightest <= WidestBracket ? deviation : null;
    }

    /// <summary>The first vCPU's clock as a guest reads it, by its version.</summary>
    private static unsafe VcpuTimeInfo Read(Domain domain)
    {
        VcpuTimeInfo* info = &((VcpuInfo*)domain.Context->SharedInfo)->Time;
        while (true)
        {
            uint version = Volatile.Read(ref info->Version);
            Thread.MemoryBarrier();
            VcpuTimeInfo copy = *info;
            Thread.MemoryBarrier();
            if ((version & 1) == 0 && version == Volatile.Read(ref info->Version))
                return copy;
        }
    }
}
