// The two byte streams between the store and one client, whatever carries them: a ring in a guest's page, a socket.
namespace XenSharp.Devices.Xenstore;

/// <summary>Why a connection was given up; the numbers are those of the ring's error field (io/xs_wire.h).</summary>
public enum XenstoreConnectionError : uint
{
    None = 0,

    /// <summary>XENSTORE_ERROR_COMM: the carrier failed.</summary>
    Communication = 1,

    /// <summary>XENSTORE_ERROR_RINGIDX: producer and consumer indexes contradict each other.</summary>
    RingIndex = 2,

    /// <summary>XENSTORE_ERROR_PROTO: a message announced a payload that is too long.</summary>
    Protocol = 3,
}

/// <summary>
/// A duplex byte stream that never blocks. One task at a time calls the members, except <see cref="WaitAsync"/>, which may be
/// pending meanwhile.
/// </summary>
public interface IXenstoreTransport
{
    /// <summary>Takes bytes that the client has sent.</summary>
    /// <param name="destination">Where they go; not empty.</param>
    /// <param name="count">Bytes taken, at most the length of <paramref name="destination"/>; 0 when there are none now.</param>
    /// <returns><see langword="false"/> when the stream is unusable, as its indexes contradict each other or it has ended.</returns>
    bool TryRead(Span<byte> destination, out int count);

    /// <summary>Gives bytes to the client.</summary>
    /// <param name="source">The bytes; not empty.</param>
    /// <param name="count">Bytes accepted; 0 when there is no room now.</param>
    /// <returns><see langword="false"/> when the stream is unusable.</returns>
    bool TryWrite(ReadOnlySpan<byte> source, out int count);

    /// <summary>Makes the client see what was read and written since the last call, before the service loop waits.</summary>
    void Flush();

    /// <summary>
    /// Completes when there may be something to read, room to write, or a reset requested, since the last completed call.
    /// </summary>
    /// <returns><see langword="false"/> when nothing will ever come again.</returns>
    /// <exception cref="OperationCanceledException"><paramref name="cancellation"/> was signalled.</exception>
    ValueTask<bool> WaitAsync(CancellationToken cancellation);

    /// <summary>Whether the client asks to start over (connection field of the ring); always false for carriers without that.</summary>
    bool ResetRequested { get; }

    /// <summary>Empties both directions and clears the error; tells the client if it had asked for it.</summary>
    void Reset();

    /// <summary>Tells the client, if the carrier can, why it is no longer served.</summary>
    void Fail(XenstoreConnectionError error);
}
