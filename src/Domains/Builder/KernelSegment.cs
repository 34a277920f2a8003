// One piece of a kernel image: which bytes go where in the guest's memory.

namespace XenSharp.Domains.Builder;

/// <summary>
/// A loadable piece of a kernel: <see cref="Data"/> followed by zeroes up to <see cref="MemorySize"/> bytes.
/// </summary>
/// <param name="GuestPhysicalAddress">
/// Where it goes, in bytes from the start of the domain's pseudo-physical memory (pfn 0): the program header's p_paddr less
/// PADDR_OFFSET. Not necessarily page aligned.
/// </param>
/// <param name="VirtualAddress">
/// Where the guest sees it in its initial mapping: <see cref="KernelImage.VirtualBase"/> + <paramref name="GuestPhysicalAddress"/>.
/// Xen maps by physical address and does not look at p_vaddr, which may differ (per-CPU templates of Linux are linked at 0).
/// </param>
/// <param name="Data">The bytes to copy; never longer than <paramref name="MemorySize"/>, and possibly empty.</param>
/// <param name="MemorySize">Bytes of guest memory taken, greater than 0; what <paramref name="Data"/> does not cover is zeroed.</param>
public readonly record struct KernelSegment(
    ulong GuestPhysicalAddress, ulong VirtualAddress, ReadOnlyMemory<byte> Data, ulong MemorySize)
{
    /// <summary>First byte after the segment, in bytes from the start of pseudo-physical memory.</summary>
    public ulong GuestPhysicalEnd => GuestPhysicalAddress + MemorySize;
}
