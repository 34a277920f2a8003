// What a guest prints by the console_io hypercall: lines of the manager's log, as Xen prints them, "(d3) …".

using System.Text;
using XenSharp.Devices.Console;

namespace XenSharp.Toolstack.Management;

/// <summary>Makes lines of a guest's output, not more than so many in a while, as guests_loglvl's rate limit does.</summary>
/// <param name="log">Where they go.</param>
/// <param name="domain">The domain's number; asked when there is a line.</param>
internal sealed class GuestLogSink(ManagerLog log, Func<int> domain) : IConsoleSink
{
    private const int LongestLine = 256;
    private const int LinesPerPeriod = 200;
    private static readonly TimeSpan s_period = TimeSpan.FromSeconds(5);

    private readonly StringBuilder _line = new();
    private long _periodStart = long.MinValue;
    private int _lines;

    /// <inheritdoc/>
    /// <remarks>Called by one thread at a time, and takes everything.</remarks>
    public int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation)
    {
        foreach (byte value in bytes)
        {
            if (value == (byte)'\n' || _line.Length == LongestLine)
                Flush();
            if (value is >= 0x20 and < 0x7f or (byte)'\t')
                _ = _line.Append((char)value);
        }

        return bytes.Length;
    }

    private void Flush()
    {
        long now = Environment.TickCount64;
        if (_periodStart == long.MinValue || now - _periodStart >= (long)s_period.TotalMilliseconds)
            (_periodStart, _lines) = (now, 0);
        if (++_lines <= LinesPerPeriod)
            log.Add($"(d{domain()}) {_line}");
        else if (_lines == LinesPerPeriod + 1)
            log.Add($"(d{domain()}) more is not shown for {s_period.TotalSeconds:0} seconds");
        _ = _line.Clear();
    }
}
