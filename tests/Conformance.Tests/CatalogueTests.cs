// The catalogue of scripts and what was recorded of them.

using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts;
using XenSharp.Oracle.Comparison;
using XenSharp.Oracle.Differences;

namespace XenSharp.Conformance.Tests;

public sealed class CatalogueTests
{
    /// <summary>What the comparison is worth, at the least.</summary>
    private const int LeastCases = 250;

    [Test]
    public void Names_are_unique_and_fit_for_files()
    {
        string[] names = [.. AbiScripts.Create().Select(static script => script.Name)];
        Assert.That(names, Is.Unique);
        Assert.That(names, Is.All.Match("^[a-z0-9-]{1,40}$"));
    }

    [Test]
    public void Every_script_was_recorded_and_nothing_else()
        => Assert.That(RecordedTruth.Scripts, Is.EquivalentTo(AbiScripts.Create().Select(static script => script.Name)));

    [Test]
    public void There_are_enough_cases_and_as_many_of_errors_as_of_others()
    {
        CaseTranscript[] cases = [.. RecordedTruth.Scripts.SelectMany(static script => RecordedTruth.Of(script).Cases)];
        Assert.That(cases, Has.Length.AtLeast(LeastCases));
        int errors = cases.Count(static c => c.Lines.Any(static line => line.Answer is { } answer
            && (answer.StartsWith("-E", StringComparison.Ordinal) || answer.StartsWith('#') || answer.StartsWith("(not", StringComparison.Ordinal))));
        Assert.That(errors, Is.AtLeast(cases.Length / 2));
    }

    [Test]
    public void Recordings_are_of_the_scripts_as_they_are()
    {
        foreach (AbiScript script in AbiScripts.Create())
        {
            Transcript recorded = RecordedTruth.Of(script.Name);
            Assert.That(recorded.Cases.Select(static c => c.Name), Is.EqualTo(script.Cases), script.Name);
            HashSet<string> steps = [.. script.Steps.Select(static step => step.Text)];
            Assert.That(recorded.Cases.SelectMany(static c => c.Lines).Where(line => !steps.Contains(line.Step)), Is.Empty, script.Name);
            Assert.That(
                recorded.Cases.Sum(static c => c.Lines.Count), Is.AtLeast(script.Steps.Count(static step => !step.Quiet)), script.Name);
        }
    }

    [Test]
    public void Known_differences_name_cases_that_exist_and_say_why()
    {
        Dictionary<string, AbiScript> scripts = AbiScripts.Create().ToDictionary(static script => script.Name);
        foreach (KnownDifference difference in KnownDifferences.All)
        {
            Assert.That(scripts, Contains.Key(difference.Script), difference.ToString());
            Assert.That(scripts[difference.Script].Cases, Contains.Item(difference.Case), difference.ToString());
            Assert.That(difference.Reason, Has.Length.AtLeast(20).And.EndWith("."), difference.ToString());
            Assert.That(difference.Step is null, Is.EqualTo(difference.Answer is null), difference.ToString());
        }
    }
}
