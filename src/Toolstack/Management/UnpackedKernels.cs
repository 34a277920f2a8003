// Kernels that were unpacked before: unpacking one takes longer than all else that is done to make a domain.

using System.Globalization;
using System.IO.Hashing;
using Microsoft.Win32.SafeHandles;
using Tmds.Linux;
using XenSharp.Core;
using XenSharp.Domains.Builder;

namespace XenSharp.Toolstack.Management;

/// <summary>A kernel that can be loaded, and the memory that it is in.</summary>
/// <param name="Image">The kernel.</param>
/// <param name="Memory">To be disposed with it.</param>
internal sealed record LoadedKernel(KernelImage Image, IDisposable Memory);

/// <summary>
/// Keeps the ELF images of compressed kernels in a folder, and finds them again: those of a file by what the file system says of it, its
/// device and inode, size, and times of the last change, of which one cannot be set by anybody; those out of a guest's disk by the compressed
/// kernel itself, which is kept with what came of it. Members may be called by any thread.
/// </summary>
/// <param name="folder">The folder, for one manager at a time; it is made when there is something to keep.</param>
/// <param name="log">Is told when nothing can be kept.</param>
internal sealed class UnpackedKernels(string folder, ManagerLog log) : IAsyncDisposable
{
    /// <summary>How many are kept: those that were used last.</summary>
    internal const int Most = 8;

    private const string Extension = ".elf";
    private const string UnfinishedExtension = ".new";
    private const UnixFileMode Private = UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute;
    private const int Block = 4096;

    private readonly Lock _lock = new();
    private readonly HashSet<Task> _finishing = [];

    /// <summary>
    /// How long a file must have been as it is. File systems count time in ticks of some milliseconds: one that was changed just now could be
    /// changed once more without a trace.
    /// </summary>
    internal TimeSpan Settled { get; init; } = TimeSpan.FromSeconds(1);

    /// <summary>Reads a kernel's file, or what it was unpacked to before.</summary>
    /// <param name="path">Absolute path of the kernel.</param>
    /// <param name="option">What it was named with.</param>
    /// <exception cref="HostFileException">It cannot be read.</exception>
    /// <exception cref="KernelImageException">It is no kernel that can be loaded.</exception>
    internal LoadedKernel Load(string path, string option) => HostFile.WithOpened(path, option, file =>
    {
        string? identity = IdentityOf(file.SafeFileHandle);
        if (identity is not null && TryLoad(Path.Combine(folder, identity + Extension)) is { } known)
            return known;
        HostBuffer content = HostFile.Load(file, path, option, KernelImage.LargestUnpackedSize, "is larger than any kernel; name the kernel itself.");
        bool kept = false;
        try
        {
            ReadOnlyMemory<byte> elf = KernelImage.Unpack(content.Memory);
            KernelImage image = KernelImage.Parse(elf);
            if (elf.Span.Overlaps(content.GetSpan()))
            {
                kept = true;
                return new LoadedKernel(image, content);
            }

            if (identity is not null && IdentityOf(file.SafeFileHandle) == identity)
                Keep(identity, elf.Span);
            return new LoadedKernel(image, NoMemory.Instance);
        }
        finally
        {
            if (!kept)
                ((IDisposable)content).Dispose();
        }
    });

    /// <summary>Unpacks a kernel that is in memory, or takes what it was unpacked to before.</summary>
    /// <param name="packed">The kernel's file; a guest may have written it.</param>
    /// <exception cref="KernelImageException">It is no kernel that can be loaded.</exception>
    internal LoadedKernel Load(ReadOnlyMemory<byte> packed)
    {
        string name = NameOf(packed.Span);
        if (TryLoad(Path.Combine(folder, name + Extension), packed.Span) is { } known)
            return known;
        ReadOnlyMemory<byte> elf = KernelImage.Unpack(packed);
        var kernel = new LoadedKernel(KernelImage.Parse(elf), NoMemory.Instance);
        if (!elf.Span.Overlaps(packed.Span))
            Keep(name, elf.Span, packed.Span);
        return kernel;
    }

    /// <summary>Waits until what is kept is on its disk.</summary>
    public async ValueTask DisposeAsync()
    {
        Task[] finishing;
        lock (_lock)
            finishing = [.. _finishing];
        await Task.WhenAll(finishing).ConfigureAwait(false);
    }

    /// <summary>What tells a file, as it is now, from all others and from itself at other times; null where nothing does.</summary>
    private unsafe string? IdentityOf(SafeFileHandle file)
    {
        stat status;
        if (LibC.fstat((int)file.DangerousGetHandle(), &status) != 0 || (status.st_mode & LibC.S_IFMT) != LibC.S_IFREG)
            return null;
        DateTimeOffset changed = DateTimeOffset.FromUnixTimeMilliseconds(Nanoseconds(status.st_ctim) / 1_000_000);
        return DateTimeOffset.UtcNow - changed < Settled
            ? null
            : string.Create(
                CultureInfo.InvariantCulture,
                $"{(ulong)status.st_dev:x}-{(ulong)status.st_ino:x}-{(long)status.st_size:x}-{Nanoseconds(status.st_mtim):x}-{Nanoseconds(status.st_ctim):x}");
    }

    private static long Nanoseconds(timespec time) => unchecked(((long)time.tv_sec * 1_000_000_000) + (long)time.tv_nsec);

    /// <summary>
    /// What the image of a kernel from a guest's disk is kept as: its length and a hash. Others can be made to have the same, so it only says where
    /// to look; that it is this kernel, and no other guest's, is found by comparing all of it.
    /// </summary>
    private static string NameOf(ReadOnlySpan<byte> packed)
        => string.Create(CultureInfo.InvariantCulture, $"content-{packed.Length:x}-{XxHash3.HashToUInt64(packed):x16}");

    /// <summary>What is kept under a name; null where nothing is, or it cannot be used.</summary>
    /// <param name="path">The file.</param>
    /// <param name="packed">What stands behind the image and has to be the same; empty for nothing.</param>
    private static LoadedKernel? TryLoad(string path, ReadOnlySpan<byte> packed = default)
    {
        HostBuffer? content = null;
        try
        {
            if (!File.Exists(path))
                return null;
            using (SafeFileHandle file = File.OpenHandle(path))
            {
                long length = RandomAccess.GetLength(file);
                if (length <= packed.Length || length > Math.Min((long)KernelImage.LargestUnpackedSize + packed.Length, int.MaxValue))
                    return null;
                content = HostBuffer.Map(file, (int)length);
            }

            ReadOnlyMemory<byte> all = content.Memory;
            LoadedKernel? kernel = null;
            if (all.Span[^packed.Length..].SequenceEqual(packed))
            {
                kernel = new LoadedKernel(KernelImage.Parse(all[..^packed.Length]), content);
                File.SetLastWriteTimeUtc(path, DateTime.UtcNow);
            }
            else
            {
                ((IDisposable)content).Dispose();
            }

            return kernel;
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException or KernelImageException)
        {
            // It is unpacked again then, and put in the place of this.
            (content as IDisposable)?.Dispose();
            return null;
        }
    }

    /// <summary>Writes an image, without its blocks of zeroes; it is found once all of it is on the disk, which is not waited for.</summary>
    private void Keep(string identity, ReadOnlySpan<byte> elf, ReadOnlySpan<byte> packed = default)
    {
        string path = Path.Combine(folder, identity + Extension);
        string unfinished = $"{path}.{Guid.NewGuid():N}{UnfinishedExtension}";
        SafeFileHandle? file = null;
        try
        {
            _ = Directory.CreateDirectory(folder, Private);
            file = File.OpenHandle(unfinished, FileMode.CreateNew, FileAccess.Write);
            WriteSparse(file, elf);
            RandomAccess.Write(file, packed, elf.Length);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            file?.Dispose();
            Fail(unfinished, failure);
            return;
        }

        lock (_lock)
        {
            Task finishing = Task.Run(() => Finish(file, unfinished, path));
            _ = _finishing.Add(finishing);
            _ = finishing.ContinueWith(
                ended =>
                {
                    lock (_lock)
                        _ = _finishing.Remove(ended);
                },
                CancellationToken.None, TaskContinuationOptions.ExecuteSynchronously, TaskScheduler.Default);
        }
    }

    private static void WriteSparse(SafeFileHandle file, ReadOnlySpan<byte> elf)
    {
        RandomAccess.SetLength(file, elf.Length);
        for (int start = 0; start < elf.Length;)
        {
            int end = start;
            while (end < elf.Length && elf[end..Math.Min(end + Block, elf.Length)].ContainsAnyExcept((byte)0))
                end = Math.Min(end + Block, elf.Length);
            if (end > start)
                RandomAccess.Write(file, elf[start..end], start);
            start = Math.Min(end + Block, elf.Length);
        }
    }

    private void Finish(SafeFileHandle file, string unfinished, string path)
    {
        try
        {
            using (file)
                RandomAccess.FlushToDisk(file);
            File.Move(unfinished, path, overwrite: true);

            // Of those that were killed while they wrote nothing is left either.
            FileInfo[] files = new DirectoryInfo(folder).GetFiles();
            IEnumerable<FileInfo> old = files.Where(static one => one.Extension == Extension).OrderByDescending(static one => one.LastWriteTimeUtc).Skip(Most);
            IEnumerable<FileInfo> left = files.Where(static one => one.Extension == UnfinishedExtension && DateTime.UtcNow - one.LastWriteTimeUtc > TimeSpan.FromHours(1));
            foreach (FileInfo one in old.Concat(left))
                one.Delete();
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            Fail(unfinished, failure);
        }
    }

    private void Fail(string unfinished, Exception failure)
    {
        log.Write($"An unpacked kernel cannot be kept in {folder}, so that each domain's is unpacked anew: {failure.Message}");
        try
        {
            File.Delete(unfinished);
        }
        catch (Exception second) when (second is IOException or UnauthorizedAccessException)
        {
            // It is of no use, and does no harm.
        }
    }

    private sealed class NoMemory : IDisposable
    {
        internal static NoMemory Instance { get; } = new();

        public void Dispose()
        {
            // The collector sees to it.
        }
    }
}
