// Standard output for what may be long: says when nobody reads it any more.

using XenSharp.Devices.Console;

namespace XenSharp.Cli.Commands;

/// <summary>
/// A stream to standard output. .NET's own drops what it writes into a pipe without a reader, and a <see cref="FileStream"/>
/// keeps a position of its own, not the one that a file shares with the shell.
/// </summary>
internal sealed class StandardOutput : Stream
{
    private const int Descriptor = 1;

    private readonly FileDescriptorSink _sink = new(Descriptor);

    public override bool CanRead => false;

    public override bool CanSeek => false;

    public override bool CanWrite => true;

    public override long Length => throw new NotSupportedException();

    public override long Position
    {
        get => throw new NotSupportedException();
        set => throw new NotSupportedException();
    }

    /// <summary>Whether a failure of <see cref="Write(ReadOnlySpan{byte})"/> means no more than that the reader has gone away.</summary>
    public bool ReaderGone => _sink.Closed is { IsCompletedSuccessfully: true, Result.ReaderGone: true };

    /// <exception cref="IOException">Not all could be written.</exception>
    public override void Write(ReadOnlySpan<byte> buffer)
    {
        while (!buffer.IsEmpty)
        {
            int count = _sink.Write(buffer, CancellationToken.None);
            if (count == 0)
                throw new IOException($"Standard output cannot be written ({_sink.Closed.Result.Message}); send it where there is room for it.");
            buffer = buffer[count..];
        }
    }

    public override void Write(byte[] buffer, int offset, int count) => Write(buffer.AsSpan(offset, count));

    public override void Flush()
    {
    }

    public override int Read(byte[] buffer, int offset, int count) => throw new NotSupportedException();

    public override long Seek(long offset, SeekOrigin origin) => throw new NotSupportedException();

    public override void SetLength(long value) => throw new NotSupportedException();

    protected override void Dispose(bool disposing)
    {
        if (disposing)
            _sink.Dispose();
        base.Dispose(disposing);
    }
}
