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
        return -(long)SetGdt(vcpu, new ReadOnlySpan<ulong>(list, (int)count), entries);
    }

    /// <summary>Replaces the vCPU's GDT by the given frames (pv_set_gdt); the old one stays if any of them is refused.</summary>
    public static Errno SetGdt(VcpuContext* vcpu, ReadOnlySpan<ulong> frameList, uint entries)
    {
        FrameTable* frames = FrameTable.Of(vcpu->Domain);
        for (int i = 0; i < frameList.Length; i++)
        {
            if (PageTables.GetPageAndType(vcpu, new Mfn(frameList[i]), PageType.SegmentDescriptors, out _) == Errno.None)
                continue;
            while (i-- > 0)
                _ = PageTables.PutPageAndType(vcpu, new Mfn(frameList[i]), frames->Find(new Mfn(frameList[i])));
            return Errno.EINVAL;
        }

        for (int i = 0; i < 14; i++)
        {
            ref ulong current = ref vcpu->State->GdtFrames[i];
            ulong next = i < frameList.Length ? frameList[i] : 0;
            PageTableEntry entry = next == 0
                ? vcpu->GdtEmptyEntry
                : new PageTableEntry(new Mfn(next), PageFlags.Present | PageFlags.Accessed | PageFlags.Dirty | PageFlags.Writable | PageFlags.NoExecute);
            _ = vcpu->PageTableWrites->Store(vcpu->GdtEntries + i, vcpu->GdtEntriesAddress + ((ulong)i * sizeof(ulong)), entry);
            if (current != 0)
                _ = PageTables.PutPageAndType(vcpu, new Mfn(current), frames->Find(new Mfn(current)));
            current = next;
        }

        vcpu->State->GdtEntries = entries;
        TlbFlush.OnThisVcpu(vcpu);
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
        return error == Errno.None ? 0 : -(long)Errno.EINVAL;
    }

    /// <summary>MMUEXT_SET_LDT.</summary>
    /// <remarks>The table is read where a selector of it has to be resolved; no frame is typed before that.</remarks>
    public static Errno SetLdt(VcpuContext* vcpu, ulong address, uint entries)
    {
        if (entries > MaxLdtEntries)
            return Errno.EINVAL;
        if (entries != 0 && ((address & Paging.PageOffsetMask) != 0 || !new VirtualAddress(address).IsGuest))
            return Errno.EINVAL;
        vcpu->State->LdtBase = entries == 0 ? 0 : address;
        vcpu->State->LdtEntries = entries;
        return Errno.None;
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

    /// <summary>guest_gate_selector_okay: an LDT selector, one of the guest's GDT, or Xen's flat 64-bit code.</summary>
    private static bool IsGuestCodeSelector(ulong selector)
        => (selector & 4) != 0 || selector < MaxGdtEntries * 8 || selector == FlatSelectors.Ring3Cs64;
}
