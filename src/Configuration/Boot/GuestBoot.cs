// What was found in a disk to boot a guest with.

namespace XenSharp.Configuration.Boot;

/// <summary>A kernel out of a disk image, with what belongs to it.</summary>
public sealed record GuestBoot
{
    /// <summary>The menu entry's title, or the kernel's path.</summary>
    public required string Title { get; init; }

    /// <summary>The kernel's path in its file system.</summary>
    public required string KernelPath { get; init; }

    /// <summary>The kernel.</summary>
    public required byte[] Kernel { get; init; }

    /// <summary>The paths of the initial ramdisks; none for a kernel without.</summary>
    public required IReadOnlyList<string> RamdiskPaths { get; init; }

    /// <summary>The initial ramdisk, of one or more files; empty for none.</summary>
    public required byte[] Ramdisk { get; init; }

    /// <summary>The command line: the entry's, and behind it the configuration's.</summary>
    public required string CommandLine { get; init; }

    /// <summary>Sentences about what may not be as expected.</summary>
    public required IReadOnlyList<string> Notes { get; init; }
}
