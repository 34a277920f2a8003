using Tmds.Linux;
using XenSharp.Core;

namespace XenSharp.Kvm;

/// <summary>A memfd mapped into this process: the backing of a memory slot. Pages cost nothing before their first use.</summary>
internal sealed unsafe class HostMemory : IDisposable
{
    private HostMemory(byte* address, ulong size)
    {
        Address = address;
        Size = size;
    }

    /// <summary>Host address, page-aligned.</summary>
    public byte* Address { get; private set; }

    /// <summary>Bytes.</summary>
    public ulong Size { get; }

    /// <summary>Creates and maps zeroed memory.</summary>
    /// <param name="name">What /proc shows.</param>
    /// <param name="size">Bytes, a multiple of the page size.</param>
    public static HostMemory Create(ReadOnlySpan<byte> name, ulong size)
    {
        int file;
        fixed (byte* text = name)
            file = LibC.memfd_create(text, LibC.MFD_CLOEXEC);
        if (file < 0)
            throw new KvmException("Cannot create memory for a domain", LibC.errno);
        try
        {
            if (LibC.ftruncate(file, (long)size) != 0)
                throw new KvmException($"Cannot size a domain's memory to {size >> 20} MiB", LibC.errno);
            void* address = LibC.mmap(null, (size_t)size, LibC.PROT_READ | LibC.PROT_WRITE, LibC.MAP_SHARED | LibC.MAP_NORESERVE, file, 0);
            if (address == LibC.MAP_FAILED)
                throw new KvmException($"Cannot map {size >> 20} MiB of domain memory", LibC.errno);
            return new HostMemory((byte*)address, size);
        }
        finally
        {
            _ = LibC.close(file);
        }
    }

    public void Dispose()
    {
        if (Address == null)
            return;
        _ = LibC.munmap(Address, (size_t)Size);
        Address = null;
    }
}
