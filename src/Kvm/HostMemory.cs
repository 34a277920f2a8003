using System.Runtime.InteropServices;
using Tmds.Linux;
using XenSharp.Core;

namespace XenSharp.Kvm;

/// <summary>A memfd mapped into this process: the backing of a memory slot. Pages cost nothing before their first use.</summary>
internal sealed unsafe class HostMemory : IDisposable
{
    /// <summary>What st_blocks counts in, whatever the file system's blocks are (stat(3type)).</summary>
    private const ulong BlockSize = 512;

    private readonly int _file;
    private int _holders = 1;

    private HostMemory(int file, byte* address, ulong size)
    {
        _file = file;
        Address = address;
        Size = size;
    }

    /// <summary>Host address, page-aligned.</summary>
    public byte* Address { get; private set; }

    /// <summary>Bytes.</summary>
    public ulong Size { get; }

    /// <summary>The memfd.</summary>
    public int File => _file;

    /// <summary>Bytes of the host's memory that it takes, swapped out or not.</summary>
    public ulong Resident
    {
        get
        {
            stat status;
            KvmVirtualMachine.Check(LibC.fstat(_file, &status), "Cannot ask how much memory a domain takes");
            return (ulong)(long)status.st_blocks * BlockSize;
        }
    }

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
        void* address = LibC.MAP_FAILED;
        try
        {
            if (LibC.ftruncate(file, (long)size) != 0)
                throw new KvmException($"Cannot size a domain's memory to {size >> 20} MiB", LibC.errno);
            address = LibC.mmap(null, (size_t)size, LibC.PROT_READ | LibC.PROT_WRITE, LibC.MAP_SHARED | LibC.MAP_NORESERVE, file, 0);
            if (address == LibC.MAP_FAILED)
                throw new KvmException($"Cannot map {size >> 20} MiB of domain memory", LibC.errno);
            return new HostMemory(file, (byte*)address, size);
        }
        finally
        {
            if (address == LibC.MAP_FAILED)
                _ = LibC.close(file);
        }
    }

    /// <summary>Copies bytes in by the file: a page that is new is filled instead of being cleared, and is not mapped here, which takes half the time.</summary>
    /// <param name="offset">Where to, in bytes; all lies within the memory.</param>
    /// <param name="bytes">What to copy.</param>
    public void Write(ulong offset, ReadOnlySpan<byte> bytes)
    {
        while (!bytes.IsEmpty)
        {
            nint count;
            fixed (byte* start = bytes)
                count = (nint)LibC.pwrite(_file, start, bytes.Length, (long)offset);
            if (count <= 0)
            {
                if (count < 0 && LibC.errno == LibC.EINTR)
                    continue;

                // Where the host has no page the mapping says so in its way.
                bytes.CopyTo(new Span<byte>(Address + offset, bytes.Length));
                return;
            }

            offset += (ulong)count;
            bytes = bytes[(int)count..];
        }
    }

    /// <summary>Gives a part back to the host: it reads as zeroes from then on, here and in every VM that has it.</summary>
    /// <param name="offset">In bytes, a multiple of the page size.</param>
    /// <param name="length">In bytes, a multiple of the page size.</param>
    public void Discard(ulong offset, ulong length)
    {
        // Memory that the process has locked is not taken from it.
        if (LibC.madvise(Address + offset, (size_t)length, LibC.MADV_REMOVE) != 0)
            NativeMemory.Clear(Address + offset, (nuint)length);
    }

    /// <summary>Where the next part begins that takes memory of the host's; all in front of it reads as zeroes, and would take some then.</summary>
    /// <param name="offset">In bytes, a multiple of the page size below <see cref="Size"/>.</param>
    /// <returns>In bytes, a multiple of the page size; <paramref name="offset"/> itself where there is memory, or the host does not say.</returns>
    public ulong NextUsed(ulong offset)
    {
        const int seekData = 3;
        long found = (long)LibC.lseek(_file, (long)offset, seekData);
        if (found >= 0)
            return Math.Max((ulong)found & ~Paging.PageOffsetMask, offset);
        return LibC.errno == LibC.ENXIO ? Size : offset;
    }

    /// <summary>One holder more, to be ended by <see cref="Dispose"/>.</summary>
    public void Hold() => Interlocked.Increment(ref _holders);

    /// <summary>Ends a hold; the memory goes with the last one, but for what is mapped elsewhere.</summary>
    public void Dispose()
    {
        if (Interlocked.Decrement(ref _holders) != 0)
            return;
        _ = LibC.munmap(Address, (size_t)Size);
        _ = LibC.close(_file);
        Address = null;
    }
}
