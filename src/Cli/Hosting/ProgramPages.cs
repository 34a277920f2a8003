// The pages of the program's own file: most of those that starting it reads are of no use afterwards.

using System.Globalization;
using Tmds.Linux;

namespace XenSharp.Cli.Hosting;

/// <summary>Gives back what was mapped of the program's file while it started.</summary>
/// <remarks>
/// A native program of .NET's unpacks its tables once, out of megabytes of its file, and the kernel maps sixteen pages where one is touched.
/// Those pages count as this process's own for as long as it runs, and for a daemon that is long. Given back, they stay in the host's page
/// cache while there is room, and what is used comes back from there at its next use, for the price of a minor fault.
/// </remarks>
internal static unsafe class ProgramPages
{
    /// <summary>Has the kernel unmap the pages. To be called when the program has started what it is to do for long.</summary>
    internal static void GiveBack()
    {
        if (Environment.ProcessPath is not { } program)
            return;
        try
        {
            foreach ((ulong start, ulong end) in Find(File.ReadAllLines("/proc/self/smaps"), program))
            {
                // That it fails is of no consequence: they stay, then.
                _ = LibC.madvise((void*)start, (size_t)(nuint)(end - start), LibC.MADV_DONTNEED);
            }
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            // A /proc that hides things: they stay as well.
        }
    }

    /// <summary>
    /// The program's mappings that are as its file is: not to be written, and with no page of their own in them, such as relocations leave
    /// behind, which would be lost.
    /// </summary>
    /// <param name="smaps">The lines of /proc/pid/smaps (proc(5)).</param>
    /// <param name="program">The program's file.</param>
    internal static IReadOnlyList<(ulong Start, ulong End)> Find(IEnumerable<string> smaps, string program)
    {
        var found = new List<(ulong, ulong)>();
        (ulong Start, ulong End)? mapping = null;
        foreach (string line in smaps)
        {
            // "55d828af8000-55d828b24000 r--p 00000000 fe:00 393288     /usr/bin/xensharp", and below it "Anonymous:             0 kB".
            if (line.Length > 0 && char.IsAsciiHexDigitLower(line[0]))
            {
                string[] fields = line.Split(' ', 6, StringSplitOptions.RemoveEmptyEntries);
                string[] ends = fields[0].Split('-');
                mapping = fields is [_, ['r', '-', _, 'p'], _, _, _, { } path] && path.Trim() == program
                    && ulong.TryParse(ends[0], NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out ulong start)
                    && ulong.TryParse(ends[^1], NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out ulong end)
                    ? (start, end) : null;
            }
            else if (mapping is { } candidate && line.StartsWith("Anonymous:", StringComparison.Ordinal))
            {
                if (line.AsSpan("Anonymous:".Length).Trim() is "0 kB")
                    found.Add(candidate);
                mapping = null;
            }
        }

        return found;
    }
}
