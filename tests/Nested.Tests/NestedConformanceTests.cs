// The ABI scripts on hardware-style KVM, held against real Xen's recorded transcripts.

using System.Text;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts;
using XenSharp.Oracle.Beds;
using XenSharp.Oracle.Comparison;
using XenSharp.Oracle.Differences;
using XenSharp.Oracle.Nested;

namespace XenSharp.Nested.Tests;

/// <summary>What <see cref="NestedKvmBedTests"/> needs.</summary>
[TestFixture(true)]
[TestFixture(false)]
[Category("Nested")]
[Parallelizable(ParallelScope.Self)]
[CancelAfter(1_200_000)]
public sealed class NestedConformanceTests(bool nestedPaging)
{
    /// <summary>Two processors' worth of emulation lie between a script and this machine.</summary>
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(90);

    /// <summary>Memory of the two domains of a pair.</summary>
    private const int PairMiB = 96;

    private readonly Dictionary<string, ScriptRun> _runs = [];

    private static IEnumerable<string> Scripts => Alone.Select(static script => script.Name);

    /// <summary>What the bed runs, which has one domain at a time.</summary>
    private static IReadOnlyList<AbiScript> Alone => [.. AbiScripts.Create().Where(static script => !script.IsPair)];

    [OneTimeSetUp]
    public async Task RunAllAsync()
    {
        var bed = new NestedKvmBed(new GuestCache(GuestCache.DefaultRoot()), await NativeCommand.GetAsync(), nestedPaging);
        try
        {
            await foreach (ScriptRun run in ScriptRun.RunAsync(bed, Alone, Patience))
                _runs.Add(run.Script.Name, run);
        }
        catch (GuestFetchException missing)
        {
            Assert.Ignore(missing.Message);
        }
    }

    [TestCaseSource(nameof(Scripts))]
    public void XenSharp_answers_as_Xen_did(string name)
    {
        ScriptRun run = _runs[name];
        ScriptComparison comparison = ScriptComparison.Make(run.Script.Subject, RecordedTruth.Of(name), run.Transcript, KnownDifferences.All);
        Assert.That(comparison.Complaints(), Is.Empty, run.Report);
    }

    [Test]
    public async Task Pairs_of_domains_answer_as_Xen_did()
    {
        string[] pairs = [.. AbiScripts.Create().Where(static script => script.IsPair).Select(static script => script.Name)];
        Assert.That(pairs, Is.Not.Empty);
        string script = $$"""
            xensharp compare {{string.Join(' ', pairs)}} >/tmp/comparison 2>&1
            echo "$? $(base64 -w 0 /tmp/comparison)" >&3
            """;
        var machine = new NestedMachine(new GuestCache(GuestCache.DefaultRoot()), await NativeCommand.GetAsync(), nestedPaging, null);
        List<string> lines = [];
        await foreach (string line in machine.RunAsync(script, [], PairMiB, TimeSpan.FromMinutes(10), TestContext.CurrentContext.CancellationToken))
            lines.Add(line);
        Assert.That(lines, Has.Count.EqualTo(1));
        string[] words = lines[0].Split(' ');
        Assert.That(words[0], Is.EqualTo("0"), () => Encoding.UTF8.GetString(Convert.FromBase64String(words[1])));
    }
}
