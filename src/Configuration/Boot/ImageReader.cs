// Reading a disk image at any place, whatever its format.

using Microsoft.Win32.SafeHandles;

namespace XenSharp.Configuration.Boot;

/// <summary>A disk's content, read-only. A format other than raw is a class of its own.</summary>
public abstract class ImageReader : IDisposable
{
    /// <summary>Fills a buffer.</summary>
    /// <param name="offset">Where to read, in bytes.</param>
    /// <param name="buffer">What to fill.</param>
    /// <exception cref="BootException">The disk ends before, or cannot be read.</exception>
    public void Read(long offset, Span<byte> buffer)
    {
        // Offsets come out of the image itself; none may wrap around.
        if (offset < 0 || offset > long.MaxValue - buffer.Length)
            throw new BootException($"The disk refers to a place that it does not have (byte {(ulong)offset}).");
        while (!buffer.IsEmpty)
        {
            int count = ReadSome(offset, buffer);
            if (count == 0)
                throw new BootException($"The disk ends at byte {offset}, and there should be more: it was cut off, or is no raw image.");
            buffer = buffer[count..];
            offset += count;
        }
    }

    /// <summary>Reads what there is.</summary>
    /// <returns>Bytes read; 0 at and behind the end.</returns>
    protected abstract int ReadSome(long offset, Span<byte> buffer);

    /// <summary>A part of the disk.</summary>
    /// <param name="offset">Where it begins, in bytes.</param>
    /// <param name="length">How long it is, in bytes.</param>
    internal ImageReader Part(long offset, long length) => new PartOfImage(this, offset, length);

    /// <inheritdoc/>
    public void Dispose()
    {
        Dispose(true);
        GC.SuppressFinalize(this);
    }

    /// <summary>Closes what is open.</summary>
    protected virtual void Dispose(bool disposing)
    {
    }

    private sealed class PartOfImage(ImageReader whole, long start, long length) : ImageReader
    {
        protected override int ReadSome(long offset, Span<byte> buffer)
            => offset >= length ? 0 : whole.ReadSome(start + offset, buffer[..(int)Math.Min(buffer.Length, length - offset)]);
    }
}

/// <summary>A raw image file, or a block device.</summary>
public sealed class RawImageReader : ImageReader
{
    private readonly SafeFileHandle _file;
    private readonly string _path;

    /// <summary>Opens a file or block device for reading.</summary>
    /// <exception cref="BootException">It cannot be opened.</exception>
    public RawImageReader(string path)
    {
        _path = path;
        try
        {
            if (Directory.Exists(path))
                throw new BootException($"{path} is a folder, where a disk image should be.");
            _file = File.OpenHandle(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite | FileShare.Delete);
        }
        catch (Exception failure) when (failure is FileNotFoundException or DirectoryNotFoundException)
        {
            throw new BootException($"There is no file {path}.", failure);
        }
        catch (UnauthorizedAccessException failure)
        {
            throw new BootException($"There is no permission to read {path}.", failure);
        }
        catch (IOException failure)
        {
            throw new BootException($"{path} cannot be opened: {failure.Message}", failure);
        }
    }

    /// <inheritdoc/>
    protected override int ReadSome(long offset, Span<byte> buffer)
    {
        try
        {
            return RandomAccess.Read(_file, buffer, offset);
        }
        catch (Exception failure) when (failure is IOException or NotSupportedException or UnauthorizedAccessException)
        {
            throw new BootException($"{_path} cannot be read: {failure.Message}", failure);
        }
    }

    /// <inheritdoc/>
    protected override void Dispose(bool disposing)
    {
        if (disposing)
            _file.Dispose();
        base.Dispose(disposing);
    }
}
