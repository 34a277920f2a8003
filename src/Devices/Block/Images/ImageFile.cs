// An image's file as the host has it: opened, measured, and locked against a second writer.
using System.Globalization;
using System.Runtime.InteropServices;
using System.Text;
using Tmds.Linux;

namespace XenSharp.Devices.Block.Images;

/// <summary>What there is to know of a block device of the host.</summary>
/// <param name="SectorSize">Bytes of a logical sector.</param>
/// <param name="PhysicalSectorSize">Bytes of a physical one.</param>
/// <param name="Discard">Where it can give room back; null if it cannot.</param>
internal readonly record struct HostDevice(uint SectorSize, uint PhysicalSectorSize, DiscardLimits? Discard);

/// <summary>
/// An open file or block device. It is locked (flock) as long as it is open: by itself if it can be written, else together with others
/// that only read; so two disks do not write one image.
/// </summary>
internal sealed unsafe class ImageFile : IDisposable
{
    private const int TypeMask = 0xf000;
    private const int RegularFile = 0x8000;
    private const int BlockDevice = 0x6000;
    private const int Folder = 0x4000;
    private const uint SmallestSector = 512;
    private const uint LargestSector = 4096;

    private int _descriptor;

    private ImageFile(int descriptor, string path, bool readOnly)
    {
        (_descriptor, Path, IsReadOnly) = (descriptor, path, readOnly);
    }

    internal int Descriptor => _descriptor;

    /// <summary>The file's name, as it was given.</summary>
    internal string Path { get; }

    internal bool IsReadOnly { get; }

    /// <summary>Bytes.</summary>
    internal ulong Size { get; private set; }

    /// <summary>Bytes of the file system's blocks.</summary>
    internal uint BlockSize { get; private set; } = 4096;

    /// <summary>Null for an ordinary file.</summary>
    internal HostDevice? Device { get; private set; }

    /// <exception cref="BlockImageException">It cannot be opened or used; the message says why and what to do.</exception>
    /// <param name="path">Its name.</param>
    /// <param name="readOnly">Whether it is only read.</param>
    /// <param name="direct">Whether it is used past the page cache (O_DIRECT).</param>
    internal static ImageFile Open(string path, bool readOnly, bool direct = false)
    {
        ArgumentException.ThrowIfNullOrEmpty(path);

        // Without O_NONBLOCK a FIFO would hold us up here.
        int flags = (readOnly ? LibC.O_RDONLY : LibC.O_RDWR) | LibC.O_CLOEXEC | LibC.O_NONBLOCK | (direct ? LibC.O_DIRECT : 0);
        int descriptor;
        fixed (byte* name = Encoding.UTF8.GetBytes(path + "\0"))
            descriptor = LibC.open(name, flags);
        if (descriptor < 0)
        {
            int error = LibC.errno;
            throw direct && error == LibC.EINVAL ? CannotBypass(path) : CannotOpen(path, readOnly, error);
        }

        var file = new ImageFile(descriptor, path, readOnly);
        try
        {
            file.Measure();
            file.Lock();
            return file;
        }
        catch
        {
            file.Dispose();
            throw;
        }
    }

    public void Dispose()
    {
        int descriptor = Interlocked.Exchange(ref _descriptor, -1);
        if (descriptor >= 0)
            _ = LibC.close(descriptor);
    }

    /// <summary>The smallest unit in which a file that is used directly can be read, in place, length and memory.</summary>
    /// <exception cref="BlockImageException">It cannot be used so.</exception>
    internal uint FindDirectUnit()
    {
        byte* memory = (byte*)NativeMemory.AlignedAlloc(2 * LargestSector, LargestSector);
        try
        {
            for (uint unit = SmallestSector; unit <= LargestSector; unit *= 2)
            {
                // Memory that is aligned to no more than the unit, as a guest's may be.
                var vector = new IoVector { Base = memory + (unit % LargestSector), Length = unit };
                long read = HostIo.Transfer(_descriptor, write: false, &vector, 1, 0, flags: 0);
                if (read >= 0)
                    return unit;
                if (read != -LibC.EINVAL)
                    throw CannotOpen(Path, IsReadOnly, (int)-read);
            }
        }
        finally
        {
            NativeMemory.AlignedFree(memory);
        }

        throw CannotBypass(Path);
    }

    private static BlockImageException CannotBypass(string path)
        => new($"{path} cannot be used past the host's page cache, as its file system does not allow that; leave direct-io-safe out, or move the image.");

    private static BlockImageException CannotOpen(string path, bool readOnly, int error)
    {
        string what = error == LibC.ENOENT ? "there is no such file; give the path of an image or block device"
            : error == LibC.EACCES || error == LibC.EPERM ? $"it may not be {(readOnly ? "read" : "read and written")}; change its permissions or choose another"
            : error == LibC.EROFS ? "its file system is read-only; attach it read-only (mode \"r\")"
            : error == LibC.EISDIR ? "it is a folder; give the path of an image or block device"
            : error == LibC.EBUSY || error == LibC.ETXTBSY ? "the host uses it; unmount it first"
            : Marshal.GetPInvokeErrorMessage(error);
        return new BlockImageException($"{path} cannot be opened as a disk: {what}.");
    }

    private void Measure()
    {
        stat status;
        if (LibC.fstat(_descriptor, &status) != 0)
            throw CannotOpen(Path, IsReadOnly, LibC.errno);
        switch ((int)(uint)status.st_mode & TypeMask)
        {
            case RegularFile:
                Size = (ulong)(long)status.st_size;
                if ((long)status.st_blksize is > 0 and <= 1 << 20)
                    BlockSize = (uint)(long)status.st_blksize;
                break;

            case BlockDevice:
                int error = HostIo.GetDevice(_descriptor, out ulong size, out uint sector, out uint physical);
                if (error != 0)
                    throw CannotOpen(Path, IsReadOnly, error);
                if (sector > LargestSector)
                    throw new BlockImageException($"{Path} has sectors of {sector} bytes, and guests can use {LargestSector} at most; choose another device.");
                Size = size;
                Device = new HostDevice(sector, physical, ReadDiscardLimits((ulong)status.st_rdev));
                break;

            case Folder:
                throw CannotOpen(Path, IsReadOnly, LibC.EISDIR);

            default:
                throw new BlockImageException($"{Path} is neither a file nor a block device; give the path of an image or block device.");
        }
    }

    private void Lock()
    {
        int error = HostIo.Lock(_descriptor, exclusive: !IsReadOnly);
        if (error == LibC.EWOULDBLOCK)
        {
            throw new BlockImageException(IsReadOnly
                ? $"{Path} is in use by something that writes to it; detach it there first."
                : $"{Path} is in use already, and an image that is written to can be one disk only; detach it there first, or attach it read-only in both places.");
        }

        // A file system without locks is no reason to refuse the image.
        if (error != 0 && error != LibC.ENOLCK && error != LibC.EOPNOTSUPP && error != LibC.ENOSYS)
            throw CannotOpen(Path, IsReadOnly, error);
    }

    // The queue belongs to the whole disk, which for a partition is the folder above.
    private static DiscardLimits? ReadDiscardLimits(ulong device)
    {
        ulong major = ((device >> 8) & 0xfff) | ((device >> 32) & ~0xffful);
        ulong minor = (device & 0xff) | ((device >> 12) & ~0xfful);
        string folder = string.Create(CultureInfo.InvariantCulture, $"/sys/dev/block/{major}:{minor}");
        foreach (string queue in new[] { folder + "/queue", folder + "/../queue" })
        {
            if (ReadNumber(queue + "/discard_max_bytes") is not { } most)
                continue;
            uint granularity = ReadNumber(queue + "/discard_granularity") ?? 0;
            return most > 0 && granularity > 0 ? new DiscardLimits(granularity, ReadNumber(folder + "/discard_alignment") ?? 0) : null;
        }

        return null;
    }

    private static uint? ReadNumber(string path)
    {
        try
        {
            return ulong.TryParse(File.ReadAllText(path).AsSpan().Trim(), NumberStyles.None, CultureInfo.InvariantCulture, out ulong number)
                ? (uint)Math.Min(number, uint.MaxValue)
                : null;
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }
}
