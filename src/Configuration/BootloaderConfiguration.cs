// What bootloader and bootloader_args say.

namespace XenSharp.Configuration;

/// <summary>How the kernel is found in the domain's first disk, in the terms of pygrub's options.</summary>
public sealed record BootloaderConfiguration
{
    /// <summary>The menu entry: its number from 0 on, its title or its id (--entry); null for the menu's default.</summary>
    public string? Entry { get; init; }

    /// <summary>Text that goes behind the entry's command line (--args).</summary>
    public string? Arguments { get; init; }

    /// <summary>Path of a kernel inside the image, which is taken without looking at the menu (--kernel).</summary>
    public string? Kernel { get; init; }

    /// <summary>Path of its initial ramdisk (--ramdisk).</summary>
    public string? Ramdisk { get; init; }

    /// <summary>Where the file system begins in the image, in bytes (--offset); null to look for it.</summary>
    public long? Offset { get; init; }

    /// <summary>The same as options of pygrub.</summary>
    public IReadOnlyList<string> ToArguments() => [.. new[]
    {
        Entry is null ? null : $"--entry={Entry}",
        Arguments is null ? null : $"--args={Arguments}",
        Kernel is null ? null : $"--kernel={Kernel}",
        Ramdisk is null ? null : $"--ramdisk={Ramdisk}",
        Offset is null ? null : string.Create(System.Globalization.CultureInfo.InvariantCulture, $"--offset={Offset}"),
    }.OfType<string>()];
}
