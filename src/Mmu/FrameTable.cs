// The frame table: who owns a frame, how often it is referenced, and as what it may be used.
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>What a frame is used as (PGT_* of Xen's mm.h). Uses exclude each other while the type count is above zero.</summary>
public enum PageType : byte
{
    None = 0,
    L1PageTable = 1,
    L2PageTable = 2,
    L3PageTable = 3,
    L4PageTable = 4,
    SegmentDescriptors = 5,
    Writable = 7,
}

/// <summary>State bits of a frame beside its counts.</summary>
[Flags]
public enum FrameFlags : byte
{
    None = 0,

    /// <summary>The domain owns the frame (PGC_allocated): it holds one of the references.</summary>
    Allocated = 1 << 0,

    /// <summary>Pinned as a page table (PGT_pinned): the pin holds a reference and a type reference.</summary>
    Pinned = 1 << 1,

    /// <summary>The contents were checked for the type (PGT_validated).</summary>
    Validated = 1 << 2,

    /// <summary>Shared with the guest by the hypervisor (shared_info and the like): never given away.</summary>
    Special = 1 << 3,
}

/// <summary>One frame, 16 bytes.</summary>
/// <remarks>
/// Lock discipline: with one vCPU the domain's thread is the only writer. For several, the type byte and count change
/// together under a compare-exchange on the first eight bytes, and validation holds the frame's own lock bit; both fit here.
/// </remarks>
[StructLayout(LayoutKind.Sequential)]
public struct FrameInfo
{
    /// <summary>Uses as <see cref="Type"/>.</summary>
    public uint TypeCount;
    public PageType Type;
    public FrameFlags Flags;

    /// <summary>Domain id of the owner while <see cref="FrameFlags.Allocated"/>.</summary>
    public ushort Owner;

    /// <summary>All references; the frame is free at 0. A type reference always comes with one of these.</summary>
    public uint ReferenceCount;

    /// <summary>
    /// Of a page table above L1: entries of it that name another table of its own level (positive), or such entries of others
    /// that name it (negative). Never both, so that linear tables cannot be chained (linear_pt_count).
    /// </summary>
    public int LinearCount;

    public readonly bool IsPageTable => Type is >= PageType.L1PageTable and <= PageType.L4PageTable;

    public readonly bool Has(FrameFlags flags) => (Flags & flags) == flags;
}

/// <summary>The table of a domain's frames, and its free ones. Lives in unmanaged memory.</summary>
public unsafe struct FrameTable
{
    private FrameInfo* _frames;
    private MachineMemory _memory;

    private DomainState* _domain;
    private ulong* _machineToPhys;

    /// <summary>No frame below this index is free.</summary>
    private ulong _firstFree;

    /// <summary>Frames that no domain owns.</summary>
    public ulong FreeCount { get; private set; }

    /// <summary>Makes the table, all frames free.</summary>
    /// <param name="frames">Zeroed, one element a frame.</param>
    /// <param name="memory">The frames' memory.</param>
    /// <param name="domain">Whose <see cref="DomainState.OwnedPages"/> is kept.</param>
    /// <param name="machineToPhys">The M2P table, where a frame that becomes free loses its entry.</param>
    public void Initialize(FrameInfo* frames, MachineMemory memory, DomainState* domain, ulong* machineToPhys)
    {
        _frames = frames;
        _memory = memory;
        _domain = domain;
        _machineToPhys = machineToPhys;
        FreeCount = memory.FrameCount;
    }

    /// <summary>The frame table that a domain context points to.</summary>
    public static FrameTable* Of(DomainContext* domain) => (FrameTable*)domain->Frames;

    /// <summary>A frame's entry, or null for one outside machine memory.</summary>
    public readonly FrameInfo* Find(Mfn frame) => _memory.Contains(frame) ? _frames + _memory.IndexOf(frame) : null;

    /// <summary>Takes the lowest free frames for the domain: 2^order of them, contiguous and aligned to their number.</summary>
    /// <returns>False when there are none. The contents are whatever they were: see <see cref="Clear"/>.</returns>
    public bool TryAllocate(FrameFlags flags, int order, out Mfn frame) => TryAllocate(flags, order, ulong.MaxValue, out frame);

    /// <summary><see cref="TryAllocate(FrameFlags, int, out Mfn)"/> of frames whose numbers are below a limit.</summary>
    public bool TryAllocate(FrameFlags flags, int order, ulong limit, out Mfn frame)
    {
        frame = default;
        ulong count = 1UL << order;
        if (FreeCount < count)
            return false;
        while (_frames[_firstFree].ReferenceCount != 0)
            _firstFree++;
        ulong alignment = count - 1;
        for (ulong first = AlignUp(_firstFree, alignment); first + count <= _memory.FrameCount; first += count)
        {
            if (_memory.FirstFrame.Value + first + count > limit)
                return false;
            if (!AllFree(first, count))
                continue;
            for (ulong i = 0; i < count; i++)
                _frames[first + i] = new FrameInfo { Owner = _domain->Id, Flags = FrameFlags.Allocated | flags, ReferenceCount = 1 };
            FreeCount -= count;
            if ((flags & FrameFlags.Special) == 0)
                _domain->OwnedPages += count;
            frame = _memory.FirstFrame + first;
            return true;
        }

        return false;
    }

    /// <summary>
    /// Takes a frame from the domain that owns it and uses it for nothing (steal_page): the only reference is that of the owner. The
    /// frame is free then.
    /// </summary>
    public bool TrySteal(Mfn frame)
    {
        FrameInfo* info = Find(frame);
        if (info == null || info->ReferenceCount != 1 || info->Owner != _domain->Id || !info->Has(FrameFlags.Allocated) || info->Has(FrameFlags.Special))
            return false;
        PutPage(info);
        return true;
    }

    /// <summary>Gives a frame back that was stolen and is still free.</summary>
    public void Return(Mfn frame)
    {
        *Find(frame) = new FrameInfo { Owner = _domain->Id, Flags = FrameFlags.Allocated, ReferenceCount = 1 };
        FreeCount--;
        _domain->OwnedPages++;
    }

    /// <summary>Zeroes a frame.</summary>
    public readonly void Clear(Mfn frame) => NativeMemory.Clear(_memory.Page(frame), (nuint)Paging.PageSize);

    /// <summary>Adds a reference to a frame that the domain owns (get_page).</summary>
    /// <returns>Null when the frame does not exist or is another's.</returns>
    public readonly FrameInfo* GetPage(Mfn frame, ushort owner)
    {
        FrameInfo* info = Find(frame);
        if (info == null || info->ReferenceCount == 0 || info->Owner != owner)
            return null;
        if (info->ReferenceCount == uint.MaxValue)
            return null;
        info->ReferenceCount++;
        return info;
    }

    /// <summary>Drops a reference (put_page); the last one frees the frame.</summary>
    public void PutPage(FrameInfo* info)
    {
        if (--info->ReferenceCount != 0)
            return;
        ulong index = (ulong)(info - _frames);
        if (!info->Has(FrameFlags.Special))
            _domain->OwnedPages--;
        *info = default;
        _machineToPhys[index] = Mfn.Invalid.Value;
        FreeCount++;
        _firstFree = Math.Min(_firstFree, index);
    }

    /// <summary>First index from which the frame number is aligned.</summary>
    private readonly ulong AlignUp(ulong index, ulong alignment)
        => ((_memory.FirstFrame.Value + index + alignment) & ~alignment) - _memory.FirstFrame.Value;

    private readonly bool AllFree(ulong first, ulong count)
    {
        for (ulong i = 0; i < count; i++)
        {
            if (_frames[first + i].ReferenceCount != 0)
                return false;
        }

        return true;
    }
}
