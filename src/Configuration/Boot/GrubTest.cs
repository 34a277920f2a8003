// [ … ] of GRUB's scripts.

using System.Globalization;
using XenSharp.Configuration.Boot.Ext;

namespace XenSharp.Configuration.Boot;

/// <summary>Decides conditions: strings, numbers, files, !, -a and -o.</summary>
internal static class GrubTest
{
    /// <param name="words">The condition's words, without brackets.</param>
    /// <param name="files">Where files are looked for.</param>
    internal static bool Evaluate(ReadOnlySpan<string> words, ExtFileSystem files)
    {
        bool any = false;
        bool all = true;
        int start = 0;
        for (int at = 0; at <= words.Length; at++)
        {
            bool end = at == words.Length;
            if (!end && words[at] is not ("-a" or "-o"))
                continue;
            all &= Single(words[start..at], files);
            start = at + 1;
            if (end || words[at] == "-o")
            {
                any |= all;
                all = true;
            }
        }

        return any;
    }

    private static bool Single(ReadOnlySpan<string> words, ExtFileSystem files)
    {
        bool expected = true;
        while (words is ["!", ..])
        {
            expected = !expected;
            words = words[1..];
        }

        return expected == words switch
        {
            [] => false,
            [var text] => text.Length > 0,
            ["-z", var text] => text.Length == 0,
            ["-n", var text] => text.Length > 0,
            ["-f" or "-e", var path] => files.Exists(PathOf(path)),
            ["-s", var path] => files.FileSize(PathOf(path)) > 0,
            ["-d", var path] => files.Exists(PathOf(path)) && !files.FileExists(PathOf(path)),
            [var left, "=" or "==", var right] => left == right,
            [var left, "!=", var right] => left != right,
            [var left, "<", var right] => string.CompareOrdinal(left, right) < 0,
            [var left, ">", var right] => string.CompareOrdinal(left, right) > 0,
            [var left, ['-', .. var comparison], var right] => Compare(left, comparison, right),
            _ => false,
        };
    }

    /// <summary>A path without the device before it.</summary>
    private static string PathOf(string path) => path.StartsWith('(') && path.IndexOf(')') is > 0 and var end ? path[(end + 1)..] : path;

    private static bool Compare(string left, string comparison, string right)
    {
        if (!long.TryParse(left, NumberStyles.AllowLeadingSign, CultureInfo.InvariantCulture, out long first)
            || !long.TryParse(right, NumberStyles.AllowLeadingSign, CultureInfo.InvariantCulture, out long second))
        {
            return false;
        }

        return comparison switch
        {
            "eq" => first == second,
            "ne" => first != second,
            "lt" => first < second,
            "le" => first <= second,
            "gt" => first > second,
            "ge" => first >= second,
            _ => false,
        };
    }
}
