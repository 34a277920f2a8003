// A large buffer outside of the managed heap, for what is read once and let go of.
using System.Buffers;
using Tmds.Linux;

namespace XenSharp.Core;

/// <summary>
/// Zeroed memory of <see cref="HostPages"/> as <see cref="Memory{T}"/>. It goes back to the host when it is disposed, and not at some later
/// collection: kernels and ramdisks have tens of MiB.
/// </summary>
public sealed unsafe class HostBuffer : MemoryManager<byte>
{
    private const int HugePage = 2 << 20;

    private readonly int _length;
    private void* _address;

    /// <param name="length">Bytes, at least 1.</param>
    /// <exception cref="OutOfMemoryException">The host has no address space left for it.</exception>
    public HostBuffer(int length)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(length);
        _length = length;
        _address = HostPages.Allocate((nuint)length);

        // Advice that Linux need not take: with large pages there are fewer faults when it is filled.
        if (length >= HugePage)
            _ = LibC.madvise(_address, (size_t)(nuint)length, LibC.MADV_HUGEPAGE);
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
