using XenSharp.Core;

namespace XenSharp.Domains.Builder;

/// <summary>Where the domain builder put what others need to find.</summary>
public sealed record DomainLayout
{
    /// <summary>Machine frame of shared_info.</summary>
    public required Mfn SharedInfo { get; init; }

    /// <summary>Machine frame of start_info.</summary>
    public required Mfn StartInfo { get; init; }

    /// <summary>Machine frame of the console ring.</summary>
    public required Mfn Console { get; init; }

    /// <summary>Machine frame of the xenstore ring.</summary>
    public required Mfn Store { get; init; }

    /// <summary>Machine frame of the boot L4.</summary>
    public required Mfn PageTableRoot { get; init; }

    /// <summary>Numbers of the frames that the manager and its back ends write to: each has a reference and a use as writable for that.</summary>
    public ReadOnlySpan<ulong> WrittenByManager => (ulong[])[SharedInfo.Value, Console.Value, Store.Value];
}
