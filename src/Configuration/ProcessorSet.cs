// Processors of the host as xl writes them, in cpus= and for vcpu-pin: "all", "0-3,^1", "node:0".

using System.Globalization;
using System.Text;

namespace XenSharp.Configuration;

/// <summary>A choice of the host's processors in xl's notation: what it comes to depends on the host.</summary>
public sealed class ProcessorSet
{
    private const string All = "all";
    private const int Highest = 8191;
    private static readonly string[] s_nodes = ["nodes:", "node:"];

    private readonly List<Part> _parts = [];

    private ProcessorSet(string text) => Text = text;

    /// <summary>One piece between commas: numbers of processors or of NUMA nodes, to be added or taken away.</summary>
    private readonly record struct Part(bool Without, bool IsNode, int First, int Last);

    /// <summary>As it was written.</summary>
    public string Text { get; }

    /// <summary>Reads a choice.</summary>
    /// <param name="text">xl's notation: numbers and ranges with commas between them, ^ before what is taken away again, node: before nodes.</param>
    /// <exception cref="FormatException">It is none; the message is a sentence.</exception>
    public static ProcessorSet Parse(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        var set = new ProcessorSet(text);
        foreach (string word in text.Split(',', StringSplitOptions.TrimEntries))
        {
            string rest = word;
            bool without = rest.StartsWith('^');
            if (without)
                rest = rest[1..];
            string? prefix = s_nodes.FirstOrDefault(rest.StartsWith);
            rest = rest[(prefix?.Length ?? 0)..];
            without |= prefix is not null && rest.StartsWith('^');
            rest = rest.TrimStart('^');
            if (rest == All)
            {
                set._parts.Add(new Part(without, false, 0, Highest));
                continue;
            }

            string[] ends = rest.Split('-');
            if (ends.Length > 2 || !TryNumber(ends[0], out int first) || !TryNumber(ends[^1], out int last) || last < first)
                throw new FormatException($"Processors are named as in \"0-3,^1\", \"node:0\" or \"{All}\"; \"{word}\" is no such name.");
            set._parts.Add(new Part(without, prefix is not null, first, last));
        }

        return set;
    }

    /// <summary>What it comes to on a host.</summary>
    /// <param name="online">The host's processors.</param>
    /// <param name="node">The processors of a NUMA node; null where there is none.</param>
    /// <returns>Their numbers, ascending; not empty.</returns>
    /// <exception cref="FormatException">The host has not what is named, or nothing is left; the message is a sentence.</exception>
    public IReadOnlyList<int> Resolve(IReadOnlyCollection<int> online, Func<int, IReadOnlyCollection<int>?> node)
    {
        ArgumentNullException.ThrowIfNull(online);
        ArgumentNullException.ThrowIfNull(node);
        var chosen = new SortedSet<int>();
        foreach (Part part in _parts)
        {
            IEnumerable<int> named = part.Last == Highest && part.First == 0 ? online
                : Enumerable.Range(part.First, part.Last - part.First + 1).SelectMany(number => part.IsNode
                    ? node(number) ?? throw new FormatException($"This host has no NUMA node {number}.")
                    : online.Contains(number) ? [number] : throw new FormatException($"This host has no processor {number}; it has {Format(online)}."));
            if (part.Without)
                chosen.ExceptWith(named);
            else
                chosen.UnionWith(named);
        }

        return chosen.Count > 0 ? [.. chosen] : throw new FormatException($"\"{Text}\" leaves no processor.");
    }

    /// <summary>Reads Linux's notation (sysfs's cpulist, Cpus_allowed_list): numbers and ranges with commas between them.</summary>
    public static IReadOnlyList<int> ParseList(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        text = text.Trim();
        return text.Length == 0 ? []
            : [.. Parse(text)._parts.SelectMany(static part => Enumerable.Range(part.First, part.Last - part.First + 1))];
    }

    /// <summary>Writes numbers as xl does.</summary>
    /// <param name="numbers">Numbers of processors.</param>
    /// <returns>Such as "0-3,6".</returns>
    public static string Format(IEnumerable<int> numbers)
    {
        var text = new StringBuilder();
        int[] sorted = [.. numbers.Order()];
        for (int i = 0; i < sorted.Length;)
        {
            int end = i;
            while (end + 1 < sorted.Length && sorted[end + 1] == sorted[end] + 1)
                end++;
            text.Append(text.Length > 0 ? "," : string.Empty).Append(CultureInfo.InvariantCulture, $"{sorted[i]}");
            if (end > i)
                text.Append(CultureInfo.InvariantCulture, $"-{sorted[end]}");
            i = end + 1;
        }

        return text.ToString();
    }

    private static bool TryNumber(string text, out int number)
        => int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out number) && number < Highest;
}
