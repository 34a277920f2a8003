// Standard output of the xenstore commands: bytes, as values are, held back until they are known to be right.

using System.Buffers;
using System.Text;
using System.Text.Encodings.Web;
using System.Text.Json;
using XenSharp.Cli.Commands;

namespace XenSharp.Cli.Xenstore;

/// <summary>Collects output and writes it when it is flushed.</summary>
internal sealed class XenstoreOutput : IDisposable
{
    private static readonly JsonWriterOptions Json = new() { Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping };

    private readonly StandardOutput _standard = new();
    private readonly ArrayBufferWriter<byte> _pending = new();

    /// <summary>Whether a failure means no more than that the reader has gone away.</summary>
    internal bool ReaderGone => _standard.ReaderGone;

    internal void Write(ReadOnlySpan<byte> bytes) => _pending.Write(bytes);

    internal void Write(string text) => Encoding.UTF8.GetBytes(text, _pending);

    internal void WriteLine(string text)
    {
        Write(text);
        Write("\n"u8);
    }

    /// <summary>Writes a line of JSON.</summary>
    internal void WriteJson(Action<Utf8JsonWriter> write)
    {
        using (Utf8JsonWriter writer = new(_pending, Json))
            write(writer);
        Write("\n"u8);
    }

    /// <summary>Forgets what was not flushed.</summary>
    internal void Discard() => _pending.ResetWrittenCount();

    /// <exception cref="IOException">Not all could be written.</exception>
    internal void Flush()
    {
        _standard.Write(_pending.WrittenSpan);
        Discard();
    }

    public void Dispose() => _standard.Dispose();
}
