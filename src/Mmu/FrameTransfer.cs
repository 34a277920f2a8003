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

    /// <summary>Takes a free frame of a domain for what another gives it; it cannot be named before <see cref="Deliver"/>.</summary>
    /// <returns>False where the domain may have no more, or its VM has no more.</returns>
    public static bool TryReserve(DomainContext* domain, out Mfn frame)
        => FrameTable.Of(domain)->TryReserve(FrameFlags.None, 0, ulong.MaxValue, out frame);

    /// <summary>Leaves a frame of <see cref="TryReserve"/> free.</summary>
    public static void Refuse(DomainContext* domain, Mfn frame)
    {
        FrameTable* frames = FrameTable.Of(domain);
        frames->Lock();
        frames->Unreserve(0, frame);
        frames->Unlock();
    }

    /// <summary>Fills a frame of <see cref="TryReserve"/> and makes it the domain's.</summary>
    /// <param name="domain">The domain.</param>
    /// <param name="machine">Its VM.</param>
    /// <param name="frame">The frame.</param>
    /// <param name="contents">A page.</param>
    public static void Deliver(DomainContext* domain, IVirtualMachine machine, Mfn frame, byte* contents)
    {
        // As long as it is nobody's, nobody can use it as anything.
        while (OutsideAccess.GetWritable(domain, machine, frame) != Errno.None)
            _ = Thread.Yield();
        Buffer.MemoryCopy(contents, domain->Memory.Page(frame), Paging.PageSize, Paging.PageSize);
        OutsideAccess.PutWritable(domain, frame);
        FrameTable.Of(domain)->Assign(FrameFlags.None, 0, frame);
    }
}
