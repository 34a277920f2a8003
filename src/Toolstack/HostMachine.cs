// What the command wants to know of the machine beside its KVM.

using System.Globalization;

namespace XenSharp.Toolstack;

/// <summary>Facts about this machine from proc(5).</summary>
public static class HostMachine
{
    /// <summary>The machine's memory in MiB.</summary>
    /// <exception cref="IOException">/proc is not mounted, or not Linux's.</exception>
    public static int MemoryMiB
    {
        get
        {
            const string Key = "MemTotal:";
            foreach (string line in File.ReadLines("/proc/meminfo"))
            {
                // "MemTotal:       24684208 kB"
                if (line.StartsWith(Key, StringComparison.Ordinal)
                    && long.TryParse(line.AsSpan(Key.Length).Trim().TrimEnd("kB").Trim(), CultureInfo.InvariantCulture, out long kiB))
                {
                    return (int)Math.Min(kiB >> 10, int.MaxValue);
                }
            }
            throw new IOException("/proc/meminfo does not say how much memory this machine has; XenSharp runs on Linux only.");
        }
    }

    /// <summary>What <c>uname -r</c> says.</summary>
    public static string KernelRelease => File.ReadAllText("/proc/sys/kernel/osrelease").Trim();
}
