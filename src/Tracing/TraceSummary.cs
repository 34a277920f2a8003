// What a trace has how often, and how long it took.
using XenSharp.Core.Trace;

namespace XenSharp.Tracing;

/// <summary>All records of one name.</summary>
/// <param name="Kind">Their kind.</param>
/// <param name="Name">Their name.</param>
/// <param name="Count">How many there are.</param>
/// <param name="Errors">How many of them failed.</param>
/// <param name="Total">Nanoseconds of all together. A multicall's include those of the calls in it.</param>
/// <param name="Median">The duration, in nanoseconds, that half of them do not exceed; so on for the next.</param>
/// <param name="Percentile90">That nine of ten do not exceed.</param>
/// <param name="Percentile99">That 99 of 100 do not exceed.</param>
/// <param name="Longest">The longest.</param>
public sealed record TraceSummaryRow(
    TraceKind Kind, string Name, int Count, int Errors, double Total, double Median, double Percentile90, double Percentile99, double Longest)
{
    /// <summary>All durations in nanoseconds, shortest first.</summary>
    internal double[] Durations { get; init; } = [];
}

/// <summary>The figures of a trace.</summary>
/// <param name="Seconds">From the first record's start to the last's end.</param>
/// <param name="Rows">Each name, those with the most time first.</param>
public sealed record TraceSummary(double Seconds, IReadOnlyList<TraceSummaryRow> Rows)
{
    /// <summary>Counts the records that a filter lets through.</summary>
    public static TraceSummary Of(TraceFile file, TraceFilter filter)
    {
        ArgumentNullException.ThrowIfNull(file);
        ArgumentNullException.ThrowIfNull(filter);
        var text = new TraceText();
        var groups = new Dictionary<(TraceKind Kind, string Name), (List<double> Durations, int Errors)>();
        double first = double.PositiveInfinity;
        double last = double.NegativeInfinity;
        foreach (TraceRecord record in file.Records())
        {
            if (!filter.Matches(record, file.Header, text))
                continue;
            double duration = TraceTime.Nanoseconds(record.Duration, file.Header);
            double start = TraceTime.SecondsOf(record, file.Header);
            first = Math.Min(first, start);
            last = Math.Max(last, start + (duration / 1e9));
            (TraceKind, string) key = (record.Kind, text.Name(record));
            (List<double> durations, int errors) = groups.TryGetValue(key, out (List<double>, int) group) ? group : ([], 0);
            durations.Add(duration);
            groups[key] = (durations, errors + (TraceText.IsError(record) ? 1 : 0));
        }

        return new TraceSummary(
            groups.Count == 0 ? 0 : last - first,
            [.. groups.Select(static group => Row(group.Key.Kind, group.Key.Name, group.Value.Durations, group.Value.Errors))
                .OrderByDescending(static row => row.Total).ThenBy(static row => row.Name, StringComparer.Ordinal)]);
    }

    /// <summary>The value that a share of the sorted values does not exceed (the nearest-rank method).</summary>
    internal static double Percentile(IReadOnlyList<double> sorted, double share)
        => sorted[Math.Clamp((int)Math.Ceiling(share * sorted.Count) - 1, 0, sorted.Count - 1)];

    private static TraceSummaryRow Row(TraceKind kind, string name, List<double> durations, int errors)
    {
        double[] sorted = [.. durations.Order()];
        return new TraceSummaryRow(
            kind, name, sorted.Length, errors, sorted.Sum(), Percentile(sorted, 0.5), Percentile(sorted, 0.9), Percentile(sorted, 0.99), sorted[^1])
        {
            Durations = sorted,
        };
    }
}
