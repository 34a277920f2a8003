// An image of a block back end's, read by whoever looks for a kernel in it.

using System.Runtime.InteropServices;
using XenSharp.Configuration.Boot;
using XenSharp.Devices.Block.Images;

namespace XenSharp.Toolstack.Management;

/// <summary>Reads an <see cref="IBlockImage"/> at any byte. It owns the image.</summary>
internal sealed unsafe class BlockImageReader : ImageReader
{
    private const int WindowSize = 1 << 20;
    private const nuint Alignment = 4096;

    private readonly IBlockImage _image;
    private readonly byte* _window = (byte*)NativeMemory.AlignedAlloc(WindowSize, Alignment);
    private long _windowStart;
    private int _windowLength;
    private bool _disposed;

    internal BlockImageReader(IBlockImage image) => _image = image;

    /// <summary>Opens an image in a format that QEMU knows.</summary>
    /// <exception cref="BlockImageException">It cannot be opened.</exception>
    internal static BlockImageReader Open(string path, BlockImageFormat format)
        => new(QemuImage.OpenAsync(path, format, readOnly: true).GetAwaiter().GetResult());

    protected override int ReadSome(long offset, Span<byte> buffer)
    {
        ObjectDisposedException.ThrowIf(_disposed, this);
        if ((ulong)offset >= _image.Size)
            return 0;
        if (offset < _windowStart || offset >= _windowStart + _windowLength)
            Fill(offset & ~(WindowSize - 1L));
        int within = (int)(offset - _windowStart);
        int count = Math.Min(buffer.Length, _windowLength - within);
        new ReadOnlySpan<byte>(_window + within, count).CopyTo(buffer);
        return count;
    }

    protected override void Dispose(bool disposing)
    {
        if (!_disposed && disposing)
        {
            _disposed = true;
            _image.DisposeAsync().AsTask().GetAwaiter().GetResult();
            NativeMemory.AlignedFree(_window);
        }

        base.Dispose(disposing);
    }

    private void Fill(long start)
    {
        _windowLength = 0;
        int length = (int)Math.Min(WindowSize, _image.Size - (ulong)start);
        using var read = new WindowRead(_window, start, length);
        _image.Submit(read);
        int error = read.Wait();
        if (error != 0)
            throw new BootException($"{_image.Description} cannot be read: {Marshal.GetPInvokeErrorMessage(error)}.");
        (_windowStart, _windowLength) = (start, length);
    }

    /// <summary>One read into the window.</summary>
    private sealed class WindowRead : BlockOperation, IDisposable
    {
        private readonly ManualResetEventSlim _done = new();
        private int _error;

        internal WindowRead(byte* window, long start, int length)
        {
            Kind = BlockOperationKind.Read;
            Offset = (ulong)start;
            Length = (ulong)length;
            Vectors = (IoVector*)NativeMemory.Alloc((nuint)sizeof(IoVector));
            Vectors[0] = new IoVector { Base = window, Length = (nuint)length };
            VectorCount = 1;
        }

        public override void Complete(int error)
        {
            _error = error;
            _done.Set();
        }

        /// <summary>Waits for the end.</summary>
        /// <returns>0, or Linux's errno.</returns>
        internal int Wait()
        {
            _done.Wait();
            return _error;
        }

        public void Dispose()
        {
            NativeMemory.Free(Vectors);
            _done.Dispose();
        }
    }
}
