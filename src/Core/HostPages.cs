// Memory of the manager's own for tables that are large, or mostly never used.
using Tmds.Linux;

namespace XenSharp.Core;

/// <summary>
/// Zeroed memory straight from the host: a page takes nothing before it is touched, and all goes back at once. A heap would keep what
/// a domain gives back, wherever something else lies behind it.
/// </summary>
public static unsafe class HostPages
{
    /// <summary>Takes memory, aligned to a page.</summary>
    /// <param name="bytes">How much, at least 1.</param>
    /// <exception cref="OutOfMemoryException">The host has no address space left for it.</exception>
    public static void* Allocate(nuint bytes)
    {
        void* address = LibC.mmap(null, (size_t)bytes, LibC.PROT_READ | LibC.PROT_WRITE, LibC.MAP_PRIVATE | LibC.MAP_ANONYMOUS | LibC.MAP_NORESERVE, -1, 0);
        return address != LibC.MAP_FAILED ? address : throw new OutOfMemoryException($"The host has no {bytes >> 10} KiB for the manager's tables.");
    }

    /// <summary>
    /// Has the host provide the pages of memory that is about to be written to, all at once instead of one page fault after another. Where
    /// it does not, they come as they are written to.
    /// </summary>
    /// <param name="memory">Mapped memory that is not in the managed heap.</param>
    public static void Populate(Span<byte> memory)
    {
        const int populateWrite = 23;
        fixed (byte* start = memory)
        {
            byte* first = (byte*)((nuint)start & ~(nuint)Paging.PageOffsetMask);
            _ = LibC.madvise(first, (size_t)(nuint)(start + memory.Length - first), populateWrite);
        }
    }

    /// <summary>Gives back what <see cref="Allocate"/> gave.</summary>
    /// <param name="address">The address; null for nothing.</param>
    /// <param name="bytes">As it was allocated.</param>
    public static void Free(void* address, nuint bytes)
    {
        if (address != null)
            _ = LibC.munmap(address, (size_t)bytes);
    }
}
