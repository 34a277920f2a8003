// Where a vCPU's descriptor tables are mapped for the processor.
namespace XenSharp.Core;

/// <summary>The entries that map a vCPU's descriptor tables, for <c>set_gdt</c> and MMUEXT_SET_LDT.</summary>
/// <param name="Start">Where the window is, in the reserved slots.</param>
/// <param name="Entries">
/// Host view of its consecutive L1 entries: <see cref="GdtPages"/> of the global table, of which the guest's frames are the first 14,
/// then <see cref="LdtPages"/> of the local one, not present at first.
/// </param>
/// <param name="Address">Machine address of the first of them.</param>
/// <param name="Empty">What stands in the guest's GDT entries for no frame: a page of null descriptors, as Xen's zero page there.</param>
public readonly record struct DescriptorWindow(VirtualAddress Start, nint Entries, MachineAddress Address, PageTableEntry Empty)
{
    /// <summary>Pages of the global table.</summary>
    public const int GdtPages = 16;

    /// <summary>Pages of the local table.</summary>
    public const int LdtPages = 16;

    /// <summary>Where the local table is.</summary>
    public VirtualAddress Ldt => Start + (GdtPages * Paging.PageSize);
}
