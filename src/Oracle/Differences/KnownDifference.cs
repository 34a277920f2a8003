// Where XenSharp answers other than Xen does and it is known why.
namespace XenSharp.Oracle.Differences;

/// <summary>Why there is a difference.</summary>
public enum DifferenceKind
{
    /// <summary>It is to stay: the reason says what is better or cannot be had.</summary>
    ByDesign,

    /// <summary>What Xen does is not built yet.</summary>
    NotBuilt,
}

/// <summary>What a host's KVM cannot do for a guest, found by XenSharp's probes; some differences rest on that and show there only.</summary>
[Flags]
public enum HostLacks
{
    None = 0,

    /// <summary>Breakpoints in the debug registers raise nothing.</summary>
    DebugRegisters = 1 << 0,

    /// <summary>CR0.TS has no effect: FPU instructions never raise #NM.</summary>
    TaskSwitched = 1 << 1,

    /// <summary>CR4.TSD has no effect: RDTSC is never trapped.</summary>
    TimeStampDisable = 1 << 2,

    /// <summary>CPUID outside of the forced emulation shows the host's own leaves.</summary>
    CpuidPolicy = 1 << 3,

    /// <summary>Guests run without hardware's virtualization: at the mercy of the host's own descriptor tables and control registers.</summary>
    Virtualization = 1 << 4,
}

/// <summary>One difference that is expected. An expected difference that does not show is as wrong as one that was not expected.</summary>
/// <param name="Script">The script's name.</param>
/// <param name="Case">The case's name.</param>
/// <param name="Step">The step's text; null for any step of the case, which then may differ or not.</param>
/// <param name="Answer">What XenSharp answers instead; null only where <paramref name="Step"/> is.</param>
/// <param name="Kind">Whether it is to stay.</param>
/// <param name="Reason">Why, as a sentence for people.</param>
public sealed record KnownDifference(string Script, string Case, string? Step, string? Answer, DifferenceKind Kind, string Reason)
{
    /// <summary>Shows only on hosts that lack this; <see cref="HostLacks.None"/> for one that shows everywhere.</summary>
    public HostLacks OnlyWithout { get; init; }

    /// <summary>One step answers otherwise on hosts that lack something.</summary>
    public static KnownDifference Without(HostLacks what, string script, string @case, string step, string answer, string reason)
        => new(script, @case, step, answer, DifferenceKind.ByDesign, reason) { OnlyWithout = what };

    /// <summary>One step answers otherwise, for good.</summary>
    public static KnownDifference ByDesign(string script, string @case, string step, string answer, string reason)
        => new(script, @case, step, answer, DifferenceKind.ByDesign, reason);

    /// <summary>One step answers otherwise until something is built.</summary>
    public static KnownDifference NotBuilt(string script, string @case, string step, string answer, string reason)
        => new(script, @case, step, answer, DifferenceKind.NotBuilt, reason);

    /// <summary>Steps of a case answer otherwise until something is built; at least one.</summary>
    public static KnownDifference CaseNotBuilt(string script, string @case, string reason)
        => new(script, @case, null, null, DifferenceKind.NotBuilt, reason);
}

/// <summary>All of them.</summary>
public static class KnownDifferences
{
    public static IReadOnlyList<KnownDifference> All { get; } = [.. MemoryDifferences.All, .. EventDifferences.All, .. ProcessorDifferences.All];

    /// <summary>Those that show on a host.</summary>
    public static IReadOnlyList<KnownDifference> On(HostLacks lacks)
        => [.. All.Where(difference => difference.OnlyWithout == HostLacks.None || (difference.OnlyWithout & lacks) != 0)];
}
