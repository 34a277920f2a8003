// What a run of the fuzz guest says of itself: how often each operation came to what.
using System.Buffers.Binary;
using System.Text;

namespace XenSharp.Guests.Fuzz;

/// <summary>Counts of a run, or the sum of several.</summary>
/// <param name="Calls">Hypercalls made.</param>
/// <param name="Operations">By name: how often it succeeded, and how often it failed with each errno (positive).</param>
public sealed record FuzzFigures(ulong Calls, IReadOnlyDictionary<string, SortedDictionary<int, long>> Operations)
{
    /// <summary>In <see cref="Operations"/>: success.</summary>
    public const int Success = 0;

    /// <summary>In <see cref="Operations"/>: a count of 0, where one of more was asked for.</summary>
    public const int NothingDone = FuzzMemory.NothingDone;

    /// <summary>The figures of no run.</summary>
    public static FuzzFigures None { get; } = new(0, new Dictionary<string, SortedDictionary<int, long>>());

    /// <summary>How often an operation succeeded.</summary>
    public long Successes(string operation) => Operations[operation].GetValueOrDefault(Success);

    /// <summary>Both together.</summary>
    public FuzzFigures Add(FuzzFigures other)
    {
        ArgumentNullException.ThrowIfNull(other);
        Dictionary<string, SortedDictionary<int, long>> sum = [];
        foreach ((string name, SortedDictionary<int, long> results) in Operations.Concat(other.Operations))
        {
            if (!sum.TryGetValue(name, out SortedDictionary<int, long>? counts))
                sum[name] = counts = [];
            foreach ((int result, long count) in results)
                counts[result] = counts.GetValueOrDefault(result) + count;
        }

        return new FuzzFigures(Calls + other.Calls, sum);
    }

    /// <summary>A line for each operation.</summary>
    public override string ToString()
    {
        var text = new StringBuilder();
        foreach ((string name, SortedDictionary<int, long> results) in Operations)
        {
            text.Append($"{name,-44} {results.Values.Sum(),9} ");
            text.AppendJoin(", ", results.Select(static result => $"{NameOf(result.Key)} {result.Value}"));
            text.AppendLine();
        }

        return text.ToString();
    }

    internal static FuzzFigures? Read(ReadOnlySpan<byte> console, string[] names)
    {
        byte[] marker = Encoding.ASCII.GetBytes(FuzzGuest.Marker);
        int size = marker.Length + 8 + FuzzMemory.HistogramSize;
        for (int start = console.LastIndexOf(marker); start >= 0; start = console[..start].LastIndexOf(marker))
        {
            if (console.Length - start >= size)
                return Read(console[(start + marker.Length)..], names.Length, names);
        }

        return null;
    }

    private static FuzzFigures Read(ReadOnlySpan<byte> figures, int operations, string[] names)
    {
        Dictionary<string, SortedDictionary<int, long>> read = [];
        for (int operation = 0; operation < operations; operation++)
        {
            SortedDictionary<int, long> counts = [];
            for (int result = 0; result < FuzzMemory.ResultClasses; result++)
            {
                uint count = BinaryPrimitives.ReadUInt32LittleEndian(figures[(8 + (((operation * FuzzMemory.ResultClasses) + result) * 4))..]);
                if (count != 0)
                    counts[result] = count;
            }

            read[names[operation]] = counts;
        }

        return new FuzzFigures(BinaryPrimitives.ReadUInt64LittleEndian(figures), read);
    }

    private static string NameOf(int result) => result switch
    {
        Success => "ok",
        NothingDone => "nothing done",
        _ => Probe.ErrorNames.Of(result),
    };
}
