// Filters, figures and the picture.
using System.Xml.Linq;
using XenSharp.Core;
using XenSharp.Core.Trace;
using static XenSharp.Tracing.Tests.Records;

namespace XenSharp.Tracing.Tests;

public sealed class TraceSummaryTests
{
    private static readonly TraceFilter Everything = new();

    [Test]
    public void Each_name_has_count_errors_and_percentiles()
    {
        // 1 to 100 µs, one of four failing, and one long console_io.
        using TraceFile trace = Trace([
            .. Enumerable.Range(1, 100).Select(i => Hypercall(HypercallNumber.SchedOp, 1, 0).Result(i % 4 == 0 ? -22 : 0).At((ulong)i * 1_000_000, (ulong)i * 1000)),
            Hypercall(HypercallNumber.ConsoleIo, 0, 5, 0x1000).At(200_000_000, 50_000_000),
            Hypercall(HypercallNumber.SchedOp, 0, 0).At(1_000_000_000, 1),
        ]);
        TraceSummary summary = TraceSummary.Of(trace, Everything);
        Assert.That(summary.Rows.Select(row => row.Name), Is.EqualTo(new[] { "console_io/write", "sched_op/block", "sched_op/yield" }), "most time first");
        TraceSummaryRow block = summary.Rows[1];
        Assert.That((block.Kind, block.Count, block.Errors), Is.EqualTo((TraceKind.Hypercall, 100, 25)));
        Assert.That(
            new[] { block.Total, block.Median, block.Percentile90, block.Percentile99, block.Longest },
            Is.EqualTo(new[] { 5_050_000.0, 50_000, 90_000, 99_000, 100_000 }).Within(0.01));
        Assert.That(summary.Seconds, Is.EqualTo(0.999).Within(1e-6));
        TraceSummaryRow one = summary.Rows[0];
        Assert.That(new[] { one.Median, one.Percentile90, one.Percentile99, one.Longest }, Is.All.EqualTo(50_000_000));
    }

    [Test]
    public void A_filter_that_lets_nothing_through_leaves_nothing()
    {
        using TraceFile trace = Trace(Hypercall(HypercallNumber.SchedOp, 1, 0));
        TraceSummary summary = TraceSummary.Of(trace, new TraceFilter { Vcpus = [5] });
        Assert.That((summary.Rows.Count, summary.Seconds), Is.EqualTo((0, 0.0)));
        Assert.That(XDocument.Parse(TraceHistogram.Draw(summary, "empty")).ToString(), Does.Contain("There are no records."));
    }

    private static IEnumerable<TestCaseData> Filters()
    {
        yield return new TestCaseData(new TraceFilter(), "abcdefg").SetArgDisplayNames("everything");
        yield return new TestCaseData(new TraceFilter { Kinds = [TraceKind.Hypercall] }, "abcd").SetArgDisplayNames("a kind");
        yield return new TestCaseData(new TraceFilter { Kinds = [TraceKind.Upcall, TraceKind.Exception] }, "ef").SetArgDisplayNames("two kinds");
        yield return new TestCaseData(new TraceFilter { Hypercalls = ["sched_op"] }, "ab").SetArgDisplayNames("a hypercall");
        yield return new TestCaseData(new TraceFilter { Hypercalls = ["sched_op/block"] }, "a").SetArgDisplayNames("a command");
        yield return new TestCaseData(new TraceFilter { Hypercalls = ["sched_op/yield", "set_gdt"] }, "bc").SetArgDisplayNames("several");
        yield return new TestCaseData(new TraceFilter { From = 2 }, "cdefg").SetArgDisplayNames("from");
        yield return new TestCaseData(new TraceFilter { From = 2, To = 4 }, "cd").SetArgDisplayNames("from and to");
        yield return new TestCaseData(new TraceFilter { ErrorsOnly = true }, "cf").SetArgDisplayNames("errors");
        yield return new TestCaseData(new TraceFilter { Vcpus = [1] }, "d").SetArgDisplayNames("a vCPU");
        yield return new TestCaseData(new TraceFilter { Vcpus = [0], Kinds = [TraceKind.Hypercall], To = 2, ErrorsOnly = true }, "").SetArgDisplayNames("all at once");
    }

    [TestCaseSource(nameof(Filters))]
    public void Filters_let_through_what_they_say(TraceFilter filter, string expected)
    {
        TraceRecord[] records =
        [
            Hypercall(HypercallNumber.SchedOp, 1, 0).At(0), Hypercall(HypercallNumber.SchedOp, 0, 0).At(1_000_000_000),
            Hypercall(HypercallNumber.SetGdt, 0, 0).Result(-22).At(2_000_000_000), Hypercall(HypercallNumber.Iret).Result(-22).At(3_000_000_000),
            new() { Kind = TraceKind.Upcall, Start = Header.StartTsc + 4_000_000_000, Outcome = TraceOutcome.Delivered },
            Trap(TraceKind.Exception, ExceptionVector.DoubleFault, TraceOutcome.Crashed).At(5_000_000_000),
            Trap(TraceKind.Emulation, ExceptionVector.GeneralProtection, TraceOutcome.Emulated, "fa").At(6_000_000_000),
        ];
        records[3].Vcpu = 1;
        var text = new TraceText();
        string found = string.Concat(records.Select((record, index) => filter.Matches(record, Header, text) ? $"{(char)('a' + index)}" : ""));
        Assert.That(found, Is.EqualTo(expected));
    }

    [Test]
    public void The_picture_has_every_name_and_every_record()
    {
        using TraceFile trace = Trace([
            .. Enumerable.Range(0, 1000).Select(i => Hypercall(HypercallNumber.SchedOp, 1, 0).At((ulong)i * 1000, (ulong)(10 + (i * 37 % 90_000)))),
            .. Enumerable.Range(0, 30).Select(i => Hypercall((HypercallNumber)(100 + i)).At((ulong)i, 0)),
            Hypercall(HypercallNumber.SetGdt, 0, 0).At(5, 3_000_000_000),
        ]);
        string svg = TraceHistogram.Draw(TraceSummary.Of(trace, Everything), "a <guest> & its \"trace\"");
        XDocument picture = XDocument.Parse(svg);
        XNamespace ns = "http://www.w3.org/2000/svg";
        Assert.That(picture.Root!.Name, Is.EqualTo(ns + "svg"));
        string[] texts = [.. picture.Descendants(ns + "text").Select(text => text.Value)];
        Assert.That(texts, Does.Contain("a <guest> & its \"trace\"").And.Contain("sched_op/block").And.Contain("set_gdt").And.Contain("16 more names"));
        Assert.That(texts, Does.Contain("1 µs").And.Contain("1 s"), "the axis");

        // Each bar says how many it stands for.
        int records = picture.Descendants(ns + "rect").Where(bar => (string?)bar.Attribute("class") == "bar")
            .Sum(bar => int.Parse(bar.Element(ns + "title")!.Value.Split(": ")[1].Split(' ')[0].Replace(",", "")));
        Assert.That(records, Is.EqualTo(1031));
        Assert.That(svg, Does.Contain("prefers-color-scheme: dark"));
        Assert.That(svg.Replace("http://www.w3.org/2000/svg", ""), Does.Not.Contain("http").And.Not.Contain("href"), "nothing from elsewhere");
        double width = double.Parse(picture.Root.Attribute("width")!.Value);
        Assert.That(picture.Descendants(ns + "rect").Select(bar => (double?)bar.Attribute("x") ?? 0), Is.All.InRange(0, width));
    }

    [TestCase(0, "0 ns")]
    [TestCase(12.34, "12.3 ns")]
    [TestCase(999.4, "999 ns")]
    [TestCase(999.9, "1 µs")]
    [TestCase(1234, "1.23 µs")]
    [TestCase(56_789, "56.8 µs")]
    [TestCase(1_234_567, "1.23 ms")]
    [TestCase(12_345_678_901, "12.3 s")]
    public void Durations_have_three_digits_and_a_unit(double nanoseconds, string text) => Assert.That(TraceUnits.Duration(nanoseconds), Is.EqualTo(text));
}
