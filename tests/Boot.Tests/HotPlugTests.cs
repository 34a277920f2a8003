// Debian with four vCPUs, of which some go and come while all work.

using System.Diagnostics;
using System.Globalization;
using XenSharp.Domains;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

/// <summary>Needs the network at its first run, for some 70 MB. Takes half a minute, or as long as <see cref="Variable"/> says.</summary>
[TestFixture]
[Parallelizable(ParallelScope.Self)]
[Category("Debian")]
[Category("Long")]
public sealed class HotPlugTests : KvmFixture
{
    /// <summary>The environment variable with the time that vCPUs go and come, in seconds.</summary>
    private const string Variable = "XENSHARP_HOTPLUG_SECONDS";

    private const int DefaultSeconds = 20;
    private const int Vcpus = 4;

    /// <summary>What the guest's clock, in seconds, may differ from the host's over the whole time; it is read in hundredths.</summary>
    private const double MaxClockDifference = 0.1;

    private static int Seconds => Durations.Seconds(Variable, DefaultSeconds);

    [Test]
    public async Task Vcpus_go_and_come_under_load()
    {
        using var end = new CancellationTokenSource(TimeSpan.FromSeconds((Seconds * 2) + 300));
        // The farm's shells fork; the sleeps need their timers wherever their vCPU has gone.
        string script = $$"""
            worker() { while [ ! -e /stop ]; do i=0; while [ $i -lt 20 ]; do ls /proc >/dev/null; i=$((i+1)); done; sleep 0.01; done; }
            for j in 1 2 3 4 5 6; do worker & done
            echo "@begins"; read go
            read start idle </proc/uptime
            echo "@start $start"
            now=${start%.*}; until=$((now+{{Seconds}})); changes=0
            while [ $now -lt $until ]; do
                for c in 1 2 3; do echo 0 >/sys/devices/system/cpu/cpu$c/online && changes=$((changes+1)); done
                for c in 3 1 2; do echo 1 >/sys/devices/system/cpu/cpu$c/online && changes=$((changes+1)); done
                read now idle </proc/uptime; now=${now%.*}
            done
            echo "@ends"; read go
            read end idle </proc/uptime
            echo "@end $end"
            touch /stop; wait
            echo "@changes $changes"
            echo "@online $(nproc)"
            echo "[dmesg]"; dmesg; echo "[end]"
            """;
        DomainImage image = await DebianGuest.ImageAsync(
            DebianKernelFlavour.Amd64,
            new BusyboxInitramfsOptions { Banner = string.Empty, InitScript = script.ReplaceLineEndings("\n") },
            reusable: false,
            end.Token);
        var console = new ConsoleLines();
        await using RunningDomain domain = RunningDomain.Create(
            Host,
            new DomainSpecification
            {
                Name = "hotplug",
                Image = image,
                MemoryMiB = 512,
                Vcpus = Vcpus,
                CommandLine = "console=hvc0 quiet",
            },
            console);
        domain.Start();
        (double started, long startAsked, long startSeen) = await AskAsync("@begins", "@start ");
        (double ended, long endAsked, long endSeen) = await AskAsync("@ends", "@end ");
        DomainExit exit = await domain.Completion.WaitAsync(end.Token);
        Assert.That(exit.Reason, Is.EqualTo(ShutdownReason.PowerOff), exit.Report + console.Text);
        int changes = (int)Number(await console.WaitForAsync("@changes ", domain.Stopped, end.Token));
        double least = Stopwatch.GetElapsedTime(startSeen, endAsked).TotalSeconds;
        double most = Stopwatch.GetElapsedTime(startAsked, endSeen).TotalSeconds;
        TestContext.Out.WriteLine($"{changes} changes in {ended - started:F2} s by the guest's clock, {least:F2} to {most:F2} s by the host's");
        Assert.That(changes, Is.AtLeast(6).And.EqualTo(changes / 6 * 6), "every one was made");
        Assert.That(Number(await console.WaitForAsync("@online ", domain.Stopped, end.Token)), Is.EqualTo(Vcpus));
        Assert.That(ended - started, Is.InRange(least - MaxClockDifference, most + MaxClockDifference));
        string log = KernelLog.Section(console.Text, "[dmesg]", "[end]");
        Assert.That(KernelLog.TroubleIn(log), Is.Empty);
        Assert.That(log, Does.Not.Contain("soft lockup").And.Not.Contain("rcu_sched").And.Not.Contain("rcu: INFO"));

        // The guest reads its clock between when it is asked to and when its answer is here, however long either is under way.
        async Task<(double Reading, long Asked, long Seen)> AskAsync(string ready, string answer)
        {
            _ = await console.WaitForAsync(ready, domain.Stopped, end.Token);
            long asked = Stopwatch.GetTimestamp();
            Assert.That(await domain.WriteInputAsync("go\n"u8.ToArray(), end.Token), Is.True);
            double reading = Number(await console.WaitForAsync(answer, domain.Stopped, end.Token));
            return (reading, asked, Stopwatch.GetTimestamp());
        }
    }

    private static double Number(string text) => double.Parse(text, CultureInfo.InvariantCulture);
}
