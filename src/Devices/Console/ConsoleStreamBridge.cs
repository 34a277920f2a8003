// Lets the other end of a stream be a viewer of a console: a socket, a pseudo-terminal.

namespace XenSharp.Devices.Console;

/// <summary>Copies between a console and a duplex stream.</summary>
public static class ConsoleStreamBridge
{
    // Input comes from fingers or from a paste.
    private const int InputBatch = 1024;

    private const int OutputBatch = 16 * 1024;

    /// <summary>
    /// Shows the console on the stream and types what comes from it, until the stream ends, the console does, or cancellation.
    /// </summary>
    /// <param name="hub">The console.</param>
    /// <param name="stream">Readable and writable at the same time; stays the caller's.</param>
    /// <param name="historyBytes">How much of what was printed before is shown at most.</param>
    /// <param name="cancellation">Ends it.</param>
    /// <returns>Completes when the stream is no longer used. An error of the stream ends it like its end does.</returns>
    /// <exception cref="OperationCanceledException"><paramref name="cancellation"/> was signalled.</exception>
    public static async Task RunAsync(ConsoleHub hub, Stream stream, int historyBytes, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(hub);
        ArgumentNullException.ThrowIfNull(stream);
        using ConsoleViewer viewer = hub.Attach(historyBytes);
        using var stop = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        Task output = ShowAsync(viewer, stream, stop.Token);
        Task input = TypeAsync(viewer, stream, stop.Token);
        _ = await Task.WhenAny(output, input).ConfigureAwait(false);
        await stop.CancelAsync().ConfigureAwait(false);
        await Task.WhenAll(output, input).ConfigureAwait(false);
        cancellation.ThrowIfCancellationRequested();
    }

    private static async Task ShowAsync(ConsoleViewer viewer, Stream stream, CancellationToken cancellation)
    {
        byte[] batch = new byte[OutputBatch];
        try
        {
            int count;
            while ((count = await viewer.ReadAsync(batch, cancellation).ConfigureAwait(false)) > 0)
            {
                await stream.WriteAsync(batch.AsMemory(0, count), cancellation).ConfigureAwait(false);
                await stream.FlushAsync(cancellation).ConfigureAwait(false);
            }
        }
        catch (Exception end) when (IsEnd(end))
        {
        }
    }

    private static async Task TypeAsync(ConsoleViewer viewer, Stream stream, CancellationToken cancellation)
    {
        byte[] batch = new byte[InputBatch];
        try
        {
            int count;
            while ((count = await stream.ReadAsync(batch, cancellation).ConfigureAwait(false)) > 0)
            {
                // What is typed to a guest that reads no more is dropped, as by a terminal without a program: its output may go on.
                _ = await viewer.TypeAsync(batch.AsMemory(0, count), cancellation).ConfigureAwait(false);
            }
        }
        catch (Exception end) when (IsEnd(end))
        {
        }
    }

    private static bool IsEnd(Exception exception) => exception is IOException or ObjectDisposedException or OperationCanceledException;
}
