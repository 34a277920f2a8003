// The ABI scripts on hardware-style KVM, held against real Xen's recorded transcripts.

using XenSharp.Guests.Fetching;
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts;
using XenSharp.Oracle.Beds;
using XenSharp.Oracle.Comparison;
using XenSharp.Oracle.Differences;

namespace XenSharp.Nested.Tests;

/// <summary>What <see cref="NestedKvmBedTests"/> needs.</summary>
[TestFixture(true)]
[TestFixture(false)]
[Category("Nested")]
[CancelAfter(900_000)]
public sealed class NestedConformanceTests(bool nestedPaging)
{
    /// <summary>Two processors' worth of emulation lie between a script and this machine.</summary>
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(90);

    private readonly Dictionary<string, ScriptRun> _runs = [];

    private static IEnumerable<string> Scripts => AbiScripts.Create().Select(static script => script.Name);

    [OneTimeSetUp]
    public async Task RunAllAsync()
    {
        var bed = new NestedKvmBed(new GuestCache(GuestCache.DefaultRoot()), await NativeCommand.GetAsync(), nestedPaging);
        try
        {
            await foreach (ScriptRun run in ScriptRun.RunAsync(bed, AbiScripts.Create(), Patience))
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
}
