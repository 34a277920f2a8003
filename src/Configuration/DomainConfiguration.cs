// What a domain is to be: the content of an xl.cfg(5) file, with defaults filled in.

using XenSharp.Configuration.Devices;

namespace XenSharp.Configuration;

/// <summary>
/// A domain as xl.cfg(5) describes one. <see cref="DomainConfigurationReader"/> makes one of a file,
/// <see cref="DomainConfigurationText"/> a file of one, <see cref="DomainConfigurationJson"/> is its form for programs.
/// </summary>
/// <remarks>
/// To be treated as immutable, and changed by <c>with</c>. Properties whose default is not their type's can be set for one reason: JSON
/// that leaves out what can only be initialized gets the type's default.
/// </remarks>
public sealed record DomainConfiguration
{
    /// <summary>Memory of a domain that says nothing about it, in MiB.</summary>
    public const int DefaultMemoryMiB = 512;

    /// <summary>The name (name): 1 to 255 printable ASCII characters without a slash.</summary>
    public required string Name { get; init; }

    /// <summary>The UUID (uuid); null for one that is made when the domain is.</summary>
    public Guid? Uuid { get; init; }

    /// <summary>Path of the kernel (kernel). With a bootloader, a path inside of the disk image.</summary>
    public string? Kernel { get; init; }

    /// <summary>Path of the initial ramdisk (ramdisk). With a bootloader, a path inside of the disk image.</summary>
    public string? Ramdisk { get; init; }

    /// <summary>
    /// The kernel's command line: cmdline, or else root= and extra put together. With a bootloader it goes behind the one that the disk
    /// image has.
    /// </summary>
    public string CommandLine { get; set; } = string.Empty;

    /// <summary>How the kernel is found inside the first disk (bootloader="pygrub"); null where it is a file of the host's.</summary>
    public BootloaderConfiguration? Bootloader { get; init; }

    /// <summary>Memory that the domain boots with, in MiB (memory).</summary>
    public int MemoryMiB { get; set; } = DefaultMemoryMiB;

    /// <summary>Memory up to which its balloon may grow, in MiB (maxmem); not below <see cref="MemoryMiB"/>. 0 for the same.</summary>
    public int MaxMemoryMiB { get; init; }

    /// <summary>vCPUs that are online from the start (vcpus), from 1 on.</summary>
    public int Vcpus { get; set; } = 1;

    /// <summary>vCPUs that can be brought online (maxvcpus); not below <see cref="Vcpus"/>. 0 for the same.</summary>
    public int MaxVcpus { get; init; }

    /// <summary>When the guest powers off.</summary>
    public ShutdownAction OnPoweroff { get; set; } = ShutdownAction.Destroy;

    /// <summary>When the guest asks for a reboot.</summary>
    public ShutdownAction OnReboot { get; set; } = ShutdownAction.Restart;

    /// <summary>When the guest crashes.</summary>
    public ShutdownAction OnCrash { get; set; } = ShutdownAction.Destroy;

    /// <summary>When the guest's watchdog fires.</summary>
    public ShutdownAction OnWatchdog { get; set; } = ShutdownAction.Destroy;

    /// <summary>When the guest asks for a soft reset.</summary>
    public ShutdownAction OnSoftReset { get; set; } = ShutdownAction.Destroy;

    /// <summary>The disks (disk).</summary>
    public IReadOnlyList<DiskConfiguration> Disks { get; set; } = [];

    /// <summary>The network interfaces (vif).</summary>
    public IReadOnlyList<VifConfiguration> Vifs { get; set; } = [];

    /// <summary>The channels (channel).</summary>
    public IReadOnlyList<ChannelConfiguration> Channels { get; set; } = [];

    /// <summary>The wall clock shows the host's local time instead of UTC (localtime).</summary>
    public bool LocalTime { get; init; }

    /// <summary>Seconds that the wall clock is ahead of UTC, or of local time (rtc_timeoffset).</summary>
    public int RtcTimeOffset { get; init; }

    /// <summary>What CPUID is to answer otherwise than it would (cpuid).</summary>
    public IReadOnlyList<CpuidMask> Cpuid { get; set; } = [];

    /// <summary>Which of the host's processors each vCPU may run on (cpus), in the notation of <see cref="ProcessorSet"/>; those without an item may on all.</summary>
    public IReadOnlyList<string> Processors
    {
        get => field ?? [];
        init;
    }

    /// <summary>The highest event-channel port (max_event_channels), as libxl's default.</summary>
    public int MaxEventChannels { get; set; } = 1023;

    /// <summary>Pages that the grant table may grow to (max_grant_frames); null for the toolstack's default.</summary>
    public int? MaxGrantFrames { get; init; }

    /// <summary>Pages' worth of grants of others that the domain may have mapped (max_maptrack_frames); null for the toolstack's default.</summary>
    public int? MaxMaptrackFrames { get; init; }

    /// <summary>The highest version of the grant table interface that it may use, 1 or 2 (max_grant_version); null for the toolstack's default.</summary>
    public int? MaxGrantVersion { get; init; }

    /// <summary>The domain may not be saved or moved (nomigrate).</summary>
    public bool NoMigrate { get; init; }

    /// <summary>Memory in MiB up to which the domain can grow: <see cref="MaxMemoryMiB"/>, or what it boots with.</summary>
    [System.Text.Json.Serialization.JsonIgnore]
    public int GreatestMemoryMiB => Math.Max(MaxMemoryMiB, MemoryMiB);

    /// <summary>vCPUs that the domain has, online or not.</summary>
    [System.Text.Json.Serialization.JsonIgnore]
    public int VcpuCount => Math.Max(MaxVcpus, Vcpus);

    /// <summary>
    /// The same with the host's paths made absolute, for a process that has another working directory. The targets of disks are absolute
    /// already (see <see cref="DiskConfiguration.Target"/>), and paths inside an image stay as they are.
    /// </summary>
    /// <param name="folder">What relative paths are relative to.</param>
    public DomainConfiguration WithAbsolutePaths(string folder) => Bootloader is not null ? this : this with
    {
        Kernel = Kernel is null ? null : Path.GetFullPath(Kernel, folder),
        Ramdisk = Ramdisk is null ? null : Path.GetFullPath(Ramdisk, folder),
    };
}
