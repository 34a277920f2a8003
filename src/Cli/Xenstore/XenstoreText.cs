// Values as text for people, in the form of Xen's tools: printable ASCII as it is, backslash and the rest as escapes.

using System.Globalization;
using System.Text;

namespace XenSharp.Cli.Xenstore;

/// <summary>Escapes values, and takes escapes for values.</summary>
internal static class XenstoreText
{
    /// <summary>The value in one line: \t, \n, \r and \\; bytes below 8 as \OOO, others that do not print as \xHH.</summary>
    internal static string Escape(ReadOnlySpan<byte> value)
    {
        StringBuilder text = new(value.Length);
        foreach (byte character in value)
        {
            _ = character switch
            {
                (byte)'\t' => text.Append("\\t"),
                (byte)'\n' => text.Append("\\n"),
                (byte)'\r' => text.Append("\\r"),
                (byte)'\\' => text.Append("\\\\"),
                >= (byte)' ' and <= (byte)'~' => text.Append((char)character),
                < 8 => text.Append(CultureInfo.InvariantCulture, $"\\00{character}"),
                _ => text.Append(CultureInfo.InvariantCulture, $"\\x{character:x2}"),
            };
        }
        return text.ToString();
    }

    /// <summary>The bytes that are meant: UTF-8, with escapes if wanted.</summary>
    /// <remarks>A number is as long as its digits go, two at most in \xHH and three in \OOO. A backslash before anything else stands
    /// for nothing, and at the end for itself.</remarks>
    internal static byte[] Value(string text, bool unescape)
    {
        byte[] bytes = Encoding.UTF8.GetBytes(text);
        if (!unescape || !bytes.AsSpan().Contains((byte)'\\'))
            return bytes;
        List<byte> value = new(bytes.Length);
        for (int index = 0; index < bytes.Length; index++)
        {
            if (bytes[index] != '\\' || index + 1 == bytes.Length)
            {
                value.Add(bytes[index]);
                continue;
            }
            byte escape = bytes[++index];
            switch (escape)
            {
                case (byte)'t': value.Add((byte)'\t'); break;
                case (byte)'n': value.Add((byte)'\n'); break;
                case (byte)'r': value.Add((byte)'\r'); break;
                case (byte)'x' when Digits(bytes, index + 1, 16, 2) is { Length: > 0 } hexadecimal:
                    value.Add(hexadecimal.Value);
                    index += hexadecimal.Length;
                    break;
                case >= (byte)'0' and <= (byte)'7':
                    (int length, byte octal) = Digits(bytes, index, 8, 3);
                    value.Add(octal);
                    index += length - 1;
                    break;
                default: value.Add(escape); break;
            }
        }
        return [.. value];
    }

    private static (int Length, byte Value) Digits(ReadOnlySpan<byte> bytes, int start, int numberBase, int most)
    {
        int length = 0;
        int value = 0;
        while (length < most && start + length < bytes.Length)
        {
            char digit = (char)bytes[start + length];
            if (!char.IsAsciiHexDigit(digit) || Convert.ToInt32(digit.ToString(), 16) is var number && number >= numberBase)
                break;
            value = (value * numberBase) + number;
            length++;
        }
        return (length, (byte)value);
    }
}
