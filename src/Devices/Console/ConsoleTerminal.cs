// The pseudo-terminal of a guest's first console, as Xen's console daemon has one: for screen, minicom and the like.

using Tmds.Linux;

namespace XenSharp.Devices.Console;

/// <summary>
/// Whoever opens the slave sees what the guest prints, and is heard by it. As by the console daemon, each byte is shown there once: the
/// first to come gets all that is kept, a later one what was printed since the one before left.
/// </summary>
/// <remarks>A thread waits for both directions, as nothing else can wait for a terminal. While nobody has the slave open it is looked for
/// once a second. It ends with the console, when the last words were read, or are not read.</remarks>
internal sealed class ConsoleTerminal
{
    private const int StackSize = 256 << 10;
    private const int LookInterval = 1000;
    private const int InputBatch = 1024;
    private const int OutputBatch = 4096;

    /// <summary>Milliseconds for which one is waited for who does not read the last words.</summary>
    private const int LastPatience = 1000;

    private readonly ConsoleHub _hub;
    private readonly PseudoTerminal _terminal = new("the console");
    private readonly CancellationTokenSource _ending = new();
    private readonly TaskCompletionSource _ended = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly Lock _gate = new();
    private bool _isGone;

    /// <summary>Up to where somebody has been shown what was printed.</summary>
    private long _shown;

    /// <exception cref="IOException">The host has no more terminals, or descriptors, or threads, to give.</exception>
    internal ConsoleTerminal(ConsoleHub hub)
    {
        _hub = hub;
        try
        {
            new Thread(Serve, StackSize) { IsBackground = true, Name = "console terminal" }.Start();
        }
        catch (OutOfMemoryException)
        {
            _terminal.Dispose();
            throw new IOException("A thread cannot be started for the console; raise the limit on processes (ulimit -u).");
        }
    }

    /// <summary>The slave's path.</summary>
    internal string Path => _terminal.Path;

    /// <summary>Completes when the terminal is gone.</summary>
    internal Task Completion => _ended.Task;

    /// <summary>The console prints no more.</summary>
    internal void End()
    {
        lock (_gate)
        {
            if (_isGone)
                return;
            _ending.Cancel();
            _terminal.Wake();
        }
    }

    private void Serve()
    {
        bool isEnding;
        do
        {
            // One who has just come gets the last words too.
            isEnding = _ending.IsCancellationRequested;
            if ((_terminal.Poll(0, 0) & LibC.POLLHUP) == 0)
                Attend();
            else if (!isEnding)
                _ = _ending.Token.WaitHandle.WaitOne(LookInterval);
        }
        while (!isEnding);

        lock (_gate)
        {
            _isGone = true;
            _terminal.Dispose();
            _ending.Dispose();
        }

        _ended.SetResult();
    }

    /// <summary>Serves those who have the slave open, until nobody has, or the console ends.</summary>
    private void Attend()
    {
        using ConsoleViewer viewer = _hub.AttachAt(_shown);
        byte[] output = new byte[OutputBatch];
        int start = 0;
        int end = 0;
        Task<int>? reading = null;
        Task woken = Task.CompletedTask;
        long progress = Environment.TickCount64;
        while (true)
        {
            if (start == end)
            {
                if (reading is null)
                {
                    reading = viewer.ReadAsync(output).AsTask();
                    woken = reading.ContinueWith(_ => _terminal.Wake(), TaskScheduler.Default);
                }

                if (reading.IsCompleted)
                {
                    (start, end) = (0, reading.Result);
                    reading = null;
                    if (end == 0)
                        break;
                }
            }

            bool hasOutput = start < end;
            bool isEnding = _ending.IsCancellationRequested;
            short events = _terminal.Poll(hasOutput ? LibC.POLLIN | LibC.POLLOUT : LibC.POLLIN, isEnding ? LastPatience : -1);
            if ((events & LibC.POLLIN) != 0)
                Type();
            else if ((events & (LibC.POLLHUP | LibC.POLLERR)) != 0)
                break;
            if ((events & LibC.POLLOUT) != 0)
            {
                start += Math.Max(_terminal.Write(output.AsSpan(start..end)), 0);
                progress = Environment.TickCount64;
            }
            else if (isEnding && Environment.TickCount64 - progress >= LastPatience)
            {
                break;
            }
        }

        viewer.Dispose();
        woken.Wait();
        if (reading is not null)
            (start, end) = (0, reading.Result);
        _shown = viewer.Shown - (end - start);
        if (_ending.IsCancellationRequested)
            _terminal.AwaitReader(LastPatience);
    }

    private void Type()
    {
        Span<byte> batch = stackalloc byte[InputBatch];
        int count = _terminal.Read(batch);
        if (count <= 0)
            return;
        try
        {
            // Dropped where the guest reads no more.
            _ = _hub.TypeAsync(batch[..count].ToArray(), _ending.Token).AsTask().GetAwaiter().GetResult();
        }
        catch (OperationCanceledException)
        {
            // The console has ended.
        }
    }
}
