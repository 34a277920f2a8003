// What one run did that another did not.
using DiffPlex;
using DiffPlex.Chunkers;
using DiffPlex.Model;
using XenSharp.Core.Trace;

namespace XenSharp.Tracing;

/// <summary>A record as it is compared.</summary>
/// <param name="Seconds">From the begin of its trace.</param>
/// <param name="Name">What it is counted under.</param>
/// <param name="Text">What is compared, see <see cref="TraceText.Normalise"/>.</param>
public readonly record struct ComparedRecord(double Seconds, string Name, string Text);

/// <summary>A place where two runs differ: records of the one stand in place of records of the other.</summary>
/// <param name="StartA">Index in the first run.</param>
/// <param name="CountA">Records that only the first has here.</param>
/// <param name="StartB">Index in the second run.</param>
/// <param name="CountB">Records that only the second has here.</param>
public readonly record struct TraceDifference(int StartA, int CountA, int StartB, int CountB);

/// <summary>How often a name differs.</summary>
/// <param name="Name">The name.</param>
/// <param name="CountA">Records of it in the first run.</param>
/// <param name="CountB">In the second.</param>
/// <param name="OnlyA">Those without a counterpart in the second.</param>
/// <param name="OnlyB">Those without a counterpart in the first.</param>
public sealed record TraceDiffRow(string Name, int CountA, int CountB, int OnlyA, int OnlyB);

/// <summary>Two runs side by side.</summary>
/// <param name="A">The first run.</param>
/// <param name="B">The second run.</param>
/// <param name="Differences">Where they differ, in order.</param>
/// <param name="Rows">The names that differ, most first.</param>
public sealed record TraceDiff(
    IReadOnlyList<ComparedRecord> A, IReadOnlyList<ComparedRecord> B, IReadOnlyList<TraceDifference> Differences, IReadOnlyList<TraceDiffRow> Rows)
{
    /// <summary>
    /// Records of each run that are aligned at a time. Aligning takes time in proportion to length × differences, which for two boots
    /// as wholes would be hours: by windows it is the length alone that counts.
    /// </summary>
    internal const int Window = 4096;

    /// <summary>Records in a row that agree, after which a window may end: fewer could be agreement by chance.</summary>
    private const int Anchor = 8;

    /// <summary>Whether nothing differs.</summary>
    public bool IsSame => Differences.Count == 0;

    /// <summary>Reads what is to be compared of a trace.</summary>
    public static List<ComparedRecord> Read(TraceFile file, TraceFilter filter)
    {
        ArgumentNullException.ThrowIfNull(file);
        ArgumentNullException.ThrowIfNull(filter);
        var text = new TraceText();

        // Of a hundred thousand records a few hundred texts are different.
        var texts = new Dictionary<string, string>();
        var list = new List<ComparedRecord>();
        foreach (TraceRecord record in file.Records())
        {
            if (filter.Matches(record, file.Header, text))
                list.Add(new ComparedRecord(TraceTime.SecondsOf(record, file.Header), Shared(texts, text.Name(record)), Shared(texts, text.Normalise(record))));
        }

        return list;
    }

    /// <summary>Aligns two runs.</summary>
    public static TraceDiff Of(IReadOnlyList<ComparedRecord> a, IReadOnlyList<ComparedRecord> b)
    {
        ArgumentNullException.ThrowIfNull(a);
        ArgumentNullException.ThrowIfNull(b);
        List<TraceDifference> differences = Align(a, b);
        return new TraceDiff(a, b, differences, Count(a, b, differences));
    }

    private static string Shared(Dictionary<string, string> texts, string text)
    {
        if (texts.TryGetValue(text, out string? known))
            return known;
        texts.Add(text, text);
        return text;
    }

    private static List<TraceDifference> Align(IReadOnlyList<ComparedRecord> a, IReadOnlyList<ComparedRecord> b)
    {
        var differences = new List<TraceDifference>();
        int atA = 0;
        int atB = 0;
        foreach ((int endA, int endB) in TraceAnchors.Find(a, b))
        {
            AlignPart(a, atA, endA, b, atB, endB, differences);
            atA = endA;
            atB = endB;
        }

        AlignPart(a, atA, a.Count, b, atB, b.Count, differences);
        return differences;
    }

    /// <summary>Aligns a part of each run, window by window.</summary>
    private static void AlignPart(
        IReadOnlyList<ComparedRecord> a, int atA, int endA, IReadOnlyList<ComparedRecord> b, int atB, int endB, List<TraceDifference> differences)
    {
        while (true)
        {
            while (atA < endA && atB < endB && a[atA].Text == b[atB].Text)
            {
                atA++;
                atB++;
            }

            int lengthA = Math.Min(Window, endA - atA);
            int lengthB = Math.Min(Window, endB - atB);
            if (lengthA == 0 && lengthB == 0)
                return;
            if (lengthA == 0 || lengthB == 0)
            {
                Add(differences, new TraceDifference(atA, endA - atA, atB, endB - atB));
                return;
            }

            IList<DiffBlock> blocks = Differ.Instance.CreateDiffs(
                Lines(a, atA, lengthA), Lines(b, atB, lengthB), ignoreWhiteSpace: false, ignoreCase: false, LineChunker.Instance).DiffBlocks;

            // Where a window ends in both runs says nothing about what comes behind: it is used up to where the runs agree last.
            bool last = atA + lengthA == endA && atB + lengthB == endB;
            (int usedA, int usedB) = last ? (lengthA, lengthB) : LastAgreement(blocks, lengthA, lengthB);
            foreach (DiffBlock block in blocks)
            {
                if (block.DeleteStartA < usedA || block.InsertStartB < usedB)
                {
                    Add(differences, new TraceDifference(
                        atA + block.DeleteStartA, Math.Min(block.DeleteCountA, usedA - block.DeleteStartA),
                        atB + block.InsertStartB, Math.Min(block.InsertCountB, usedB - block.InsertStartB)));
                }
            }

            atA += usedA;
            atB += usedB;
        }
    }

    /// <summary>Adds a difference, to the one before if nothing agrees between them.</summary>
    private static void Add(List<TraceDifference> differences, TraceDifference difference)
    {
        if (differences.Count > 0 && differences[^1] is var before && before.StartA + before.CountA == difference.StartA
            && before.StartB + before.CountB == difference.StartB)
        {
            differences[^1] = before with { CountA = before.CountA + difference.CountA, CountB = before.CountB + difference.CountB };
            return;
        }

        differences.Add(difference);
    }

    /// <summary>The end of the last stretch that agrees, in both windows; where there is none, all of them.</summary>
    private static (int A, int B) LastAgreement(IList<DiffBlock> blocks, int lengthA, int lengthB)
    {
        int endA = lengthA;
        int endB = lengthB;
        for (int i = blocks.Count - 1; i >= 0; i--)
        {
            DiffBlock block = blocks[i];
            int agree = endA - (block.DeleteStartA + block.DeleteCountA);
            if (agree >= Anchor && endA > lengthA / 4 && endB > lengthB / 4)
                return (endA, endB);
            endA = block.DeleteStartA;
            endB = block.InsertStartB;
        }

        return endA >= Anchor && endA > lengthA / 4 && endB > lengthB / 4 ? (endA, endB) : (lengthA, lengthB);
    }

    private static string Lines(IReadOnlyList<ComparedRecord> records, int start, int count)
        => string.Join('\n', Enumerable.Range(start, count).Select(index => records[index].Text));

    private static List<TraceDiffRow> Count(IReadOnlyList<ComparedRecord> a, IReadOnlyList<ComparedRecord> b, List<TraceDifference> differences)
    {
        var counts = new Dictionary<string, (int A, int B, int OnlyA, int OnlyB)>();
        foreach (ComparedRecord record in a)
            counts[record.Name] = counts.GetValueOrDefault(record.Name) is var count ? (count.A + 1, count.B, 0, 0) : default;
        foreach (ComparedRecord record in b)
            counts[record.Name] = counts.GetValueOrDefault(record.Name) is var count ? (count.A, count.B + 1, 0, 0) : default;
        foreach (TraceDifference difference in differences)
        {
            for (int i = 0; i < difference.CountA; i++)
            {
                string name = a[difference.StartA + i].Name;
                counts[name] = counts[name] with { OnlyA = counts[name].OnlyA + 1 };
            }

            for (int i = 0; i < difference.CountB; i++)
            {
                string name = b[difference.StartB + i].Name;
                counts[name] = counts[name] with { OnlyB = counts[name].OnlyB + 1 };
            }
        }

        return
        [
            .. counts.Where(static pair => pair.Value.OnlyA + pair.Value.OnlyB > 0)
                .OrderByDescending(static pair => pair.Value.OnlyA + pair.Value.OnlyB).ThenBy(static pair => pair.Key, StringComparer.Ordinal)
                .Select(static pair => new TraceDiffRow(pair.Key, pair.Value.A, pair.Value.B, pair.Value.OnlyA, pair.Value.OnlyB)),
        ];
    }
}
