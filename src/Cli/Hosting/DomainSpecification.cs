// What a domain is to be, in the words of the person who asks for it.

using XenSharp.Domains;
using XenSharp.Domains.Builder;

namespace XenSharp.Cli.Hosting;

/// <summary>What <see cref="RunningDomain"/> makes a domain from. One specification can be run any number of times.</summary>
public sealed record DomainSpecification
{
    /// <summary>Memory where nothing else is asked for, in MiB.</summary>
    public const int DefaultMemoryMiB = 512;

    /// <summary>The domain's name, for people and xenstore.</summary>
    public required string Name { get; init; }

    /// <summary>The kernel.</summary>
    public required KernelImage Kernel { get; init; }

    /// <summary>The initial ramdisk; empty for none.</summary>
    public ReadOnlyMemory<byte> Ramdisk { get; init; }

    /// <summary>Memory in MiB, from <see cref="DomainOptions.MinMemoryMiB"/> on.</summary>
    public int MemoryMiB { get; init; } = DefaultMemoryMiB;

    /// <summary>The kernel's command line, at most 1023 bytes in UTF-8.</summary>
    public string CommandLine { get; init; } = string.Empty;

    /// <summary>The domain's UUID, the same for each of its incarnations.</summary>
    public Guid Uuid { get; init; } = Guid.NewGuid();

    /// <summary>The kernel's file, for people.</summary>
    public string KernelFile { get; init; } = string.Empty;

    /// <summary>The ramdisk's file, for people; <see langword="null"/> for none.</summary>
    public string? RamdiskFile { get; init; }
}
