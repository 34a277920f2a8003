// The map of frames to be scrubbed, held against the frame table.
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>Checks that only free frames are to be scrubbed, and that as many are as are said to be. For tests and debug builds.</summary>
public static unsafe class ScrubAudit
{
    /// <summary>Compares. The domain's vCPUs must be at rest.</summary>
    /// <returns>Null when all agree; else a sentence.</returns>
    public static string? Check(DomainContext* domain)
    {
        FrameTable* frames = FrameTable.Of(domain);
        long marked = 0;
        for (ulong i = 0; i < domain->Memory.FrameCount; i++)
        {
            if (!frames->Scrub.IsMarked(i))
                continue;
            marked++;
            if (frames->Find(domain->Memory.FirstFrame + i)->ReferenceCount != 0)
                return $"{domain->Memory.FirstFrame + i} is to be scrubbed, and in use.";
        }

        return marked == frames->Scrub.Pending ? null : $"{frames->Scrub.Pending} frames are said to be waiting to be scrubbed, and {marked} are.";
    }
}
