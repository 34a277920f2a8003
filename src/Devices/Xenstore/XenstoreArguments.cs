// Takes the payload of a request apart: strings closed by NUL, numbers in decimal.
using System.Text;

namespace XenSharp.Devices.Xenstore;

/// <summary>
/// The payload of a request. Strings are decoded one character for each byte, so that tokens may hold any bytes but NUL and
/// come back as they were.
/// </summary>
internal readonly ref struct XenstoreArguments(ReadOnlySpan<byte> payload)
{
    private readonly ReadOnlySpan<byte> _payload = payload;

    /// <summary>How many strings with a closing NUL there are; what follows the last NUL is not counted.</summary>
    public int Count => _payload.Count((byte)0);

    /// <summary>The only string of a payload that is exactly one string, or <see langword="null"/> for any other payload.</summary>
    public string? Single => _payload.IndexOf((byte)0) == _payload.Length - 1 && _payload.Length > 0 ? Text(0) : null;

    /// <summary>The string of that number, which must be below <see cref="Count"/>.</summary>
    public string Text(int index)
    {
        ReadOnlySpan<byte> rest = After(index);
        return Encoding.Latin1.GetString(rest[..rest.IndexOf((byte)0)]);
    }

    /// <summary>What follows that many strings, NULs included.</summary>
    public ReadOnlySpan<byte> After(int count)
    {
        ReadOnlySpan<byte> rest = _payload;
        for (; count > 0; count--)
            rest = rest[(rest.IndexOf((byte)0) + 1)..];
        return rest;
    }

    /// <summary>
    /// A decimal number as C's atoi reads it, since clients rely on it: blanks and a sign in front are allowed, anything
    /// behind is ignored, no number is 0. Values beyond 32 bits saturate.
    /// </summary>
    public static int Number(string text)
    {
        ReadOnlySpan<char> rest = text.AsSpan().TrimStart(" \t\n\v\f\r");
        bool negative = rest.StartsWith('-');
        if (negative || rest.StartsWith('+'))
            rest = rest[1..];
        long value = 0;
        foreach (char digit in rest)
        {
            if (!char.IsAsciiDigit(digit))
                break;
            value = Math.Min((value * 10) + (digit - '0'), uint.MaxValue);
        }
        return (int)Math.Clamp(negative ? -value : value, int.MinValue, int.MaxValue);
    }
}
