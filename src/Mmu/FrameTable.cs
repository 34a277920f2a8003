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

    /// <summary>
    /// A page table that was left in the middle of being checked or dropped (PGT_partial): <see cref="FrameInfo.Progress"/>
    /// says how far. Its one type count, and a reference, belong to this state.
    /// </summary>
    Partial = 1 << 4,

    /// <summary>Reserved with what an earlier life left in it: to be cleared before it is anybody's (PGC_need_scrub).</summary>
    NeedScrub = 1 << 5,
}

/// <summary>Type, type count, owner and the flags that go with them: what changes together, in one word (type_info).</summary>
/// <remarks>
/// A frame with a type count is in one of three states. Validated: anyone may count it once more. Partial: there is one count,
/// which is nobody's; whoever wants the type goes on with the check. Neither: one vCPU is checking or dropping it, has it to
/// itself, and the others wait.
/// </remarks>
public readonly record struct FrameType(ulong Value)
{
    private const int TypeShift = 32;
    private const int FlagsShift = 40;
    private const int OwnerShift = 48;
    private const ulong OwnerMask = 0xffffUL << OwnerShift;

    /// <summary>Uses as <see cref="Type"/>.</summary>
    public uint Count => (uint)Value;

    public PageType Type => (PageType)(byte)(Value >> TypeShift);

    public FrameFlags Flags => (FrameFlags)(byte)(Value >> FlagsShift);

    /// <summary>Domain id of the owner.</summary>
    public ushort Owner => (ushort)(Value >> OwnerShift);

    public bool IsPageTable => Type is >= PageType.L1PageTable and <= PageType.L4PageTable;

    public bool Has(FrameFlags flags) => (Flags & flags) == flags;

    /// <summary>One use more.</summary>
    public FrameType Plus() => new(Value + 1);

    /// <summary>One use less; the type stays, so that what processors may still have cached is known.</summary>
    public FrameType Minus() => new(Value - 1);

    public FrameType With(FrameFlags flags) => new(Value | ((ulong)flags << FlagsShift));

    public FrameType Without(FrameFlags flags) => new(Value & ~((ulong)flags << FlagsShift));

    /// <summary>The first use as a type, to be checked by the vCPU that makes it so.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public FrameType First(PageType type) => new((Value & OwnerMask) | ((ulong)type << TypeShift) | 1);

    /// <summary>No use, and none that could be cached.</summary>
    public FrameType Unused() => new(Value & OwnerMask);

    /// <summary>Nobody's; only what it was used as last is remembered.</summary>
    public FrameType Free() => new((ulong)Type << TypeShift);

    /// <summary>A domain's, and used for nothing.</summary>
    public FrameType Of(ushort domain) => new(((ulong)domain << OwnerShift) | ((ulong)Type << TypeShift));
}

/// <summary>One frame, 16 bytes.</summary>
/// <remarks>
/// No locks. The type word and the reference word each change by compare-exchange. A page table's contents, <see cref="Progress"/>
/// and the fate of its entries belong to whoever made it neither validated nor partial (<see cref="FrameType"/>); its entries may
/// be changed by all who hold a use of it, each by one atomic exchange whose old value is the changer's to release. A vCPU waits
/// for a table of a lower level only, so waits cannot form a ring.
/// </remarks>
[StructLayout(LayoutKind.Sequential)]
public struct FrameInfo
{
    private const uint AllocatedBit = 1u << 31;
    private const uint SpecialBit = 1u << 30;
    private const uint CountMask = SpecialBit - 1;

    /// <summary>References that only the manager takes, so that it never has to ask: more than there are vCPUs.</summary>
    private const uint ReservedReferences = 1 << 16;

    private ulong _type;
    private uint _references;
    private short _linearCount;
    private short _progress;

    /// <summary>The type word as it is now.</summary>
    public readonly FrameType State => new(Volatile.Read(in _type));

    public readonly uint TypeCount => State.Count;

    public readonly PageType Type => State.Type;

    public readonly FrameFlags Flags
    {
        get
        {
            uint references = Volatile.Read(in _references);
            return State.Flags
                | ((references & AllocatedBit) != 0 ? FrameFlags.Allocated : FrameFlags.None)
                | ((references & SpecialBit) != 0 ? FrameFlags.Special : FrameFlags.None);
        }
    }

    /// <summary>Domain id of the owner; 0 of a free frame.</summary>
    public readonly ushort Owner => State.Owner;

    /// <summary>All references; the frame is free at 0. A type reference always comes with one of these.</summary>
    public readonly uint ReferenceCount => Volatile.Read(in _references) & CountMask;

    /// <summary>
    /// Of a page table above L1: entries of it that name another table of its own level (positive), or such entries of others
    /// that name it (negative). Never both, so that linear tables cannot be chained (linear_pt_count).
    /// </summary>
    public readonly short LinearCount => Volatile.Read(in _linearCount);

    /// <summary>Of a partial table, and of one that is being checked: entries, from the first on, whose references are held.</summary>
    public int Progress
    {
        readonly get => _progress & short.MaxValue;
        set => _progress = (short)value;
    }

    /// <summary>
    /// The entry at <see cref="Progress"/> may name a table that was left partial on this one's behalf (PTF_partial_set): going on
    /// takes it up again, giving up drops it first. Setting <see cref="Progress"/> clears it.
    /// </summary>
    public bool PartialEntry
    {
        readonly get => _progress < 0;
        set => _progress = value ? (short)(_progress | short.MinValue) : (short)(_progress & short.MaxValue);
    }

    public readonly bool IsPageTable => State.IsPageTable;

    public readonly bool Has(FrameFlags flags) => (Flags & flags) == flags;

    /// <summary>Changes the type word if it still is what the caller saw.</summary>
    public bool TryChange(FrameType from, FrameType to) => Interlocked.CompareExchange(ref _type, to.Value, from.Value) == from.Value;

    /// <summary>
    /// Adds a use as writable to a frame that the caller holds a reference to, where that is all that there is to do: it is used so
    /// already, or for nothing and was no page table before.
    /// </summary>
    /// <returns>False where more is to be looked at, or another vCPU was faster.</returns>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    internal bool TryUseAsWritable()
    {
        FrameType state = State;
        if (state.Count == 0 && !state.IsPageTable)
            return TryChange(state, state.First(PageType.Writable).With(FrameFlags.Validated));
        return state.Type == PageType.Writable && state.Has(FrameFlags.Validated) && state.Count != uint.MaxValue && TryChange(state, state.Plus());
    }

    /// <summary>Drops a use as writable.</summary>
    /// <returns>False where another vCPU was faster, or it is used as something else.</returns>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    internal bool TryDropWritable()
    {
        FrameType state = State;
        return state.Type == PageType.Writable && TryChange(state, state.Minus());
    }

    /// <summary>Ends the exclusive state: the word is the caller's until this store.</summary>
    public void Settle(FrameType state) => Volatile.Write(ref _type, state.Value);

    /// <summary>Sets the pin of a table that the caller holds a use of.</summary>
    /// <returns>False when it is pinned already.</returns>
    public bool TryPin()
    {
        while (true)
        {
            FrameType state = State;
            if (state.Has(FrameFlags.Pinned))
                return false;
            if (TryChange(state, state.With(FrameFlags.Pinned)))
                return true;
        }
    }

    /// <summary>Takes the pin away; its use and reference are the caller's then.</summary>
    public bool TryUnpin()
    {
        while (true)
        {
            FrameType state = State;
            if (!state.Has(FrameFlags.Pinned))
                return false;
            if (TryChange(state, state.Without(FrameFlags.Pinned)))
                return true;
        }
    }

    /// <summary>A free frame is taken, and nobody's yet.</summary>
    /// <param name="contents"><see cref="FrameFlags.NeedScrub"/> or nothing.</param>
    internal void Reserve(FrameFlags contents)
    {
        _linearCount = 0;
        _progress = 0;
        Settle(State.Free().With(contents));
        Volatile.Write(ref _references, 1);
    }

    /// <summary>A reserved frame becomes the domain's: from here on its vCPUs can name it.</summary>
    internal void Assign(ushort domain, FrameFlags flags)
    {
        _ = Interlocked.Or(ref _references, AllocatedBit | ((flags & FrameFlags.Special) != 0 ? SpecialBit : 0));
        Settle(State.Of(domain));
    }

    /// <summary>Adds a reference to a frame that is not free.</summary>
    /// <returns>False for a free frame, and where the count would leave no room for <see cref="AddReference"/>.</returns>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    internal bool TryReference()
    {
        while (true)
        {
            uint references = Volatile.Read(ref _references);
            if ((references & CountMask) is 0 or >= CountMask - ReservedReferences)
                return false;
            if (Interlocked.CompareExchange(ref _references, references + 1, references) == references)
                return true;
        }
    }

    /// <summary>Adds a reference to a frame that the caller has one to.</summary>
    internal void AddReference() => Interlocked.Increment(ref _references);

    /// <summary>Drops a reference that is not the last one.</summary>
    /// <returns>False when it is the last one, and kept.</returns>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    internal bool TryDereference()
    {
        while (true)
        {
            uint references = Volatile.Read(ref _references);
            if ((references & CountMask) == 1)
                return false;
            if (Interlocked.CompareExchange(ref _references, references - 1, references) == references)
                return true;
        }
    }

    /// <summary>Drops the last reference: the frame is free.</summary>
    /// <returns>False when it is not the last any more.</returns>
    internal bool TryFree()
    {
        uint references = Volatile.Read(ref _references);
        if ((references & CountMask) != 1 || Interlocked.CompareExchange(ref _references, 0, references) != references)
            return false;
        Settle(State.Free());
        return true;
    }

    /// <summary>Takes the frame from the domain that owns it; the owner's reference is the caller's to drop.</summary>
    /// <returns>False when it was taken before.</returns>
    internal bool TryDisown()
        => (Interlocked.And(ref _references, ~AllocatedBit) & AllocatedBit) != 0;

    /// <summary>Takes the frame from the domain that owns it, where nobody else has a reference to it: it is free then.</summary>
    internal bool TryFreeUnused()
    {
        if (Interlocked.CompareExchange(ref _references, 0, 1 | AllocatedBit) != (1 | AllocatedBit))
            return false;
        Settle(State.Free());
        return true;
    }

    /// <summary>
    /// Takes a frame that is shared with the domain from it, where nobody but its owner and who shares it has a reference to it: it
    /// is free then.
    /// </summary>
    internal bool TryFreeShared()
    {
        if (Interlocked.CompareExchange(ref _references, 0, 2 | AllocatedBit | SpecialBit) != (2 | AllocatedBit | SpecialBit))
            return false;
        Settle(State.Free());
        return true;
    }

    /// <summary>A frame that <see cref="TryFreeShared"/> made free, and nobody has taken since, is shared again.</summary>
    internal void ShareAgain(ushort domain)
    {
        Reserve(FrameFlags.None);
        AddReference();
        Assign(domain, FrameFlags.Special);
        Settle(State.First(PageType.Writable).With(FrameFlags.Validated));
    }

    /// <summary>Counts an entry that names another table of this one's level; false where others do so with this one.</summary>
    internal bool TryAddLinearEntry() => TryMoveLinear(1);

    /// <summary>Counts an entry of another table of this one's level that names it; false where this one has such entries.</summary>
    internal bool TryAddLinearUse() => TryMoveLinear(-1);

    internal void DropLinearEntry() => _ = MoveLinear(-1);

    internal void DropLinearUse() => _ = MoveLinear(1);

    private bool TryMoveLinear(short step)
    {
        while (true)
        {
            short count = Volatile.Read(ref _linearCount);
            if (step > 0 ? count is < 0 or short.MaxValue : count is > 0 or short.MinValue)
                return false;
            if (Interlocked.CompareExchange(ref _linearCount, (short)(count + step), count) == count)
                return true;
        }
    }

    private short MoveLinear(short step)
    {
        while (true)
        {
            short count = Volatile.Read(ref _linearCount);
            if (Interlocked.CompareExchange(ref _linearCount, (short)(count + step), count) == count)
                return count;
        }
    }
}

/// <summary>The table of a domain's frames, and its free ones. Lives in unmanaged memory.</summary>
public unsafe struct FrameTable
{
    private FrameInfo* _frames;
    private MachineMemory _memory;

    private DomainState* _domain;
    private ulong* _machineToPhys;

    /// <summary>
    /// Held while the free frames and the domain's count of its own change (page_alloc_lock); nothing is waited for under it.
    /// </summary>
    private int _lock;

    /// <summary>No frame below this index is free.</summary>
    private ulong _firstFree;

    /// <summary>Free frames whose memory the host can have back.</summary>
    public ScrubMap Scrub;

    /// <summary>Frames that no domain owns.</summary>
    public ulong FreeCount { get; private set; }

    /// <summary>Makes the table, all frames free.</summary>
    /// <param name="frames">Zeroed, one element a frame.</param>
    /// <param name="memory">The frames' memory.</param>
    /// <param name="domain">Whose <see cref="DomainState.OwnedPages"/> is kept.</param>
    /// <param name="machineToPhys">The M2P table, where a frame that becomes free loses its entry.</param>
    /// <param name="scrub">For <see cref="Scrub"/>: zeroed, <see cref="ScrubMap.SizeOf"/> bytes.</param>
    public void Initialize(FrameInfo* frames, MachineMemory memory, DomainState* domain, ulong* machineToPhys, ulong* scrub)
    {
        _frames = frames;
        _memory = memory;
        _domain = domain;
        _machineToPhys = machineToPhys;
        FreeCount = memory.FrameCount;
        Scrub.Initialize(scrub, memory.FrameCount);
    }

    /// <summary>The frame table that a domain context points to.</summary>
    public static FrameTable* Of(DomainContext* domain) => (FrameTable*)domain->Frames;

    /// <summary>A frame's entry, or null for one outside machine memory.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public readonly FrameInfo* Find(Mfn frame) => _memory.Contains(frame) ? _frames + _memory.IndexOf(frame) : null;

    /// <summary>Takes the lowest free frames for the domain: 2^order of them, contiguous and aligned to their number.</summary>
    /// <returns>False when there are none. The contents are whatever they were.</returns>
    public bool TryAllocate(FrameFlags flags, int order, out Mfn frame)
    {
        if (!TryReserve(flags, order, ulong.MaxValue, out frame))
            return false;
        Assign(flags, order, frame);
        return true;
    }

    /// <summary>
    /// Takes frames as <see cref="TryAllocate"/> does, of those whose numbers are below a limit, and counts them for the domain; it
    /// cannot name them before <see cref="Assign"/>, so that those with <see cref="FrameFlags.NeedScrub"/> can be emptied first.
    /// </summary>
    /// <returns>False when there are none, or the domain has all that it may have.</returns>
    public bool TryReserve(FrameFlags flags, int order, ulong limit, out Mfn frame)
    {
        Lock();
        bool taken = TryTake(flags, order, limit, out frame);
        Unlock();
        return taken;
    }

    /// <summary>Makes reserved frames the domain's.</summary>
    public readonly void Assign(FrameFlags flags, int order, Mfn frame)
    {
        for (ulong i = 0; i < 1UL << order; i++)
            Find(frame + i)->Assign(_domain->Id, flags);
    }

    /// <summary>
    /// Takes a frame from the domain that owns it and uses it for nothing (steal_page): the only reference is that of the owner. The
    /// frame is free then. Under <see cref="Lock"/>.
    /// </summary>
    internal bool TrySteal(Mfn frame)
    {
        FrameInfo* info = Find(frame);
        if (info == null || info->Owner != _domain->Id || !info->TryFreeUnused())
            return false;
        NoteFree(_memory.IndexOf(frame), special: false);
        return true;
    }

    /// <summary>
    /// Gives a frame back that was stolen under the same <see cref="Lock"/>; with its contents, where <see cref="Scrub"/> held them
    /// since.
    /// </summary>
    internal void Return(Mfn frame)
    {
        _ = Scrub.Take(_memory.IndexOf(frame));
        Find(frame)->Reserve(FrameFlags.None);
        Find(frame)->Assign(_domain->Id, FrameFlags.None);
        FreeCount--;
        _domain->OwnedPages++;
    }

    /// <summary>Takes frames back that are shared with the domain, all or none.</summary>
    /// <returns>False where the domain still refers to one.</returns>
    internal bool TryUnshare(ulong* frames, int count)
    {
        Lock();
        int freed = 0;
        while (freed < count && Find(new Mfn(frames[freed]))->TryFreeShared())
            freed++;
        bool all = freed == count;
        for (int i = 0; i < freed; i++)
        {
            if (all)
                NoteFree(_memory.IndexOf(new Mfn(frames[i])), special: true);
            else
                Find(new Mfn(frames[i]))->ShareAgain(_domain->Id);
        }

        Unlock();
        return all;
    }

    /// <summary>Lets frames go that were taken under the same <see cref="Lock"/> and not assigned.</summary>
    internal void Unreserve(int order, Mfn frame)
    {
        for (ulong i = 0; i < 1UL << order; i++)
        {
            // A vCPU that guesses the frame's number holds a reference for as long as it takes to see that it is nobody's.
            while (!Find(frame + i)->TryFree())
                _ = Thread.Yield();
            NoteFree(_memory.IndexOf(frame + i), special: false);
        }
    }

    /// <summary>Zeroes a frame.</summary>
    public readonly void Clear(Mfn frame) => NativeMemory.Clear(_memory.Page(frame), (nuint)Paging.PageSize);

    /// <summary>Adds a reference to a frame that the domain owns (get_page).</summary>
    /// <returns>Null when the frame does not exist or is another's.</returns>
    public FrameInfo* GetPage(Mfn frame, ushort owner)
    {
        FrameInfo* info = Find(frame);
        if (info == null || !info->TryReference())
            return null;
        if (info->Owner == owner)
            return info;
        PutPage(info);
        return null;
    }

    /// <summary>Drops a reference (put_page); the last one frees the frame.</summary>
    public void PutPage(FrameInfo* info)
    {
        while (!info->TryDereference())
        {
            // Free frames are looked for under the lock, so that nobody takes this one half-way.
            bool special = info->Has(FrameFlags.Special);
            Lock();
            bool free = info->TryFree();
            if (free)
                NoteFree((ulong)(info - _frames), special);
            Unlock();
            if (free)
                return;
        }
    }

    private void NoteFree(ulong index, bool special)
    {
        if (!special)
            _domain->OwnedPages--;
        Scrub.Mark(index);
        _machineToPhys[index] = Mfn.Invalid.Value;
        FreeCount++;
        _firstFree = Math.Min(_firstFree, index);
    }

    /// <summary>Keeps the free frames as they are for other vCPUs until <see cref="Unlock"/>.</summary>
    internal void Lock() => SpinWord.Enter(ref _lock);

    /// <summary>Ends <see cref="Lock"/>.</summary>
    internal void Unlock() => SpinWord.Exit(ref _lock);

    /// <summary><see cref="TryReserve"/> under <see cref="Lock"/>.</summary>
    internal bool TryTake(FrameFlags flags, int order, ulong limit, out Mfn frame)
    {
        ulong count = 1UL << order;
        frame = default;
        bool special = (flags & FrameFlags.Special) != 0;
        if (FreeCount < count || (!special && _domain->OwnedPages + count > _domain->MaxPages))
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
                _frames[first + i].Reserve(Scrub.Take(first + i) ? FrameFlags.NeedScrub : FrameFlags.None);
            FreeCount -= count;
            if (!special)
                _domain->OwnedPages += count;
            frame = _memory.FirstFrame + first;
            return true;
        }

        return false;
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
