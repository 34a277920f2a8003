// Console output into any stream: a file, a memory stream, a network stream.

namespace XenSharp.Devices.Console;

/// <summary>Hands console output to a stream. The stream stays the caller's: it is neither flushed nor disposed here.</summary>
/// <param name="stream">A writable stream.</param>
public sealed class StreamSink(Stream stream) : IConsoleSink
{
    private volatile Exception? _failure;

    /// <summary>The error that closed the sink: the first write that the stream refused.</summary>
    public Exception? Failure => _failure;

    /// <inheritdoc/>
    public int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation)
    {
        if (_failure is not null)
            return 0;
        cancellation.ThrowIfCancellationRequested();
        try
        {
            stream.Write(bytes);
            return bytes.Length;
        }
        catch (Exception failure) when (failure is IOException or ObjectDisposedException or NotSupportedException)
        {
            _failure = failure;
            return 0;
        }
    }
}
