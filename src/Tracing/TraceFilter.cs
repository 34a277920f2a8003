// Which records of a trace somebody wants to see.
using XenSharp.Core.Trace;

namespace XenSharp.Tracing;

/// <summary>What all wanted records have in common. An empty filter lets everything through.</summary>
public sealed record TraceFilter
{
    /// <summary>Kinds; none for all.</summary>
    public IReadOnlyCollection<TraceKind> Kinds { get; init; } = [];

    /// <summary>Hypercalls by name, also with a command ("sched_op/block"); none for all, and for what is no hypercall.</summary>
    public IReadOnlyCollection<string> Hypercalls { get; init; } = [];

    /// <summary>The earliest start, in seconds from the begin of the trace.</summary>
    public double From { get; init; } = double.NegativeInfinity;

    /// <summary>Starts from here on are left out, in seconds from the begin of the trace.</summary>
    public double To { get; init; } = double.PositiveInfinity;

    /// <summary>Only what failed.</summary>
    public bool ErrorsOnly { get; init; }

    /// <summary>vCPUs; none for all.</summary>
    public IReadOnlyCollection<int> Vcpus { get; init; } = [];

    /// <summary>Whether a record is wanted.</summary>
    /// <param name="record">The record.</param>
    /// <param name="header">Of its trace.</param>
    /// <param name="text">Names it.</param>
    public bool Matches(TraceRecord record, TraceHeader header, TraceText text)
    {
        ArgumentNullException.ThrowIfNull(record);
        ArgumentNullException.ThrowIfNull(header);
        ArgumentNullException.ThrowIfNull(text);
        if (Kinds.Count > 0 && !Kinds.Contains(record.Kind))
            return false;
        if (Vcpus.Count > 0 && !Vcpus.Contains(record.Vcpu))
            return false;
        double start = TraceTime.SecondsOf(record, header);
        if (start < From || start >= To)
            return false;
        if (ErrorsOnly && !TraceText.IsError(record))
            return false;
        return Hypercalls.Count == 0 || (record.Kind == TraceKind.Hypercall && IsNamed(record, text));
    }

    private bool IsNamed(TraceRecord record, TraceText text)
    {
        string full = text.Name(record);
        string name = TraceText.HypercallName(record.Number);
        return Hypercalls.Any(wanted => wanted == full || wanted == name);
    }
}

/// <summary>Ticks as times.</summary>
public static class TraceTime
{
    /// <summary>Seconds from the begin of the trace to the record's start.</summary>
    public static double SecondsOf(TraceRecord record, TraceHeader header)
    {
        ArgumentNullException.ThrowIfNull(record);
        ArgumentNullException.ThrowIfNull(header);

        // A counter that was set back makes a negative time, not a huge one.
        return (long)(record.Start - header.StartTsc) / (header.TscKiloHertz * 1e3);
    }

    /// <summary>Nanoseconds of a number of ticks.</summary>
    public static double Nanoseconds(ulong ticks, TraceHeader header)
    {
        ArgumentNullException.ThrowIfNull(header);
        return ticks * 1e6 / header.TscKiloHertz;
    }
}
