// What the threads of this process's vCPUs took of the processors.
using System.Globalization;

namespace XenSharp.Boot.Tests;

/// <summary>Looks at the threads of domains by name.</summary>
internal static class VcpuThreads
{
    /// <summary>Seconds of processor time that all vCPUs of a domain have taken.</summary>
    /// <param name="domain">The domain's name, short enough for the kernel to keep it in the threads'.</param>
    /// <exception cref="InvalidOperationException">None runs.</exception>
    internal static double ProcessorTime(string domain)
    {
        double time = 0;
        bool found = false;
        foreach (string thread in Directory.EnumerateDirectories("/proc/self/task"))
        {
            try
            {
                if (!File.ReadAllText(Path.Combine(thread, "comm")).StartsWith($"{domain} vcpu", StringComparison.Ordinal))
                    continue;
                time += long.Parse(File.ReadAllText(Path.Combine(thread, "schedstat")).Split(' ')[0], CultureInfo.InvariantCulture) / 1e9;
                found = true;
            }
            catch (IOException)
            {
                // The thread has ended.
            }
        }

        return found ? time : throw new InvalidOperationException($"The domain {domain} has no vCPU that runs.");
    }
}
