// What the daemon says of the machine and of itself: what xl info shows.

namespace XenSharp.Api;

/// <summary>The machine that domains run on, and the daemon that runs them.</summary>
public sealed record HostInfo
{
    /// <summary>The machine's name.</summary>
    public required string Host { get; init; }

    /// <summary>Its kernel's release (uname -r).</summary>
    public required string Release { get; init; }

    /// <summary>The processor's architecture: x86_64.</summary>
    public required string Machine { get; init; }

    /// <summary>Its processors.</summary>
    public required int Processors { get; init; }

    /// <summary>Its memory in MiB.</summary>
    public required long TotalMemoryMiB { get; init; }

    /// <summary>What of it is available, in MiB.</summary>
    public required long FreeMemoryMiB { get; init; }

    /// <summary>The version of XenSharp.</summary>
    public required string Version { get; init; }

    /// <summary>The version of Xen whose ABI guests find: "4.17".</summary>
    public required string XenVersion { get; init; }

    /// <summary>The KVM device.</summary>
    public required string KvmDevice { get; init; }

    /// <summary>Why no domain can be run here, as a sentence; null where one can.</summary>
    public string? KvmProblem { get; init; }

    /// <summary>Domains that there are.</summary>
    public required int Domains { get; init; }

    /// <summary>When the daemon was started.</summary>
    public required DateTimeOffset StartTime { get; init; }

    /// <summary>The daemon's process.</summary>
    public required int ProcessId { get; init; }

    /// <summary>Where it keeps its records.</summary>
    public required string StateFolder { get; init; }

    /// <summary>The socket of xenstore, for xenstore-utils and the xenstore command; null where there is none.</summary>
    public string? XenstoreSocket { get; init; }
}
