// The machine in the rows of xl info, for people and scripts that look for free_memory and the like.

using System.Globalization;
using System.Runtime.InteropServices;
using System.Text;
using XenSharp.Configuration;
using XenSharp.Toolstack;

namespace XenSharp.Cli.Commands;

/// <summary>What of xl info can be said of a host without Xen: names and format are xl's (xl_info.c).</summary>
internal static class HostRows
{
    private const string Processors = "/sys/devices/system/cpu";
    private const string Nodes = "/sys/devices/system/node";

    /// <summary>What guests get from XENVER_extraversion.</summary>
    private const string ExtraVersion = ".xensharp";

    /// <summary>"NAME : VALUE", a line each.</summary>
    internal static string Text()
    {
        Version version = Version.Parse(HostReport.AbiVersion);
        IReadOnlyList<int> online = HostMachine.OnlineProcessors;
        (int threads, int cores) = Siblings(online);
        var text = new StringBuilder();
        Add("host", Environment.MachineName);
        Add("release", HostMachine.KernelRelease);
        Add("version", File.ReadAllText("/proc/sys/kernel/version").Trim());
        Add("machine", RuntimeInformation.OSArchitecture == Architecture.X64 ? "x86_64" : RuntimeInformation.OSArchitecture.ToString().ToLowerInvariant());
        Add("nr_cpus", online.Count);
        Add("max_cpu_id", online[^1]);
        Add("nr_nodes", NodeNumbers().Count);
        Add("cores_per_socket", cores);
        Add("threads_per_core", threads);
        if (MegaHertz() is { } frequency)
            Add("cpu_mhz", frequency);
        Add("virt_caps", "pv");
        Add("total_memory", HostMachine.MemoryMiB);
        Add("free_memory", HostMachine.AvailableMemoryMiB);
        Add("xen_major", version.Major);
        Add("xen_minor", version.Minor);
        Add("xen_extra", ExtraVersion);
        Add("xen_version", HostReport.AbiVersion + ExtraVersion);
        Add("xen_caps", "xen-3.0-x86_64");
        Add("xen_pagesize", 4096);
        Add("platform_params", "virt_start=0xffff800000000000");
        return text.ToString();

        void Add(string name, object value) => text.AppendLine(CultureInfo.InvariantCulture, $"{name,-23}: {value}");
    }

    /// <summary>What <c>xl info -n</c> adds: where processors are, and which node has how much memory.</summary>
    internal static string NumaText()
    {
        IReadOnlyList<int> nodes = NodeNumbers();
        var text = new StringBuilder().AppendLine("cpu_topology           :").AppendLine("cpu:    core    socket     node");
        foreach (int processor in HostMachine.OnlineProcessors)
        {
            int node = nodes.FirstOrDefault(node => HostMachine.ProcessorsOfNode(node)?.Contains(processor) == true);
            text.AppendLine(
                CultureInfo.InvariantCulture,
                $"{processor,3}:    {Number($"{Processors}/cpu{processor}/topology/core_id") ?? 0,4}     {Number($"{Processors}/cpu{processor}/topology/physical_package_id") ?? 0,4}     {node,4}");
        }

        text.AppendLine("numa_info              :").AppendLine("node:    memsize    memfree    distances");
        foreach (int node in nodes)
        {
            string distances = ReadLine($"{Nodes}/node{node}/distance") is { } line ? string.Join(',', line.Split(' ', StringSplitOptions.RemoveEmptyEntries)) : "10";
            text.AppendLine(
                CultureInfo.InvariantCulture,
                $"{node,4}:    {NodeMemory(node, "MemTotal:") ?? HostMachine.MemoryMiB,6}     {NodeMemory(node, "MemFree:") ?? HostMachine.AvailableMemoryMiB,6}      {distances}");
        }

        return text.ToString();
    }

    /// <summary>Threads of a core, and cores of a socket, of the first processor; 1 where the host does not say.</summary>
    private static (int Threads, int Cores) Siblings(IReadOnlyList<int> online)
    {
        int Count(string file) => ReadLine($"{Processors}/cpu{online[0]}/topology/{file}") is { } list ? Math.Max(1, ProcessorSet.ParseList(list).Count) : 1;
        int threads = Count("thread_siblings_list");
        return (threads, Math.Max(1, Count("core_siblings_list") / threads));
    }

    private static IReadOnlyList<int> NodeNumbers() => ReadLine($"{Nodes}/online") is { } list ? ProcessorSet.ParseList(list) : [0];

    /// <summary>MiB of a node, from a line such as "Node 0 MemTotal:       24684208 kB".</summary>
    private static long? NodeMemory(int node, string key)
    {
        string path = $"{Nodes}/node{node}/meminfo";
        string? line = File.Exists(path) ? File.ReadLines(path).FirstOrDefault(line => line.Contains(key, StringComparison.Ordinal)) : null;
        return line?.Split(' ', StringSplitOptions.RemoveEmptyEntries) is [.., { } size, "kB"] && long.TryParse(size, CultureInfo.InvariantCulture, out long kiB) ? kiB >> 10 : null;
    }

    /// <summary>What /proc/cpuinfo says of the first processor, without the fraction.</summary>
    private static int? MegaHertz()
    {
        const string key = "cpu MHz";
        string? line = File.ReadLines("/proc/cpuinfo").FirstOrDefault(static line => line.StartsWith(key, StringComparison.Ordinal));
        return line is not null && double.TryParse(line[(line.IndexOf(':') + 1)..], CultureInfo.InvariantCulture, out double frequency) ? (int)frequency : null;
    }

    private static int? Number(string path) => int.TryParse(ReadLine(path), CultureInfo.InvariantCulture, out int number) ? number : null;

    private static string? ReadLine(string path)
    {
        try
        {
            return File.ReadAllText(path).Trim();
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            // Not every host says this; containers hide much of it.
            return null;
        }
    }
}
