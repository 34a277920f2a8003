namespace XenSharp.Domains;

/// <summary>Why a domain asked to stop: the SHUTDOWN_* reasons of xen/include/public/sched.h.</summary>
public enum ShutdownReason : uint
{
    PowerOff = 0,
    Reboot = 1,
    Suspend = 2,
    Crash = 3,
    Watchdog = 4,
    SoftReset = 5,
}

/// <summary>How a domain's run ended.</summary>
/// <param name="Reason">The guest's own reason, or <see cref="ShutdownReason.Crash"/> where the manager stopped it.</param>
/// <param name="Report">For a crash, the full text of the report for a person; otherwise <see langword="null"/>.</param>
public sealed record DomainExit(ShutdownReason Reason, string? Report = null);
