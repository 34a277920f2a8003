// A frame that leaves its domain (steal_page), for GNTTABOP_transfer.
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>What becomes of a frame that a domain gives away.</summary>
public static unsafe class FrameTransfer
{
    /// <summary>Takes a frame that the domain uses for nothing; it keeps its contents until it is decided whose it becomes.</summary>
    /// <param name="domain">Its owner.</param>
    /// <param name="frame">Any number.</param>
    /// <returns>False when it is not the domain's, or is in use. Then no <see cref="End"/> is due.</returns>
    public static bool TryBegin(DomainContext* domain, Mfn frame)
    {
        FrameTable* frames = FrameTable.Of(domain);
        frames->Scrub.Hold();
        frames->Lock();
        if (frames->TrySteal(frame))
            return true;
        frames->Unlock();
        frames->Scrub.Release();
        return false;
    }

    /// <summary>Whether the domain may have as many frames as before.</summary>
    public static bool HasRoom(DomainContext* domain) => domain->State->OwnedPages < domain->State->MaxPages;

    /// <summary>Gives the frame back to the domain, or leaves it free.</summary>
    public static void End(DomainContext* domain, Mfn frame, bool giveBack)
    {
        FrameTable* frames = FrameTable.Of(domain);
        if (giveBack)
            frames->Return(frame);
        frames->Unlock();
        frames->Scrub.Release();
    }
}
