// Page types and page-table entries: the rules by which a guest's own tables become safe to load into CR3.
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>
/// Xen's direct paging (arch/x86/mm.c): a frame is used as a page table only after every entry in it was checked, is never
/// writable by the guest while it is, and every entry holds a reference to what it maps.
/// </summary>
/// <remarks>
/// Static over the vCPU's context, free of allocation and exceptions: hot code of both places. Errors are positive
/// <see cref="Errno"/> values. Validation of a tree is not interrupted; its cost is bounded by the domain's memory.
/// </remarks>
public static unsafe class PageTables
{
    private const PageFlags CacheAttributes = PageFlags.WriteThrough | PageFlags.CacheDisable | PageFlags.LargePage;

    /// <summary>
    /// What an L1 entry may not have: cache attributes, for a domain without devices (l1_disallow_mask). Software bits 52–62
    /// and NX are the guest's.
    /// </summary>
    private const ulong DisallowedL1 = (ulong)CacheAttributes;

    /// <summary>What the entries above may not have (base_disallow_mask): no large pages, no global directories.</summary>
    private const ulong DisallowedUpper = (ulong)(CacheAttributes | PageFlags.Global);

    /// <summary>Flags that may change without the mapped frame being looked at again (FASTPATH_FLAG_WHITELIST).</summary>
    private const ulong FastPathFlags = (0x7ffUL << 52) | (ulong)(PageFlags.NoExecute | PageFlags.Available0 | PageFlags.Available1
        | PageFlags.Available2 | PageFlags.Global | PageFlags.Dirty | PageFlags.Accessed | PageFlags.User);

    /// <summary>The table type of a level, 1 to 4.</summary>
    public static PageType TypeOfLevel(int level) => (PageType)level;

    /// <summary>References a frame for a use (get_page_and_type).</summary>
    public static Errno GetPageAndType(VcpuContext* vcpu, Mfn frame, PageType type, out FrameInfo* info)
    {
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        info = frames->GetPage(frame, vcpu->Domain->State->Id);
        if (info == null)
            return Errno.EINVAL;
        Errno error = GetType(vcpu, frame, info, type);
        if (error != Errno.None)
        {
            frames->PutPage(info);
            info = null;
        }

        return error;
    }

    /// <summary>Drops what <see cref="GetPageAndType"/> took (put_page_and_type).</summary>
    public static void PutPageAndType(VcpuContext* vcpu, Mfn frame, FrameInfo* info)
    {
        PutType(vcpu, frame, info);
        FrameTable.Of(vcpu->Domain)->PutPage(info);
    }

    /// <summary>Adds a use of a frame whose reference the caller holds (get_page_type).</summary>
    public static Errno GetType(VcpuContext* vcpu, Mfn frame, FrameInfo* info, PageType type)
    {
        if (info->TypeCount == uint.MaxValue)
            return Errno.EINVAL;
        if (info->TypeCount != 0)
        {
            if (info->Type != type)
                return Errno.EINVAL;
            info->TypeCount++;
            return Errno.None;
        }

        // The last writable mapping may still be in a TLB when the frame becomes something that must not be written.
        if (info->Type == PageType.Writable && type != PageType.Writable && vcpu->PageTableWrites->InGuest == 0)
            vcpu->PageTableWrites->Flush();
        info->Type = type;
        info->TypeCount = 1;
        info->Flags &= ~FrameFlags.Validated;
        Errno error = type switch
        {
            PageType.SegmentDescriptors => DescriptorTables.Validate(vcpu->Domain->Memory.Page(frame)) ? Errno.None : Errno.EINVAL,
            >= PageType.L1PageTable and <= PageType.L4PageTable => ValidateTable(vcpu, frame, (int)type),
            _ => Errno.None,
        };
        if (error == Errno.None)
        {
            info->Flags |= FrameFlags.Validated;
            return Errno.None;
        }

        info->TypeCount = 0;
        info->Type = PageType.None;
        return error;
    }

    /// <summary>Drops a use (put_page_type); the last one of a page table drops what its entries hold.</summary>
    public static void PutType(VcpuContext* vcpu, Mfn frame, FrameInfo* info)
    {
        // The last use stays counted while the entries are dropped, so that a table cannot be freed under its own walk.
        if (info->TypeCount == 1 && info->IsPageTable && info->Has(FrameFlags.Validated))
        {
            InvalidateTable(vcpu, frame, (int)info->Type, Paging.EntriesPerTable);
            info->Flags &= ~FrameFlags.Validated;
        }

        info->TypeCount--;
    }

    /// <summary>
    /// Changes one entry of a table that is in use as one (mod_lN_entry).
    /// </summary>
    /// <param name="vcpu">The calling vCPU.</param>
    /// <param name="level">The table's level, 1 to 4.</param>
    /// <param name="entry">Host address of the entry.</param>
    /// <param name="address">Its machine address.</param>
    /// <param name="value">What the guest wants there.</param>
    /// <param name="preserveAccessedDirty">MMU_PT_UPDATE_PRESERVE_AD: bits that the processor sets meanwhile are kept.</param>
    /// <param name="ioMemory">Of an L1: the frame is meant to be DOMID_IO's, not the domain's own.</param>
    public static Errno ModifyEntry(
        VcpuContext* vcpu, int level, PageTableEntry* entry, MachineAddress address, PageTableEntry value, bool preserveAccessedDirty,
        bool ioMemory = false)
    {
        if (level == 4 && Paging.IsHypervisorSlot(address.Offset / sizeof(ulong)))
            return Errno.EINVAL;
        PageTableEntry old = Read(entry);
        if (value.IsPresent)
        {
            if ((value.Value & Disallowed(level)) != 0)
                return Errno.EINVAL;
            value = Adjust(level, value);
            if (old.IsPresent && ((old.Value ^ value.Value) & ~FastPathFlags) == 0)
                return Update(vcpu, entry, address, old, value, preserveAccessedDirty) ? Errno.None : Errno.EBUSY;
            Errno error = ioMemory ? RefuseIoMemory(vcpu, value.Frame) : Reference(vcpu, address.Frame, level, value);
            if (error != Errno.None)
                return error;
            if (!Update(vcpu, entry, address, old, value, preserveAccessedDirty))
            {
                Release(vcpu, address.Frame, level, value);
                return Errno.EBUSY;
            }
        }
        else if (!Update(vcpu, entry, address, old, value, preserveAccessedDirty))
        {
            return Errno.EBUSY;
        }

        if (old.IsPresent)
            Release(vcpu, address.Frame, level, old);

        // Above L1 a TLB may hold parts of walks that went through the old entry.
        if (level > 1 && old.IsPresent && vcpu->PageTableWrites->InGuest == 0)
            vcpu->PageTableWrites->Flush();
        return Errno.None;
    }

    /// <summary>
    /// Shows or hides the M2P table in an L4: the kernel reads it, user mode does not. A new L4 has it where m2p_strict is on, and
    /// loses it by becoming the root of user mode; else it gets it by becoming the kernel's, and keeps it (fill_ro_mpt, zap_ro_mpt).
    /// </summary>
    internal static void ShowMachineToPhys(VcpuContext* vcpu, Mfn root, bool shown)
    {
        int slot = vcpu->Domain->MachineToPhysStart.TableIndex(4);
        PageTableEntry* entry = vcpu->Domain->Memory.Table(root) + slot;
        var value = new PageTableEntry(shown ? vcpu->Domain->HypervisorSlots[slot - Paging.FirstHypervisorSlot] : 0);
        const ulong maySet = (ulong)(PageFlags.Accessed | PageFlags.Dirty);
        if (((entry->Value ^ value.Value) & ~maySet) != 0)
            vcpu->PageTableWrites->Store(entry, root.Address + ((ulong)slot * sizeof(ulong)), value);
    }

    /// <summary>Checks an L1 entry and takes the references that it needs, as <see cref="ModifyEntry"/> does.</summary>
    /// <returns>The entry as it is to be stored, in <paramref name="value"/>.</returns>
    public static Errno ReferenceL1(VcpuContext* vcpu, ref PageTableEntry value)
    {
        if (!value.IsPresent)
            return Errno.None;
        if ((value.Value & Disallowed(1)) != 0)
            return Errno.EINVAL;
        value = Adjust(1, value);
        return ReferencePage(vcpu, value);
    }

    /// <summary>Gives back the references of a present L1 entry that is no longer stored.</summary>
    public static void ReleaseL1(VcpuContext* vcpu, PageTableEntry value)
    {
        if (value.IsPresent)
            Release(vcpu, default, 1, value);
    }

    private static PageTableEntry Read(PageTableEntry* entry) => new(Volatile.Read(ref *(ulong*)entry));

    private static ulong Disallowed(int level) => level == 1 ? DisallowedL1 : DisallowedUpper;

    /// <summary>
    /// What the guest wrote becomes what runs at CPL 3: kernel entries lack User, and get it with a mark (adjust_guest_lNe).
    /// </summary>
    private static PageTableEntry Adjust(int level, PageTableEntry value)
    {
        if (level > 1)
            return value.With(level == 4 ? PageFlags.User | PageFlags.Accessed : PageFlags.User);
        if (!value.Has(PageFlags.User))
            value = value.With(PageFlags.GuestKernel | PageFlags.User);
        return value.Has(PageFlags.GuestKernel) ? value : value.With(PageFlags.Global | PageFlags.User);
    }

    private static bool Update(
        VcpuContext* vcpu, PageTableEntry* entry, MachineAddress address, PageTableEntry old, PageTableEntry value, bool preserveAccessedDirty)
    {
        if (!preserveAccessedDirty)
        {
            vcpu->PageTableWrites->Store(entry, address, value);
            return true;
        }

        const PageFlags accessedDirty = PageFlags.Accessed | PageFlags.Dirty;
        while (true)
        {
            PageTableEntry kept = value.With(old.Flags & accessedDirty);
            PageTableEntry found = vcpu->PageTableWrites->CompareExchange(entry, address, kept, old);
            if (found == old)
                return true;

            // Only the processor's own bits may have changed; anything else is another writer.
            if (((found.Value ^ old.Value) & ~(ulong)accessedDirty) != 0)
                return false;
            old = found;
        }
    }

    /// <summary>Takes the references that a present entry of a table needs (get_page_from_lNe).</summary>
    private static Errno Reference(VcpuContext* vcpu, Mfn table, int level, PageTableEntry value)
    {
        if (level == 1)
            return ReferencePage(vcpu, value);
        Errno error = GetPageAndType(vcpu, value.Frame, TypeOfLevel(level - 1), out _);
        return error == Errno.EINVAL && ReferenceLinear(vcpu, table, level, value) ? Errno.None : error;
    }

    /// <summary>What an L1 entry maps (get_page_from_l1e).</summary>
    private static Errno ReferencePage(VcpuContext* vcpu, PageTableEntry value)
    {
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        FrameInfo* info = frames->Find(value.Frame);
        if (info == null)
            return RefuseIoMemory(vcpu, value.Frame);
        if (frames->GetPage(value.Frame, vcpu->Domain->State->Id) == null)
            return Errno.EBUSY;
        if (!value.IsWritable || GetType(vcpu, value.Frame, info, PageType.Writable) == Errno.None)
            return Errno.None;
        frames->PutPage(info);
        return Errno.EBUSY;
    }

    /// <summary>A domain without devices maps no I/O memory, and what is memory is not DOMID_IO's.</summary>
    private static Errno RefuseIoMemory(VcpuContext* vcpu, Mfn frame)
        => vcpu->Domain->Memory.Contains(frame) ? Errno.EBUSY
            : frame.Value == PageTableEntry.FrameMask >> Paging.PageShift ? Errno.EINVAL
            : Errno.EPERM;

    /// <summary>
    /// A linear page table: an entry that names a table of the entry's own level, so that the guest reads its tables as one
    /// array (get_lN_linear_pagetable). It must be read-only, or the guest could write its own entries. Naming the table that
    /// it is in takes no reference; naming another takes one of a table that is validated and has no linear entries itself.
    /// </summary>
    private static bool ReferenceLinear(VcpuContext* vcpu, Mfn table, int level, PageTableEntry value)
    {
        if (value.IsWritable)
            return false;
        if (value.Frame == table)
            return true;
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        FrameInfo* from = frames->Find(table);
        FrameInfo* to = frames->GetPage(value.Frame, vcpu->Domain->State->Id);
        if (to == null)
            return false;
        if (from->LinearCount >= 0 && from->LinearCount < short.MaxValue && to->LinearCount <= 0 && to->LinearCount > short.MinValue
            && to->Type == TypeOfLevel(level) && to->TypeCount is > 0 and < uint.MaxValue && to->Has(FrameFlags.Validated))
        {
            from->LinearCount++;
            to->LinearCount--;
            to->TypeCount++;
            return true;
        }

        frames->PutPage(to);
        return false;
    }

    /// <summary>Drops the references of a present entry of a table (put_page_from_lNe).</summary>
    private static void Release(VcpuContext* vcpu, Mfn table, int level, PageTableEntry value)
    {
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        FrameInfo* info = frames->Find(value.Frame);
        if (info == null || (level > 1 && value.Frame == table))
            return;
        if (level > 1 && info->Type == TypeOfLevel(level))
        {
            frames->Find(table)->LinearCount--;
            info->LinearCount++;
        }

        if (level > 1 || value.IsWritable)
            PutType(vcpu, value.Frame, info);
        frames->PutPage(info);
    }

    /// <summary>Checks and references every entry of a table (promote_lN_table).</summary>
    private static Errno ValidateTable(VcpuContext* vcpu, Mfn frame, int level)
    {
        vcpu->Domain->MarkShadowed(frame);
        PageTableEntry* table = vcpu->Domain->Memory.Table(frame);
        for (int i = 0; i < Paging.EntriesPerTable; i++)
        {
            if (level == 4 && Paging.IsHypervisorSlot(i))
                continue;
            PageTableEntry value = Read(table + i);
            if (!value.IsPresent)
                continue;
            Errno error = (value.Value & Disallowed(level)) != 0 ? Errno.EINVAL : Reference(vcpu, frame, level, value);
            if (error != Errno.None)
            {
                InvalidateTable(vcpu, frame, level, i);
                return error;
            }

            PageTableEntry adjusted = Adjust(level, value);
            if (adjusted != value)
                vcpu->PageTableWrites->Store(table + i, frame.Address + ((ulong)i * sizeof(ulong)), adjusted);
        }

        if (level == 4)
        {
            // A stale shadow can hold nothing else here: the guest's own stores were seen, and these are always the same; but for the
            // M2P table's.
            int machineToPhys = vcpu->Domain->MachineToPhysStart.TableIndex(4);
            for (int i = 0; i < Paging.HypervisorSlots; i++)
            {
                if (Paging.FirstHypervisorSlot + i != machineToPhys)
                    ((ulong*)table)[Paging.FirstHypervisorSlot + i] = vcpu->Domain->HypervisorSlots[i];
            }

            ShowMachineToPhys(vcpu, frame, vcpu->Domain->State->Has(VmAssist.M2PStrict));
        }

        return Errno.None;
    }

    /// <summary>Drops the references of the first <paramref name="count"/> entries of a table (demote_lN_table).</summary>
    private static void InvalidateTable(VcpuContext* vcpu, Mfn frame, int level, int count)
    {
        PageTableEntry* table = vcpu->Domain->Memory.Table(frame);
        for (int i = 0; i < count; i++)
        {
            if (level == 4 && Paging.IsHypervisorSlot(i))
                continue;
            PageTableEntry value = Read(table + i);
            if (value.IsPresent)
                Release(vcpu, frame, level, value);
        }
    }
}
