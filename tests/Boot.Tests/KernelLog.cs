// What a guest's console shows, looked at.

using System.Text.RegularExpressions;

namespace XenSharp.Boot.Tests;

/// <summary>Linux's log on a console.</summary>
internal static partial class KernelLog
{
    /// <summary>What in a kernel's log says that something went wrong in it; not what it says of the processor's vulnerabilities.</summary>
    [GeneratedRegex("WARNING(?!: See .*hw-vuln)|BUG|Call Trace|Oops|general protection|nable to handle")]
    internal static partial Regex Trouble { get; }

    /// <summary>What the guest printed between two lines.</summary>
    internal static string Section(string output, string from, string to)
    {
        int start = output.LastIndexOf(from + "\r\n", StringComparison.Ordinal);
        int end = output.LastIndexOf(to + "\r\n", StringComparison.Ordinal);
        Assert.That(start >= 0 && end > start, $"no section {from}: {output}");
        return output[start..end];
    }

    /// <summary>The lines with <see cref="Trouble"/> in them.</summary>
    internal static IEnumerable<string> TroubleIn(string log) => log.Split('\n').Where(static line => Trouble.IsMatch(line));
}
