// A large buffer outside of the managed heap, for what is read once and let go of.
using System.Buffers;
using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;
using Tmds.Linux;

namespace XenSharp.Core;

/// <summary>
/// Memory of <see cref="HostPages"/>, zeroed, as <see cref="Memory{T}"/>. It goes back to the host when it is disposed, and not at some later
/// collection: kernels and ramdisks have tens of MiB.
/// </summary>
public sealed unsafe class HostBuffer : MemoryManager<byte>
{
    private readonly int _length;
    private void* _address;

    /// <param name="length">Bytes, at least 1.</param>
    /// <exception cref="OutOfMemoryException">The host has no address space left for it.</exception>
    public HostBuffer(int length)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(length);
        _length = length;
        _address = HostPages.Allocate((nuint)length);
    }

    private HostBuffer(void* address, int length)
    {
        _address = address;
        _length = length;
    }

    /// <summary>
    /// A file's content where the host has it already, only to be read. The file must stay as it is until this is disposed: it is for those
    /// that nobody else writes to.
    /// </summary>
    /// <param name="file">The open file.</param>
    /// <param name="length">Its length in bytes, at least 1.</param>
    /// <exception cref="IOException">It cannot be mapped, or read to its end.</exception>
    public static HostBuffer Map(SafeFileHandle file, int length)
    {
        const int populateRead = 22;
        ArgumentNullException.ThrowIfNull(file);
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(length);
        void* address = LibC.mmap(null, (size_t)(nuint)length, LibC.PROT_READ, LibC.MAP_PRIVATE, (int)file.DangerousGetHandle(), 0);
        if (address == LibC.MAP_FAILED)
            throw new IOException(Marshal.GetPInvokeErrorMessage(LibC.errno));

        // A page that the disk does not give would end the process where it is looked at; here it is an error. Before Linux 5.14 it is read then.
        if (LibC.madvise(address, (size_t)(nuint)length, populateRead) != 0 && LibC.errno is var error && error != LibC.EINVAL)
        {
            HostPages.Free(address, (nuint)length);
            throw new IOException(Marshal.GetPInvokeErrorMessage(error));
        }

        return new HostBuffer(address, length);
    }

    /// <inheritdoc/>
    public override Span<byte> GetSpan()
    {
        ObjectDisposedException.ThrowIf(_address == null, this);
        return new Span<byte>(_address, _length);
    }

    /// <inheritdoc/>
    public override MemoryHandle Pin(int elementIndex = 0)
    {
        ObjectDisposedException.ThrowIf(_address == null, this);
        ArgumentOutOfRangeException.ThrowIfGreaterThan((uint)elementIndex, (uint)_length);
        return new MemoryHandle((byte*)_address + elementIndex);
    }

    /// <inheritdoc/>
    public override void Unpin()
    {
        // It does not move.
    }

    /// <summary>Gives the memory back. Nobody may use it any more.</summary>
    protected override void Dispose(bool disposing)
    {
        HostPages.Free(_address, (nuint)_length);
        _address = null;
    }
}
