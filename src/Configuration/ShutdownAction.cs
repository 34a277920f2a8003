// What becomes of a domain that has ended.

using System.Text.Json.Serialization;

namespace XenSharp.Configuration;

/// <summary>
/// What on_poweroff, on_reboot, on_crash, on_watchdog and on_soft_reset can say (libxl_action_on_shutdown). soft-reset is not among
/// them: Xen does it for HVM guests only, so that a PV domain which asks for it is ended.
/// </summary>
[JsonConverter(typeof(KebabCaseEnumConverter<ShutdownAction>))]
public enum ShutdownAction
{
    /// <summary>The domain is destroyed.</summary>
    Destroy,

    /// <summary>It is destroyed, and another is made from the same configuration.</summary>
    Restart,

    /// <summary>It is kept under another name, and another is made from the same configuration.</summary>
    RenameRestart,

    /// <summary>It is kept, to be looked at.</summary>
    Preserve,

    /// <summary>Its memory is written to a file, and it is destroyed.</summary>
    CoredumpDestroy,

    /// <summary>Its memory is written to a file; then as <see cref="Restart"/>.</summary>
    CoredumpRestart,
}
