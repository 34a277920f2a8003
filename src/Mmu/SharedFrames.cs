// Frames of the hypervisor's that a domain may map and write, like those of its grant table (share_xen_page_with_guest).
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>Shares frames with a domain: they are writable for as long as they are shared, and never given away.</summary>
public static unsafe class SharedFrames
{
    /// <summary>Takes a free frame, zeroes it and shares it.</summary>
    /// <param name="vcpu">A vCPU of the domain, on whose thread this is.</param>
    /// <param name="frame">The frame.</param>
    /// <returns>ENOMEM where there is no free frame; ERESTART where another vCPU has to take note of what the frame was before.</returns>
    public static Errno Share(VcpuContext* vcpu, out Mfn frame)
    {
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        if (!frames->TryReserve(FrameFlags.Special, 0, ulong.MaxValue, out frame))
            return Errno.ENOMEM;
        bool isClear = !new ReadOnlySpan<byte>(vcpu->Domain->Memory.Page(frame), (int)Paging.PageSize).ContainsAnyExcept((byte)0);
        if (!isClear)
            frames->Clear(frame);
        frames->Assign(FrameFlags.Special, 0, frame);
        Errno error = PageTables.GetPageAndType(vcpu, frame, PageType.Writable, out FrameInfo* info);

        // The use may have to wait until this vCPU has made all its stores, so these come after it; and not again the next time.
        if (!isClear)
            GuestAccess.Written(vcpu, frame, 0, Paging.PageSize);
        if (error == Errno.None)
            return error;

        // The guest cannot know of it yet, and may have guessed: then it keeps it, as a frame of no use.
        info = frames->Find(frame);
        if (info->TryDisown())
            frames->PutPage(info);
        return error == Errno.ERESTART ? error : Errno.ENOMEM;
    }

    /// <summary>Takes shared frames back, all or none.</summary>
    /// <param name="domain">The domain.</param>
    /// <param name="frames">Their numbers.</param>
    /// <param name="count">How many.</param>
    /// <returns>False where the domain has one of them mapped.</returns>
    public static bool TryUnshare(DomainContext* domain, ulong* frames, int count) => FrameTable.Of(domain)->TryUnshare(frames, count);
}
