// Two runs side by side.
using System.Diagnostics;
using CsCheck;
using XenSharp.Core;
using XenSharp.Core.Trace;
using static XenSharp.Tracing.Tests.Records;

namespace XenSharp.Tracing.Tests;

[CancelAfter(120_000)]
public sealed class TraceDiffTests
{
    [Test]
    public void Runs_that_differ_in_addresses_frames_and_times_are_the_same()
    {
        using TraceFile a = Trace(
            Hypercall(HypercallNumber.SetTrapTable, 0xffff_ffff_8100_0000).At(10),
            Hypercall(HypercallNumber.UpdateVaMapping, 0xffff_ffff_8200_0000, 0x4_0000_0063, 2).At(20),
            Hypercall(HypercallNumber.SetTimerOp, 123_456_789).At(30, duration: 55));
        using TraceFile b = Trace(
            Hypercall(HypercallNumber.SetTrapTable, 0xffff_ffff_8333_0000).At(1000),
            Hypercall(HypercallNumber.UpdateVaMapping, 0xffff_c900_0000_0000, 0x5_0000_0063, 2).At(2000),
            Hypercall(HypercallNumber.SetTimerOp, 987_654_321).At(3000, duration: 555));
        Assert.That(TraceDiff.Of(Read(a), Read(b)).IsSame, Is.True);
    }

    [Test]
    public void A_result_a_right_and_a_missing_call_are_differences()
    {
        using TraceFile a = Trace(
            Hypercall(HypercallNumber.SetGdt, 0x1000, 5), Hypercall(HypercallNumber.UpdateVaMapping, 1, 0x4_0000_0063, 2),
            Hypercall(HypercallNumber.SchedOp, 0, 0), Hypercall(HypercallNumber.SchedOp, 1, 0));
        using TraceFile b = Trace(
            Hypercall(HypercallNumber.SetGdt, 0x1000, 5).Result(-22), Hypercall(HypercallNumber.UpdateVaMapping, 1, 0x4_0000_0061, 2),
            Hypercall(HypercallNumber.SchedOp, 1, 0));
        TraceDiff diff = TraceDiff.Of(Read(a), Read(b));
        Assert.That(diff.Differences, Is.EqualTo(new[] { new TraceDifference(0, 3, 0, 2) }));
        Assert.That(diff.Rows.ToHashSet(), Is.EquivalentTo(new[]
        {
            new TraceDiffRow("set_gdt", 1, 1, 1, 1), new TraceDiffRow("update_va_mapping", 1, 1, 1, 1), new TraceDiffRow("sched_op/yield", 1, 0, 1, 0),
        }));
    }

    [Test]
    public void An_empty_run_differs_from_any_other()
    {
        List<ComparedRecord> some = Run("ab");
        Assert.That(TraceDiff.Of([], []).IsSame, Is.True);
        Assert.That(TraceDiff.Of([], some).Differences, Is.EqualTo(new[] { new TraceDifference(0, 0, 0, 2) }));
        Assert.That(TraceDiff.Of(some, []).Differences, Is.EqualTo(new[] { new TraceDifference(0, 2, 0, 0) }));
    }

    [Test]
    public void What_is_not_different_is_the_same_in_both() => Gen.Select(AnyRun(300), AnyRun(300)).Sample((a, b) => Check(Run(a), Run(b)));

    [Test]
    public void A_run_is_the_same_as_itself() => AnyRun(2000).Sample(run => TraceDiff.Of(Run(run), Run(run)).IsSame);

    [Test]
    public void Few_changes_make_few_differences() => Gen.Select(AnyRun(3000), Gen.Int[0, 2999].Array[1, 10]).Sample((run, places) =>
    {
        if (run.Length == 0)
            return;
        char[] changed = run.ToCharArray();
        foreach (int place in places)
            changed[place % changed.Length] = '!';
        TraceDiff diff = Check(Run(run), Run(new string(changed)));
        Assert.That(diff.Differences.Sum(difference => difference.CountA), Is.LessThanOrEqualTo(places.Length), "no more than was changed");
    }, iter: 50);

    [Test]
    public void Parts_that_are_longer_than_a_window_are_found_missing()
    {
        // Two parts of a boot, and between them one that only the second run has.
        var random = new Random(1);
        string Part(int length) => new([.. Enumerable.Range(0, length).Select(_ => (char)('a' + random.Next(12)))]);
        string begin = Part(20_000);
        string end = Part(20_000);
        string only = Part(3 * TraceDiff.Window);
        TraceDiff diff = Check(Run(begin + end), Run(begin + only + end));
        Assert.That(diff.Differences.Sum(difference => difference.CountA), Is.LessThan(20), "but for what happens to agree at its borders");
        Assert.That(diff.Differences.Sum(difference => difference.CountB), Is.InRange(only.Length, only.Length + 20));
    }

    [Test]
    public void Hundreds_of_thousands_of_records_with_differences_everywhere_take_seconds()
    {
        var random = new Random(2);
        string a = new([.. Enumerable.Range(0, 300_000).Select(i => (char)('a' + (i % 50 == 0 ? random.Next(26) : i * i % 7)))]);
        string b = string.Concat(a.Where(_ => random.Next(10) != 0).Select(c => random.Next(20) == 0 ? '!' : c));
        var watch = Stopwatch.StartNew();
        _ = Check(Run(a), Run(b));
        TestContext.Out.WriteLine($"{watch.Elapsed.TotalSeconds:0.0} s");
        Assert.That(watch.Elapsed, Is.LessThan(TimeSpan.FromSeconds(60)));
    }

    private static Gen<string> AnyRun(int most) => Gen.Char['a', 'e'].Array[0, most].Select(characters => new string(characters));

    private static List<ComparedRecord> Run(string records) => [.. records.Select((character, index) => new ComparedRecord(index, "name", character.ToString()))];

    private static List<ComparedRecord> Read(TraceFile file) => TraceDiff.Read(file, new TraceFilter());

    /// <summary>Replacing in A what differs by what B has there makes B.</summary>
    private static TraceDiff Check(List<ComparedRecord> a, List<ComparedRecord> b)
    {
        TraceDiff diff = TraceDiff.Of(a, b);
        int atA = 0;
        int atB = 0;
        foreach (TraceDifference difference in diff.Differences.Append(new TraceDifference(a.Count, 0, b.Count, 0)))
        {
            Assert.That(difference.StartA - atA, Is.EqualTo(difference.StartB - atB), "as much in both between two differences");
            for (; atA < difference.StartA; atA++, atB++)
            {
                if (a[atA].Text != b[atB].Text)
                    Assert.Fail($"record {atA} and {atB} are said to be the same");
            }

            atA += difference.CountA;
            atB += difference.CountB;
        }

        Assert.That((atA, atB), Is.EqualTo((a.Count, b.Count)));
        Assert.That(diff.Rows.Sum(row => row.OnlyA), Is.EqualTo(diff.Differences.Sum(difference => difference.CountA)));
        Assert.That(diff.Rows.Sum(row => row.OnlyB), Is.EqualTo(diff.Differences.Sum(difference => difference.CountB)));
        return diff;
    }
}
