using XenSharp.Core;
using XenSharp.EventChannels;
using XenSharp.Mmu;

namespace XenSharp.Domains;

/// <summary>Frames that event channels write to, held by the frame table.</summary>
internal sealed unsafe class WritableFrames : IWritableFrames
{
    /// <inheritdoc/>
    public Errno Hold(VcpuContext* vcpu, Mfn frame)
    {
        Errno error = PageTables.GetPageAndType(vcpu, frame, PageType.Writable, out _);
        return error is Errno.None or Errno.ERESTART ? error : Errno.EINVAL;
    }

    /// <inheritdoc/>
    public void Release(VcpuContext* vcpu, Mfn frame)
    {
        // It may become a page table from here on.
        GuestAccess.Written(vcpu, frame, 0, Paging.PageSize);
        _ = PageTables.PutPageAndType(vcpu, frame, FrameTable.Of(vcpu->Domain)->Find(frame));
    }
}
