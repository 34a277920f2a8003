// Files that the user names, read with a sentence for everything that can be wrong with them.

using System.Buffers;
using XenSharp.Core;

namespace XenSharp.Toolstack;

/// <summary>Reads whole files; pipes as well, so that <c>--kernel &lt;(zcat …)</c> works.</summary>
public static class HostFile
{
    private const int ChunkSize = 1 << 20;

    /// <summary>Reads a file.</summary>
    /// <param name="path">Its path.</param>
    /// <param name="option">The option it was named with, such as "--kernel".</param>
    /// <param name="limit">The most bytes it may have.</param>
    /// <param name="tooLarge">The sentence, without the file's name, for a larger one.</param>
    /// <exception cref="HostFileException">It cannot be read, is empty or too large.</exception>
    public static byte[] Read(string path, string option, int limit, string tooLarge)
        => WithOpened(path, option, file => NotEmpty(file.CanSeek ? ReadSeekable(file, path, limit, tooLarge) : ReadStream(file, path, limit, tooLarge), path, option));

    /// <summary>Reads a file into memory outside of the managed heap.</summary>
    /// <returns>The memory, which is the caller's to dispose.</returns>
    /// <inheritdoc cref="Read"/>
    internal static HostBuffer Load(string path, string option, int limit, string tooLarge)
        => WithOpened(path, option, file => Load(file, path, option, limit, tooLarge));

    /// <summary>Reads an open file into memory outside of the managed heap.</summary>
    /// <param name="file">The file, at its start.</param>
    /// <param name="path">Its path, for sentences; the rest as for <see cref="Read"/>.</param>
    /// <param name="option">The option.</param>
    /// <param name="limit">The most bytes.</param>
    /// <param name="tooLarge">The sentence for a larger one.</param>
    internal static HostBuffer Load(FileStream file, string path, string option, int limit, string tooLarge)
    {
        long length = file.CanSeek ? file.Length : 0;
        if (length is 0 || length > limit)
            return Copy(NotEmpty(file.CanSeek ? ReadSeekable(file, path, limit, tooLarge) : ReadStream(file, path, limit, tooLarge), path, option));
        var buffer = new HostBuffer((int)length);
        try
        {
            // One that becomes shorter meanwhile is as long as it is now.
            int count = file.ReadAtLeast(buffer.GetSpan(), (int)length, throwOnEndOfStream: false);
            if (count == length)
                return buffer;
            HostBuffer shorter = Copy(NotEmpty(buffer.GetSpan()[..count].ToArray(), path, option));
            ((IDisposable)buffer).Dispose();
            return shorter;
        }
        catch
        {
            ((IDisposable)buffer).Dispose();
            throw;
        }
    }

    /// <summary>Does something with an open file.</summary>
    /// <exception cref="HostFileException">It cannot be opened or read.</exception>
    internal static T WithOpened<T>(string path, string option, Func<FileStream, T> read)
    {
        if (path.Length == 0)
            throw new HostFileException($"{option} was given an empty name; give it the name of a file.");
        if (Directory.Exists(path))
            throw new HostFileException($"{path} is a folder; give {option} the name of a file.");
        try
        {
            using var file = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite | FileShare.Delete, bufferSize: 0);
            return read(file);
        }
        catch (Exception failure) when (failure is FileNotFoundException or DirectoryNotFoundException)
        {
            throw new HostFileException($"There is no file {path}; give {option} the name of one that exists.");
        }
        catch (UnauthorizedAccessException)
        {
            throw new HostFileException($"There is no permission to read {path}; change its mode, or run as a user who may read it.");
        }
        catch (IOException failure)
        {
            throw new HostFileException($"{path} cannot be read: {failure.Message}");
        }
    }

    private static HostBuffer Copy(byte[] content)
    {
        var buffer = new HostBuffer(content.Length);
        content.CopyTo(buffer.GetSpan());
        return buffer;
    }

    private static byte[] NotEmpty(byte[] content, string path, string option)
        => content.Length > 0 ? content : throw new HostFileException($"{path} is empty; give {option} another file.");

    private static byte[] ReadSeekable(FileStream file, string path, int limit, string tooLarge)
    {
        long length = file.Length;
        if (length > limit)
            throw new HostFileException($"{path} {tooLarge}");

        // Some files that can be sought, those of /proc and devices, do not say how long they are.
        if (length == 0)
            return ReadStream(file, path, limit, tooLarge);
        var content = GC.AllocateUninitializedArray<byte>((int)length);
        int count = file.ReadAtLeast(content, content.Length, throwOnEndOfStream: false);
        return count == content.Length ? content : content[..count];
    }

    private static byte[] ReadStream(FileStream file, string path, int limit, string tooLarge)
    {
        var content = new ArrayBufferWriter<byte>(ChunkSize);
        while (true)
        {
            int count = file.Read(content.GetSpan(ChunkSize));
            if (count == 0)
                return content.WrittenSpan.ToArray();
            content.Advance(count);
            if (content.WrittenCount > limit)
                throw new HostFileException($"{path} {tooLarge}");
        }
    }
}

/// <summary>A file cannot be used for what it was named for; the message is a sentence that says why.</summary>
/// <param name="message">The sentence.</param>
public sealed class HostFileException(string message) : Exception(message);
