// What a domain is to be, in the words of the person who asks for it.

using System.Runtime.InteropServices;
using XenSharp.Core.Trace;
using XenSharp.Domains;
using XenSharp.Domains.Builder;
using XenSharp.Domains.Emulation;
using XenSharp.Domains.Grants;

namespace XenSharp.Toolstack;

/// <summary>What <see cref="RunningDomain"/> makes a domain from. One specification can be run any number of times.</summary>
public sealed record DomainSpecification
{
    /// <summary>Memory where nothing else is asked for, in MiB.</summary>
    public const int DefaultMemoryMiB = 512;

    /// <summary>The domain's name, for people and xenstore.</summary>
    public required string Name { get; init; }

    /// <summary>Kernel and ramdisk; not looked at for a domain that is restored.</summary>
    public required DomainImage Image { get; init; }

    /// <summary>Memory in MiB that it boots with, from <see cref="DomainOptions.MinMemoryMiB"/> on.</summary>
    public int MemoryMiB { get; init; } = DefaultMemoryMiB;

    /// <summary>Memory in MiB that its balloon can let it grow to; at least, and where it is 0, <see cref="MemoryMiB"/>.</summary>
    public int MaxMemoryMiB
    {
        get => Math.Max(field, MemoryMiB);
        init;
    }

    /// <summary>vCPUs that the guest may bring up.</summary>
    public int Vcpus { get; init; } = 1;

    /// <summary>vCPUs that it is to have up in the beginning, as xenstore tells it; at most, and where it is 0, <see cref="Vcpus"/>.</summary>
    public int OnlineVcpus
    {
        get => field == 0 ? Vcpus : Math.Min(field, Vcpus);
        init;
    }

    /// <summary>The highest event-channel port that the guest may have (<see cref="DomainOptions.MaxEventChannels"/>).</summary>
    public uint MaxEventChannels { get; init; } = 1023;

    /// <summary>What its grant table may grow to.</summary>
    public GrantLimits GrantLimits { get; init; } = new();

    /// <summary>Seconds that the wall clock is ahead of UTC.</summary>
    public int TimeOffsetSeconds { get; init; }

    /// <summary>What CPUID is to answer otherwise than by default.</summary>
    public IReadOnlyList<CpuidOverride> Cpuid { get; init; } = [];

    /// <summary>
    /// A guest that suspends itself is kept as it is, to be saved and resumed (<see cref="RunningDomain.Resume"/>), until it is destroyed;
    /// otherwise that is an end like any other.
    /// </summary>
    public bool KeepSuspended { get; init; }

    /// <summary>The kernel's command line, at most 1023 bytes in UTF-8.</summary>
    public string CommandLine { get; init; } = string.Empty;

    /// <summary>The domain's UUID, the same for each of its incarnations.</summary>
    public Guid Uuid { get; init; } = Guid.NewGuid();

    /// <summary>Records what the guest asks for, in each of its incarnations; <see langword="null"/> for no trace.</summary>
    public TraceRecorder? Trace { get; init; }

    /// <summary>Exits between two checks of the domain's books, for tests (<see cref="DomainOptions.AuditInterval"/>); 0 for none.</summary>
    public int AuditInterval { get; init; }

    /// <summary>The kernel's file, for people.</summary>
    public string KernelFile { get; init; } = string.Empty;

    /// <summary>The ramdisk's file, for people; <see langword="null"/> for none.</summary>
    public string? RamdiskFile { get; init; }
}

/// <summary>
/// Kernel and ramdisk of a domain, unpacked: some ten times what the files have, and of no use once they are in the domain's
/// memory. So an image that is not to be used again is let go by its first domain.
/// </summary>
/// <param name="kernel">The kernel.</param>
/// <param name="ramdisk">The initial ramdisk; empty for none.</param>
/// <param name="memory">What they lie in, if that is to be disposed with them.</param>
public sealed class DomainImage(KernelImage? kernel, ReadOnlyMemory<byte> ramdisk = default, params IReadOnlyList<IDisposable> memory)
{
    private KernelImage? _kernel = kernel;
    private ReadOnlyMemory<byte> _ramdisk = ramdisk;
    private readonly bool _onHeap = (kernel?.Segments.Any(static segment => IsOnHeap(segment.Data)) ?? false) || IsOnHeap(ramdisk);

    /// <summary>No kernel at all, for a domain that is restored.</summary>
    public static DomainImage None { get; } = new(null);

    /// <summary>Whether any number of domains may be made from it.</summary>
    public bool Reusable { get; init; } = true;

    /// <summary>Gives kernel and ramdisk out, for good unless <see cref="Reusable"/>.</summary>
    /// <exception cref="InvalidOperationException">They have been given out.</exception>
    public (KernelImage Kernel, ReadOnlyMemory<byte> Ramdisk) Take()
    {
        var taken = (_kernel ?? throw new InvalidOperationException("This image was made for one domain, which has it."), _ramdisk);
        if (!Reusable)
            Forget();
        return taken;
    }

    /// <summary>Lets go of what it is in, unless it is <see cref="Reusable"/>: the domain was made, or could not be. Nobody may look at it any more.</summary>
    /// <returns>Whether some of it was in the managed heap, where it stays until the next collection.</returns>
    internal bool Release()
    {
        if (Reusable)
            return false;
        Forget();
        foreach (IDisposable part in memory)
            part.Dispose();
        return _onHeap;
    }

    private static bool IsOnHeap(ReadOnlyMemory<byte> memory) => !memory.IsEmpty && MemoryMarshal.TryGetArray(memory, out _);

    private void Forget() => (_kernel, _ramdisk) = (null, default);
}
