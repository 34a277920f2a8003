// Requests as a line for people, when XS_CONTROL has switched that on.
using System.Globalization;
using System.Text;

namespace XenSharp.Devices.Xenstore;

/// <summary>Makes log lines of what clients say, whatever bytes that has.</summary>
internal static class XenstoreRequestLog
{
    private const int LongestPayload = 256;

    /// <summary>Who asked for what, and what became of it.</summary>
    public static string Describe(XenstoreSession session, XenstoreHeader header, ReadOnlySpan<byte> payload, XenstoreError error)
    {
        string cut = payload.Length > LongestPayload ? "..." : "";
        string text = Printable(Encoding.Latin1.GetString(payload[..Math.Min(payload.Length, LongestPayload)]));
        string transaction = header.TransactionId == 0
            ? ""
            : string.Create(CultureInfo.InvariantCulture, $" in transaction {header.TransactionId}");
        string answer = error == XenstoreError.None ? "OK" : error.ToString();
        return string.Create(CultureInfo.InvariantCulture,
            $"domain {session.Domain.Id}, client {session.Sequence}: {header.Type}{transaction} \"{text}{cut}\": {answer}");
    }

    /// <summary>The text with "|" for each NUL, and "?" for what else does not print.</summary>
    public static string Printable(string text) => string.Create(text.Length, text, static (line, from) =>
    {
        for (int index = 0; index < line.Length; index++)
        {
            char character = from[index];
            line[index] = character == 0 ? '|' : character is >= ' ' and <= '~' ? character : '?';
        }
    });
}
