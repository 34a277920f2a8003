// The statuses that the command ends with, for scripts.

namespace XenSharp.Cli.Commands;

/// <summary>Exit statuses of <c>xensharp</c>. A signal's is 128 plus its number.</summary>
internal static class ExitStatus
{
    /// <summary>The guest powered off, the user left with Ctrl-], or the command had nothing to run.</summary>
    internal const int Success = 0;

    /// <summary>The guest crashed, or stopped for a reason that Xen's interface does not define.</summary>
    internal const int GuestCrash = 1;

    /// <summary>What the daemon was asked to do was not done; a sentence on standard error says why. xl's status for it.</summary>
    internal const int Failed = 1;

    /// <summary>What was compared differs, and nothing says why.</summary>
    internal const int Different = 1;

    /// <summary>The command line or the host is not fit for what was asked; a sentence on standard error says what to do.</summary>
    internal const int Error = 2;

    /// <summary>The guest asked to be rebooted.</summary>
    internal const int GuestReboot = 3;

    /// <summary>The guest suspended itself, which is not served.</summary>
    internal const int GuestSuspend = 4;

    /// <summary>The guest's own watchdog stopped it.</summary>
    internal const int GuestWatchdog = 5;

    /// <summary>The guest asked for a soft reset, which is not served.</summary>
    internal const int GuestSoftReset = 6;

    /// <summary>A defect of XenSharp's own: EX_SOFTWARE of sysexits.h.</summary>
    internal const int Defect = 70;

    /// <summary>The output's reader has gone away, as a filter ends that SIGPIPE kills.</summary>
    internal const int OutputReaderGone = OfSignal + 13;

    /// <summary>What is added to a signal's number.</summary>
    internal const int OfSignal = 128;
}
