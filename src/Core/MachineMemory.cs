using System.Runtime.CompilerServices;

namespace XenSharp.Core;

/// <summary>
/// The RAM of one domain as the host sees it: a contiguous range of machine frames, starting at a frame number that is not
/// zero, so that a machine frame taken for a pseudo-physical one shows at once.
/// </summary>
/// <param name="host">Host address of the first byte.</param>
/// <param name="firstFrame">Machine frame number of the first page.</param>
/// <param name="frameCount">Number of frames.</param>
public readonly unsafe struct MachineMemory(byte* host, Mfn firstFrame, ulong frameCount)
{
    private readonly byte* _host = host;

    public Mfn FirstFrame { get; } = firstFrame;

    public ulong FrameCount { get; } = frameCount;

    /// <summary>One past the last frame.</summary>
    public Mfn EndFrame => FirstFrame + FrameCount;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public bool Contains(Mfn frame) => frame.Value - FirstFrame.Value < FrameCount;

    /// <summary>0-based index of a frame that <see cref="Contains"/> accepts.</summary>
    public ulong IndexOf(Mfn frame) => frame.Value - FirstFrame.Value;

    /// <summary>Host address of the frame's first byte.</summary>
    /// <remarks>The frame must be one that <see cref="Contains"/> accepts: callers check what a guest names.</remarks>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public byte* Page(Mfn frame)
    {
        System.Diagnostics.Debug.Assert(Contains(frame), "frame outside machine memory");
        return _host + ((frame.Value - FirstFrame.Value) << Paging.PageShift);
    }

    /// <summary>Machine address of what lies at a host address in this memory.</summary>
    public MachineAddress AddressOf(void* host) => FirstFrame.Address + (ulong)((byte*)host - _host);

    /// <summary>Host view of the frame as a page table of 512 entries.</summary>
    public PageTableEntry* Table(Mfn frame) => (PageTableEntry*)Page(frame);
}
