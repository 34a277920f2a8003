// From a domain's configuration to what it is made from: kernel and ramdisk read, and what the host cannot do refused.

using XenSharp.Api;
using XenSharp.Configuration;
using XenSharp.Domains.Builder;
using XenSharp.Kvm;

namespace XenSharp.Toolstack.Management;

/// <summary>Reads what a configuration names.</summary>
internal static class DomainLoader
{
    /// <summary>Refuses what this host, or this build, cannot do.</summary>
    /// <returns>Sentences about settings that have no effect.</returns>
    /// <exception cref="ToolstackException">The domain cannot be had here.</exception>
    internal static IReadOnlyList<string> Check(DomainConfiguration configuration)
    {
        if (configuration.GreatestMemoryMiB > HostMachine.MemoryMiB)
        {
            throw Refusal(
                ProblemKind.HostCannot,
                $"The domain {configuration.Name} is to have up to {configuration.GreatestMemoryMiB} MiB, and this machine has {HostMachine.MemoryMiB}: give it less.");
        }

        if (configuration.VcpuCount > KvmVirtualMachine.MaxVcpus)
        {
            throw Refusal(
                ProblemKind.HostCannot,
                $"The domain {configuration.Name} is to have {configuration.VcpuCount} vCPUs, and a domain here can have {KvmVirtualMachine.MaxVcpus}: give it fewer.");
        }

        if (configuration.Channels.Count > 0)
            throw Refusal(ProblemKind.NotSupported, $"The domain {configuration.Name} has channel=, and channels are not supported by this build: leave it out.");
        List<string> ineffective = [];
        void Note(bool present, string key)
        {
            if (present)
                ineffective.Add($"{key} has no effect in this build.");
        }

        Note(configuration.Cpuid.Count > 0, "cpuid");
        Note(configuration.LocalTime, "localtime");
        Note(configuration.RtcTimeOffset != 0, "rtc_timeoffset");
        Note(configuration.MaxGrantFrames is not null, "max_grant_frames");
        Note(configuration.MaxMaptrackFrames is not null, "max_maptrack_frames");
        Note(configuration.MaxGrantVersion is not null, "max_grant_version");
        return ineffective;
    }

    /// <summary>Reads kernel and ramdisk.</summary>
    /// <exception cref="ToolstackException">They cannot be read, or are none; a sentence says which.</exception>
    internal static DomainImage Load(DomainConfiguration configuration)
    {
        if (configuration.Bootloader is not null)
            throw Refusal(ProblemKind.NotSupported, "A kernel inside a disk image (bootloader=) is not supported by this build: name it with kernel=.");
        if (configuration.Kernel is not { } kernel)
            throw Refusal(ProblemKind.BadConfiguration, $"The domain {configuration.Name} has no kernel: name it with kernel=.");
        try
        {
            byte[] image = HostFile.Read(Absolute(kernel, "kernel"), "kernel=", KernelImage.LargestUnpackedSize, "is larger than any kernel; name the kernel itself.");
            byte[] disk = configuration.Ramdisk is { } ramdisk
                ? HostFile.Read(
                    Absolute(ramdisk, "ramdisk"), "ramdisk=", (int)Math.Min((long)configuration.MemoryMiB << 20, Array.MaxLength),
                    $"does not fit into the domain's {configuration.MemoryMiB} MiB of memory; give it more with memory=.")
                : [];
            return new DomainImage(KernelImage.Parse(image), disk) { Reusable = false };
        }
        catch (HostFileException failure)
        {
            throw Refusal(ProblemKind.BadConfiguration, failure.Message, failure);
        }
        catch (KernelImageException failure)
        {
            throw Refusal(ProblemKind.BadConfiguration, $"{kernel}: {failure.Message}", failure);
        }
    }

    /// <summary>What the domain is made from.</summary>
    internal static DomainSpecification Describe(DomainConfiguration configuration, DomainImage image) => new()
    {
        Name = configuration.Name,
        Uuid = configuration.Uuid ?? throw new ArgumentException("The domain's UUID has to be chosen before.", nameof(configuration)),
        Image = image,
        MemoryMiB = configuration.MemoryMiB,
        MaxMemoryMiB = configuration.GreatestMemoryMiB,
        Vcpus = configuration.VcpuCount,
        OnlineVcpus = configuration.Vcpus,
        MaxEventChannels = (uint)configuration.MaxEventChannels,
        CommandLine = configuration.CommandLine,
        KernelFile = configuration.Kernel ?? string.Empty,
        RamdiskFile = configuration.Ramdisk,
        KeepSuspended = true,
    };

    private static string Absolute(string path, string key) => Path.IsPathRooted(path)
        ? path
        : throw Refusal(ProblemKind.BadConfiguration, $"{key}=\"{path}\" is a relative path, and nothing was said of the folder that it starts from: write the whole path.");

    private static ToolstackException Refusal(string kind, string message, Exception? inner = null) => new(kind, message, inner);
}
