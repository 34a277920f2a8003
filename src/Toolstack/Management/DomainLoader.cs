// From a domain's configuration to what it is made from: kernel and ramdisk read, and what the host cannot do refused.

using XenSharp.Api;
using XenSharp.Configuration;
using XenSharp.Configuration.Boot;
using XenSharp.Configuration.Devices;
using XenSharp.Core;
using XenSharp.Devices.Block.Images;
using XenSharp.Domains.Builder;
using XenSharp.Domains.Emulation;
using XenSharp.Domains.Grants;
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

        List<string> ineffective = [];
        ineffective.AddRange(configuration.Cpuid.Where(static mask => !Override(mask).IsHeeded).Select(static mask =>
            $"cpuid has no effect on leaf 0x{mask.Leaf:x}, {mask.Register}: features, the processor's signature and its name can be changed."));
        return ineffective;
    }

    /// <summary>Reads kernel and ramdisk, from the host's files or out of the first disk.</summary>
    /// <param name="configuration">What names them.</param>
    /// <param name="kernels">Those that were unpacked before.</param>
    /// <param name="note">Is told, in sentences, what may not be as expected.</param>
    /// <exception cref="ToolstackException">They cannot be read, or are none; a sentence says which.</exception>
    internal static DomainSpecification Load(DomainConfiguration configuration, UnpackedKernels kernels, Action<string>? note = null)
    {
        if (configuration.Bootloader is { } bootloader)
            return LoadFromDisk(configuration, bootloader, kernels, note);
        if (configuration.Kernel is not { } kernel)
            throw Refusal(ProblemKind.BadConfiguration, $"The domain {configuration.Name} has no kernel: name it with kernel=.");
        LoadedKernel? loaded = null;
        HostBuffer? disk = null;
        bool handedOver = false;
        try
        {
            loaded = kernels.Load(Absolute(kernel, "kernel"), "kernel=");
            if (configuration.Ramdisk is { } ramdisk)
            {
                disk = HostFile.Load(
                    Absolute(ramdisk, "ramdisk"), "ramdisk=", (int)Math.Min((long)configuration.MemoryMiB << 20, Array.MaxLength),
                    $"does not fit into the domain's {configuration.MemoryMiB} MiB of memory; give it more with memory=.");
            }

            var image = disk is null
                ? new DomainImage(loaded.Image, default, loaded.Memory) { Reusable = false }
                : new DomainImage(loaded.Image, disk.Memory, loaded.Memory, disk) { Reusable = false };
            DomainSpecification specification = Describe(configuration, image);
            handedOver = true;
            return specification;
        }
        catch (HostFileException failure)
        {
            throw Refusal(ProblemKind.BadConfiguration, failure.Message, failure);
        }
        catch (KernelImageException failure)
        {
            throw Refusal(ProblemKind.BadConfiguration, $"{kernel}: {failure.Message}", failure);
        }
        finally
        {
            if (!handedOver)
            {
                loaded?.Memory.Dispose();
                (disk as IDisposable)?.Dispose();
            }
        }
    }

    /// <summary>What its grant table may grow to.</summary>
    private static GrantLimits GrantsOf(DomainConfiguration configuration)
    {
        var usual = new GrantLimits();
        return new GrantLimits
        {
            Frames = configuration.MaxGrantFrames ?? usual.Frames,
            HandlePages = configuration.MaxMaptrackFrames ?? usual.HandlePages,
            Version = configuration.MaxGrantVersion ?? usual.Version,
        };
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
        GrantLimits = GrantsOf(configuration),
        CommandLine = configuration.CommandLine,
        TimeOffsetSeconds = TimeOffset(configuration),
        Cpuid = [.. configuration.Cpuid.Select(Override)],
        KernelFile = configuration.Kernel ?? string.Empty,
        RamdiskFile = configuration.Ramdisk,
        KeepSuspended = true,
    };

    /// <summary>What pygrub does: the kernel that the guest's own disk says is to be booted.</summary>
    private static DomainSpecification LoadFromDisk(
        DomainConfiguration configuration, BootloaderConfiguration bootloader, UnpackedKernels kernels, Action<string>? note)
    {
        // The first disk, as with libxl; and what kernel and ramdisk name is inside of it, since libxl hands them to pygrub.
        DiskConfiguration disk = configuration.Disks is [{ Format: not DiskFormat.Empty } first, ..]
            ? first
            : throw Refusal(ProblemKind.BadConfiguration, $"The domain {configuration.Name} is to boot from its first disk, and has none: add disk=, or name a kernel with kernel=.");
        bootloader = bootloader with { Kernel = bootloader.Kernel ?? configuration.Kernel, Ramdisk = bootloader.Ramdisk ?? configuration.Ramdisk };
        try
        {
            using ImageReader image = disk.Format == DiskFormat.Raw ? new RawImageReader(disk.Target) : BlockImageReader.Open(disk.Target, BlockImageFormat.Qcow2);
            GuestBoot boot = GuestBootLoader.Load(image, bootloader, configuration.CommandLine);
            foreach (string sentence in boot.Notes)
                note?.Invoke(sentence);
            if (boot.Ramdisk.Length > (long)configuration.MemoryMiB << 20)
                throw new BootException($"Its ramdisk {boot.RamdiskPaths[0]} does not fit into the domain's {configuration.MemoryMiB} MiB of memory; give it more with memory=.");
            if (System.Text.Encoding.UTF8.GetByteCount(boot.CommandLine) > DomainConfigurationRules.LongestCommandLine)
                throw new BootException($"The command line of \"{boot.Title}\", with the configuration's, is longer than the {DomainConfigurationRules.LongestCommandLine} bytes that a PV guest gets.");
            LoadedKernel kernel = kernels.Load(boot.Kernel);
            return Describe(configuration, new DomainImage(kernel.Image, boot.Ramdisk, kernel.Memory) { Reusable = false }) with
            {
                CommandLine = boot.CommandLine,
                KernelFile = $"{disk.Target}:{boot.KernelPath}",
                RamdiskFile = boot.RamdiskPaths.Count == 0 ? null : string.Join(' ', boot.RamdiskPaths.Select(path => $"{disk.Target}:{path}")),
            };
        }
        catch (Exception failure) when (failure is BootException or KernelImageException or BlockImageException)
        {
            throw Refusal(ProblemKind.BadConfiguration, $"The disk {disk.Target} of {configuration.Name} cannot be booted: {failure.Message}", failure);
        }
    }

    /// <summary>What CPUID is to answer otherwise.</summary>
    private static CpuidOverride Override(CpuidMask mask)
        => new(mask.Leaf, mask.Subleaf ?? 0, (Domains.Emulation.CpuidRegister)(int)mask.Register, mask.Set, mask.Clear, mask.Host);

    /// <summary>Seconds that the wall clock is ahead of UTC, as libxl adds them up.</summary>
    private static int TimeOffset(DomainConfiguration configuration)
        => (int)Math.Clamp(
            configuration.RtcTimeOffset + (configuration.LocalTime ? (long)TimeZoneInfo.Local.GetUtcOffset(DateTimeOffset.UtcNow).TotalSeconds : 0),
            int.MinValue, int.MaxValue);

    private static string Absolute(string path, string key) => Path.IsPathRooted(path)
        ? path
        : throw Refusal(ProblemKind.BadConfiguration, $"{key}=\"{path}\" is a relative path, and nothing was said of the folder that it starts from: write the whole path.");

    private static ToolstackException Refusal(string kind, string message, Exception? inner = null) => new(kind, message, inner);
}
