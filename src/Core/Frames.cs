// The machine concepts that everything else is written in: frame numbers, addresses and page-table entries.
using System.Runtime.CompilerServices;

namespace XenSharp.Core;

/// <summary>A machine frame number: the guest-physical frame number of the domain's VM. One frame is 4096 bytes.</summary>
public readonly record struct Mfn(ulong Value)
{
    /// <summary>The value that the ABI uses for "no frame" (INVALID_M2P_ENTRY, INVALID_MFN).</summary>
    public static readonly Mfn Invalid = new(ulong.MaxValue);

    /// <summary>The machine address of the frame's first byte.</summary>
    public MachineAddress Address => new(Value << Paging.PageShift);

    public static Mfn operator +(Mfn frame, ulong count) => new(frame.Value + count);

    public override string ToString() => $"mfn {Value:x}";
}

/// <summary>A pseudo-physical frame number: the domain's own contiguous numbering, which the p2m list maps to <see cref="Mfn"/>.</summary>
public readonly record struct Pfn(ulong Value)
{
    public static Pfn operator +(Pfn frame, ulong count) => new(frame.Value + count);

    public override string ToString() => $"pfn {Value:x}";
}

/// <summary>A machine address in bytes (PTE contents, mmu_update pointers).</summary>
public readonly record struct MachineAddress(ulong Value)
{
    public Mfn Frame => new(Value >> Paging.PageShift);

    /// <summary>Offset within the page, 0..4095.</summary>
    public int Offset => (int)(Value & Paging.PageOffsetMask);

    public static MachineAddress operator +(MachineAddress address, ulong bytes) => new(address.Value + bytes);
}

/// <summary>A guest linear address.</summary>
public readonly record struct VirtualAddress(ulong Value)
{
    /// <summary>Bits 63..47 all equal: the 48-bit canonical form (Intel SDM volume 1, 3.3.7.1).</summary>
    public bool IsCanonical => (ulong)((long)(Value << 16) >> 16) == Value;

    /// <summary>In L4 slots 256–271, which the 64-bit PV ABI reserves for the hypervisor (xen/arch-x86/xen-x86_64.h).</summary>
    public bool IsHypervisorReserved => Value is >= Paging.HypervisorVirtualStart and < Paging.HypervisorVirtualEnd;

    /// <summary>Canonical and not reserved: what a guest may name as its own (Xen's access_ok and is_canonical checks).</summary>
    public bool IsGuest => IsCanonical && !IsHypervisorReserved;

    /// <summary>Offset within the page, 0..4095.</summary>
    public int Offset => (int)(Value & Paging.PageOffsetMask);

    /// <summary>Index of the entry that maps this address in a table of the level, 1 (L1) to 4 (L4).</summary>
    public int TableIndex(int level) => (int)(Value >> (Paging.PageShift + (9 * (level - 1)))) & (Paging.EntriesPerTable - 1);

    public static VirtualAddress operator +(VirtualAddress address, ulong bytes) => new(address.Value + bytes);

    public override string ToString() => $"{Value:x16}";
}

/// <summary>Constants of four-level paging and of Xen's split of the 64-bit address space.</summary>
public static class Paging
{
    public const int PageShift = 12;
    public const ulong PageSize = 1UL << PageShift;
    public const ulong PageOffsetMask = PageSize - 1;
    public const int EntriesPerTable = 512;

    /// <summary>Bytes that an L4 entry maps.</summary>
    public const ulong SlotSize = 1UL << 39;

    /// <summary>First L4 slot reserved for the hypervisor (ROOT_PAGETABLE_FIRST_XEN_SLOT).</summary>
    public const int FirstHypervisorSlot = 256;

    /// <summary>Number of reserved L4 slots (256–271).</summary>
    public const int HypervisorSlots = 16;

    /// <summary>HYPERVISOR_VIRT_START of xen/arch-x86/xen-x86_64.h; also the classic place of the M2P table.</summary>
    public const ulong HypervisorVirtualStart = 0xffff_8000_0000_0000;

    /// <summary>HYPERVISOR_VIRT_END.</summary>
    public const ulong HypervisorVirtualEnd = 0xffff_8800_0000_0000;

    /// <summary>True for an L4 index that the guest may not write.</summary>
    public static bool IsHypervisorSlot(int index) => (uint)(index - FirstHypervisorSlot) < HypervisorSlots;
}

/// <summary>Flag bits of a page-table entry (Intel SDM volume 3, 4.5; software bits as Xen uses them).</summary>
[Flags]
public enum PageFlags : ulong
{
    None = 0,
    Present = 1 << 0,
    Writable = 1 << 1,
    User = 1 << 2,
    WriteThrough = 1 << 3,
    CacheDisable = 1 << 4,
    Accessed = 1 << 5,
    Dirty = 1 << 6,

    /// <summary>Page size in L2 and L3, PAT in L1.</summary>
    LargePage = 1 << 7,
    Global = 1 << 8,
    Available0 = 1 << 9,
    Available1 = 1 << 10,
    Available2 = 1 << 11,

    /// <summary>_PAGE_GUEST_KERNEL: Xen's mark, in the software bit 52, on an L1 entry that the guest wrote without User.</summary>
    GuestKernel = 1UL << 52,
    NoExecute = 1UL << 63,
}

/// <summary>A 64-bit page-table entry of any level.</summary>
public readonly record struct PageTableEntry(ulong Value)
{
    /// <summary>Bits 12..51: the machine address of the frame.</summary>
    public const ulong FrameMask = 0x000f_ffff_ffff_f000;

    public PageTableEntry(Mfn frame, PageFlags flags)
        : this((frame.Value << Paging.PageShift) | (ulong)flags)
    {
    }

    public Mfn Frame
    {
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        get => new((Value & FrameMask) >> Paging.PageShift);
    }

    public PageFlags Flags => (PageFlags)(Value & ~FrameMask);

    public bool IsPresent => (Value & (ulong)PageFlags.Present) != 0;

    public bool IsWritable => (Value & (ulong)PageFlags.Writable) != 0;

    public bool Has(PageFlags flags) => (Value & (ulong)flags) == (ulong)flags;

    public PageTableEntry With(PageFlags flags) => new(Value | (ulong)flags);

    public PageTableEntry Without(PageFlags flags) => new(Value & ~(ulong)flags);

    public override string ToString() => $"{Value:x16}";
}
