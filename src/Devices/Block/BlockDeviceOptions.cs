// What a virtual disk is to be.
using XenSharp.Core;
using XenSharp.Devices.Block.Images;

namespace XenSharp.Devices.Block;

/// <summary>A disk for a guest. The limits are xen-blkback's.</summary>
public sealed record BlockDeviceOptions
{
    /// <summary>As which disk the guest sees it.</summary>
    public required VirtualDevice Device { get; init; }

    /// <summary>What is on it; the back end's from the moment on that it is made, which disposes it in the end.</summary>
    public required IBlockImage Image { get; init; }

    /// <summary>Whether the guest may only read; so it may of a read-only image and a CD-ROM in any case.</summary>
    public bool IsReadOnly { get; init; }

    /// <summary>Whether it is shown as a CD-ROM.</summary>
    public bool IsCdRom { get; init; }

    /// <summary>Whether it is shown as a disk that can be taken out.</summary>
    public bool IsRemovable { get; init; }

    /// <summary>Whether the guest may discard, where the image can.</summary>
    public bool AllowsDiscard { get; init; } = true;

    /// <summary>The most rings, 1 or more; a guest uses as many as it has vCPUs.</summary>
    public int MaxQueues { get; init; } = Math.Min(Environment.ProcessorCount, 8);

    /// <summary>The most pages of a ring, as a power of two: 0..4.</summary>
    public int MaxRingPageOrder { get; init; } = 4;

    /// <summary>The most pieces of memory of an indirect request: 11..1024.</summary>
    public int MaxIndirectSegments { get; init; } = 256;

    /// <summary>
    /// The most pages that stay mapped for each ring (xen-blkback has 1056); 0 to have none do, and not to offer it. A front end with pages that
    /// stay mapped copies all data to and from them, and that costs more than what it saves: mapping a page is no hypercall here.
    /// </summary>
    public int MaxPersistentGrants { get; init; }

    internal void Check()
    {
        ArgumentNullException.ThrowIfNull(Image);
        ArgumentOutOfRangeException.ThrowIfLessThan(MaxQueues, 1);
        ArgumentOutOfRangeException.ThrowIfNegative(MaxRingPageOrder);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(MaxRingPageOrder, 4);
        ArgumentOutOfRangeException.ThrowIfLessThan(MaxIndirectSegments, BlkifAbi.MaxDirectSegments);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(MaxIndirectSegments, BlockOperation.MaxVectors - 1);
        ArgumentOutOfRangeException.ThrowIfNegative(MaxPersistentGrants);
    }
}
