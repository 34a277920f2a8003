// The one place where a page-table entry that a processor may be walking is stored.
using System.Diagnostics.CodeAnalysis;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace XenSharp.Core;

/// <summary>
/// Page-table stores of one vCPU, and what must be repeated from inside its VM before the guest runs on.
/// </summary>
/// <remarks>
/// The host always stores into the guest's memory at once, so that every later look at the tables is right. Where the
/// processor walks the guest's tables itself (two-dimensional paging) nothing more is due than a TLB flush. Where KVM walks
/// shadow copies it sees only stores that the guest makes, so the entry's address is queued and the monitor stores the
/// value over itself in the same KVM_RUN that enters the guest again. Blittable: lives in the per-vCPU page.
/// </remarks>
[StructLayout(LayoutKind.Sequential)]
public unsafe struct PageTableWriteQueue
{
    /// <summary>Most runs that are kept apart; past that, every shadow page is dropped instead (<see cref="Overflowed"/>).</summary>
    public const int Capacity = 1024;

    /// <summary>Most pages whose translations are dropped one by one; past that, all are.</summary>
    public const int MaxInvalidations = 8;

    /// <summary>A run of neighbouring entries.</summary>
    public struct Run
    {
        /// <summary>Machine address of the first entry.</summary>
        public ulong Address;

        /// <summary>Number of entries, at least 1.</summary>
        public ulong Count;
    }

    /// <summary>1 where stores must be repeated inside the VM.</summary>
    public int InGuest;

    /// <summary>Runs in use.</summary>
    public int Count;

    /// <summary>Set when a translation may be cached that the guest must no longer use; the next entry drops them all.</summary>
    public int FlushPending;

    /// <summary>Pages whose translations the next entry drops (<see cref="Invalidated"/>), where it does not drop all.</summary>
    public int InvalidationCount;

    /// <summary>
    /// Not 0 while the processor may be executing guest code: from before it looks at <see cref="FlushRequested"/> until it has come
    /// back. Written by its own thread only.
    /// </summary>
    public int Running;

    /// <summary>Set by other vCPUs that want <see cref="Flush"/> done; taken at the next entry.</summary>
    public int FlushRequested;

    /// <summary>
    /// The page, its lowest bit set, that another vCPU wants <see cref="Invalidate"/> done for; 0 for none. Who finds it taken asks for
    /// all to be dropped.
    /// </summary>
    public ulong InvalidationRequested;

    /// <summary>Set when the operation under way can only go on once the queued stores have been repeated: the next entry comes first.</summary>
    public int EntryFirst;

    /// <summary>Set when an entry above L1 was replaced: other vCPUs' translations are to be dropped when the batch ends.</summary>
    public int UnlinkPending;

    /// <summary>Set when <see cref="Capacity"/> was not enough: the VM has to forget all it derived from the tables.</summary>
    public int Overflowed;

    private RunArray _runs;
    private InvalidationArray _invalidations;

    [InlineArray(Capacity)]
    private struct RunArray
    {
        private Run _element;
    }

    [InlineArray(MaxInvalidations)]
    private struct InvalidationArray
    {
        private ulong _element;
    }

    [UnscopedRef]
    public ref Run this[int index] => ref _runs[index];

    /// <summary>Stores an entry and does what the VM needs for the guest to see it.</summary>
    /// <param name="entry">Host address of the entry.</param>
    /// <param name="address">Its machine address.</param>
    /// <param name="value">The new value.</param>
    /// <returns>The value that was replaced, with the bits that the processor set to the last.</returns>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public PageTableEntry Store(PageTableEntry* entry, MachineAddress address, PageTableEntry value)
    {
        var old = new PageTableEntry(Interlocked.Exchange(ref *(ulong*)entry, value.Value));
        if (InGuest != 0)
            RepeatIfCached(address, old, value);
        return old;
    }

    /// <summary>
    /// Replaces an entry only if it still is <paramref name="expected"/>: the processor may be setting Accessed and Dirty.
    /// </summary>
    /// <returns>The value found; equal to <paramref name="expected"/> when the store was made.</returns>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public PageTableEntry CompareExchange(PageTableEntry* entry, MachineAddress address, PageTableEntry value, PageTableEntry expected)
    {
        ulong found = Interlocked.CompareExchange(ref *(ulong*)entry, value.Value, expected.Value);
        if (found == expected.Value && InGuest != 0)
            RepeatIfCached(address, expected, value);
        return new PageTableEntry(found);
    }

    /// <summary>What a replaced entry needs where stores are repeated: not in the way where they are not.</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    private void RepeatIfCached(MachineAddress address, PageTableEntry old, PageTableEntry value)
    {
        if (MayBeCached(old, value))
            Repeat(address);
    }

    /// <summary>
    /// Whether something derived from the old entry may be in use that the new one does not allow. An entry that was not
    /// present, or never accessed, was not cached by any processor nor shadowed by KVM, and one that only gains rights is
    /// looked at again by the fault that misses them (Intel SDM volume 3, 4.10.2 and 4.10.4.3).
    /// </summary>
    private static bool MayBeCached(PageTableEntry old, PageTableEntry value)
    {
        if (!old.Has(PageFlags.Present | PageFlags.Accessed))
            return false;
        const PageFlags rights = PageFlags.Present | PageFlags.Writable | PageFlags.User | PageFlags.Accessed | PageFlags.Dirty;
        const PageFlags restrictions = PageFlags.NoExecute | PageFlags.WriteThrough | PageFlags.CacheDisable | PageFlags.LargePage;
        return old.Frame != value.Frame
            || (old.Flags & ~value.Flags & rights) != 0
            || ((old.Flags ^ value.Flags) & restrictions) != 0;
    }

    /// <summary>Asks for all translations of this processor to be dropped before the guest runs on.</summary>
    public void Flush() => FlushPending = 1;

    /// <summary>Asks for the translations of one page to be dropped on this processor before the guest runs on.</summary>
    public void Invalidate(VirtualAddress address)
    {
        ulong page = address.Value & ~(Paging.PageSize - 1);
        for (int i = 0; i < InvalidationCount; i++)
        {
            if (_invalidations[i] == page)
                return;
        }

        if (InvalidationCount == MaxInvalidations)
        {
            Flush();
            return;
        }

        _invalidations[InvalidationCount] = page;
        InvalidationCount++;
    }

    /// <summary>The page of a request to drop translations.</summary>
    /// <param name="index">Below <see cref="InvalidationCount"/>.</param>
    public readonly ulong Invalidated(int index) => _invalidations[index];

    /// <summary>Another vCPU wants the translations of one page dropped: before this one's next entry they are.</summary>
    public void RequestInvalidation(VirtualAddress address)
    {
        ulong request = (address.Value & ~(Paging.PageSize - 1)) | 1;
        ulong found = Interlocked.CompareExchange(ref InvalidationRequested, request, 0);
        if (found != 0 && found != request)
            _ = Interlocked.Exchange(ref FlushRequested, 1);
    }

    /// <summary>Takes over what other vCPUs asked for, before an entry.</summary>
    public void TakeRequests()
    {
        if (Volatile.Read(ref FlushRequested) != 0 && Interlocked.Exchange(ref FlushRequested, 0) != 0)
            Flush();
        if (Volatile.Read(ref InvalidationRequested) != 0)
            Invalidate(new VirtualAddress(Interlocked.Exchange(ref InvalidationRequested, 0)));
    }

    /// <summary>Whether a request of another vCPU has not been taken over.</summary>
    public bool IsRequested => Volatile.Read(ref FlushRequested) != 0 || Volatile.Read(ref InvalidationRequested) != 0;

    /// <summary>Nothing of this is due any more: the guest has been entered, or KVM has forgotten all that it made from the tables.</summary>
    public void Clear()
    {
        Count = 0;
        Overflowed = 0;
        FlushPending = 0;
        InvalidationCount = 0;
        EntryFirst = 0;
    }

    /// <summary>Has the entry at a machine address, which the manager stored, stored again inside the VM.</summary>
    public void Repeat(MachineAddress address)
    {
        if (Count > 0)
        {
            ref Run last = ref _runs[Count - 1];
            if (address.Value - last.Address < last.Count * sizeof(ulong))
                return;
            if (address.Value == last.Address + (last.Count * sizeof(ulong)))
            {
                last.Count++;
                return;
            }
        }

        if (Count == Capacity)
        {
            Overflowed = 1;
            return;
        }

        _runs[Count].Address = address.Value;
        _runs[Count].Count = 1;
        Count++;
    }
}
