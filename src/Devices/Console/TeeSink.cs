// One console output into several places, such as a terminal and a log file.

namespace XenSharp.Devices.Console;

/// <summary>
/// Gives every sink the same bytes, each exactly once, in the order of the list; a closed sink is left out. The tee is
/// closed when all are.
/// </summary>
/// <remarks>
/// A sink is offered only what all sinks before it have taken. So with a terminal first and a log second, the log holds
/// what the terminal showed, and a terminal that waits makes the log wait too.
/// </remarks>
public sealed class TeeSink : IConsoleSink
{
    private readonly Branch[] _branches;

    /// <param name="sinks">At least one sink.</param>
    public TeeSink(params ReadOnlySpan<IConsoleSink> sinks)
    {
        if (sinks.IsEmpty)
            throw new ArgumentException("A tee needs at least one sink to write to.", nameof(sinks));
        _branches = new Branch[sinks.Length];
        for (int i = 0; i < sinks.Length; i++)
            _branches[i].Sink = sinks[i];
    }

    /// <inheritdoc/>
    public int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation)
    {
        // The bytes that all open sinks so far have taken: what the next is offered, and in the end what counts as taken.
        int taken = bytes.Length;
        bool anyOpen = false;
        foreach (ref Branch branch in _branches.AsSpan())
        {
            taken = branch.Write(bytes[..taken], cancellation);
            anyOpen |= !branch.Closed;
            if (taken == 0)
                break;
        }
        if (taken == 0)
            throw new OperationCanceledException(cancellation);

        foreach (ref Branch branch in _branches.AsSpan())
            branch.Ahead = Math.Max(0, branch.Ahead - taken);
        return anyOpen ? taken : 0;
    }

    private struct Branch
    {
        internal IConsoleSink Sink;
        internal bool Closed;

        /// <summary>How many bytes of the next call the sink has already, because another took fewer in an earlier one.</summary>
        internal int Ahead;

        /// <summary>Brings the sink to the end of <paramref name="bytes"/>.</summary>
        /// <returns>How far it got: less than asked for, possibly 0, only if it was cancelled. A closed sink "takes" all.</returns>
        internal int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation)
        {
            while (!Closed && Ahead < bytes.Length)
            {
                int count;
                try
                {
                    count = Sink.Write(bytes[Ahead..], cancellation);
                }
                catch (OperationCanceledException) when (cancellation.IsCancellationRequested)
                {
                    return Ahead;
                }
                Closed = count == 0;
                Ahead += count;
            }
            return bytes.Length;
        }
    }
}
