// What a test bed is: a hypervisor that runs guests and says what they printed and how they ended.
namespace XenSharp.Oracle.Beds;

/// <summary>One guest to run in a bed.</summary>
/// <param name="Name">1 to 40 of a–z, 0–9, '-' and '_'; different for each guest of a run.</param>
/// <param name="Kernel">The kernel, an ELF image that any Xen domain builder takes.</param>
public sealed record BedGuest(string Name, ReadOnlyMemory<byte> Kernel)
{
    /// <summary>The initial ramdisk; empty for none.</summary>
    public ReadOnlyMemory<byte> Ramdisk { get; init; }

    /// <summary>The kernel's command line, without control characters.</summary>
    public string CommandLine { get; init; } = string.Empty;

    /// <summary>Memory in MiB.</summary>
    public int MemoryMiB { get; init; } = 32;

    /// <summary>vCPUs, at least 1. XenSharp's domains have one so far, whatever is asked for: a guest finds the others absent.</summary>
    public int Vcpus { get; init; } = 1;

    /// <summary>
    /// Whether it is the first of a pair: the next guest's domain is made right after this one's, has the next number, and both start
    /// together. A domain of a pair that has ended is destroyed at once, while the other may run on; the first's <see cref="Timeout"/> is that
    /// of both. Not every bed can.
    /// </summary>
    public bool WithNext { get; init; }

    /// <summary>How long it may run, by the clock of the wall, before it is taken for hung and destroyed.</summary>
    public TimeSpan Timeout { get; init; } = TimeSpan.FromSeconds(20);
}

/// <summary>How a guest ended: a reason of SCHEDOP_shutdown (public sched.h), or what was done to it.</summary>
public enum GuestEnding
{
    PowerOff,
    Reboot,
    Suspend,

    /// <summary>It said so itself, or the hypervisor crashed it.</summary>
    Crash,
    Watchdog,
    SoftReset,

    /// <summary>It ran longer than <see cref="BedGuest.Timeout"/> and was destroyed.</summary>
    TimedOut,
}

/// <summary>What came of one guest.</summary>
/// <param name="Name">The <see cref="BedGuest.Name"/>.</param>
/// <param name="Console">All that it printed, a character for each byte (Latin-1).</param>
/// <param name="Ending">How it ended.</param>
/// <param name="Report">What the hypervisor had to say of its end, for people; empty if nothing.</param>
public sealed record GuestRun(string Name, string Console, GuestEnding Ending, string Report = "");

/// <summary>A hypervisor to run guests on. A bed is used by one caller at a time.</summary>
public interface IGuestBed
{
    /// <summary>What it is, for headings: "Xen 4.17.7 (domU)".</summary>
    string Name { get; }

    /// <summary>Whether it costs nothing to be given the guests one after another (pairs together), so that their images need not all be in memory.</summary>
    bool TakesOneByOne => false;

    /// <summary>
    /// Runs guests, one after another but for pairs, each in a domain of its own, in as few boots of the hypervisor as it can.
    /// </summary>
    /// <returns>One result per guest, in the same order, each as soon as it is there.</returns>
    /// <exception cref="ArgumentException">A guest is not as <see cref="BedGuest"/> says; the message names it.</exception>
    /// <exception cref="OracleException">The bed cannot be set up, or broke down; the message says what to do.</exception>
    IAsyncEnumerable<GuestRun> RunAsync(IReadOnlyList<BedGuest> guests, CancellationToken cancellation = default);
}
