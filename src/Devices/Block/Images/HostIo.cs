// Calls of the C library that images need and no package brings.
using System.Runtime.InteropServices;
using Tmds.Linux;

namespace XenSharp.Devices.Block.Images;

/// <summary>Vectored file input and output, locks and device sizes of Linux.</summary>
internal static unsafe partial class HostIo
{
    /// <summary>RWF_NOWAIT: what would wait for the disk comes to EAGAIN instead.</summary>
    internal const int NoWait = 8;

    private const int LockShared = 1;
    private const int LockExclusive = 2;
    private const int LockNonBlocking = 4;

    private const nuint BlockGetSize64 = 0x80081272;
    private const nuint BlockSectorSize = 0x1268;
    private const nuint BlockPhysicalSectorSize = 0x127b;
    private const nuint BlockDiscard = 0x1277;

    /// <summary>Reads or writes at a place of a file.</summary>
    /// <returns>Bytes, or the negative of errno.</returns>
    internal static long Transfer(int file, bool write, IoVector* vectors, int count, ulong offset, int flags)
    {
        nint moved;
        do
        {
            moved = flags == 0
                ? write ? PWriteV(file, vectors, count, (long)offset) : PReadV(file, vectors, count, (long)offset)
                : write ? PWriteV2(file, vectors, count, (long)offset, flags) : PReadV2(file, vectors, count, (long)offset, flags);
        }
        while (moved < 0 && Marshal.GetLastPInvokeError() == LibC.EINTR);
        return moved < 0 ? -Marshal.GetLastPInvokeError() : moved;
    }

    /// <summary>Moves vectors on over bytes that are done.</summary>
    internal static void Advance(ref IoVector* vectors, ref int count, ulong bytes)
    {
        while (count > 0 && bytes >= vectors->Length)
        {
            bytes -= vectors->Length;
            vectors++;
            count--;
        }

        if (count > 0)
        {
            vectors->Base += bytes;
            vectors->Length -= (nuint)bytes;
        }
    }

    /// <summary>Locks a file for as long as it is open: by itself to be written, or together with other readers.</summary>
    /// <returns>0 or errno; EWOULDBLOCK where somebody else has it.</returns>
    internal static int Lock(int file, bool exclusive)
        => Flock(file, (exclusive ? LockExclusive : LockShared) | LockNonBlocking) == 0 ? 0 : Marshal.GetLastPInvokeError();

    /// <summary>Size and sectors of a block device.</summary>
    /// <returns>0 or errno.</returns>
    internal static int GetDevice(int file, out ulong size, out uint sector, out uint physicalSector)
    {
        size = sector = physicalSector = 0;
        ulong bytes;
        int logical;
        uint physical;
        if (Ioctl(file, BlockGetSize64, &bytes) != 0 || Ioctl(file, BlockSectorSize, &logical) != 0
            || Ioctl(file, BlockPhysicalSectorSize, &physical) != 0)
        {
            return Marshal.GetLastPInvokeError();
        }

        (size, sector, physicalSector) = (bytes, (uint)logical, physical);
        return 0;
    }

    /// <summary>Discards a range of a block device.</summary>
    /// <returns>0 or errno.</returns>
    internal static int DiscardDevice(int file, ulong offset, ulong length)
    {
        ulong* range = stackalloc ulong[] { offset, length };
        return Ioctl(file, BlockDiscard, range) == 0 ? 0 : Marshal.GetLastPInvokeError();
    }

    [LibraryImport("libc", EntryPoint = "preadv64", SetLastError = true)]
    private static partial nint PReadV(int file, IoVector* vectors, int count, long offset);

    [LibraryImport("libc", EntryPoint = "pwritev64", SetLastError = true)]
    private static partial nint PWriteV(int file, IoVector* vectors, int count, long offset);

    [LibraryImport("libc", EntryPoint = "preadv64v2", SetLastError = true)]
    private static partial nint PReadV2(int file, IoVector* vectors, int count, long offset, int flags);

    [LibraryImport("libc", EntryPoint = "pwritev64v2", SetLastError = true)]
    private static partial nint PWriteV2(int file, IoVector* vectors, int count, long offset, int flags);

    [LibraryImport("libc", EntryPoint = "flock", SetLastError = true)]
    private static partial int Flock(int file, int operation);

    [LibraryImport("libc", EntryPoint = "ioctl", SetLastError = true)]
    private static partial int Ioctl(int file, nuint request, void* argument);
}
