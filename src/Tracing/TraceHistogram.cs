// The durations of a trace as a picture: an SVG file that needs nothing beside itself.
using System.Globalization;
using System.Net;
using System.Text;

namespace XenSharp.Tracing;

/// <summary>
/// Draws one histogram a name, those with the most time first, on a common logarithmic axis of durations. Each has its own height
/// scale: the counts differ by orders of magnitude, and are written beside.
/// </summary>
public static class TraceHistogram
{
    /// <summary>Bars a decade.</summary>
    private const int BarsPerDecade = 10;

    /// <summary>The most histograms in a picture; the remaining names are one more.</summary>
    private const int MaxRows = 16;

    private const int LabelWidth = 300;
    private const int PlotWidth = 640;
    private const int FigureWidth = 250;
    private const int Margin = 24;
    private const int HeadHeight = 84;
    private const int RowHeight = 58;
    private const int BarHeight = 40;
    private const int FootHeight = 56;
    private const int Width = Margin + LabelWidth + PlotWidth + FigureWidth + Margin;

    private const string Style = """
        svg { font-family: system-ui, "DejaVu Sans", "Segoe UI", Helvetica, Arial, sans-serif; background: #ffffff; }
        .ground { fill: #ffffff; }
        .title { font-size: 20px; font-weight: 600; fill: #1a1a1a; }
        .note, .tick, .figure { font-size: 12px; fill: #555555; }
        .name { font-size: 13px; fill: #1a1a1a; }
        .bar { fill: #2a6fbb; }
        .grid { stroke: #dddddd; stroke-width: 1; }
        .base { stroke: #999999; stroke-width: 1; }
        .median { stroke: #c2410c; stroke-width: 2; }
        .tail { stroke: #c2410c; stroke-width: 1.5; stroke-dasharray: 3 2; }
        @media (prefers-color-scheme: dark) {
          svg { background: #16181c; }
          .ground { fill: #16181c; }
          .title, .name { fill: #f0f0f0; }
          .note, .tick, .figure { fill: #b5b9c0; }
          .bar { fill: #6cb0f5; }
          .grid { stroke: #33373e; }
          .base { stroke: #6a6f78; }
          .median, .tail { stroke: #ff9b5e; }
        }
        """;

    /// <summary>Draws a summary.</summary>
    /// <param name="summary">What to draw.</param>
    /// <param name="title">The picture's title.</param>
    public static string Draw(TraceSummary summary, string title)
    {
        ArgumentNullException.ThrowIfNull(summary);
        List<(string Name, double[] Durations)> rows = Rows(summary);

        // A duration of no ticks is drawn as the least that there can be.
        double[] all = [.. rows.SelectMany(static row => row.Durations)];
        int firstDecade = all.Length == 0 ? 2 : Decade(all.Min());
        int lastDecade = Math.Max(all.Length == 0 ? 3 : Decade(all.Max()) + 1, firstDecade + 1);
        int height = HeadHeight + (rows.Count * RowHeight) + FootHeight;
        var svg = new StringBuilder();
        Line(svg, $"""<svg xmlns="http://www.w3.org/2000/svg" width="{Width}" height="{height}" viewBox="0 0 {Width} {height}" role="img">""");
        Line(svg, $"<title>{Escape(title)}</title>");
        Line(svg, $"<style>\n{Style}\n</style>");
        Line(svg, $"""<rect class="ground" width="{Width}" height="{height}"/>""");
        Line(svg, $"""<text class="title" x="{Margin}" y="36">{Escape(title)}</text>""");
        string note = $"Durations, {BarsPerDecade} bars a decade; each row is scaled to its own highest bar. Solid line: median; dashed: 99th percentile.";
        Line(svg, $"""<text class="note" x="{Margin}" y="58">{note}</text>""");
        int bottom = HeadHeight + (rows.Count * RowHeight);
        for (int decade = firstDecade; decade <= lastDecade; decade++)
        {
            double x = X(Math.Pow(10, decade), firstDecade, lastDecade);
            Line(svg, $"""<line class="grid" x1="{x:0.#}" y1="{HeadHeight}" x2="{x:0.#}" y2="{bottom}"/>""");
            Line(svg, $"""<text class="tick" x="{x:0.#}" y="{bottom + 20}" text-anchor="middle">{Tick(decade)}</text>""");
        }

        for (int i = 0; i < rows.Count; i++)
            DrawRow(svg, rows[i].Name, rows[i].Durations, HeadHeight + (i * RowHeight), firstDecade, lastDecade);
        if (rows.Count == 0)
            Line(svg, $"""<text class="name" x="{Margin}" y="{HeadHeight + 14}">There are no records.</text>""");
        Line(svg, $"</svg>");
        return svg.ToString();
    }

    private static List<(string Name, double[] Durations)> Rows(TraceSummary summary)
    {
        List<(string, double[])> rows = [.. summary.Rows.Take(MaxRows).Select(static row => (row.Name, row.Durations))];
        TraceSummaryRow[] rest = [.. summary.Rows.Skip(MaxRows)];
        if (rest.Length > 0)
            rows.Add(($"{rest.Length} more names", [.. rest.SelectMany(static row => row.Durations).Order()]));
        return rows;
    }

    private static void DrawRow(StringBuilder svg, string name, double[] durations, int top, int firstDecade, int lastDecade)
    {
        int bottom = top + RowHeight - 8;
        int[] bars = new int[(lastDecade - firstDecade) * BarsPerDecade];
        foreach (double duration in durations)
            bars[Math.Clamp((int)((Math.Log10(Math.Max(duration, 1)) - firstDecade) * BarsPerDecade), 0, bars.Length - 1)]++;
        int highest = bars.Max();
        double width = (double)PlotWidth / bars.Length;
        Line(svg, $"""<text class="name" x="{Margin}" y="{bottom - 12}">{Escape(Shorten(name))}</text>""");
        for (int i = 0; i < bars.Length; i++)
        {
            if (bars[i] == 0)
                continue;

            // What is there is seen, be it one among a million.
            double height = Math.Max(1.5, (double)BarHeight * bars[i] / highest);
            double x = Margin + LabelWidth + (i * width);
            double lower = Math.Pow(10, firstDecade + ((double)i / BarsPerDecade));
            double upper = Math.Pow(10, firstDecade + ((double)(i + 1) / BarsPerDecade));
            Line(svg, $"""<rect class="bar" x="{x + 0.5:0.##}" y="{bottom - height:0.##}" width="{width - 1:0.##}" height="{height:0.##}">""");
            Line(svg, $"<title>{Escape(name)}: {bars[i]:N0} from {TraceUnits.Duration(lower)} to {TraceUnits.Duration(upper)}</title></rect>");
        }

        Line(svg, $"""<line class="base" x1="{Margin + LabelWidth}" y1="{bottom}" x2="{Margin + LabelWidth + PlotWidth}" y2="{bottom}"/>""");
        double median = TraceSummary.Percentile(durations, 0.5);
        double tail = TraceSummary.Percentile(durations, 0.99);
        foreach ((double value, string mark) in (ReadOnlySpan<(double, string)>)[(median, "median"), (tail, "tail")])
        {
            double x = X(value, firstDecade, lastDecade);
            Line(svg, $"""<line class="{mark}" x1="{x:0.#}" y1="{bottom - BarHeight}" x2="{x:0.#}" y2="{bottom}"/>""");
        }

        int figures = Margin + LabelWidth + PlotWidth + 16;
        Line(svg, $"""<text class="figure" x="{figures}" y="{bottom - 22}">{durations.Length:N0} ×</text>""");
        Line(svg, $"""<text class="figure" x="{figures}" y="{bottom - 6}">median {TraceUnits.Duration(median)}, p99 {TraceUnits.Duration(tail)}</text>""");
    }

    private static int Decade(double duration) => (int)Math.Floor(Math.Log10(Math.Max(duration, 1)));

    private static double X(double duration, int firstDecade, int lastDecade)
        => Margin + LabelWidth + (PlotWidth * (Math.Log10(Math.Max(duration, 1)) - firstDecade) / (lastDecade - firstDecade));

    private static string Tick(int decade) => TraceUnits.Duration(Math.Pow(10, decade));

    private static string Shorten(string name) => name.Length <= 42 ? name : name[..41] + "…";

    private static string Escape(string text) => WebUtility.HtmlEncode(text);

    private static void Line(StringBuilder svg, FormattableString line) => svg.Append(line.ToString(CultureInfo.InvariantCulture)).Append('\n');
}

/// <summary>Durations for people.</summary>
public static class TraceUnits
{
    /// <summary>A duration with three digits and its unit: "12.3 µs".</summary>
    /// <param name="nanoseconds">The duration in nanoseconds.</param>
    public static string Duration(double nanoseconds)
    {
        // Rounded first, so that 999.9 ns are 1 µs and not 1000 ns.
        foreach ((double unit, string name) in (ReadOnlySpan<(double, string)>)[(1, "ns"), (1e3, "µs"), (1e6, "ms")])
        {
            if (nanoseconds < unit * 999.5)
                return Digits(nanoseconds / unit) + " " + name;
        }

        return Digits(nanoseconds / 1e9) + " s";
    }

    private static string Digits(double value)
        => value.ToString(value < 9.995 ? "0.##" : value < 99.95 ? "0.#" : "0", CultureInfo.InvariantCulture);
}
