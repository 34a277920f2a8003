// Page types and page-table entries: the rules by which a guest's own tables become safe to load into CR3.
using System.Runtime.CompilerServices;
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>
/// Xen's direct paging (arch/x86/mm.c): a frame is used as a page table only after every entry in it was checked, is never
/// writable by the guest while it is, and every entry holds a reference to what it maps.
/// </summary>
/// <remarks>
/// Static over the vCPU's context, free of allocation and exceptions: hot code of both places. Errors are positive
/// <see cref="Errno"/> values. What walks a tree stops where <see cref="VcpuContext.PreemptionDue"/> says so and answers
/// <see cref="Errno.ERESTART"/>: the tables remember how far it came (<see cref="FrameFlags.Partial"/>), and asking again goes on
/// from there. Each call gets at least one entry further.
/// </remarks>
public static unsafe class PageTables
{
    private const PageFlags AccessedDirty = PageFlags.Accessed | PageFlags.Dirty;
    private const PageFlags CacheAttributes = PageFlags.WriteThrough | PageFlags.CacheDisable | PageFlags.LargePage;

    /// <summary>
    /// What an L1 entry may not have: cache attributes, for a domain without devices (l1_disallow_mask). Software bits 52–62
    /// and NX are the guest's.
    /// </summary>
    private const ulong DisallowedL1 = (ulong)CacheAttributes;

    /// <summary>What the entries above may not have (base_disallow_mask): no large pages, no global directories.</summary>
    private const ulong DisallowedUpper = (ulong)(CacheAttributes | PageFlags.Global);

    /// <summary>Looks at a table that another vCPU is checking before this one gives way.</summary>
    private const int MaxWaits = 1000;

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
    /// <returns>ERESTART where a table was left partial: it has to be handed to <see cref="Defer"/>.</returns>
    public static Errno PutPageAndType(VcpuContext* vcpu, Mfn frame, FrameInfo* info)
    {
        Errno error = PutType(vcpu, frame, info);
        FrameTable.Of(vcpu->Domain)->PutPage(info);
        return error;
    }

    /// <summary>Adds a use of a frame whose reference the caller holds (get_page_type).</summary>
    public static Errno GetType(VcpuContext* vcpu, Mfn frame, FrameInfo* info, PageType type)
    {
        for (int waits = 0; ;)
        {
            FrameType state = info->State;
            FrameType next;
            if (state.Count == 0)
            {
                next = state.First(type);
                if (type == PageType.Writable && !state.IsPageTable)
                    next = next.With(FrameFlags.Validated);
            }
            else if (state.Type != type || state.Count == uint.MaxValue)
            {
                return Errno.EINVAL;
            }
            else if (state.Has(FrameFlags.Validated))
            {
                next = state.Plus();
            }
            else if (state.Has(FrameFlags.Partial))
            {
                next = state.Without(FrameFlags.Partial);
            }
            else
            {
                // Another vCPU is at it. Its thread may have been taken from the processor, for longer than this one has to spare.
                if (++waits > MaxWaits || vcpu->PreemptionDue)
                    return Errno.ERESTART;
                continue;
            }

            if (info->TryChange(state, next))
                return next.Has(FrameFlags.Validated) ? Errno.None : Validate(vcpu, frame, info, state, type);
        }
    }

    /// <summary>Drops a use (put_page_type); the last one of a page table drops what its entries hold.</summary>
    /// <returns>ERESTART where the table was left partial: it has to be handed to <see cref="Defer"/>.</returns>
    public static Errno PutType(VcpuContext* vcpu, Mfn frame, FrameInfo* info)
    {
        while (true)
        {
            FrameType state = info->State;
            if (state.Count != 1 || !state.IsPageTable)
            {
                if (info->TryChange(state, state.Minus()))
                    return Errno.None;
                continue;
            }

            // The last use stays counted while the entries are dropped, so that a table cannot be freed under its own walk.
            if (!info->TryChange(state, state.Without(FrameFlags.Validated)))
                continue;
            info->Progress = Paging.EntriesPerTable;
            return Invalidate(vcpu, frame, info, wasPartial: false);
        }
    }

    /// <summary>Adds a use of a frame as the page table that it is, so that it stays one (page_lock, as far as entries go).</summary>
    /// <param name="info">A frame that the caller holds a reference to.</param>
    /// <param name="level">Its level, 1 to 4.</param>
    /// <returns>False when it is no page table whose contents were checked.</returns>
    public static bool TryHold(FrameInfo* info, out int level)
    {
        while (true)
        {
            FrameType state = info->State;
            level = (int)state.Type;
            if (!state.IsPageTable || state.Count is 0 or uint.MaxValue || !state.Has(FrameFlags.Validated))
                return false;
            if (info->TryChange(state, state.Plus()))
                return true;
        }
    }

    /// <summary>References the domain's L1 table in a frame, and holds it as one.</summary>
    /// <returns>Null where there is none.</returns>
    public static FrameInfo* HoldL1(VcpuContext* vcpu, Mfn frame)
    {
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        FrameInfo* info = frames->GetPage(frame, vcpu->Domain->State->Id);
        if (info == null)
            return null;
        if (TryHold(info, out int level))
        {
            if (level == 1)
                return info;
            Release(vcpu, frame, info);
        }

        frames->PutPage(info);
        return null;
    }

    /// <summary>Ends <see cref="HoldL1"/>, or <see cref="TryHold"/> of a table that a reference was taken to.</summary>
    public static void LetGo(VcpuContext* vcpu, Mfn frame, FrameInfo* info)
    {
        Release(vcpu, frame, info);
        FrameTable.Of(vcpu->Domain)->PutPage(info);
    }

    /// <summary>Ends <see cref="TryHold"/>.</summary>
    public static void Release(VcpuContext* vcpu, Mfn frame, FrameInfo* info)
    {
        // Only where other vCPUs dropped the table meanwhile is there anything to do; then it is done in one.
        Errno error = PutType(vcpu, frame, info);
        while (error == Errno.ERESTART)
            error = PutPartial(vcpu, frame, info);
    }

    /// <summary>Notes a table that was left partial in being dropped; <see cref="FinishDeferred"/> goes on with it (old_guest_table).</summary>
    public static void Defer(VcpuContext* vcpu, Mfn frame) => vcpu->State->DeferredTable = frame.Value;

    /// <summary>Goes on dropping what an earlier operation of this vCPU left partial (put_old_guest_table).</summary>
    /// <returns>ERESTART when it is still not done.</returns>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Errno FinishDeferred(VcpuContext* vcpu) => vcpu->State->DeferredTable == 0 ? Errno.None : DropDeferred(vcpu);

    private static Errno DropDeferred(VcpuContext* vcpu)
    {
        var frame = new Mfn(vcpu->State->DeferredTable);
        Errno error = PutPartial(vcpu, frame, FrameTable.Of(vcpu->Domain)->Find(frame));
        if (error == Errno.None)
            vcpu->State->DeferredTable = 0;
        return error;
    }

    /// <summary>
    /// Changes one entry of a table that the caller holds a use of (mod_lN_entry). A table that the old entry named may be left
    /// partial, and deferred.
    /// </summary>
    /// <param name="vcpu">The calling vCPU, with nothing deferred.</param>
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
        if (level == 1 && !preserveAccessedDirty && !ioMemory && OwnPages.TryChange(vcpu, entry, address, value))
            return Errno.None;
        if (level == 4 && Paging.IsHypervisorSlot(address.Offset / sizeof(ulong)))
            return Errno.EINVAL;
        PageTableEntry old = Read(entry);
        if (value.IsPresent)
        {
            if (!MayHave(level, value))
                return Errno.EINVAL;
            value = Adjust(level, value);

            // The same frame for the same use: no reference changes hands, so what is replaced must be exactly what was seen.
            while (old.IsPresent && ((old.Value ^ value.Value) & ~FastPathFlags) == 0)
            {
                PageTableEntry kept = preserveAccessedDirty ? value.With(old.Flags & AccessedDirty) : value;
                PageTableEntry found = vcpu->PageTableWrites->CompareExchange(entry, address, kept, old);
                if (found == old)
                    return Errno.None;
                old = found;
            }

            Errno error = ioMemory ? RefuseIoMemory(vcpu, value.Frame) : Reference(vcpu, address.Frame, level, value);
            if (error != Errno.None)
                return error;
        }

        if (!Replace(vcpu, entry, address, ref old, value, preserveAccessedDirty))
        {
            ReleaseEntry(vcpu, address.Frame, level, value);
            return Errno.EBUSY;
        }

        if (!old.IsPresent)
            return Errno.None;
        ReleaseEntry(vcpu, address.Frame, level, old);

        // Above L1 a TLB may hold parts of walks that went through the old entry.
        if (level > 1)
            TlbFlush.AfterUnlink(vcpu);
        return Errno.None;
    }

    /// <summary>Shows in an L4 what kernel mode sees of the hypervisor's slots: it becomes a root of the kernel's.</summary>
    public static void ShowToKernel(VcpuContext* vcpu, Mfn root)
    {
        if (!vcpu->Domain->State->Has(VmAssist.M2PStrict))
            ShowMachineToPhys(vcpu, root, shown: true);
        ShowKernelSlot(vcpu, root, shown: true);
    }

    /// <summary>Hides in an L4 what user mode is not to see of the hypervisor's slots: it becomes a root of user mode.</summary>
    /// <param name="vcpu">The calling vCPU.</param>
    /// <param name="root">The L4.</param>
    /// <param name="kernelRoot">The root of kernel mode on the same vCPU.</param>
    public static void HideFromUser(VcpuContext* vcpu, Mfn root, Mfn kernelRoot)
    {
        if (vcpu->Domain->State->Has(VmAssist.M2PStrict))
            ShowMachineToPhys(vcpu, root, shown: false);

        // User mode that runs on the kernel's own tables reaches all that the kernel does, whatever is hidden here.
        if (root != kernelRoot)
            ShowKernelSlot(vcpu, root, shown: false);
    }

    /// <summary>
    /// Shows or hides the M2P table in an L4: the kernel reads it, user mode does not. A new L4 has it where m2p_strict is on, and
    /// loses it by becoming the root of user mode; else it gets it by becoming the kernel's, and keeps it (fill_ro_mpt, zap_ro_mpt).
    /// </summary>
    private static void ShowMachineToPhys(VcpuContext* vcpu, Mfn root, bool shown)
    {
        int slot = vcpu->Domain->MachineToPhysStart.TableIndex(4);
        ShowSlot(vcpu, root, slot, shown ? vcpu->Domain->HypervisorSlots[slot - Paging.FirstHypervisorSlot] : 0);
    }

    /// <summary>Shows in an L4 what only kernel mode may reach, or what user mode has in its place.</summary>
    private static void ShowKernelSlot(VcpuContext* vcpu, Mfn root, bool shown)
    {
        int slot = vcpu->Domain->KernelSlot;
        if (slot != 0)
            ShowSlot(vcpu, root, slot, KernelSlotOf(vcpu->Domain, shown));
    }

    /// <summary>Whether an L4 shows in <see cref="DomainContext.KernelSlot"/> what a mode's root has to.</summary>
    /// <param name="domain">The domain, which has such a slot.</param>
    /// <param name="root">The L4.</param>
    /// <param name="kernelMode">Kernel mode, or user mode.</param>
    public static bool ShowsKernelSlot(DomainContext* domain, Mfn root, bool kernelMode)
    {
        ulong shown = Volatile.Read(ref *(ulong*)(domain->Memory.Table(root) + domain->KernelSlot));
        return ((shown ^ KernelSlotOf(domain, kernelMode)) & ~(ulong)AccessedDirty) == 0;
    }

    private static ulong KernelSlotOf(DomainContext* domain, bool kernelMode)
        => kernelMode ? domain->HypervisorSlots[domain->KernelSlot - Paging.FirstHypervisorSlot] : domain->UserSlot;

    private static void ShowSlot(VcpuContext* vcpu, Mfn root, int slot, ulong shown)
    {
        PageTableEntry* entry = vcpu->Domain->Memory.Table(root) + slot;
        var value = new PageTableEntry(shown);
        if (((entry->Value ^ value.Value) & ~(ulong)AccessedDirty) != 0)
            _ = vcpu->PageTableWrites->Store(entry, root.Address + ((ulong)slot * sizeof(ulong)), value);
    }

    /// <summary>Checks an L1 entry and takes the references that it needs, as <see cref="ModifyEntry"/> does.</summary>
    /// <returns>The entry as it is to be stored, in <paramref name="value"/>.</returns>
    public static Errno ReferenceL1(VcpuContext* vcpu, ref PageTableEntry value)
    {
        if (!value.IsPresent)
            return Errno.None;
        if (!MayHave(1, value))
            return Errno.EINVAL;
        value = Adjust(1, value);
        return ReferencePage(vcpu, value);
    }

    /// <summary>Gives back the references of a present L1 entry that is no longer stored.</summary>
    public static void ReleaseL1(VcpuContext* vcpu, PageTableEntry value)
    {
        if (value.IsPresent)
            _ = Unreference(vcpu, default, 1, value);
    }

    private static PageTableEntry Read(PageTableEntry* entry) => new(Volatile.Read(ref *(ulong*)entry));

    /// <summary>Whether a present entry of a table of the level has none of the flags that no such entry may have.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    internal static bool MayHave(int level, PageTableEntry value) => (value.Value & Disallowed(level)) == 0;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static ulong Disallowed(int level) => level == 1 ? DisallowedL1 : DisallowedUpper;

    /// <summary>
    /// What the guest wrote becomes what runs at CPL 3: kernel entries lack User, and get it with a mark (adjust_guest_lNe).
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    internal static PageTableEntry Adjust(int level, PageTableEntry value)
    {
        if (level > 1)
            return value.With(level == 4 ? PageFlags.User | PageFlags.Accessed : PageFlags.User);
        if (!value.Has(PageFlags.User))
            value = value.With(PageFlags.GuestKernel | PageFlags.User);
        return value.Has(PageFlags.GuestKernel) ? value : value.With(PageFlags.Global | PageFlags.User);
    }

    /// <summary>Stores an entry.</summary>
    /// <param name="vcpu">The calling vCPU.</param>
    /// <param name="entry">Host address of the entry.</param>
    /// <param name="address">Its machine address.</param>
    /// <param name="old">What the caller saw there; what was replaced, when this returns.</param>
    /// <param name="value">The new value.</param>
    /// <param name="preserveAccessedDirty">Bits that the processor sets meanwhile are kept.</param>
    /// <returns>False when another vCPU was faster, which only an update that keeps bits of the old entry has to heed.</returns>
    private static bool Replace(
        VcpuContext* vcpu, PageTableEntry* entry, MachineAddress address, ref PageTableEntry old, PageTableEntry value, bool preserveAccessedDirty)
    {
        if (!preserveAccessedDirty)
        {
            old = vcpu->PageTableWrites->Store(entry, address, value);
            return true;
        }

        while (true)
        {
            PageTableEntry kept = value.With(old.Flags & AccessedDirty);
            PageTableEntry found = vcpu->PageTableWrites->CompareExchange(entry, address, kept, old);
            if (found == old)
                return true;

            // Only the processor's own bits may have changed; anything else is another writer.
            if (((found.Value ^ old.Value) & ~(ulong)AccessedDirty) != 0)
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
        Errno error = value.IsWritable ? GetType(vcpu, value.Frame, info, PageType.Writable) : Errno.None;
        if (error == Errno.None)
            return error;
        frames->PutPage(info);
        return error == Errno.ERESTART ? error : Errno.EBUSY;
    }

    /// <summary>A domain without devices maps no I/O memory, and what is memory is not DOMID_IO's.</summary>
    private static Errno RefuseIoMemory(VcpuContext* vcpu, Mfn frame)
        => vcpu->Domain->PageOf(frame) != null || IsMachineToPhys(vcpu->Domain, frame) || IsOthers(vcpu->Domain, frame) ? Errno.EBUSY
            : frame.Value == PageTableEntry.FrameMask >> Paging.PageShift ? Errno.EINVAL
            : Errno.EPERM;

    /// <summary>Whether a frame is RAM that another domain has, or nobody.</summary>
    private static bool IsOthers(DomainContext* domain, Mfn frame) => domain->MachineFrames != null && domain->MachineFrames->Contains(frame);

    /// <summary>Whether a frame is one of those that hold the M2P table, which a domain can learn of and may not map.</summary>
    private static bool IsMachineToPhys(DomainContext* domain, Mfn frame)
        => (frame.Value - domain->MachineToPhysFrame.Value) << Paging.PageShift < domain->Memory.FrameCount * sizeof(ulong);

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
        if (from->TryAddLinearEntry())
        {
            if (to->TryAddLinearUse())
            {
                if (TryHold(to, out int held))
                {
                    if (held == level)
                        return true;
                    Release(vcpu, value.Frame, to);
                }

                to->DropLinearUse();
            }

            from->DropLinearEntry();
        }

        frames->PutPage(to);
        return false;
    }

    /// <summary>Drops the references of an entry that is no longer stored, if it is present; what is left of it is deferred.</summary>
    private static void ReleaseEntry(VcpuContext* vcpu, Mfn table, int level, PageTableEntry value)
    {
        if (value.IsPresent && Unreference(vcpu, table, level, value) == Errno.ERESTART)
            Defer(vcpu, value.Frame);
    }

    /// <summary>Drops the references of a present entry of a table (put_page_from_lNe).</summary>
    /// <returns>ERESTART where the table that it names was left partial.</returns>
    private static Errno Unreference(VcpuContext* vcpu, Mfn table, int level, PageTableEntry value)
    {
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        FrameInfo* info = frames->Find(value.Frame);
        if (info == null && vcpu->Domain->Window.Contains(value.Frame))
            ForeignFrames.Release(vcpu->Domain, value.Frame, value.IsWritable);
        if (info == null || (level > 1 && value.Frame == table))
            return Errno.None;
        if (level > 1 && info->Type == TypeOfLevel(level))
        {
            frames->Find(table)->DropLinearEntry();
            info->DropLinearUse();
        }

        Errno error = level > 1 || value.IsWritable ? PutType(vcpu, value.Frame, info) : Errno.None;
        frames->PutPage(info);
        return error;
    }

    /// <summary>Checks a frame that this vCPU has to itself for its new type, or goes on doing so (validate_page).</summary>
    private static Errno Validate(VcpuContext* vcpu, Mfn frame, FrameInfo* info, FrameType before, PageType type)
    {
        bool wasPartial = before.Has(FrameFlags.Partial);
        if (!wasPartial)
        {
            if (before.Type != type && !TlbFlush.TryBeforeTypeChange(vcpu, before.Type))
            {
                info->Settle(before);
                return Errno.ERESTART;
            }

            info->Progress = 0;
        }

        Errno error = type switch
        {
            PageType.Writable => Errno.None,
            PageType.SegmentDescriptors => DescriptorTables.Validate(vcpu->Domain->Memory.Page(frame)) ? Errno.None : Errno.EINVAL,
            _ => Promote(vcpu, frame, info, (int)type),
        };
        FrameType state = info->State;
        bool remains = error == Errno.ERESTART || (error != Errno.None && (info->Progress != 0 || info->PartialEntry));
        if (remains)
        {
            if (error != Errno.ERESTART)
                Defer(vcpu, frame);
            if (!wasPartial)
                info->AddReference();
            info->Settle(state.With(FrameFlags.Partial));
            return error;
        }

        info->Settle(error == Errno.None ? state.With(FrameFlags.Validated) : state.Unused());
        if (wasPartial)
            FrameTable.Of(vcpu->Domain)->PutPage(info);
        return error;
    }

    /// <summary>Drops all that the entries of a table hold which this vCPU has to itself, or goes on doing so (devalidate_page).</summary>
    private static Errno Invalidate(VcpuContext* vcpu, Mfn frame, FrameInfo* info, bool wasPartial)
    {
        Errno error = Demote(vcpu, frame, info, (int)info->Type);
        if (error == Errno.ERESTART)
        {
            if (!wasPartial)
                info->AddReference();
            info->Settle(info->State.With(FrameFlags.Partial));
            return error;
        }

        info->Settle(info->State.Minus());
        if (wasPartial)
            FrameTable.Of(vcpu->Domain)->PutPage(info);
        return Errno.None;
    }

    /// <summary>
    /// Drops a table that was left partial, unless somebody took it up meanwhile: it may be a whole one by now, or none.
    /// </summary>
    private static Errno PutPartial(VcpuContext* vcpu, Mfn frame, FrameInfo* info)
    {
        FrameType state = info->State;
        return state.Has(FrameFlags.Partial) && info->TryChange(state, state.Without(FrameFlags.Partial))
            ? Invalidate(vcpu, frame, info, wasPartial: true)
            : Errno.None;
    }

    /// <summary>Checks and references the entries of a table from <see cref="FrameInfo.Progress"/> on (promote_lN_table).</summary>
    private static Errno Promote(VcpuContext* vcpu, Mfn frame, FrameInfo* info, int level)
    {
        vcpu->Domain->MarkShadowed(frame);
        PageTableEntry* table = vcpu->Domain->Memory.Table(frame);
        int first = info->Progress;
        for (int i = first; i < Paging.EntriesPerTable; i++)
        {
            if (level == 4 && Paging.IsHypervisorSlot(i))
                continue;
            PageTableEntry value = Read(table + i);
            if (!value.IsPresent)
                continue;
            if (level > 1 && i > first && vcpu->PreemptionDue)
            {
                info->Progress = i;
                return Errno.ERESTART;
            }

            Errno error = MayHave(level, value) ? Reference(vcpu, frame, level, value) : Errno.EINVAL;
            if (error != Errno.None)
            {
                // What failed further down was deferred, and is dropped with this table now.
                ulong deferred = vcpu->State->DeferredTable;
                bool partial = error == Errno.ERESTART || (deferred != 0 && deferred == value.Frame.Value) || (i == first && info->PartialEntry);
                info->Progress = i;
                info->PartialEntry = partial;

                // An L1 is small enough to be dropped at once.
                if (level == 1)
                    _ = Demote(vcpu, frame, info, level);
                return error;
            }

            PageTableEntry adjusted = Adjust(level, value);
            if (adjusted != value)
                _ = vcpu->PageTableWrites->Store(table + i, frame.Address + ((ulong)i * sizeof(ulong)), adjusted);
        }

        if (level == 4)
        {
            // A stale shadow can hold nothing else here: the guest's own stores were seen, and these are always the same; but for two.
            int machineToPhys = vcpu->Domain->MachineToPhysStart.TableIndex(4);
            for (int i = 0; i < Paging.HypervisorSlots; i++)
            {
                int slot = Paging.FirstHypervisorSlot + i;
                if (slot != machineToPhys && slot != vcpu->Domain->KernelSlot)
                    ((ulong*)table)[slot] = vcpu->Domain->HypervisorSlots[i];
            }

            ShowKernelSlot(vcpu, frame, shown: false);

            ShowMachineToPhys(vcpu, frame, vcpu->Domain->State->Has(VmAssist.M2PStrict));
        }

        return Errno.None;
    }

    /// <summary>Drops the references of a table's entries before <see cref="FrameInfo.Progress"/>, the last first (demote_lN_table).</summary>
    private static Errno Demote(VcpuContext* vcpu, Mfn frame, FrameInfo* info, int level)
    {
        PageTableEntry* table = vcpu->Domain->Memory.Table(frame);
        if (info->PartialEntry)
        {
            Mfn below = Read(table + info->Progress).Frame;
            if (PutPartial(vcpu, below, FrameTable.Of(vcpu->Domain)->Find(below)) == Errno.ERESTART)
                return Errno.ERESTART;
            info->PartialEntry = false;
        }

        int first = info->Progress - 1;
        for (int i = first; i >= 0; i--)
        {
            PageTableEntry value = Read(table + i);
            if (!value.IsPresent || (level == 4 && Paging.IsHypervisorSlot(i)))
                continue;
            if (level > 1 && i < first && vcpu->PreemptionDue)
            {
                info->Progress = i + 1;
                return Errno.ERESTART;
            }

            Errno error = Unreference(vcpu, frame, level, value);
            if (error == Errno.ERESTART)
            {
                info->Progress = i;
                info->PartialEntry = true;
                return error;
            }
        }

        info->Progress = 0;
        return Errno.None;
    }
}
