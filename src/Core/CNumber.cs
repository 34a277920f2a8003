// Numbers as strtol reads them.

using System.Globalization;

namespace XenSharp.Core;

/// <summary>Reads numbers in C's notation: decimal, octal after 0, hexadecimal after 0x, with a sign or without.</summary>
public static class CNumber
{
    /// <summary>Reads a number.</summary>
    /// <param name="text">All of it, without white space.</param>
    /// <param name="number">The number; 0 where there is none.</param>
    /// <returns>False if the text is no number, or one that does not fit.</returns>
    public static bool TryParse(ReadOnlySpan<char> text, out long number)
    {
        number = 0;
        ReadOnlySpan<char> digits = text;
        bool negative = digits is ['-', ..];
        if (digits is ['-' or '+', ..])
            digits = digits[1..];
        if (digits is ['0', 'x' or 'X', .. var hexadecimal])
        {
            if (!ulong.TryParse(hexadecimal, NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out ulong value) || value > long.MaxValue)
                return false;
            number = negative ? -(long)value : (long)value;
            return true;
        }

        if (digits.Length > 1 && digits[0] == '0')
            return TryParseOctal(digits, negative, out number);
        if (!long.TryParse(digits, NumberStyles.None, CultureInfo.InvariantCulture, out number))
            return false;
        number = negative ? -number : number;
        return true;
    }

    private static bool TryParseOctal(ReadOnlySpan<char> digits, bool negative, out long number)
    {
        number = 0;
        foreach (char digit in digits)
        {
            if (digit is < '0' or > '7' || number > long.MaxValue >> 3)
                return false;
            number = (number << 3) | (uint)(digit - '0');
        }

        number = negative ? -number : number;
        return true;
    }
}
