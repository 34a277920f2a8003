// set_gdt (2), update_descriptor (10) and the LDT of mmuext_op.
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>The guest's descriptor tables: typed frames whose descriptors cannot reach privilege.</summary>
public static unsafe class DescriptorTables
{
    /// <summary>Descriptors in the guest's part of the GDT (FIRST_RESERVED_GDT_ENTRY).</summary>
    public const uint MaxGdtEntries = 14 * EntriesPerPage;

    private const uint EntriesPerPage = 512;
    private const uint MaxLdtEntries = 8192;
    private const ulong PresentBit = 1UL << 47;
    private const ulong SegmentBit = 1UL << 44;
    private const int PrivilegeShift = 45;
    private const ulong TypeMask = 0xfUL << 40;
    private const ulong CallGate = 0xcUL << 40;

    /// <summary>How the window maps the guest's frames: for the processor alone, which sets descriptors' accessed bits.</summary>
    private const PageFlags TableFlags
        = PageFlags.Present | PageFlags.Accessed | PageFlags.Dirty | PageFlags.Writable | PageFlags.NoExecute;

    /// <summary>set_gdt(frame list, entries).</summary>
    public static long SetGdt(VcpuContext* vcpu, in HypercallArguments arguments)
    {
        uint entries = (uint)arguments.A1;
        if (entries > MaxGdtEntries)
            return -(long)Errno.EINVAL;
        uint count = (entries + EntriesPerPage - 1) / EntriesPerPage;
        ulong* list = stackalloc ulong[14];
        if (!GuestAccess.CopyFrom(vcpu, arguments.A0, list, count * sizeof(ulong)))
            return -(long)Errno.EFAULT;
        Errno error = SetGdt(vcpu, vcpu, new ReadOnlySpan<ulong>(list, (int)count), entries);
        return error == Errno.ERESTART ? Continuation.Create(vcpu, arguments) : -(long)error;
    }

    /// <summary>Replaces a vCPU's GDT by the given frames (pv_set_gdt); the old one stays if any of them is refused.</summary>
    /// <param name="vcpu">The calling vCPU.</param>
    /// <param name="target">Whose GDT it is: the caller, or a vCPU that is not up yet.</param>
    /// <param name="frameList">At most 14 frames.</param>
    /// <param name="entries">Descriptors in them.</param>
    /// <returns>ERESTART when it has to be asked for again.</returns>
    public static Errno SetGdt(VcpuContext* vcpu, VcpuContext* target, ReadOnlySpan<ulong> frameList, uint entries)
    {
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        for (int i = 0; i < frameList.Length; i++)
        {
            Errno error = PageTables.GetPageAndType(vcpu, new Mfn(frameList[i]), PageType.SegmentDescriptors, out _);
            if (error == Errno.None)
                continue;
            while (i-- > 0)
                _ = PageTables.PutPageAndType(vcpu, new Mfn(frameList[i]), frames->Find(new Mfn(frameList[i])));
            return error == Errno.ERESTART ? error : Errno.EINVAL;
        }

        for (int i = 0; i < 14; i++)
        {
            ref ulong current = ref target->State->GdtFrames[i];
            ulong next = i < frameList.Length ? frameList[i] : 0;
            PageTableEntry entry = next == 0
                ? target->DescriptorWindow.Empty
                : new PageTableEntry(new Mfn(next), TableFlags);
            Map(target, i, entry);
            if (current != 0)
                _ = PageTables.PutPageAndType(vcpu, new Mfn(current), frames->Find(new Mfn(current)));
            current = next;
        }

        target->State->GdtEntries = entries;
        TlbFlush.OnThisVcpu(target);
        return Errno.None;
    }

    /// <summary>update_descriptor(machine address, descriptor).</summary>
    public static long UpdateDescriptor(VcpuContext* vcpu, in HypercallArguments arguments)
    {
        var address = new MachineAddress(arguments.A0);
        ulong descriptor = arguments.A1;
        if ((arguments.A0 & 7) != 0 || !Sanitise(ref descriptor))
            return -(long)Errno.EINVAL;
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        FrameInfo* info = frames->GetPage(address.Frame, vcpu->Domain->State->Id);
        if (info == null)
            return -(long)Errno.EINVAL;
        PageType type = info->Type == PageType.SegmentDescriptors ? PageType.SegmentDescriptors : PageType.Writable;
        Errno error = PageTables.GetType(vcpu, address.Frame, info, type);
        if (error == Errno.None)
        {
            Volatile.Write(ref *(ulong*)(vcpu->Domain->Memory.Page(address.Frame) + address.Offset), descriptor);
            GuestAccess.Written(vcpu, address.Frame, (ulong)address.Offset, sizeof(ulong));
            _ = PageTables.PutType(vcpu, address.Frame, info);
        }

        frames->PutPage(info);
        return error switch
        {
            Errno.None => 0,
            Errno.ERESTART => Continuation.Create(vcpu, arguments),
            _ => -(long)Errno.EINVAL,
        };
    }

    /// <summary>MMUEXT_SET_LDT.</summary>
    /// <remarks>No frame is typed before a descriptor in it is used: see <see cref="MapLdtPage"/>.</remarks>
    public static Errno SetLdt(VcpuContext* vcpu, ulong address, uint entries)
    {
        if (entries > MaxLdtEntries)
            return Errno.EINVAL;
        if (entries == 0)
            address = 0;
        else if ((address & Paging.PageOffsetMask) != 0 || !new VirtualAddress(address).IsGuest)
            return Errno.EINVAL;
        if (vcpu->State->LdtBase == address && vcpu->State->LdtEntries == entries)
            return Errno.None;
        DropLdt(vcpu);
        vcpu->State->LdtBase = address;
        vcpu->State->LdtEntries = entries;
        return Errno.None;
    }

    /// <summary>
    /// Types the frame that holds a descriptor of the LDT, as the kernel's tables map it now, and maps it in the window
    /// (pv_map_ldt_shadow_page).
    /// </summary>
    /// <param name="vcpu">The vCPU whose table it is.</param>
    /// <param name="offset">The descriptor's offset in the table, below its end.</param>
    /// <returns>False where nothing is mapped, or what is cannot be a descriptor table.</returns>
    public static bool MapLdtPage(VcpuContext* vcpu, uint offset)
    {
        if (Mapping(vcpu, DescriptorWindow.GdtPages + (int)(offset >> Paging.PageShift)).IsPresent)
            return true;
        var linear = new VirtualAddress(vcpu->State->LdtBase + offset);
        if (!linear.IsGuest)
            return false;
        int mode = vcpu->State->KernelMode;
        vcpu->State->KernelMode = 1;
        PageTableEntry* mapping = GuestAccess.FindEntry(vcpu, linear);
        vcpu->State->KernelMode = mode;
        if (mapping == null)
            return false;
        var entry = new PageTableEntry(Volatile.Read(ref *(ulong*)mapping));
        if (!entry.IsPresent)
            return false;
        Errno error;
        while ((error = PageTables.GetPageAndType(vcpu, entry.Frame, PageType.SegmentDescriptors, out _)) == Errno.ERESTART)
        {
            // Nothing of this vCPU's own is in the way, as it comes here before it has stored anything; others are on their way.
            _ = Thread.Yield();
        }

        if (error != Errno.None)
            return false;
        Map(vcpu, DescriptorWindow.GdtPages + (int)(offset >> Paging.PageShift), new PageTableEntry(entry.Frame, TableFlags));
        return true;
    }

    /// <summary>Takes the LDT's frames out of the window: they are typed again as they are used (pv_destroy_ldt).</summary>
    public static void DropLdt(VcpuContext* vcpu)
    {
        bool dropped = false;
        for (int i = 0; i < DescriptorWindow.LdtPages; i++)
        {
            PageTableEntry entry = Mapping(vcpu, DescriptorWindow.GdtPages + i);
            if (!entry.IsPresent)
                continue;
            Map(vcpu, DescriptorWindow.GdtPages + i, default);
            _ = PageTables.PutPageAndType(vcpu, entry.Frame, FrameTable.Of(vcpu->Domain)->Find(entry.Frame));
            dropped = true;
        }

        if (dropped)
            TlbFlush.OnThisVcpu(vcpu);
    }

    /// <summary>Reads a descriptor of the LDT, whose page is mapped in the window for it.</summary>
    /// <param name="vcpu">The vCPU whose table it is.</param>
    /// <param name="index">The descriptor's number.</param>
    /// <param name="descriptor">The descriptor; null past the table's end.</param>
    /// <returns>False where the page cannot be mapped.</returns>
    public static bool TryReadLdt(VcpuContext* vcpu, uint index, out ulong descriptor)
    {
        descriptor = 0;
        if (index >= vcpu->State->LdtEntries)
            return true;
        int page = DescriptorWindow.GdtPages + (int)(index / EntriesPerPage);
        if (!MapLdtPage(vcpu, index * sizeof(ulong)))
            return false;
        var descriptors = (ulong*)vcpu->Domain->Memory.Page(Mapping(vcpu, page).Frame);
        descriptor = Volatile.Read(ref descriptors[index % EntriesPerPage]);
        return true;
    }

    /// <summary>Checks and sanitises a whole frame of descriptors (validate_segdesc_page).</summary>
    internal static bool Validate(byte* page)
    {
        var descriptors = (ulong*)page;
        for (int i = 0; i < (int)EntriesPerPage; i++)
        {
            ulong descriptor = descriptors[i];
            if (!Sanitise(ref descriptor))
                return false;
            if (descriptors[i] != descriptor)
                descriptors[i] = descriptor;
        }

        return true;
    }

    /// <summary>
    /// Makes a descriptor safe (check_descriptor): privilege 3, no system segments but call gates that always fault.
    /// </summary>
    internal static bool Sanitise(ref ulong descriptor)
    {
        if ((descriptor & PresentBit) == 0)
            return true;
        if ((descriptor & SegmentBit) != 0)
        {
            descriptor |= 3UL << PrivilegeShift;
            return true;
        }

        if ((descriptor & TypeMask) == 0)
            return true;
        if ((descriptor & TypeMask) != CallGate)
            return false;

        // The gate must lead to a guest's code selector; using it faults at privilege 0, and is emulated from its selector.
        ulong selector = (descriptor >> 16) & 0xffff;
        if (!IsGuestCodeSelector(selector) || (descriptor & (0xffUL << 32)) != 0)
            return false;
        descriptor &= ~(3UL << PrivilegeShift);

        // The gate's privilege, 3 as that of everything of the guest's, is remembered in the selector.
        descriptor |= 3UL << 16;
        return true;
    }

    private static PageTableEntry Mapping(VcpuContext* vcpu, int page) => ((PageTableEntry*)vcpu->DescriptorWindow.Entries)[page];

    private static void Map(VcpuContext* vcpu, int page, PageTableEntry entry)
        => _ = vcpu->PageTableWrites->Store(
            (PageTableEntry*)vcpu->DescriptorWindow.Entries + page, vcpu->DescriptorWindow.Address + ((ulong)page * sizeof(ulong)), entry);

    /// <summary>guest_gate_selector_okay: an LDT selector, one of the guest's GDT, or Xen's flat 64-bit code.</summary>
    private static bool IsGuestCodeSelector(ulong selector)
        => (selector & 4) != 0 || selector < MaxGdtEntries * 8 || selector == FlatSelectors.Ring3Cs64;
}
