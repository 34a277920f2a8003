// How many cases agree, by what they are about.
namespace XenSharp.Oracle.Comparison;

/// <summary>The cases of one subject.</summary>
/// <param name="Subject">A hypercall, or another part of the ABI.</param>
/// <param name="Agree">Cases that answer as Xen does.</param>
/// <param name="ByDesign">Cases that differ for a stated reason, for good.</param>
/// <param name="NotBuilt">Cases that differ because something is not built yet, as the table says.</param>
/// <param name="Differ">Cases that differ, and nothing says why.</param>
/// <param name="NotReached">Cases that neither guest came to.</param>
public sealed record SubjectSummary(string Subject, int Agree, int ByDesign, int NotBuilt, int Differ, int NotReached)
{
    /// <summary>Sums up by subject, in alphabetical order.</summary>
    public static IReadOnlyList<SubjectSummary> Of(IEnumerable<ScriptComparison> comparisons)
        =>
        [
            .. comparisons.GroupBy(static comparison => comparison.Subject).OrderBy(static group => group.Key, StringComparer.Ordinal)
                .Select(static group => Of(group.Key, [.. group.SelectMany(static comparison => comparison.Cases)])),
        ];

    /// <summary>Sums up cases.</summary>
    public static SubjectSummary Of(string subject, IReadOnlyList<CaseComparison> cases)
    {
        int Count(Verdict verdict) => cases.Count(c => c.Verdict == verdict);
        int notBuilt = cases.Count(static c => c.Verdict == Verdict.Explained
            && c.Lines.Any(static line => line.Known?.Kind == Differences.DifferenceKind.NotBuilt));
        return new SubjectSummary(
            subject, Count(Verdict.Agree), Count(Verdict.Explained) - notBuilt, notBuilt, Count(Verdict.Differ), Count(Verdict.NotReached));
    }
}
