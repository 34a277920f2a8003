// Somebody who looks at a console: a position in what it has printed.

using System.Globalization;
using System.Text;
using System.Threading.Channels;

namespace XenSharp.Devices.Console;

/// <summary>One viewer of a <see cref="ConsoleHub"/>, attached until it is disposed.</summary>
public sealed class ConsoleViewer : IDisposable
{
    private readonly ConsoleHub _hub;

    /// <summary>Holds at most one token: there may be something to read. Completed at the end.</summary>
    private readonly Channel<bool> _wake =
        Channel.CreateBounded<bool>(new BoundedChannelOptions(1) { FullMode = BoundedChannelFullMode.DropWrite });

    private ReadOnlyMemory<byte> _note;
    private int _reading;
    private bool _disposed;

    internal ConsoleViewer(ConsoleHub hub, long position)
    {
        _hub = hub;
        Position = position;
    }

    /// <summary>Bytes that were printed while this viewer was too far behind, and that it did not get.</summary>
    public long Skipped { get; private set; }

    /// <summary>Up to where it has read.</summary>
    internal long Shown
    {
        get
        {
            lock (_hub.Gate)
                return Position;
        }
    }

    /// <summary>What it reads next. With the hub's gate held.</summary>
    internal long Position { get; private set; }

    /// <summary>Whether the guest is not to wait for it. With the hub's gate held.</summary>
    internal bool Stalled { get; set; }

    /// <summary>
    /// Reads what was printed, waiting until there is something. Where bytes had to be skipped, a line in brackets says so.
    /// </summary>
    /// <param name="destination">At least one byte.</param>
    /// <param name="cancellation">Ends the wait; nothing is lost by that.</param>
    /// <returns>The number of bytes; 0 if there will be no more, or the viewer was disposed.</returns>
    /// <exception cref="InvalidOperationException">Another call is under way.</exception>
    /// <exception cref="OperationCanceledException"><paramref name="cancellation"/> was signalled.</exception>
    public async ValueTask<int> ReadAsync(Memory<byte> destination, CancellationToken cancellation = default)
    {
        ArgumentOutOfRangeException.ThrowIfZero(destination.Length);
        if (Interlocked.Exchange(ref _reading, 1) != 0)
            throw new InvalidOperationException("A console viewer is read by one at a time; attach another viewer.");
        try
        {
            while (true)
            {
                cancellation.ThrowIfCancellationRequested();
                if (TryRead(destination.Span, out int count))
                    return count;
                if (await _wake.Reader.WaitToReadAsync(cancellation).ConfigureAwait(false))
                    _ = _wake.Reader.TryRead(out _);
            }
        }
        finally
        {
            Volatile.Write(ref _reading, 0);
        }
    }

    /// <summary>Types to the guest; see <see cref="ConsoleHub.TypeAsync"/>.</summary>
    public ValueTask<bool> TypeAsync(ReadOnlyMemory<byte> input, CancellationToken cancellation = default) =>
        _hub.TypeAsync(input, cancellation);

    /// <summary>Looks no longer. A read that is under way ends.</summary>
    public void Dispose()
    {
        lock (_hub.Gate)
        {
            _disposed = true;
            _hub.Remove(this);
        }
        _ = _wake.Writer.TryComplete();
    }

    /// <summary>There may be something to read.</summary>
    internal void Wake() => _ = _wake.Writer.TryWrite(true);

    // False: there is nothing yet.
    private bool TryRead(Span<byte> destination, out int count)
    {
        count = 0;
        lock (_hub.Gate)
        {
            if (_disposed)
                return true;
            ConsoleHistory history = _hub.History;
            if (_note.IsEmpty && Position < history.Start)
            {
                long missed = history.Start - Position;
                Skipped += missed;
                Position = history.Start;
                _note = Encoding.ASCII.GetBytes(string.Create(CultureInfo.InvariantCulture,
                    $"\r\n[xensharp: {missed} bytes of console output were skipped]\r\n"));
            }
            if (!_note.IsEmpty)
            {
                count = Math.Min(_note.Length, destination.Length);
                _note.Span[..count].CopyTo(destination);
                _note = _note[count..];
                return true;
            }
            count = history.CopyTo(Position, destination);
            Position += count;
            if (Position == history.End)
                Stalled = false;
            if (count > 0)
                _hub.Advanced();
            return count > 0 || _hub.Completed;
        }
    }
}
