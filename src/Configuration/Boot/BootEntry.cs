// One line of a boot menu: a kernel to boot, and how.

namespace XenSharp.Configuration.Boot;

/// <summary>What a boot configuration says about one way to boot.</summary>
internal sealed record BootEntry
{
    /// <summary>The text of the menu.</summary>
    internal required string Title { get; init; }

    /// <summary>The name by which others refer to it, if it has one.</summary>
    internal string? Id { get; init; }

    /// <summary>The kernel; null for an entry that does something else.</summary>
    internal BootFile? Kernel { get; init; }

    /// <summary>The initial ramdisks, which the kernel gets as one, in their order.</summary>
    internal IReadOnlyList<BootFile> Ramdisks { get; init; } = [];

    /// <summary>The kernel's command line.</summary>
    internal string CommandLine { get; init; } = string.Empty;
}

/// <summary>A file that an entry names.</summary>
/// <param name="Path">Its path in its file system.</param>
/// <param name="Device">
/// Where it is: a partition as GRUB writes it (hd0,msdos1), <c>uuid:</c> and a file system's UUID, <c>label:</c> and its label, or empty for
/// the file system that has the configuration.
/// </param>
internal sealed record BootFile(string Path, string Device = "");

/// <summary>A boot menu.</summary>
internal sealed class BootMenu
{
    /// <summary>Every entry, those of submenus where the submenu is, as pygrub numbers them.</summary>
    internal List<BootEntry> Entries { get; } = [];

    /// <summary>The entry that is booted if nothing else is asked for; null for the first that has a kernel.</summary>
    internal BootEntry? Default { get; set; }
}
