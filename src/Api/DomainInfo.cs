// What the daemon says of a domain: what xl list, vcpu-list, uptime and xentop show.

namespace XenSharp.Api;

/// <summary>Why a domain has shut down (SHUTDOWN_* of xen/include/public/sched.h).</summary>
public enum DomainShutdownReason
{
    PowerOff = 0,
    Reboot = 1,
    Suspend = 2,
    Crash = 3,
    Watchdog = 4,
    SoftReset = 5,
}

/// <summary>A domain's state: what xl's six letters say.</summary>
public sealed record DomainStateInfo
{
    /// <summary>A vCPU of it runs right now (r).</summary>
    public bool Running { get; init; }

    /// <summary>All its vCPUs sleep (b).</summary>
    public bool Blocked { get; init; }

    /// <summary>It is paused (p).</summary>
    public bool Paused { get; init; }

    /// <summary>It has shut down and was not taken apart (s); <see cref="Reason"/> says why.</summary>
    public bool Shutdown { get; init; }

    /// <summary>It has crashed and was preserved (c).</summary>
    public bool Crashed { get; init; }

    /// <summary>It is being taken apart (d).</summary>
    public bool Dying { get; init; }

    /// <summary>Why it has shut down; null while it has not.</summary>
    public DomainShutdownReason? Reason { get; init; }

    /// <summary>The six letters of xl list: r, b, p, s, c, d, or '-' in each place.</summary>
    public string Letters => string.Create(6, this, static (letters, state) =>
    {
        bool[] set = [state.Running, state.Blocked, state.Paused, state.Shutdown, state.Crashed, state.Dying];
        for (int i = 0; i < letters.Length; i++)
            letters[i] = set[i] ? "rbpscd"[i] : '-';
    });
}

/// <summary>What a domain's devices have done, all of a kind together, since it was made.</summary>
public sealed record DomainIoStatistics
{
    /// <summary>How many block devices it has.</summary>
    public int BlockDevices { get; init; }

    /// <summary>Requests to read.</summary>
    public ulong BlockReads { get; init; }

    /// <summary>Requests to write.</summary>
    public ulong BlockWrites { get; init; }

    /// <summary>Bytes read.</summary>
    public ulong BlockBytesRead { get; init; }

    /// <summary>Bytes written.</summary>
    public ulong BlockBytesWritten { get; init; }

    /// <summary>How many network interfaces it has.</summary>
    public int NetworkDevices { get; init; }

    /// <summary>Bytes that the guest has sent.</summary>
    public ulong NetworkBytesSent { get; init; }

    /// <summary>Bytes that the guest has received.</summary>
    public ulong NetworkBytesReceived { get; init; }
}

/// <summary>One domain.</summary>
public sealed record DomainInfo
{
    /// <summary>Its number, from 1 on.</summary>
    public required int Id { get; init; }

    /// <summary>Its name.</summary>
    public required string Name { get; init; }

    /// <summary>Its UUID, the same for each of its incarnations.</summary>
    public required Guid Uuid { get; init; }

    public required DomainStateInfo State { get; init; }

    /// <summary>The memory that it has, in KiB.</summary>
    public required long MemoryKiB { get; init; }

    /// <summary>What its balloon is to come to, in KiB.</summary>
    public required long TargetMemoryKiB { get; init; }

    /// <summary>What it may have at most, in KiB.</summary>
    public required long MaximumMemoryKiB { get; init; }

    /// <summary>What the host has given for it, in KiB: pages that the guest never touched take nothing.</summary>
    public long ResidentMemoryKiB { get; init; }

    /// <summary>vCPUs that are up.</summary>
    public required int OnlineVcpus { get; init; }

    /// <summary>vCPUs that it may bring up.</summary>
    public required int MaximumVcpus { get; init; }

    /// <summary>Processor time of all its vCPUs together, in seconds.</summary>
    public required double ProcessorSeconds { get; init; }

    /// <summary>When the daemon was asked for this incarnation, or began to make it anew; null where it does not say.</summary>
    public DateTimeOffset? RequestTime { get; init; }

    /// <summary>When this incarnation was made.</summary>
    public required DateTimeOffset StartTime { get; init; }

    /// <summary>Seconds since then.</summary>
    public required double UptimeSeconds { get; init; }

    /// <summary>When its first vCPU was about to execute its first instruction; null before that.</summary>
    public DateTimeOffset? FirstEntryTime { get; init; }

    /// <summary>The kernel's file.</summary>
    public string Kernel { get; init; } = string.Empty;

    /// <summary>The ramdisk's file.</summary>
    public string? Ramdisk { get; init; }

    /// <summary>The kernel's command line.</summary>
    public string CommandLine { get; init; } = string.Empty;

    /// <summary>For one that has crashed: the report, for people.</summary>
    public string? CrashReport { get; init; }

    public DomainIoStatistics Io { get; init; } = new();
}

/// <summary>One vCPU: a row of xl vcpu-list.</summary>
public sealed record VcpuInfo
{
    /// <summary>Its number, from 0 on.</summary>
    public required int Id { get; init; }

    /// <summary>The guest has it up.</summary>
    public required bool Online { get; init; }

    /// <summary>It runs right now.</summary>
    public required bool Running { get; init; }

    /// <summary>It sleeps until something happens.</summary>
    public required bool Blocked { get; init; }

    /// <summary>The domain is paused.</summary>
    public bool Paused { get; init; }

    /// <summary>The host's processor that it is on, or was last; null where that is not known.</summary>
    public int? Processor { get; init; }

    /// <summary>The host's processors that it may run on, such as "0-3,6"; null for all (its hard affinity).</summary>
    public string? Processors { get; init; }

    /// <summary>Processor time in seconds.</summary>
    public required double ProcessorSeconds { get; init; }

    /// <summary>The three letters of xl vcpu-list: r, b, p, or '-' in each place; "--p" for one that is down, as xl prints it.</summary>
    public string Letters => Online ? $"{(Running ? 'r' : '-')}{(Blocked ? 'b' : '-')}{(Paused ? 'p' : '-')}" : "--p";
}

/// <summary>A domain that ran when an earlier daemon ended without taking it down (it was killed, or the machine lost power).</summary>
public sealed record LostDomain
{
    public required string Name { get; init; }

    public required Guid Uuid { get; init; }

    /// <summary>The number that it had.</summary>
    public required int Id { get; init; }

    /// <summary>When it was made.</summary>
    public required DateTimeOffset StartTime { get; init; }

    /// <summary>When a daemon found that it is gone.</summary>
    public required DateTimeOffset FoundLost { get; init; }

    /// <summary>What it was made from, to be given to create again.</summary>
    public required DomainConfigurationDocument Configuration { get; init; }
}
