// Console output into a raw file descriptor: the terminal, a pipe, a log file.

using System.Runtime.InteropServices;
using System.Text;
using Tmds.Linux;

namespace XenSharp.Devices.Console;

/// <summary>Why a descriptor takes no more output.</summary>
/// <param name="Errno">The error number of write(2): EPIPE if the reader of a pipe has gone away.</param>
/// <param name="Message">The system's text for it.</param>
public sealed record OutputClosed(int Errno, string Message)
{
    /// <summary>Whether the reader went away, which for a Unix filter is no error but the time to leave quietly.</summary>
    public bool ReaderGone => Errno == LibC.EPIPE;
}

/// <summary>Writes console output to a file descriptor with write(2), as bytes, with no buffer of its own.</summary>
/// <remarks>
/// <para>A call that waits can be cancelled. That needs writes that do not block, and O_NONBLOCK is a property of the open
/// file, which is shared with the shell and everything else it started: setting it on standard output would break them.
/// Terminals and pipes are therefore opened a second time through /proc/self/fd, sockets are written with MSG_DONTWAIT.
/// Where that is not possible (a terminal that belongs to another user after <c>su</c>), each write is made when poll(2)
/// says there is room, and may still block if there is room for only a part.</para>
/// <para>.NET ignores SIGPIPE, so a closed pipe is seen as EPIPE here.</para>
/// </remarks>
public sealed unsafe partial class FileDescriptorSink : IConsoleSink, IDisposable
{
    private enum WriteMode { Plain, NonBlocking, PollFirst, Socket }

    private readonly TaskCompletionSource<OutputClosed> _closed = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly WriteMode _mode;
    private readonly bool _ownsDescriptor;
    private readonly int _wake;
    private int _descriptor;

    /// <param name="descriptor">A descriptor open for writing.</param>
    /// <param name="ownsDescriptor">Whether <see cref="Dispose"/> closes it.</param>
    /// <exception cref="IOException">The descriptor is not open, or the process has no more descriptors to give.</exception>
    public FileDescriptorSink(int descriptor, bool ownsDescriptor = false)
    {
        stat status;
        if (LibC.fstat(descriptor, &status) != 0)
            throw Failure($"File descriptor {descriptor} cannot take console output");

        _wake = LibC.eventfd(0, LibC.EFD_CLOEXEC | LibC.EFD_NONBLOCK);
        if (_wake < 0)
            throw Failure("The console cannot make an eventfd; raise the limit on open files (ulimit -n)");

        _descriptor = descriptor;
        _ownsDescriptor = ownsDescriptor;
        _mode = ((uint)status.st_mode & (uint)LibC.S_IFMT) switch
        {
            var type when type == (uint)LibC.S_IFREG => WriteMode.Plain,
            var type when type == (uint)LibC.S_IFSOCK => WriteMode.Socket,
            _ => WriteMode.PollFirst,
        };
        if (_mode == WriteMode.PollFirst && TryReopen(descriptor, status) is int own and >= 0)
        {
            if (ownsDescriptor)
                LibC.close(descriptor);
            _descriptor = own;
            _ownsDescriptor = true;
            _mode = WriteMode.NonBlocking;
        }
    }

    /// <summary>Opens a log file for appending, creating it (mode 0644) if need be, as Xen's console daemon does.</summary>
    /// <exception cref="IOException">The file cannot be opened; the message names it and the reason.</exception>
    public static FileDescriptorSink OpenLog(string path)
    {
        ArgumentException.ThrowIfNullOrEmpty(path);
        int descriptor;
        fixed (byte* name = Encoding.UTF8.GetBytes(path + '\0'))
            descriptor = LibC.open(name, LibC.O_WRONLY | LibC.O_APPEND | LibC.O_CREAT | LibC.O_CLOEXEC | LibC.O_NOCTTY, 0b110_100_100);
        if (descriptor < 0)
            throw Failure($"The console log {path} cannot be opened for writing");
        return new FileDescriptorSink(descriptor, ownsDescriptor: true);
    }

    /// <summary>Completes when the descriptor has refused a write for good; from then on output is discarded.</summary>
    public Task<OutputClosed> Closed => _closed.Task;

    /// <inheritdoc/>
    public int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation)
    {
        bool wait = _mode == WriteMode.PollFirst;
        while (!_closed.Task.IsCompleted)
        {
            cancellation.ThrowIfCancellationRequested();
            if (wait)
                WaitForRoom(cancellation);
            cancellation.ThrowIfCancellationRequested();

            nint count;
            fixed (byte* start = bytes)
            {
                count = (nint)(_mode == WriteMode.Socket
                    ? LibC.send(_descriptor, start, bytes.Length, LibC.MSG_DONTWAIT | LibC.MSG_NOSIGNAL)
                    : LibC.write(_descriptor, start, bytes.Length));
            }
            if (count > 0)
                return (int)count;

            int error = Marshal.GetLastPInvokeError();
            if (count == 0 || error == LibC.EAGAIN)
                wait = true;
            else if (error != LibC.EINTR)
                Close(error);
        }
        return 0;
    }

    /// <summary>Closes what the sink has opened. Not to be called while a run still writes to it.</summary>
    public void Dispose()
    {
        if (_descriptor < 0)
            return;
        _closed.TrySetResult(new OutputClosed(LibC.EBADF, "the sink was disposed"));
        LibC.close(_wake);
        if (_ownsDescriptor)
            LibC.close(_descriptor);
        _descriptor = -1;
    }

    /// <summary>Opens the same terminal or pipe once more, for writes that do not block.</summary>
    /// <returns>The new descriptor, or -1.</returns>
    private static int TryReopen(int descriptor, in stat status)
    {
        // The master end of a pseudo-terminal, device 5:2: opening it makes a new terminal instead.
        const ulong PseudoTerminalMultiplexer = (5 << 8) | 2;
        bool pipe = ((uint)status.st_mode & (uint)LibC.S_IFMT) == (uint)LibC.S_IFIFO;
        if (!pipe && (LibC.isatty(descriptor) == 0 || (ulong)status.st_rdev == PseudoTerminalMultiplexer))
            return -1;
        fixed (byte* path = Encoding.ASCII.GetBytes($"/proc/self/fd/{descriptor}\0"))
            return LibC.open(path, LibC.O_WRONLY | LibC.O_NONBLOCK | LibC.O_NOCTTY | LibC.O_CLOEXEC, 0);
    }

    /// <summary>Waits until the descriptor has room, has failed, or the token is signalled: the caller looks again.</summary>
    private void WaitForRoom(CancellationToken cancellation)
    {
        // A token of an earlier run may have left the eventfd set. Its registration is gone, so it is not set again.
        ulong count;
        _ = LibC.read(_wake, &count, sizeof(ulong));

        using CancellationTokenRegistration registration =
            cancellation.UnsafeRegister(static sink => ((FileDescriptorSink)sink!).Wake(), this);
        pollfd* descriptors = stackalloc pollfd[2];
        descriptors[0] = new pollfd { fd = _descriptor, events = (short)LibC.POLLOUT };
        descriptors[1] = new pollfd { fd = _wake, events = (short)LibC.POLLIN };
        if (Poll(descriptors, 2, -1) < 0 && Marshal.GetLastPInvokeError() is int error && error != LibC.EINTR)
            Close(error);
    }

    private void Wake()
    {
        ulong one = 1;
        _ = LibC.write(_wake, &one, sizeof(ulong));
    }

    private void Close(int error) => _closed.TrySetResult(new OutputClosed(error, Marshal.GetPInvokeErrorMessage(error)));

    private static IOException Failure(string what)
    {
        int error = Marshal.GetLastPInvokeError();
        return new IOException($"{what}: {Marshal.GetPInvokeErrorMessage(error)}.", error);
    }

    /// <summary>poll(2), whose errno Tmds.LibC does not keep.</summary>
    [LibraryImport("libc", EntryPoint = "poll", SetLastError = true)]
    internal static partial int Poll(pollfd* descriptors, nuint count, int timeout);
}
