// Two transcripts of one script side by side: where they agree, where they differ, and where that is known.
using XenSharp.Guests.Probe;
using XenSharp.Oracle.Differences;

namespace XenSharp.Oracle.Comparison;

/// <summary>What the comparison of a step or a case says.</summary>
public enum Verdict
{
    /// <summary>The answers are the same.</summary>
    Agree,

    /// <summary>They differ, and the table of known differences says why.</summary>
    Explained,

    /// <summary>They differ.</summary>
    Differ,

    /// <summary>Neither guest came to it.</summary>
    NotReached,
}

/// <summary>A step on both sides.</summary>
/// <param name="Step">Its text.</param>
/// <param name="Expected">Xen's answer; null if the guest did not come to it, or had nothing out of order to say there.</param>
/// <param name="Actual">XenSharp's answer, likewise.</param>
/// <param name="Verdict">What that says.</param>
/// <param name="Known">The known difference that explains it.</param>
public sealed record LineComparison(string Step, string? Expected, string? Actual, Verdict Verdict, KnownDifference? Known = null);

/// <summary>A case on both sides.</summary>
public sealed record CaseComparison(string Name, IReadOnlyList<LineComparison> Lines)
{
    /// <summary>The worst of its lines; not reached only if no line was.</summary>
    public Verdict Verdict { get; } =
        Lines.Any(static line => line.Verdict == Verdict.Differ) ? Verdict.Differ
        : Lines.Any(static line => line.Verdict == Verdict.Explained) ? Verdict.Explained
        : Lines.Any(static line => line.Verdict == Verdict.Agree) ? Verdict.Agree
        : Verdict.NotReached;
}

/// <summary>A script on both sides.</summary>
/// <param name="Script">Its name.</param>
/// <param name="Subject">What it is about: <see cref="AbiScript.Subject"/>.</param>
/// <param name="Cases">Its cases.</param>
/// <param name="Stale">Known differences of this script that did not show: the table is to be mended.</param>
public sealed record ScriptComparison(
    string Script, string Subject, IReadOnlyList<CaseComparison> Cases, IReadOnlyList<KnownDifference> Stale)
{
    /// <summary>The step that stands for how the domain ended, in the last case.</summary>
    public const string EndStep = "end of the domain";

    /// <summary>Whether all is as it should be.</summary>
    public bool IsGood => Stale.Count == 0 && Cases.All(static c => c.Verdict != Verdict.Differ);

    /// <summary>What is not as it should be, a text each; none if <see cref="IsGood"/>.</summary>
    public IReadOnlyList<string> Complaints() =>
    [
        .. Cases.SelectMany(static c => c.Lines.Where(static line => line.Verdict == Verdict.Differ)
            .Select(line => $"{c.Name}: {line.Step}\n    Xen:      {line.Expected}\n    XenSharp: {line.Actual}")),
        .. Stale.Select(static stale => $"{stale.Case}: {stale.Step ?? "any step"}: listed as a known difference, but not seen"),
    ];

    /// <summary>Compares.</summary>
    /// <param name="subject">What the script is about.</param>
    /// <param name="expected">Xen's transcript.</param>
    /// <param name="actual">XenSharp's.</param>
    /// <param name="known">The known differences, of this and other scripts.</param>
    /// <exception cref="OracleException">The transcripts are of different versions of the script.</exception>
    public static ScriptComparison Make(string subject, Transcript expected, Transcript actual, IReadOnlyList<KnownDifference> known)
    {
        ArgumentNullException.ThrowIfNull(expected);
        ArgumentNullException.ThrowIfNull(actual);
        if (!expected.Cases.Select(static c => c.Name).SequenceEqual(actual.Cases.Select(static c => c.Name)))
        {
            throw new OracleException(
                $"The transcripts of {actual.Script} have different cases: one is of another version of the script. Record Xen's anew with "
                + "xensharp compare --record.");
        }

        KnownDifference[] own = [.. known.Where(difference => difference.Script == actual.Script)];
        HashSet<KnownDifference> used = [];
        List<CaseComparison> cases = [];
        for (int i = 0; i < actual.Cases.Count; i++)
        {
            string name = actual.Cases[i].Name;
            KnownDifference[] here = [.. own.Where(difference => difference.Case == name)];
            List<(string Step, string? Expected, string? Actual)> pairs = Align(expected.Cases[i].Lines, actual.Cases[i].Lines);
            if (i == actual.Cases.Count - 1)
                pairs.Add((EndStep, expected.Ending, actual.Ending));
            cases.Add(new CaseComparison(name, [.. pairs.Select(pair => Judge(pair.Step, pair.Expected, pair.Actual, here, used))]));
        }

        IEnumerable<KnownDifference> unused = own.Where(difference => !used.Contains(difference));
        return new ScriptComparison(
            actual.Script, subject, cases, [.. unused.Where(static difference => difference.Kind != DifferenceKind.ByHost)]);
    }

    private static LineComparison Judge(
        string step, string? expected, string? actual, KnownDifference[] known, HashSet<KnownDifference> used)
    {
        if (expected == actual)
            return new LineComparison(step, expected, actual, expected is null ? Verdict.NotReached : Verdict.Agree);
        KnownDifference? reason = known.FirstOrDefault(difference => difference.Step == step && difference.Answer == (actual ?? Transcript.NotReached))
            ?? known.FirstOrDefault(static difference => difference.Step is null);
        if (reason is null)
            return new LineComparison(step, expected, actual, Verdict.Differ);
        used.Add(reason);
        return new LineComparison(step, expected, actual, Verdict.Explained, reason);
    }

    /// <summary>Pairs the lines of two runs; a quiet step has a line only where something was out of order.</summary>
    private static List<(string Step, string? Expected, string? Actual)> Align(
        IReadOnlyList<TranscriptLine> expected, IReadOnlyList<TranscriptLine> actual)
    {
        List<(string, string?, string?)> pairs = [];
        int next = 0;
        foreach (TranscriptLine line in expected)
        {
            int match = next;
            while (match < actual.Count && actual[match].Step != line.Step)
                match++;
            if (match == actual.Count)
            {
                pairs.Add((line.Step, line.Answer, null));
                continue;
            }

            for (; next < match; next++)
                pairs.Add((actual[next].Step, null, actual[next].Answer));
            pairs.Add((line.Step, line.Answer, actual[next++].Answer));
        }

        for (; next < actual.Count; next++)
            pairs.Add((actual[next].Step, null, actual[next].Answer));
        return pairs;
    }
}
