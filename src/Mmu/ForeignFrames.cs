// Frames of other domains that a domain has mapped: how often, and whether to write.
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>
/// Counts of the frames of <see cref="DomainContext.Window"/>. What is behind such a frame is another domain's: it can be mapped by
/// <see cref="GrantMapping"/> and by nothing else, and be no page table, nor given away; an entry that maps it stands for a count here.
/// </summary>
/// <remarks>
/// Whoever shows frames in the window adds counts, one thread at a time; all may drop them. The holds on the other domain's frame stay
/// until that one thread has seen what was dropped, and has taken what processors could still reach from behind the frame.
/// </remarks>
public static unsafe class ForeignFrames
{
    private const ulong OneMapping = 1;
    private const ulong OneWriter = 1UL << 32;

    /// <summary>How often a frame of the window is mapped, to read or to write.</summary>
    public static uint Mappings(DomainContext* domain, Mfn frame) => (uint)Volatile.Read(ref domain->WindowUses[domain->Window.IndexOf(frame)]);

    /// <summary>How often it is mapped to write.</summary>
    public static uint Writers(DomainContext* domain, Mfn frame)
        => (uint)(Volatile.Read(ref domain->WindowUses[domain->Window.IndexOf(frame)]) >> 32);

    /// <summary>Counts a mapping of a frame that shows what is to be mapped.</summary>
    public static void Add(DomainContext* domain, Mfn frame, bool writable)
        => Interlocked.Add(ref domain->WindowUses[domain->Window.IndexOf(frame)], writable ? OneMapping + OneWriter : OneMapping);

    /// <summary>Drops a mapping that is no longer there.</summary>
    public static void Release(DomainContext* domain, Mfn frame, bool writable)
    {
        ulong index = domain->Window.IndexOf(frame);
        ulong left = Interlocked.Add(ref domain->WindowUses[index], 0 - (writable ? OneMapping + OneWriter : OneMapping));
        if ((uint)left != 0 && (!writable || left >> 32 != 0))
            return;
        _ = Interlocked.Or(ref domain->WindowReleases[index / 64], 1UL << (int)(index % 64));
        _ = Interlocked.Exchange(ref domain->WindowReleased, 1);
    }
}
