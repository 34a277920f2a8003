using XenSharp.Core;

namespace XenSharp.EventChannels;

/// <summary>How event channels come by frames of the guest's to write to, and give them back.</summary>
public unsafe interface IWritableFrames
{
    /// <summary>Takes a reference and a writable use of a frame, which stays the guest's and writable until <see cref="Release"/>.</summary>
    /// <param name="vcpu">The vCPU that runs on this thread.</param>
    /// <param name="frame">As the guest named it.</param>
    /// <returns>EINVAL for a frame that is not the domain's or is in use as something else; ERESTART when another vCPU has to notice
    /// something first.</returns>
    Errno Hold(VcpuContext* vcpu, Mfn frame);

    /// <summary>Drops what <see cref="Hold"/> took.</summary>
    void Release(VcpuContext* vcpu, Mfn frame);
}
