using System.Diagnostics;
using System.Text;
using XenSharp.Devices.Console;

namespace XenSharp.Cli.Bench;

/// <summary>Keeps what a guest prints, and when each line that begins with '@' came.</summary>
internal sealed class MarkerSink : IConsoleSink
{
    private readonly Lock _lock = new();
    private readonly MemoryStream _all = new();
    private readonly StringBuilder _line = new();
    private readonly Dictionary<string, long> _times = [];

    /// <summary>Called on the console's thread with each marker as it comes.</summary>
    public Action<string>? Seen { get; init; }

    /// <summary>All bytes so far.</summary>
    public byte[] Bytes
    {
        get
        {
            lock (_lock)
                return _all.ToArray();
        }
    }

    /// <summary>Stopwatch ticks at which a marker came, the last time; null if it did not.</summary>
    public long? TimeOf(string marker)
    {
        lock (_lock)
            return _times.TryGetValue(marker, out long time) ? time : null;
    }

    public int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation)
    {
        long now = Stopwatch.GetTimestamp();
        lock (_lock)
        {
            _all.Write(bytes);
            foreach (byte value in bytes)
                Take((char)value, now);
        }

        return bytes.Length;
    }

    private void Take(char value, long now)
    {
        if (value != '\n')
        {
            _ = _line.Append(value);
            return;
        }

        string line = _line.ToString().TrimEnd('\r');
        _ = _line.Clear();
        if (!line.StartsWith('@'))
            return;
        _times[line] = now;
        Seen?.Invoke(line);
    }
}
