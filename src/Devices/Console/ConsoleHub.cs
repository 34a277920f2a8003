// One console for everybody: what the guest prints is kept, logged, and shown to any number of viewers; what they type goes to it.

using System.Diagnostics;

namespace XenSharp.Devices.Console;

/// <summary>Types to a guest, waiting for room as often as it takes.</summary>
/// <param name="input">What is typed; stays together.</param>
/// <param name="cancellation">Ends the wait; a part of the input may have been typed.</param>
/// <returns><see langword="false"/> if the guest will read no more.</returns>
public delegate ValueTask<bool> ConsoleInput(ReadOnlyMemory<byte> input, CancellationToken cancellation);

/// <summary>
/// The sink of a console that always reads, whether somebody looks or not. Members may be called by any thread, also
/// <see cref="Write"/> by several.
/// </summary>
/// <remarks>
/// <para><b>Viewers</b> read the history by position, so each gets every byte once and in order, beginning with what was printed
/// before it came. There is no buffer for each of them: whoever falls behind by more than the history is told in its stream how
/// many bytes it has missed, and goes on with the oldest that is kept.</para>
/// <para><b>The guest</b> is held up by a slow reader only for <see cref="ConsoleHubOptions.Patience"/>, then no more until that
/// reader has come up. Without such a one, nothing that is printed is missed by anybody.</para>
/// <para><b>Lifetime.</b> The hub knows no domain: it can outlive one, for its last words to be read, and serve the next, as after
/// a reboot. <see cref="CompleteAsync"/> says that there will be none.</para>
/// </remarks>
public sealed class ConsoleHub : IConsoleSink, IAsyncDisposable
{
    private const int LogBatch = 16 * 1024;

    private static readonly TimeSpan LogPatience = TimeSpan.FromSeconds(5);

    private readonly ConsoleHubOptions _options;
    private readonly ConsoleHistory _history;
    private readonly List<ConsoleViewer> _viewers = [];
    private readonly Task _logging = Task.CompletedTask;
    private ConsoleInput? _input;
    private ConsoleTerminal? _terminal;
    private bool _completed;

    /// <summary>Opens the log file, if there is to be one.</summary>
    /// <exception cref="ArgumentException">A setting makes no sense.</exception>
    /// <exception cref="IOException">The log file cannot be opened; a sentence names it and the reason.</exception>
    public ConsoleHub(ConsoleHubOptions? options = null)
    {
        _options = options ?? new ConsoleHubOptions();
        ArgumentOutOfRangeException.ThrowIfLessThan(_options.HistoryBytes, ConsoleHubOptions.MinimumHistoryBytes);
        _history = new ConsoleHistory(_options.HistoryBytes);
        if (_options.Log is { } log)
        {
            Log = new ConsoleLog(log);
            _logging = LogAsync(Log, Attach());
        }
    }

    /// <summary>The log file, for being reopened and asked for failures; <see langword="null"/> if there is none.</summary>
    public ConsoleLog? Log { get; }

    /// <summary>The path of its pseudo-terminal, for other programs; <see langword="null"/> if it has none.</summary>
    public string? Terminal => Volatile.Read(ref _terminal)?.Path;

    /// <summary>Bytes that were printed in all.</summary>
    public long Printed
    {
        get
        {
            lock (Gate)
                return _history.End;
        }
    }

    /// <summary>How many viewers there are now; the log is none.</summary>
    public int Viewers
    {
        get
        {
            lock (Gate)
                return _viewers.Count - (Log is null || _logging.IsCompleted ? 0 : 1);
        }
    }

    /// <summary>Held while the history or a position in it is touched. A monitor, as <see cref="Write"/> waits for readers.</summary>
    internal object Gate { get; } = new();

    internal ConsoleHistory History => _history;

    internal bool Completed => _completed;

    /// <summary>Says where typed input goes from now on; what was connected before is connected no longer.</summary>
    /// <param name="input">The guest; <see langword="null"/> for none.</param>
    public void Connect(ConsoleInput? input) => Volatile.Write(ref _input, input);

    /// <summary>Shows the console on a pseudo-terminal as well, to whoever opens that, until it is complete. Once.</summary>
    /// <exception cref="IOException">The host has no more of what that needs; a sentence says of what.</exception>
    public void OfferTerminal() => Volatile.Write(ref _terminal, new ConsoleTerminal(this));

    /// <summary>Types to the guest. What different callers type does not mix.</summary>
    /// <returns><see langword="false"/> if there is no guest connected, or it will read no more.</returns>
    /// <exception cref="OperationCanceledException"><paramref name="cancellation"/> was signalled; a part of the input may have
    /// been typed.</exception>
    public ValueTask<bool> TypeAsync(ReadOnlyMemory<byte> input, CancellationToken cancellation = default) =>
        Volatile.Read(ref _input) is { } connected ? connected(input, cancellation) : new ValueTask<bool>(false);

    /// <summary>Begins to look: the viewer reads what was printed before, then what is printed.</summary>
    /// <param name="historyBytes">How much of what was printed before it wants at most; 0 for none.</param>
    public ConsoleViewer Attach(int historyBytes = int.MaxValue)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(historyBytes);
        lock (Gate)
            return AttachAt(_history.End - historyBytes);
    }

    /// <summary>Begins to look at a place, or at the oldest byte that is kept.</summary>
    internal ConsoleViewer AttachAt(long position)
    {
        lock (Gate)
        {
            var viewer = new ConsoleViewer(this, Math.Max(_history.Start, position));
            _viewers.Add(viewer);
            return viewer;
        }
    }

    /// <summary>What is kept of the output, the oldest byte first.</summary>
    /// <param name="maximumBytes">If there is more than that, only the newest.</param>
    public byte[] ReadHistory(int maximumBytes = int.MaxValue)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(maximumBytes);
        lock (Gate)
        {
            long start = Math.Max(_history.Start, _history.End - maximumBytes);
            byte[] bytes = new byte[_history.End - start];
            _ = _history.CopyTo(start, bytes);
            return bytes;
        }
    }

    /// <inheritdoc/>
    public int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation)
    {
        // No more at a time than a reader who keeps up can always be given.
        bytes = bytes[..Math.Min(bytes.Length, _history.Capacity / 4)];
        lock (Gate)
        {
            if (IsHeld())
                WaitForReaders(cancellation);
            if (_completed)
                return 0;
            _history.Append(bytes);
            foreach (ConsoleViewer viewer in _viewers)
                viewer.Wake();
            return bytes.Length;
        }
    }

    /// <summary>Says that nothing will be printed any more, whichever guest: viewers come to their end when they have read all.</summary>
    /// <returns>Completes when the log has it all, and the pseudo-terminal is gone.</returns>
    public Task CompleteAsync()
    {
        lock (Gate)
        {
            _completed = true;
            Volatile.Write(ref _input, null);
            foreach (ConsoleViewer viewer in _viewers)
                viewer.Wake();
            Monitor.PulseAll(Gate);
        }

        if (Volatile.Read(ref _terminal) is not { } terminal)
            return _logging;
        terminal.End();
        return Task.WhenAll(_logging, terminal.Completion);
    }

    /// <summary>Ends the console: viewers come to their end at once, the log is closed when it has all, or after some seconds.</summary>
    public async ValueTask DisposeAsync()
    {
        try
        {
            await CompleteAsync().WaitAsync(LogPatience).ConfigureAwait(false);
        }
        catch (TimeoutException)
        {
            // A file system that hangs: the log goes without its last bytes.
        }
        ConsoleViewer[] viewers;
        lock (Gate)
            viewers = [.. _viewers];
        foreach (ConsoleViewer viewer in viewers)
            viewer.Dispose();

        // Not while its writer is stuck in it: that one closes it.
        if (_logging.IsCompleted)
            Log?.Dispose();
    }

    /// <summary>A viewer has read, or is gone. With the gate held.</summary>
    internal void Advanced() => Monitor.PulseAll(Gate);

    /// <summary>A viewer is gone. With the gate held.</summary>
    internal void Remove(ConsoleViewer viewer)
    {
        if (_viewers.Remove(viewer))
            Monitor.PulseAll(Gate);
    }

    private bool IsHeld()
    {
        foreach (ConsoleViewer viewer in _viewers)
        {
            if (Holds(viewer))
                return true;
        }
        return false;
    }

    private bool Holds(ConsoleViewer viewer) => !viewer.Stalled && _history.End - viewer.Position > _history.Capacity / 2;

    private void WaitForReaders(CancellationToken cancellation)
    {
        CancellationTokenRegistration registration = cancellation.UnsafeRegister(
            static gate =>
            {
                lock (gate!)
                    Monitor.PulseAll(gate);
            },
            Gate);
        try
        {
            long start = Stopwatch.GetTimestamp();
            while (IsHeld() && !_completed)
            {
                cancellation.ThrowIfCancellationRequested();
                TimeSpan left = _options.Patience - Stopwatch.GetElapsedTime(start);
                if (left <= TimeSpan.Zero)
                {
                    foreach (ConsoleViewer viewer in _viewers)
                        viewer.Stalled |= Holds(viewer);
                    return;
                }
                _ = Monitor.Wait(Gate, left);
            }
        }
        finally
        {
            // Disposing it would wait for the callback, which may be waiting for the gate that is held here.
            _ = registration.Unregister();
        }
    }

    private static async Task LogAsync(ConsoleLog log, ConsoleViewer viewer)
    {
        // Files block: never on the thread that made the hub.
        await Task.Yield();
        byte[] batch = new byte[LogBatch];
        int count;
        while ((count = await viewer.ReadAsync(batch).ConfigureAwait(false)) > 0)
            log.Write(batch.AsSpan(0, count));
        viewer.Dispose();
        log.Dispose();
    }
}
