using XenSharp.Core;
using XenSharp.Core.Trace;
using XenSharp.Domains.Builder;
using XenSharp.Domains.Emulation;
using XenSharp.Domains.Grants;

namespace XenSharp.Domains;

/// <summary>What a domain is made from.</summary>
public sealed record DomainOptions
{
    /// <summary>Smallest memory that is accepted.</summary>
    public const int MinMemoryMiB = 4;

    /// <summary>Frames that a domain may have beyond its memory, as libxl lets every one (LIBXL_MAXMEM_CONSTANT).</summary>
    private const ulong SparePages = 256;

    /// <summary>
    /// Frames of other domains that a domain can have mapped, unless its VM is made with a window of another size: four block rings' worth
    /// of persistent grants (1056 each in Linux). Each is a mapping of this process on the host, which has 65,530 of them
    /// (vm.max_map_count); no page takes memory before it is mapped. Mapping one frame often takes but one.
    /// </summary>
    public const ulong WindowFrames = 4096;

    /// <summary>Frames beside the domain's own and its grant table: shared_info is there.</summary>
    private const ulong HypervisorPages = 24;

    /// <summary>Name for people; the guest does not see it.</summary>
    public required string Name { get; init; }

    /// <summary>Domain id, 1..0x7fef; 0 for the next that is free.</summary>
    public ushort Id { get; init; }

    /// <summary>The kernel. Null, and not looked at, for a domain that is restored.</summary>
    public KernelImage? Kernel { get; init; }

    /// <summary>The initial ramdisk; empty for none.</summary>
    public ReadOnlyMemory<byte> Ramdisk { get; init; }

    /// <summary>Memory that the domain boots with, in MiB (xl's memory).</summary>
    public int MemoryMiB { get; init; } = 512;

    /// <summary>
    /// Memory that its balloon can let it grow to, in MiB: where its memory map ends (xl's maxmem). 0 for <see cref="MemoryMiB"/>.
    /// </summary>
    public int MaxMemoryMiB { get; init; }

    /// <summary>vCPUs that the guest may bring up, from 1 to what the VM can have; the first is up from the start.</summary>
    public int Vcpus { get; init; } = 1;

    /// <summary>The highest event-channel port that the guest may have, 1 to 131071 (xl's max_event_channels, and its default).</summary>
    public uint MaxEventChannels { get; init; } = 1023;

    /// <summary>What its grant table may grow to; the VM needs room for that (<see cref="MachineFrames"/>).</summary>
    public GrantLimits GrantLimits { get; init; } = new();

    /// <summary>Kernel command line, at most 1023 bytes in UTF-8.</summary>
    public string CommandLine { get; init; } = string.Empty;

    /// <summary>The domain's UUID (XENVER_guest_handle).</summary>
    public Guid Uuid { get; init; } = Guid.NewGuid();

    /// <summary>Seconds that the wall clock is ahead of UTC (XEN_DOMCTL_settimeoffset; xl's rtc_timeoffset and localtime).</summary>
    public int TimeOffsetSeconds { get; init; }

    /// <summary>Reads the host's TSC.</summary>
    public required Func<ulong> HostTsc { get; init; }

    /// <summary>Records everything that the guest asks for; stays the caller's. Null for no trace.</summary>
    public TraceRecorder? Trace { get; init; }

    /// <summary>KVM shadows the guest's page tables: host stores are seen only when repeated inside the VM.</summary>
    public bool ShadowPageTables { get; init; }

    /// <summary>What the CPUID policy starts from beside the host's leaves.</summary>
    public CpuidOptions Cpuid { get; init; } = new();

    /// <summary>
    /// Exits of a vCPU between two checks that what is kept about the domain's frames agrees with itself, for tests; a check takes
    /// milliseconds, and one that fails crashes the domain with a report. 0 for none.
    /// </summary>
    public int AuditInterval { get; init; }

    /// <summary>Frames that a domain which is to have so much memory may own (max_pages).</summary>
    /// <param name="memoryMiB">The memory in MiB.</param>
    public static ulong MaxPages(int memoryMiB) => Pages(memoryMiB) + SparePages;

    /// <summary>Frames that the VM of a domain needs.</summary>
    /// <param name="maxMemoryMiB">The most memory that it is ever to have, in MiB.</param>
    /// <param name="grants">What its grant table may grow to; null for what is usual.</param>
    public static ulong MachineFrames(int maxMemoryMiB, GrantLimits? grants = null)
    {
        // The states of entries of version 2 take an eighth of what the entries do.
        ulong frames = (ulong)(grants ?? new GrantLimits()).Frames;
        return MaxPages(maxMemoryMiB) + HypervisorPages + frames + ((frames + 7) / 8);
    }

    internal static ulong Pages(int memoryMiB) => (ulong)memoryMiB << (20 - Paging.PageShift);
}
