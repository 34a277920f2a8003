// A comparison as one self-contained web page.
using System.Net;
using System.Text;
using XenSharp.Guests.Probe;
using XenSharp.Oracle.Differences;

namespace XenSharp.Oracle.Comparison;

/// <summary>Writes the page: the table by subject, then every script, those with differences first and opened.</summary>
public static class HtmlReport
{
    private const string Style = """
        :root { color-scheme: light dark; --line: #8884; --good: #2a7d3f; --known: #8a6400; --bad: #b3261e; --none: #777; }
        @media (prefers-color-scheme: dark) { :root { --good: #6fcf87; --known: #e0b64a; --bad: #ff8a80; --none: #999; } }
        body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }
        h1 { font-size: 1.5rem; } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
        table { border-collapse: collapse; width: 100%; }
        th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: left; vertical-align: top; }
        table.summary { width: auto; } table.summary td + td, table.summary th + th { text-align: right; }
        table.steps { table-layout: fixed; } table.steps td { font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
        table.steps th:nth-child(1) { width: 34%; } table.steps th:nth-child(2), table.steps th:nth-child(3) { width: 33%; }
        summary { cursor: pointer; padding: .35rem 0; font-weight: 600; } .agree { color: var(--good); } .explained { color: var(--known); }
        .differ { color: var(--bad); } .notreached { color: var(--none); } .why { font: 13px/1.4 system-ui, sans-serif; color: var(--known); }
        tr.differ td { font-weight: 600; }
        """;

    /// <summary>The page.</summary>
    /// <param name="reference">What XenSharp was held against, for the heading: "Xen 4.17.7 (domU)".</param>
    /// <param name="comparisons">All scripts.</param>
    public static string Of(string reference, IReadOnlyList<ScriptComparison> comparisons)
    {
        ArgumentNullException.ThrowIfNull(comparisons);
        var page = new StringBuilder();
        string title = $"XenSharp against {reference}";
        page.Append($"<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>{Encode(title)}</title>\n");
        page.Append("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n");
        page.Append($"<style>\n{Style}\n</style>\n</head>\n<body>\n<h1>{Encode(title)}</h1>\n");
        AppendSummary(page, comparisons);
        foreach (ScriptComparison comparison in comparisons.OrderBy(static comparison => Rank(comparison)))
            AppendScript(page, comparison, reference);
        page.Append("</body>\n</html>\n");
        return page.ToString();
    }

    private static int Rank(ScriptComparison comparison)
        => !comparison.IsGood ? 0 : comparison.Cases.Any(static c => c.Verdict == Verdict.Explained) ? 1 : 2;

    private static string Encode(string? text) => WebUtility.HtmlEncode(text ?? "");

    private static string ClassOf(Verdict verdict) => verdict.ToString().ToLowerInvariant();

    private static void AppendSummary(StringBuilder page, IReadOnlyList<ScriptComparison> comparisons)
    {
        page.Append("<table class=\"summary\">\n<tr><th>Subject</th><th>agree</th><th>by design</th><th>not built</th><th>differ</th>");
        page.Append("<th>not reached</th></tr>\n");
        SubjectSummary all = SubjectSummary.Of("All cases", [.. comparisons.SelectMany(static comparison => comparison.Cases)]);
        foreach (SubjectSummary row in SubjectSummary.Of(comparisons).Append(all))
        {
            page.Append($"<tr><td>{Encode(row.Subject)}</td>");
            Cell(row.Agree, Verdict.Agree);
            Cell(row.ByDesign, Verdict.Explained);
            Cell(row.NotBuilt, Verdict.Explained);
            Cell(row.Differ, Verdict.Differ);
            Cell(row.NotReached, Verdict.NotReached);
            page.Append("</tr>\n");
        }

        page.Append("</table>\n");
        void Cell(int count, Verdict verdict) => page.Append(count == 0 ? "<td></td>" : $"<td class=\"{ClassOf(verdict)}\">{count}</td>");
    }

    private static void AppendScript(StringBuilder page, ScriptComparison comparison, string reference)
    {
        SubjectSummary counts = SubjectSummary.Of(comparison.Subject, comparison.Cases);
        page.Append(comparison.IsGood ? "<details>" : "<details open>");
        page.Append($"<summary>{Encode(comparison.Script)} <span class=\"agree\">{counts.Agree} agree</span>");
        if (counts.ByDesign + counts.NotBuilt != 0)
            page.Append($" <span class=\"explained\">{counts.ByDesign + counts.NotBuilt} explained</span>");
        if (counts.Differ != 0)
            page.Append($" <span class=\"differ\">{counts.Differ} differ</span>");
        if (counts.NotReached != 0)
            page.Append($" <span class=\"notreached\">{counts.NotReached} not reached</span>");
        page.Append("</summary>\n");
        foreach (KnownDifference stale in comparison.Stale)
        {
            page.Append($"<p class=\"differ\">Listed as a difference, but not seen: {Encode(stale.Case)}: ");
            page.Append($"{Encode(stale.Step ?? "any step")} ({Encode(stale.Reason)})</p>\n");
        }

        foreach (CaseComparison c in comparison.Cases.OrderBy(static c => c.Verdict == Verdict.Differ ? 0 : c.Verdict == Verdict.Explained ? 1 : 2))
            AppendCase(page, c, reference);
        page.Append("</details>\n");
    }

    private static void AppendCase(StringBuilder page, CaseComparison c, string reference)
    {
        page.Append($"<h3 class=\"{ClassOf(c.Verdict)}\">{Encode(c.Name)}</h3>\n");
        page.Append($"<table class=\"steps\">\n<tr><th>Step</th><th>{Encode(reference)}</th><th>XenSharp</th></tr>\n");
        foreach (LineComparison line in c.Lines)
        {
            page.Append($"<tr class=\"{ClassOf(line.Verdict)}\"><td>{Encode(line.Step)}</td>");
            page.Append($"<td>{Encode(line.Expected ?? Transcript.NotReached)}</td><td>{Encode(line.Actual ?? Transcript.NotReached)}");
            if (line.Known is { } known)
                page.Append($"<div class=\"why\">{Encode(known.Reason)}</div>");
            page.Append("</td></tr>\n");
        }

        page.Append("</table>\n");
    }
}
