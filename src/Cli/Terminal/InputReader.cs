// Reads what is typed, or piped in, on a thread of its own that can be stopped at any moment.

using System.IO.Pipelines;
using System.Runtime.InteropServices;
using Tmds.Linux;

namespace XenSharp.Cli.Terminal;

/// <summary>Reads an input descriptor into a pipe, and looks for the detach key if it is a terminal.</summary>
/// <remarks>
/// From a terminal, reading goes on while the guest takes nothing, so that the detach key is seen however much was typed or
/// pasted before it. From a pipe or a file no more is read than the guest takes, and the end is passed on as one ^D.
/// </remarks>
internal sealed unsafe partial class InputReader : IDisposable
{
    /// <summary>^], as <c>xl console</c> has it.</summary>
    internal const byte DetachKey = 0x1d;

    /// <summary>^D, the end-of-file character (VEOF) of a Linux terminal in its default mode.</summary>
    internal const byte EndOfFile = 0x04;

    /// <summary>Bytes held for a guest that does not read: for a terminal more than anybody pastes.</summary>
    private const int TerminalBacklog = 16 << 20;
    private const int PipeBacklog = 16 << 10;

    private readonly int _descriptor;
    private readonly bool _isTerminal;
    private readonly int _wake;
    private readonly Pipe _pipe;
    private readonly byte[] _buffer = new byte[4096];
    private readonly TaskCompletionSource _detach = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private Thread? _thread;
    private volatile bool _stopping;

    internal InputReader(int descriptor, bool isTerminal)
    {
        _descriptor = descriptor;
        _isTerminal = isTerminal;
        int backlog = isTerminal ? TerminalBacklog : PipeBacklog;
        _pipe = new Pipe(new PipeOptions(pauseWriterThreshold: backlog, resumeWriterThreshold: backlog / 2, useSynchronizationContext: false));
        _wake = LibC.eventfd(0, LibC.EFD_CLOEXEC | LibC.EFD_NONBLOCK);
        if (_wake < 0)
        {
            throw new IOException("The console cannot make an eventfd; raise the limit on open files (ulimit -n): "
                + Marshal.GetPInvokeErrorMessage(Marshal.GetLastPInvokeError()) + ".");
        }
    }

    /// <summary>What was read, with the ^D at the end. Complete after the end of the input.</summary>
    internal PipeReader Input => _pipe.Reader;

    /// <summary>Completes when the detach key was typed.</summary>
    internal Task DetachRequested => _detach.Task;

    /// <summary>Why the input cannot be read, for a person; <see langword="null"/> if it can, or has just come to its end.</summary>
    internal string? Failure { get; private set; }

    internal void Start()
    {
        _thread = new Thread(Read) { IsBackground = true, Name = "console input" };
        _thread.Start();
    }

    /// <summary>Stops the thread and waits for its end.</summary>
    public void Dispose()
    {
        _stopping = true;
        _pipe.Writer.CancelPendingFlush();
        ulong one = 1;
        _ = LibC.write(_wake, &one, sizeof(ulong));
        _thread?.Join();
        LibC.close(_wake);
    }

    private void Read()
    {
        bool wanted = true;
        while (wanted && WaitForInput())
        {
            nint count;
            fixed (byte* start = _buffer)
                count = (nint)LibC.read(_descriptor, start, _buffer.Length);

            if (count > 0)
            {
                wanted = TakeIn(_buffer.AsMemory(0, (int)count));
            }
            else if (count == 0)
            {
                if (!_isTerminal)
                    Pass(new[] { EndOfFile });
                break;
            }
            else if (Marshal.GetLastPInvokeError() is int error && error != LibC.EINTR && error != LibC.EAGAIN)
            {
                // A terminal whose window was closed says EIO; SIGHUP tells that story.
                if (!_isTerminal || error != LibC.EIO)
                    Failure = $"The console's input cannot be read: {Marshal.GetPInvokeErrorMessage(error)}.";
                break;
            }
        }
        _pipe.Writer.Complete();
    }

    /// <returns><see langword="false"/> if reading is to end.</returns>
    private bool TakeIn(ReadOnlyMemory<byte> bytes)
    {
        int detach = _isTerminal ? bytes.Span.IndexOf(DetachKey) : -1;
        bool passed = Pass(detach < 0 ? bytes : bytes[..detach]);
        if (detach >= 0)
        {
            _detach.SetResult();
            return false;
        }

        // A guest that reads no more does not take the detach key from the user.
        return passed || (_isTerminal && !_stopping);
    }

    /// <summary>Hands bytes on, waiting while the backlog is full.</summary>
    /// <returns><see langword="false"/> if nobody takes them any more.</returns>
    private bool Pass(ReadOnlyMemory<byte> bytes)
    {
        if (bytes.IsEmpty)
            return true;
        ValueTask<FlushResult> flush = _pipe.Writer.WriteAsync(bytes);
        FlushResult result = flush.IsCompleted ? flush.Result : flush.AsTask().GetAwaiter().GetResult();
        return !result.IsCompleted && !result.IsCanceled;
    }

    /// <returns><see langword="false"/> if the reader is to stop.</returns>
    private bool WaitForInput()
    {
        pollfd* descriptors = stackalloc pollfd[2];
        while (!_stopping)
        {
            descriptors[0] = new pollfd { fd = _descriptor, events = (short)LibC.POLLIN };
            descriptors[1] = new pollfd { fd = _wake, events = (short)LibC.POLLIN };
            int ready = Poll(descriptors, 2, -1);
            if (ready > 0 && descriptors[1].revents == 0)
                return true;
            if (ready < 0 && Marshal.GetLastPInvokeError() is int error && error != LibC.EINTR)
            {
                Failure = $"The console's input cannot be waited for: {Marshal.GetPInvokeErrorMessage(error)}.";
                return false;
            }
        }
        return false;
    }

    /// <summary>poll(2), whose errno Tmds.LibC does not keep.</summary>
    [LibraryImport("libc", EntryPoint = "poll", SetLastError = true)]
    private static partial int Poll(pollfd* descriptors, nuint count, int timeout);
}
