// What is to hold for a configuration, wherever it comes from.

using XenSharp.Core;
using XenSharp.Configuration.Devices;

namespace XenSharp.Configuration;

/// <summary>Checks the content of configurations; whether a kernel exists and the host has the memory shows when a domain is made.</summary>
public static class DomainConfigurationRules
{
    /// <summary>Longest name of a domain.</summary>
    public const int LongestName = 255;

    /// <summary>Least memory of a domain, in MiB.</summary>
    public const int LeastMemoryMiB = 4;

    /// <summary>Most vCPUs that a domain can be given by a configuration; a host's KVM may have fewer.</summary>
    public const int MostVcpus = 128;

    /// <summary>Longest command line in bytes (MAX_GUEST_CMDLINE less its NUL).</summary>
    public const int LongestCommandLine = 1023;

    /// <summary>The highest event-channel port there can be.</summary>
    public const int HighestEventChannel = 131071;

    /// <summary>Most pages of a grant table; Xen refuses more than 64, unless its command line says otherwise.</summary>
    public const int MostGrantFrames = 1024;

    /// <summary>Most pages of what a domain keeps about grants that it has mapped; Xen refuses more than 1024, unless its command line says otherwise.</summary>
    public const int MostMaptrackFrames = 16384;

    /// <summary>Whether a text can be the name of a domain.</summary>
    public static bool IsName(string name)
    {
        ArgumentNullException.ThrowIfNull(name);
        return name.Length is > 0 and <= LongestName && name.AsSpan().IndexOfAnyExceptInRange(' ', '~') < 0 && !name.Contains('/');
    }

    /// <summary>Checks a configuration.</summary>
    /// <returns>What is wrong, with the key of xl.cfg(5) that it is about; nothing if all is well.</returns>
    public static IEnumerable<(string Key, string Text)> Check(DomainConfiguration configuration)
    {
        ArgumentNullException.ThrowIfNull(configuration);
        return CheckDomain(configuration).Concat(CheckBoot(configuration)).Concat(CheckDevices(configuration));
    }

    private static IEnumerable<(string Key, string Text)> CheckDomain(DomainConfiguration configuration)
    {
        if (!IsName(configuration.Name))
            yield return ("name", $"A domain's name has 1 to {LongestName} printable ASCII characters without a slash; \"{configuration.Name}\" is none.");
        if (configuration.MemoryMiB < LeastMemoryMiB)
            yield return ("memory", $"memory={configuration.MemoryMiB} is too little: a domain has {LeastMemoryMiB} MiB at least, and a Linux kernel needs some 64.");
        if (configuration.MaxMemoryMiB != 0 && configuration.MaxMemoryMiB < configuration.MemoryMiB)
        {
            yield return ("maxmem",
                $"maxmem={configuration.MaxMemoryMiB} is less than the {configuration.MemoryMiB} MiB that the domain boots with (memory); it is to be at least that.");
        }

        if (configuration.Vcpus is < 1 or > MostVcpus)
            yield return ("vcpus", $"vcpus takes a number from 1 to {MostVcpus}; {configuration.Vcpus} is none.");
        if (configuration.MaxVcpus is < 0 or > MostVcpus)
            yield return ("maxvcpus", $"maxvcpus takes a number from 1 to {MostVcpus}; {configuration.MaxVcpus} is none.");
        else if (configuration.MaxVcpus != 0 && configuration.MaxVcpus < configuration.Vcpus)
            yield return ("maxvcpus", $"maxvcpus={configuration.MaxVcpus} is less than vcpus={configuration.Vcpus}; it is to be at least that.");
        foreach (string processors in configuration.Processors.Distinct())
        {
            if (WrongProcessors(processors) is { } wrong)
                yield return ("cpus", wrong);
        }

        if (configuration.MaxEventChannels is < 1 or > HighestEventChannel)
            yield return ("max_event_channels", $"max_event_channels takes a number from 1 to {HighestEventChannel}; {configuration.MaxEventChannels} is none.");
        if (configuration.MaxGrantVersion is < 1 or > 2)
            yield return ("max_grant_version", $"max_grant_version takes 1 or 2; {configuration.MaxGrantVersion} is neither.");
        if (configuration.MaxGrantFrames is < 1 or > MostGrantFrames)
            yield return ("max_grant_frames", $"max_grant_frames takes a number from 1 to {MostGrantFrames}; {configuration.MaxGrantFrames} is none.");
        if (configuration.MaxMaptrackFrames is < 0 or > MostMaptrackFrames)
            yield return ("max_maptrack_frames", $"max_maptrack_frames takes a number from 0 to {MostMaptrackFrames}; {configuration.MaxMaptrackFrames} is none.");
    }

    private static string? WrongProcessors(string text)
    {
        try
        {
            _ = ProcessorSet.Parse(text);
            return null;
        }
        catch (FormatException failure)
        {
            return failure.Message;
        }
    }

    private static IEnumerable<(string Key, string Text)> CheckBoot(DomainConfiguration configuration)
    {
        if (configuration.Kernel is null && configuration.Bootloader is null)
            yield return ("kernel", "It names neither a kernel nor a bootloader: add kernel=\"FILE\", or bootloader=\"pygrub\" for the kernel that is in the first disk.");
        if (configuration.Kernel is { Length: 0 })
            yield return ("kernel", "kernel is empty; give it the name of a file.");
        if (configuration.Ramdisk is { Length: 0 })
            yield return ("ramdisk", "ramdisk is empty; give it the name of a file, or leave it out.");
        if (configuration.Bootloader is not null && configuration.Disks is not [{ Format: not DiskFormat.Empty }, ..])
            yield return ("bootloader", "A bootloader looks for the kernel in the first disk, and there is none: add one to disk, or name a kernel.");
        if (System.Text.Encoding.UTF8.GetByteCount(configuration.CommandLine) > LongestCommandLine)
            yield return ("cmdline", $"The command line is longer than the {LongestCommandLine} bytes that a PV guest gets.");
        if (configuration.CommandLine.Contains('\0'))
            yield return ("cmdline", "The command line has a NUL character in it, where it would end.");
    }

    private static IEnumerable<(string Key, string Text)> CheckDevices(DomainConfiguration configuration)
    {
        // A program's JSON can have them.
        foreach ((string key, bool empty) in new[]
        {
            ("disk", configuration.Disks.Contains(null!)), ("vif", configuration.Vifs.Contains(null!)),
            ("channel", configuration.Channels.Contains(null!)), ("cpuid", configuration.Cpuid.Contains(null!)),
        })
        {
            if (empty)
                yield return (key, $"There is nothing (null) in the list {key}.");
        }

        var disks = new Dictionary<uint, string>();
        foreach (DiskConfiguration disk in configuration.Disks.OfType<DiskConfiguration>())
        {
            if (!VirtualDevice.TryParse(disk.VirtualDevice, out VirtualDevice device))
                yield return ("disk", $"\"{disk.VirtualDevice}\" is no device of a guest: write xvda, xvdb1, sda, hda, d0p1 or the number of one.");
            else if (!disks.TryAdd(device.Number, disk.VirtualDevice))
                yield return ("disk", $"Two disks are {disk.VirtualDevice}{(disks[device.Number] == disk.VirtualDevice ? string.Empty : $", which is {disks[device.Number]}")}.");
            if (disk.Format != DiskFormat.Empty && !Path.IsPathRooted(disk.Target))
                yield return ("disk", $"The target of {disk.VirtualDevice}, \"{disk.Target}\", is no absolute path.");
            if (disk.Format == DiskFormat.Empty && !disk.Cdrom)
                yield return ("disk", $"{disk.VirtualDevice} is empty, which only a CD-ROM drive can be: name its target.");
        }

        var numbers = new HashSet<int>();
        var addresses = new HashSet<string>(StringComparer.OrdinalIgnoreCase);
        var names = new HashSet<string>(StringComparer.Ordinal);
        foreach (VifConfiguration vif in configuration.Vifs.OfType<VifConfiguration>())
        {
            if (vif.DeviceId is { } number && !numbers.Add(number))
                yield return ("vif", $"Two network interfaces have the devid {number}.");
            if (vif.Mac is { } mac && VifSpecification.NormalizeMac(mac) is null)
                yield return ("vif", $"\"{mac}\" is no address for a network interface.");
            else if (vif.Mac is not null && !addresses.Add(vif.Mac))
                yield return ("vif", $"Two network interfaces have the address {vif.Mac}.");
            if (vif.Name is { } name && !names.Add(name))
                yield return ("vif", $"Two network interfaces have the vifname {name}.");
        }

        var channels = new HashSet<string>(StringComparer.Ordinal);
        foreach (ChannelConfiguration channel in configuration.Channels.OfType<ChannelConfiguration>())
        {
            if (!channels.Add(channel.Name))
                yield return ("channel", $"Two channels have the name {channel.Name}.");
            if (channel.Connection == ChannelConnection.Socket && !Path.IsPathRooted(channel.Path))
                yield return ("channel", $"The channel {channel.Name} has no absolute path for its socket.");
        }
    }
}
