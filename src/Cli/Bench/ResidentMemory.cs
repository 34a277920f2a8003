using System.Globalization;

namespace XenSharp.Cli.Bench;

/// <summary>What this process keeps in memory beside the RAM of its guests (proc(5), /proc/pid/smaps).</summary>
internal static class ResidentMemory
{
    private const string GuestRam = "memfd:xensharp-ram";

    /// <summary>Resident bytes of all mappings that are not a guest's RAM.</summary>
    public static long BesideGuests()
    {
        long total = 0;
        bool counts = false;
        foreach (string line in File.ReadLines("/proc/self/smaps"))
        {
            // A mapping begins with its address range in lower-case hexadecimal; its fields with a capital.
            if (char.IsAsciiHexDigitLower(line[0]))
                counts = !line.Contains(GuestRam, StringComparison.Ordinal);
            else if (counts && line.StartsWith("Rss:", StringComparison.Ordinal))
                total += long.Parse(line.AsSpan(4).Trim()[..^3], CultureInfo.InvariantCulture) * 1024;
        }

        return total;
    }
}
