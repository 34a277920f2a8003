// Linux's asynchronous I/O (io_submit), which does transfers past the page cache without a thread for each.
using System.Runtime.InteropServices;
using Tmds.Linux;

namespace XenSharp.Devices.Block.Images;

/// <summary>struct iocb of linux/aio_abi.h, little-endian: one transfer.</summary>
internal unsafe struct AioControl
{
    /// <summary>Comes back in <see cref="AioEvent.Data"/>.</summary>
    public ulong Data;
    public uint Key;

    /// <summary>RWF_*.</summary>
    public int Flags;
    public AioOperation Operation;
    public short Priority;
    public int File;

    /// <summary>The vectors of a transfer; the events of a poll.</summary>
    public ulong Buffer;

    /// <summary>How many vectors.</summary>
    public ulong Count;
    public ulong Offset;
    public ulong Reserved;
    public uint ControlFlags;
    public int ResultFile;
}

/// <summary>IOCB_CMD_*.</summary>
internal enum AioOperation : ushort
{
    Poll = 5,
    ReadVectors = 7,
    WriteVectors = 8,
}

/// <summary>struct io_event: how a transfer ended.</summary>
internal struct AioEvent
{
    public ulong Data;
    public ulong Control;

    /// <summary>Bytes, or the negative of errno.</summary>
    public long Result;
    public long Result2;
}

/// <summary>A context of Linux's asynchronous I/O: transfers are given to the kernel in one call, and their ends fetched by another.</summary>
internal sealed unsafe partial class KernelAio : IDisposable
{
    // System call numbers of x86-64 Linux.
    private const nint SetupCall = 206;
    private const nint DestroyCall = 207;
    private const nint GetEventsCall = 208;
    private const nint SubmitCall = 209;

    private nint _context;

    private KernelAio(nint context) => _context = context;

    /// <summary>Makes a context.</summary>
    /// <param name="capacity">Transfers that can be under way.</param>
    /// <returns>Null where the kernel has no such I/O, does not allow it, or has no more of it (fs.aio-max-nr).</returns>
    internal static KernelAio? TryCreate(int capacity)
    {
        nint context = 0;
        return Setup(SetupCall, capacity, &context) == 0 ? new KernelAio(context) : null;
    }

    /// <summary>Gives transfers to the kernel.</summary>
    /// <param name="controls">Each where it stays until the transfer has ended.</param>
    /// <param name="count">How many.</param>
    /// <returns>How many it took, the first ones; or the negative of errno, if it took none.</returns>
    internal int Submit(AioControl** controls, int count)
    {
        nint taken;
        do
            taken = Submit(SubmitCall, _context, count, controls);
        while (taken < 0 && Marshal.GetLastPInvokeError() == LibC.EINTR);
        return taken < 0 ? -Marshal.GetLastPInvokeError() : (int)taken;
    }

    /// <summary>Waits for the ends of transfers.</summary>
    /// <param name="events">Takes them.</param>
    /// <param name="least">For how many to wait.</param>
    /// <param name="patience">Nanoseconds to wait at most, less than a second; negative for as long as it takes.</param>
    /// <returns>How many have ended, which are fewer than asked for if time was up; or the negative of errno.</returns>
    internal int Wait(Span<AioEvent> events, int least, long patience)
    {
        timespec time = new() { tv_sec = 0, tv_nsec = (long_t)Math.Max(patience, 0) };
        fixed (AioEvent* first = events)
        {
            nint ended;
            do
                ended = GetEvents(GetEventsCall, _context, least, events.Length, first, patience < 0 ? null : &time);
            while (ended < 0 && Marshal.GetLastPInvokeError() == LibC.EINTR);
            return ended < 0 ? -Marshal.GetLastPInvokeError() : (int)ended;
        }
    }

    /// <summary>Ends it. Nothing may be under way, and nobody wait.</summary>
    public void Dispose()
    {
        nint context = Interlocked.Exchange(ref _context, 0);
        if (context != 0)
            _ = Destroy(DestroyCall, context);
    }

    [LibraryImport("libc", EntryPoint = "syscall", SetLastError = true)]
    private static partial nint Setup(nint number, nint capacity, nint* context);

    [LibraryImport("libc", EntryPoint = "syscall", SetLastError = true)]
    private static partial nint Destroy(nint number, nint context);

    [LibraryImport("libc", EntryPoint = "syscall", SetLastError = true)]
    private static partial nint Submit(nint number, nint context, nint count, AioControl** controls);

    [LibraryImport("libc", EntryPoint = "syscall", SetLastError = true)]
    private static partial nint GetEvents(nint number, nint context, nint least, nint most, AioEvent* events, timespec* patience);
}
