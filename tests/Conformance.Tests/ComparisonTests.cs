// Two transcripts side by side: what is called a difference, and what the reports make of it.

using XenSharp.Guests.Probe;
using XenSharp.Oracle;
using XenSharp.Oracle.Comparison;
using XenSharp.Oracle.Differences;

namespace XenSharp.Conformance.Tests;

public sealed class ComparisonTests
{
    private static readonly Transcript Xen = Transcript.Parse("s", "== first\na = 1\nb = -EINVAL\n== second\nc = 3\n-- ended: power off\n");

    [Test]
    public void The_same_answers_agree()
    {
        ScriptComparison comparison = ScriptComparison.Make("x", Xen, Xen, []);
        Assert.That(comparison.IsGood);
        Assert.That(comparison.Cases.SelectMany(static c => c.Lines).Select(static line => line.Verdict), Is.All.EqualTo(Verdict.Agree));
        Assert.That(SubjectSummary.Of([comparison]), Is.EqualTo(new[] { new SubjectSummary("x", 2, 0, 0, 0, 0) }));
    }

    [TestCase("== first\na = 1\nb = -EFAULT\n== second\nc = 3\n-- ended: power off\n", "b", TestName = "Another errno")]
    [TestCase("== first\na = 1\n== second\nc = 3\n-- ended: power off\n", "b", TestName = "A step that was not reached")]
    [TestCase("== first\na = 1\nq = #GP\nb = -EINVAL\n== second\nc = 3\n-- ended: power off\n", "q", TestName = "An exception in a quiet step")]
    [TestCase("== first\na = 1\nb = -EINVAL\n== second\nc = 3\n-- ended: crash\n", ScriptComparison.EndStep, TestName = "Another end")]
    public void A_difference_is_found_and_only_it(string text, string step)
    {
        ScriptComparison comparison = ScriptComparison.Make("x", Xen, Transcript.Parse("s", text), []);
        Assert.That(comparison.IsGood, Is.False);
        IEnumerable<LineComparison> differing = comparison.Cases.SelectMany(static c => c.Lines).Where(static line => line.Verdict == Verdict.Differ);
        Assert.That(differing.Select(static line => line.Step), Is.EqualTo(new[] { step }));
    }

    [Test]
    public void A_known_difference_explains_its_own_step_and_answer_only()
    {
        Transcript other = Transcript.Parse("s", "== first\na = 2\nb = -EFAULT\n== second\nc = 3\n-- ended: power off\n");
        KnownDifference right = KnownDifference.ByDesign("s", "first", "b", "-EFAULT", "Because it is so.");
        KnownDifference wrongAnswer = KnownDifference.NotBuilt("s", "first", "a", "7", "Because it is so.");
        ScriptComparison comparison = ScriptComparison.Make("x", Xen, other, [right, wrongAnswer]);
        Assert.That(comparison.Cases[0].Lines.Select(static line => line.Verdict), Is.EqualTo(new[] { Verdict.Differ, Verdict.Explained }));
        Assert.That(comparison.Stale, Is.EqualTo(new[] { wrongAnswer }));
    }

    [Test]
    public void A_known_difference_that_does_not_show_is_a_fault()
    {
        ScriptComparison comparison = ScriptComparison.Make("x", Xen, Xen, [KnownDifference.CaseNotBuilt("s", "second", "Because it is so.")]);
        Assert.That(comparison.IsGood, Is.False);
        Assert.That(comparison.Stale, Has.Count.EqualTo(1));
    }

    [Test]
    public void What_neither_came_to_is_not_reached()
    {
        Transcript cut = Transcript.Parse("s", "== first\na = 1\nb = -EINVAL\n== second\nc = (not reached)\n-- ended: crash\n");
        ScriptComparison comparison = ScriptComparison.Make("x", cut, cut, []);
        Assert.That(comparison.IsGood);
        Assert.That(comparison.Cases[1].Lines[0].Verdict, Is.EqualTo(Verdict.NotReached));
    }

    [Test]
    public void Transcripts_of_different_scripts_are_refused_with_a_sentence()
    {
        Transcript other = Transcript.Parse("s", "== first\na = 1\n-- ended: power off\n");
        Assert.That(() => ScriptComparison.Make("x", Xen, other, []), Throws.TypeOf<OracleException>().With.Message.Contains("--record"));
    }

    [Test]
    public void The_page_is_whole_and_takes_hostile_text_as_text()
    {
        Transcript other = Transcript.Parse("s", "== first\na = <script>alert(1)</script>\nb = -EINVAL\n== second\nc = 3\n-- ended: power off\n");
        string page = HtmlReport.Of("Xen <4.17>", [ScriptComparison.Make("x", Xen, other, [])]);
        Assert.That(page, Does.StartWith("<!DOCTYPE html>").And.EndWith("</html>\n"));
        Assert.That(page, Does.Not.Contain("<script>").And.Contain("&lt;script&gt;").And.Contain("Xen &lt;4.17&gt;"));
        Assert.That(page, Does.Not.Contain("http"), "it is self-contained");
    }
}
