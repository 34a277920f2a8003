// The page-table entries of mapped grants (arch/x86/pv/grant_table.c).
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>GNTMAP_* of public grant_table.h: how a grant is mapped.</summary>
[Flags]
public enum GrantMapFlags : uint
{
    None = 0,

    /// <summary>For a device to reach.</summary>
    Device = 1 << 0,

    /// <summary>By a page-table entry.</summary>
    Host = 1 << 1,
    ReadOnly = 1 << 2,

    /// <summary>For user mode as well.</summary>
    Application = 1 << 3,

    /// <summary>The address is the machine address of the entry, not a linear one.</summary>
    ContainsPte = 1 << 4,
}

/// <summary>
/// Makes the L1 entries of mapped grants and takes them away. An entry stands for references that the caller has taken and has to drop;
/// whoever drops the entry in another way drops them too.
/// </summary>
public static unsafe class GrantMapping
{
    /// <summary>Where the three bits that become <see cref="PageFlags.Available0"/> and its neighbours are (_GNTMAP_guest_avail0).</summary>
    private const int AvailableShift = 16;
    private const ulong AvailableMask = (ulong)(PageFlags.Available0 | PageFlags.Available1 | PageFlags.Available2);
    private const int AvailableInEntry = 9;

    /// <summary>Maps a frame (create_grant_pv_mapping). What was mapped there before is released.</summary>
    /// <param name="vcpu">The calling vCPU.</param>
    /// <param name="address">Linear address of the page, or machine address of the entry.</param>
    /// <param name="frame">The frame, referenced for it.</param>
    /// <param name="flags">How.</param>
    /// <returns>False where there is no such entry in an L1 of the domain's.</returns>
    public static bool TryCreate(VcpuContext* vcpu, ulong address, Mfn frame, GrantMapFlags flags)
    {
        FrameInfo* table = HoldTable(vcpu, address, flags, out PageTableEntry* entry, out MachineAddress at);
        if (table == null)
            return false;
        PageTableEntry old = vcpu->PageTableWrites->Store(entry, at, EntryOf(frame, flags));
        PageTables.LetGo(vcpu, at.Frame, table);
        PageTables.ReleaseL1(vcpu, old);
        return true;
    }

    /// <summary>Takes a mapping away (replace_grant_pv_mapping); its references are the caller's then.</summary>
    /// <param name="vcpu">The calling vCPU.</param>
    /// <param name="address">As it was mapped.</param>
    /// <param name="frame">The frame that it maps.</param>
    /// <param name="replacement">Linear address of a page whose entry moves to where the mapping was; 0 for none.</param>
    /// <param name="flags">As it was mapped.</param>
    /// <returns>False where it is not mapped like that.</returns>
    public static bool TryReplace(VcpuContext* vcpu, ulong address, Mfn frame, ulong replacement, GrantMapFlags flags)
    {
        PageTableEntry next = default;
        if (replacement != 0 && ((flags & GrantMapFlags.ContainsPte) != 0 || !TrySteal(vcpu, replacement, out next)))
            return false;
        FrameInfo* table = HoldTable(vcpu, address, flags, out PageTableEntry* entry, out MachineAddress at);
        bool replaced = false;
        if (table != null)
        {
            const PageFlags compared = PageFlags.Present | PageFlags.Writable;
            PageFlags expected = EntryOf(frame, flags).Flags;
            var old = new PageTableEntry(Volatile.Read(ref *(ulong*)entry));
            while (!replaced && old.Frame == frame && ((old.Flags ^ expected) & compared) == 0)
            {
                PageTableEntry found = vcpu->PageTableWrites->CompareExchange(entry, at, next, old);
                replaced = found == old;
                old = found;
            }

            PageTables.LetGo(vcpu, at.Frame, table);
        }

        if (!replaced)
            PageTables.ReleaseL1(vcpu, next);
        return replaced;
    }

    /// <summary>Drops what vCPUs may remember of mappings that were taken away (gnttab_flush_tlb).</summary>
    public static void Flush(VcpuContext* vcpu) => TlbFlush.OnAllVcpus(vcpu);

    private static PageTableEntry EntryOf(Mfn frame, GrantMapFlags flags)
    {
        PageFlags entry = PageFlags.Present | PageFlags.Accessed | PageFlags.Dirty | PageFlags.NoExecute;
        if ((flags & GrantMapFlags.Application) != 0)
            entry |= PageFlags.User;
        if ((flags & GrantMapFlags.ReadOnly) == 0)
            entry |= PageFlags.Writable;
        ulong available = ((ulong)flags >> AvailableShift << AvailableInEntry) & AvailableMask;
        return PageTables.Adjust(1, new PageTableEntry(frame, entry).With((PageFlags)available));
    }

    /// <summary>Takes the entry of a page (steal_linear_address): what it stands for is the caller's.</summary>
    private static bool TrySteal(VcpuContext* vcpu, ulong address, out PageTableEntry entry)
    {
        entry = default;
        FrameInfo* table = HoldTable(vcpu, address, GrantMapFlags.None, out PageTableEntry* place, out MachineAddress at);
        if (table == null)
            return false;
        entry = vcpu->PageTableWrites->Store(place, at, default);
        PageTables.LetGo(vcpu, at.Frame, table);
        return true;
    }

    /// <summary>Finds an entry and holds the L1 that it is in.</summary>
    /// <returns>Null where there is none.</returns>
    private static FrameInfo* HoldTable(VcpuContext* vcpu, ulong address, GrantMapFlags flags, out PageTableEntry* entry, out MachineAddress at)
    {
        MachineMemory memory = vcpu->Domain->Memory;
        entry = null;
        at = new MachineAddress(address);
        if ((flags & GrantMapFlags.ContainsPte) == 0)
        {
            var linear = new VirtualAddress(address);
            entry = linear.IsGuest ? GuestAccess.FindEntry(vcpu, linear) : null;
            if (entry == null)
                return null;
            at = memory.AddressOf(entry);
        }
        else if (address % sizeof(ulong) != 0)
        {
            return null;
        }

        FrameInfo* table = PageTables.HoldL1(vcpu, at.Frame);
        if (table != null)
            entry = (PageTableEntry*)(memory.Page(at.Frame) + at.Offset);
        return table;
    }
}
