// A comparison in the terminal: what differs first, then the table.
using Spectre.Console;
using XenSharp.Cli.Commands;
using XenSharp.Guests.Probe;
using XenSharp.Oracle.Comparison;
using XenSharp.Oracle.Differences;

namespace XenSharp.Cli.Compare;

/// <summary>Prints comparisons.</summary>
internal static class ComparisonDisplay
{
    private const int WidthOfFiles = 200;

    /// <summary>A line about what is being done.</summary>
    internal static void Progress(string text) => Console.Error.WriteLine($"{Tool.Name}: {text}");

    /// <summary>The scripts, what they are about, and how many cases they have.</summary>
    internal static void List(IReadOnlyList<AbiScript> scripts)
    {
        var table = new Table { Border = TableBorder.Simple };
        table.AddColumns("script", "about");
        table.AddColumn(new TableColumn("cases").RightAligned());
        foreach (AbiScript script in scripts)
            table.AddRow(new Text(script.Name), new Text(script.Subject), new Text($"{script.Cases.Count}"));
        Open().Write(table);
    }

    /// <summary>All comparisons.</summary>
    /// <param name="reference">What XenSharp was held against.</param>
    /// <param name="comparisons">The scripts.</param>
    /// <param name="all">Whether to show the steps of cases that agree.</param>
    internal static void Show(string reference, IReadOnlyList<ScriptComparison> comparisons, bool all)
    {
        IAnsiConsole console = Open();
        ShowCases(console, reference, comparisons, Verdict.Differ);
        foreach (ScriptComparison comparison in comparisons)
        {
            foreach (KnownDifference stale in comparison.Stale)
            {
                console.MarkupLineInterpolated(
                    $"[red]{comparison.Script}: {stale.Case}: {stale.Step ?? "any step"}: listed as a difference, but not seen; take it out of the table.[/]");
            }
        }

        ShowReasons(console, comparisons);
        if (all)
        {
            ShowCases(console, reference, comparisons, Verdict.Explained);
            ShowCases(console, reference, comparisons, Verdict.Agree);
            ShowCases(console, reference, comparisons, Verdict.NotReached);
        }

        ShowSummary(console, reference, comparisons);
    }

    private static IAnsiConsole Open()
    {
        IAnsiConsole console = AnsiConsole.Create(new AnsiConsoleSettings { Out = new AnsiConsoleOutput(Console.Out) });
        if (Console.IsOutputRedirected)
            console.Profile.Width = WidthOfFiles;
        return console;
    }

    private static Color ColorOf(Verdict verdict) => verdict switch
    {
        Verdict.Agree => Color.Green,
        Verdict.Explained => Color.Yellow,
        Verdict.Differ => Color.Red,
        _ => Color.Grey,
    };

    private static void ShowCases(IAnsiConsole console, string reference, IReadOnlyList<ScriptComparison> comparisons, Verdict verdict)
    {
        foreach (ScriptComparison comparison in comparisons)
        {
            foreach (CaseComparison c in comparison.Cases.Where(c => c.Verdict == verdict))
            {
                var title = new TableTitle($"{Markup.Escape(comparison.Script)}: {Markup.Escape(c.Name)}");
                var table = new Table { Border = TableBorder.Simple, Expand = true, Title = title };
                table.AddColumns("step", Markup.Escape(reference), "XenSharp");
                foreach (LineComparison line in c.Lines)
                {
                    var style = new Style(ColorOf(line.Verdict));
                    table.AddRow(
                        new Text(line.Step),
                        new Text(line.Expected ?? Transcript.NotReached, style),
                        new Text(line.Actual ?? Transcript.NotReached, style));
                }

                console.Write(table);
            }
        }
    }

    private static void ShowReasons(IAnsiConsole console, IReadOnlyList<ScriptComparison> comparisons)
    {
        var table = new Table { Border = TableBorder.Simple, Expand = true, Title = new TableTitle("known differences") };
        table.AddColumns("script: case", "why");
        foreach (ScriptComparison comparison in comparisons)
        {
            foreach (CaseComparison c in comparison.Cases)
            {
                IEnumerable<KnownDifference> known = c.Lines.Select(static line => line.Known).OfType<KnownDifference>();
                foreach (KnownDifference difference in known.DistinctBy(static difference => difference.Reason))
                {
                    string reason = difference.Kind == DifferenceKind.NotBuilt ? $"Not built: {difference.Reason}" : difference.Reason;
                    table.AddRow(new Text($"{comparison.Script}: {c.Name}"), new Text(reason));
                }
            }
        }

        if (table.Rows.Count != 0)
            console.Write(table);
    }

    private static void ShowSummary(IAnsiConsole console, string reference, IReadOnlyList<ScriptComparison> comparisons)
    {
        var table = new Table { Border = TableBorder.Simple, Title = new TableTitle($"XenSharp against {Markup.Escape(reference)}, cases") };
        table.AddColumn("about");
        foreach (string name in (ReadOnlySpan<string>)["agree", "by design", "not built", "differ", "not reached"])
            table.AddColumn(new TableColumn(name).RightAligned());
        SubjectSummary total = SubjectSummary.Of("all", [.. comparisons.SelectMany(static comparison => comparison.Cases)]);
        foreach (SubjectSummary row in SubjectSummary.Of(comparisons).Append(total))
        {
            table.AddRow(
                new Text(row.Subject),
                Count(row.Agree, Verdict.Agree),
                Count(row.ByDesign, Verdict.Explained),
                Count(row.NotBuilt, Verdict.Explained),
                Count(row.Differ, Verdict.Differ),
                Count(row.NotReached, Verdict.NotReached));
        }

        console.Write(table);
        static Text Count(int count, Verdict verdict) => new(count == 0 ? string.Empty : $"{count}", new Style(ColorOf(verdict)));
    }
}
