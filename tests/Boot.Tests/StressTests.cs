// Debian under stress: memory, processes and mappings come and go for a while, and nothing breaks.

using XenSharp.Domains;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Initramfs;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

/// <summary>Needs the network at its first run, for some 80 MB. Takes a quarter of a minute, or as long as <see cref="Variable"/> says.</summary>
[TestFixture]
[Parallelizable(ParallelScope.Self)]
[Category("Debian")]
[Category("Long")]
public sealed class StressTests : KvmFixture
{
    /// <summary>The environment variable with the time that the stress lasts, in seconds.</summary>
    private const string Variable = "XENSHARP_STRESS_SECONDS";

    private const int DefaultSeconds = 15;
    private const int MemoryMiB = 512;

    /// <summary>Exits between two checks of the frame table.</summary>
    private const int AuditInterval = 20_000;

    private static int Seconds => Durations.Seconds(Variable, DefaultSeconds);

    [Test]
    public async Task Memory_processes_and_mappings_come_and_go([Values(1, 4)] int vcpus)
    {
        using var end = new CancellationTokenSource(TimeSpan.FromSeconds((Seconds * 3) + 300));
        // Every stressor checks what it finds in its memory. The shared buffer that stress-ng makes at its start is as large as the
        // named cache of the host, and the third level of some is larger than the guest.
        string script = $"""
            stress-ng --vm 2 --vm-bytes 64M --fork 4 --mmap 2 --mmap-bytes 32M --verify --oomable --cache-level 1 --metrics-brief --timeout {Seconds}
            echo "@stress $?"
            echo "[dmesg]"; dmesg; echo "[end]"
            """;
        DomainImage image = await DebianGuest.ImageAsync(
            DebianKernelFlavour.Amd64,
            async cache => new BusyboxInitramfsOptions
            {
                Banner = string.Empty, InitScript = script, Files = await StressPrograms.GetAsync(cache, null, end.Token),
            },
            reusable: false,
            end.Token);
        var console = new ConsoleLines();
        await using RunningDomain domain = RunningDomain.Create(
            Host,
            new DomainSpecification
            {
                Name = "stress",
                Image = image,
                MemoryMiB = MemoryMiB,
                Vcpus = vcpus,
                CommandLine = "console=hvc0 quiet",
                AuditInterval = AuditInterval,
            },
            console);
        domain.Start();
        DomainExit exit = await domain.Completion.WaitAsync(end.Token);
        Assert.That(exit.Reason, Is.EqualTo(ShutdownReason.PowerOff), exit.Report + console.Text);
        TestContext.Out.WriteLine(console.Text[..console.Text.LastIndexOf("[dmesg]", StringComparison.Ordinal)]);
        TestContext.Out.WriteLine($"{domain.Domain.HypercallCount} hypercalls, {domain.Domain.AuditCount} audits");
        Assert.That(console.Text, Does.Contain("@stress 0\r\n"));
        Assert.That(domain.Domain.AuditCount, Is.Positive);
        string log = KernelLog.Section(console.Text, "[dmesg]", "[end]");
        Assert.That(KernelLog.TroubleIn(log), Is.Empty);
        Assert.That(log, Does.Not.Contain("Out of memory"));
    }
}
