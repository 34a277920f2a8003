// What a console backend needs of the place a guest's output goes to.

namespace XenSharp.Devices.Console;

/// <summary>
/// A place that a guest's console output goes to. A sink that blocks holds the guest back: it sees its ring full.
/// </summary>
/// <remarks>The backend calls <see cref="Write"/> from one thread of its own, never two calls at a time.</remarks>
public interface IConsoleSink
{
    /// <summary>Takes some of the bytes, blocking until at least one is taken.</summary>
    /// <param name="bytes">At least one byte. If fewer are taken than given, the next call begins with the first that was
    /// not taken.</param>
    /// <param name="cancellation">Ends a call that waits; no byte of a call that throws counts as taken.</param>
    /// <returns>How many bytes were taken, from 1 to the length of <paramref name="bytes"/>; 0 if the sink is closed for
    /// good and takes no more. An error of the place itself closes the sink; it is not thrown.</returns>
    /// <exception cref="OperationCanceledException"><paramref name="cancellation"/> was signalled before a byte was taken.</exception>
    int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation);
}
