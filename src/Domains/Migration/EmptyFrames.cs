using XenSharp.Core;

namespace XenSharp.Domains.Migration;

/// <summary>
/// Remembers which frames of a VM take no memory of the host's, for one who goes through them: to read those would give each a page of
/// zeroes.
/// </summary>
/// <param name="machine">The VM.</param>
internal sealed class EmptyFrames(IVirtualMachine machine)
{
    private ulong _first;
    private ulong _count;

    /// <summary>Whether a frame is known to be empty.</summary>
    public bool Contains(Mfn frame)
    {
        if (frame.Value - _first < _count)
            return true;
        (_first, _count) = (frame.Value, machine.CountEmpty(frame));
        return _count != 0;
    }
}
