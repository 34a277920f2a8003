// Text out of a kernel file made fit for a message or a terminal.

using System.Text;

namespace XenSharp.Domains.Builder;

/// <summary>Makes text that came out of a file safe to print: control and non-ASCII characters are masked, length is bounded.</summary>
internal static class Printable
{
    private const int Longest = 64;

    public static string Of(ReadOnlySpan<char> text)
    {
        StringBuilder result = new();
        foreach (char character in text.Length > Longest ? text[..Longest] : text)
            result.Append(character is >= ' ' and <= '~' ? character : '?');
        if (text.Length > Longest)
            result.Append("...");
        return result.ToString();
    }

    /// <summary>Bytes in a unit that people read: whole bytes when few, else MiB with one decimal.</summary>
    public static string Size(ulong bytes) => bytes < 1 << 20 ? $"{bytes} bytes" : $"{bytes / (double)(1 << 20):F1} MiB";
}
