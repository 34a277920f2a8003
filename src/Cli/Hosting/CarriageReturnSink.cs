// Plain text on a terminal in raw mode, which does not return the carriage by itself.

using XenSharp.Devices.Console;

namespace XenSharp.Cli.Hosting;

/// <summary>Puts a carriage return before each newline.</summary>
/// <param name="inner">Where the text goes; stays the caller's.</param>
internal sealed class CarriageReturnSink(IConsoleSink inner) : IConsoleSink
{
    private bool _returned;

    /// <inheritdoc/>
    public int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation)
    {
        int newline = bytes.IndexOf((byte)'\n');
        if (newline == 0 && !_returned)
        {
            if (inner.Write("\r"u8, cancellation) == 0)
                return 0;
            _returned = true;
        }

        // Up to the next newline, or one that has its carriage return.
        ReadOnlySpan<byte> piece = newline < 0 ? bytes : bytes[..Math.Max(newline, 1)];
        int taken = inner.Write(piece, cancellation);
        if (taken > 0)
            _returned = false;
        return taken;
    }
}
