using Tmds.Linux;
using XenSharp.Core;

namespace XenSharp.Kvm;

/// <summary>
/// Addresses of this process behind which pages of other VMs' memory are put one by one: the backing of a memory slot that never
/// changes. A page that nothing is put behind takes no memory, and cannot be accessed.
/// </summary>
internal sealed unsafe class HostWindow : IDisposable
{
    private HostWindow(byte* address, ulong size)
    {
        Address = address;
        Size = size;
    }

    /// <summary>Host address, page-aligned; null where there are no pages.</summary>
    public byte* Address { get; private set; }

    /// <summary>Bytes.</summary>
    public ulong Size { get; }

    private static int NotInUse => LibC.MAP_PRIVATE | LibC.MAP_ANONYMOUS | LibC.MAP_NORESERVE;

    /// <summary>Takes the addresses.</summary>
    /// <param name="size">Bytes, a multiple of the page size; 0 for none.</param>
    public static HostWindow Create(ulong size)
    {
        if (size == 0)
            return new HostWindow(null, 0);
        void* address = LibC.mmap(null, (size_t)size, LibC.PROT_NONE, NotInUse, -1, 0);
        if (address == LibC.MAP_FAILED)
            throw new KvmException($"Cannot take {size >> 20} MiB of addresses for other domains' pages", LibC.errno);
        return new HostWindow((byte*)address, size);
    }

    /// <summary>Puts a page of other memory behind one of this; KVM drops what processors had of that at once.</summary>
    /// <param name="offset">In bytes, a multiple of the page size.</param>
    /// <param name="memory">The other memory.</param>
    /// <param name="from">Offset in it.</param>
    /// <param name="writable">Whether stores are allowed.</param>
    /// <returns>False where the host refuses: a process has only so many mappings (vm.max_map_count).</returns>
    public bool TryShow(ulong offset, HostMemory memory, ulong from, bool writable)
    {
        int protection = writable ? LibC.PROT_READ | LibC.PROT_WRITE : LibC.PROT_READ;
        return LibC.mmap(Address + offset, (size_t)Paging.PageSize, protection, LibC.MAP_SHARED | LibC.MAP_FIXED, memory.File, (long)from) != LibC.MAP_FAILED;
    }

    /// <summary>Allows no stores any more to what is behind a page.</summary>
    /// <returns>As <see cref="TryShow"/>.</returns>
    public bool TryProtect(ulong offset) => LibC.mprotect(Address + offset, (size_t)Paging.PageSize, LibC.PROT_READ) == 0;

    /// <summary>Takes away what is behind a page.</summary>
    /// <exception cref="KvmException">The host cannot; which it can where there was something, as that takes no more mappings.</exception>
    public void Hide(ulong offset)
    {
        if (LibC.mmap(Address + offset, (size_t)Paging.PageSize, LibC.PROT_NONE, NotInUse | LibC.MAP_FIXED, -1, 0) == LibC.MAP_FAILED)
            throw new KvmException("Cannot take another domain's page away", LibC.errno);
    }

    public void Dispose()
    {
        if (Address != null)
            _ = LibC.munmap(Address, (size_t)Size);
        Address = null;
    }
}
