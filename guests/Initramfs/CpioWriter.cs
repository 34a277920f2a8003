// Writes cpio archives in the "newc" form that Linux unpacks as its initramfs.
using System.Text;

namespace XenSharp.Guests.Initramfs;

/// <summary>
/// Streams a cpio archive in the SVR4 "newc" format, magic 070701 (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
/// </summary>
/// <remarks>Times are zero and owners root, so equal contents give equal archives. A folder must be added before what is in it,
/// because Linux creates entries in order. <see cref="Dispose"/> writes the trailer and leaves the stream open.</remarks>
public sealed class CpioWriter : IDisposable
{
    const int HeaderSize = 110;
    const int EntryAlignment = 4;
    const int ArchiveAlignment = 512;
    const int MaxNameLength = 4095; // Linux skips longer names (PATH_MAX with the NUL)
    const uint FileTypeFifo = 0x1000;
    const uint FileTypeCharacterDevice = 0x2000;
    const uint FileTypeDirectory = 0x4000;
    const uint FileTypeBlockDevice = 0x6000;
    const uint FileTypeRegular = 0x8000;
    const uint FileTypeSymlink = 0xa000;

    readonly Stream output;
    long position;
    uint inode;
    bool finished;

    /// <param name="output">Where the archive goes; only written to, never sought.</param>
    public CpioWriter(Stream output)
    {
        ArgumentNullException.ThrowIfNull(output);
        this.output = output;
    }

    /// <summary>Adds a folder.</summary>
    /// <param name="path">Relative to the root, without a leading slash.</param>
    /// <param name="mode">Permission bits, at most 07777 octal.</param>
    public void AddDirectory(string path, UnixFileMode mode = Executable) => Add(path, FileTypeDirectory, mode, []);

    /// <summary>Adds a regular file.</summary>
    public void AddFile(string path, ReadOnlySpan<byte> contents, UnixFileMode mode = Ordinary) =>
        Add(path, FileTypeRegular, mode, contents);

    /// <summary>Adds a regular file from the rest of a stream, which must tell its length.</summary>
    /// <exception cref="IOException">The stream ended before its length was reached.</exception>
    public void AddFile(string path, Stream contents, UnixFileMode mode = Ordinary)
    {
        ArgumentNullException.ThrowIfNull(contents);
        long length = contents.Length - contents.Position;
        WriteHeader(path, FileTypeRegular | (uint)mode, length, 0, 0);
        byte[] buffer = new byte[64 * 1024];
        while (length > 0)
        {
            int got = contents.Read(buffer, 0, (int)Math.Min(buffer.Length, length));
            if (got == 0)
                throw new IOException($"The contents of {path} ended {length} bytes early; was the file changed meanwhile?");
            Write(buffer.AsSpan(0, got));
            length -= got;
        }
        Align(EntryAlignment);
    }

    /// <summary>Adds a symbolic link.</summary>
    /// <param name="path">The link.</param>
    /// <param name="target">What it points to, as readlink gives it back.</param>
    public void AddSymlink(string path, string target)
    {
        ArgumentException.ThrowIfNullOrEmpty(target);
        Add(path, FileTypeSymlink, AllPermissions, Encoding.UTF8.GetBytes(target));
    }

    /// <summary>Adds a character device node.</summary>
    public void AddCharacterDevice(string path, uint major, uint minor, UnixFileMode mode = Ordinary) =>
        WriteHeader(path, FileTypeCharacterDevice | (uint)mode, 0, major, minor);

    /// <summary>Adds a block device node.</summary>
    public void AddBlockDevice(string path, uint major, uint minor, UnixFileMode mode = Ordinary) =>
        WriteHeader(path, FileTypeBlockDevice | (uint)mode, 0, major, minor);

    /// <summary>Adds a named pipe.</summary>
    public void AddFifo(string path, UnixFileMode mode = Ordinary) => WriteHeader(path, FileTypeFifo | (uint)mode, 0, 0, 0);

    /// <summary>Writes the trailer and pads the archive to a multiple of 512 bytes.</summary>
    public void Dispose()
    {
        if (finished)
            return;
        WriteHeaderFields("TRAILER!!!", 0, 0, 0, 0, 0);
        Align(ArchiveAlignment);
        finished = true;
    }

    const UnixFileMode Ordinary = UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.GroupRead | UnixFileMode.OtherRead;

    const UnixFileMode Executable = Ordinary | UnixFileMode.UserExecute | UnixFileMode.GroupExecute | UnixFileMode.OtherExecute;

    const UnixFileMode AllPermissions = Executable | UnixFileMode.GroupWrite | UnixFileMode.OtherWrite;

    void Add(string path, uint type, UnixFileMode mode, ReadOnlySpan<byte> contents)
    {
        WriteHeader(path, type | (uint)mode, contents.Length, 0, 0);
        Write(contents);
        Align(EntryAlignment);
    }

    void WriteHeader(string path, uint mode, long length, uint major, uint minor)
    {
        ObjectDisposedException.ThrowIf(finished, this);
        ArgumentException.ThrowIfNullOrEmpty(path);
        if (path[0] == '/' || path.Contains('\0', StringComparison.Ordinal) || Encoding.UTF8.GetByteCount(path) > MaxNameLength)
            throw new ArgumentException(
                $"\"{path}\" cannot be a name in an initramfs: it must be relative to the root, without NUL, and at most " +
                $"{MaxNameLength} bytes long.", nameof(path));
        if (length > uint.MaxValue)
            throw new ArgumentException($"{path} is {length} bytes long; the newc format ends at 4 GiB a file.", nameof(path));
        WriteHeaderFields(path, mode, (uint)length, major, minor, ++inode);
    }

    void WriteHeaderFields(string name, uint mode, uint length, uint major, uint minor, uint inodeNumber)
    {
        byte[] nameBytes = [.. Encoding.UTF8.GetBytes(name), 0];
        uint links = (mode & 0xf000) == FileTypeDirectory ? 2u : 1u;
        const uint Unused = 0;
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check.
        ReadOnlySpan<uint> fields =
        [
            inodeNumber, mode, 0, 0, links, 0, length, 0, 0, major, minor, (uint)nameBytes.Length, Unused,
        ];
        Span<byte> header = stackalloc byte[HeaderSize];
        "070701"u8.CopyTo(header);
        for (int i = 0; i < fields.Length; i++)
            fields[i].TryFormat(header[(6 + 8 * i)..], out _, "x8");
        Write(header);
        Write(nameBytes);
        Align(EntryAlignment);
    }

    void Write(ReadOnlySpan<byte> bytes)
    {
        output.Write(bytes);
        position += bytes.Length;
    }

    void Align(int alignment)
    {
        ReadOnlySpan<byte> zeros = stackalloc byte[ArchiveAlignment];
        Write(zeros[..(int)(-position & (alignment - 1))]);
    }
}
