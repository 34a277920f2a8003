// How much a network interface may send: a credit that is renewed at intervals.

using System.Diagnostics.CodeAnalysis;
using System.Globalization;

namespace XenSharp.Configuration.Devices;

/// <summary>A limit in the terms of Xen's netback (xenstore's rate): so many bytes in each interval.</summary>
/// <param name="BytesPerInterval">The credit that each interval renews, in bytes.</param>
/// <param name="IntervalMicroseconds">The interval in microseconds.</param>
public sealed record VifRate(long BytesPerInterval, int IntervalMicroseconds)
{
    /// <summary>libxlu's: 50 ms.</summary>
    public const int DefaultIntervalMicroseconds = 50_000;

    /// <summary>Parses xl's notation: 10Mb/s, 250KB/s, 1MB/s@20ms.</summary>
    /// <param name="text">RATE[@INTERVAL]: bits (b) or bytes (B) a second with G, M or K for powers of 1000; the interval in s, ms or us.</param>
    /// <param name="rate">The limit.</param>
    /// <returns>Whether the text is one, and the credit of an interval one byte at least.</returns>
    public static bool TryParse(string text, [NotNullWhen(true)] out VifRate? rate)
    {
        ArgumentNullException.ThrowIfNull(text);
        rate = null;
        int at = text.IndexOf('@');
        string amount = at < 0 ? text : text[..at];
        long interval = DefaultIntervalMicroseconds;
        if (!TryParseAmount(amount, out ulong perSecond) || (at >= 0 && !TryParseInterval(text.AsSpan(at + 1), out interval)))
            return false;
        UInt128 credit = (UInt128)perSecond * (ulong)interval / 1_000_000;
        if (credit == 0 || credit > long.MaxValue)
            return false;
        rate = new VifRate((long)credit, (int)interval);
        return true;
    }

    /// <summary>The limit in xl's notation, exact to a byte an interval.</summary>
    public override string ToString()
        => string.Create(CultureInfo.InvariantCulture, $"{DividedUp((UInt128)BytesPerInterval * 1_000_000, (UInt128)IntervalMicroseconds)}B/s@{IntervalMicroseconds}us");

    private static UInt128 DividedUp(UInt128 dividend, UInt128 divisor) => (dividend + divisor - 1) / divisor;

    private static bool TryParseAmount(ReadOnlySpan<char> text, out ulong bytesPerSecond)
    {
        bytesPerSecond = 0;
        if (!text.EndsWith("/s", StringComparison.Ordinal) || text.Length < 4 || text[^3] is not ('b' or 'B'))
            return false;
        bool bits = text[^3] == 'b';
        ulong factor = text[^4] switch { 'G' => 1_000_000_000, 'M' => 1_000_000, 'K' => 1_000, _ => 1 };
        if (!uint.TryParse(text[..(factor == 1 ? ^3 : ^4)], NumberStyles.None, CultureInfo.InvariantCulture, out uint number))
            return false;
        bytesPerSecond = number * factor / (bits ? 8u : 1u);
        return true;
    }

    private static bool TryParseInterval(ReadOnlySpan<char> text, out long microseconds)
    {
        microseconds = 0;
        int digits = text.IndexOfAnyExceptInRange('0', '9');
        digits = digits < 0 ? text.Length : digits;
        long factor = text[digits..] switch { "us" or "u" => 1, "ms" or "m" => 1_000, "s" or "" => 1_000_000, _ => 0 };
        if (factor == 0 || !uint.TryParse(text[..digits], NumberStyles.None, CultureInfo.InvariantCulture, out uint number))
            return false;
        microseconds = number * factor;
        return microseconds is > 0 and <= int.MaxValue;
    }
}
