// What the command wants to know of the machine beside its KVM.

using System.Globalization;
using XenSharp.Configuration;

namespace XenSharp.Toolstack;

/// <summary>Facts about this machine from proc(5).</summary>
public static class HostMachine
{
    /// <summary>The machine's memory in MiB.</summary>
    /// <exception cref="IOException">/proc is not mounted, or not Linux's.</exception>
    public static int MemoryMiB => ReadMemory("MemTotal:");

    /// <summary>What <c>uname -r</c> says.</summary>
    public static string KernelRelease => File.ReadAllText("/proc/sys/kernel/osrelease").Trim();

    /// <summary>Memory in MiB that programs can be given without others being swapped out.</summary>
    /// <exception cref="IOException">/proc is not mounted, or not Linux's.</exception>
    public static int AvailableMemoryMiB => ReadMemory("MemAvailable:");

    /// <summary>The processor that a thread of this process is on, or was last (proc(5), stat's field 39).</summary>
    /// <param name="thread">Linux's number of the thread.</param>
    /// <returns>Null where there is no such thread.</returns>
    public static int? ProcessorOf(int thread)
    {
        const int FieldBehindName = 36;
        if (thread == 0)
            return null;
        try
        {
            // The name is in parentheses, and may have spaces and parentheses in it.
            string text = File.ReadAllText(string.Create(CultureInfo.InvariantCulture, $"/proc/self/task/{thread}/stat"));
            string[] fields = text[(text.LastIndexOf(')') + 2)..].Split(' ');
            return fields.Length > FieldBehindName && int.TryParse(fields[FieldBehindName], NumberStyles.None, CultureInfo.InvariantCulture, out int processor)
                ? processor : null;
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }

    /// <summary>Numbers of the processors that are online.</summary>
    /// <exception cref="IOException">/sys is not mounted.</exception>
    public static IReadOnlyList<int> OnlineProcessors => ProcessorSet.ParseList(File.ReadAllText("/sys/devices/system/cpu/online"));

    /// <summary>Numbers of the processors of a NUMA node.</summary>
    /// <param name="node">The node's number.</param>
    /// <returns>Null where there is no such node.</returns>
    public static IReadOnlyList<int>? ProcessorsOfNode(int node)
    {
        string path = string.Create(CultureInfo.InvariantCulture, $"/sys/devices/system/node/node{node}/cpulist");
        return File.Exists(path) ? ProcessorSet.ParseList(File.ReadAllText(path)) : null;
    }

    /// <summary>The processors that a thread of this process may be on (proc(5), status's Cpus_allowed_list).</summary>
    /// <param name="thread">Linux's number of the thread.</param>
    /// <returns>Null where there is no such thread.</returns>
    public static IReadOnlyList<int>? ProcessorsFor(int thread)
    {
        const string key = "Cpus_allowed_list:";
        if (thread == 0)
            return null;
        try
        {
            string? line = File.ReadLines(string.Create(CultureInfo.InvariantCulture, $"/proc/self/task/{thread}/status"))
                .FirstOrDefault(static line => line.StartsWith(key, StringComparison.Ordinal));
            return line is null ? null : ProcessorSet.ParseList(line[key.Length..]);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }

    private static int ReadMemory(string key)
    {
        foreach (string line in File.ReadLines("/proc/meminfo"))
        {
            // "MemTotal:       24684208 kB"
            if (line.StartsWith(key, StringComparison.Ordinal)
                && long.TryParse(line.AsSpan(key.Length).Trim().TrimEnd("kB").Trim(), CultureInfo.InvariantCulture, out long kiB))
            {
                return (int)Math.Min(kiB >> 10, int.MaxValue);
            }
        }

        throw new IOException($"/proc/meminfo does not have {key.TrimEnd(':')}; XenSharp runs on Linux only.");
    }
}
