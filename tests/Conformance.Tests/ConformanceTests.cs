// XenSharp held against real Xen's recorded transcripts, without QEMU.

using XenSharp.Boot.Tests;
using XenSharp.Cli.Compare;
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts;
using XenSharp.Oracle.Comparison;
using XenSharp.Oracle.Differences;

namespace XenSharp.Conformance.Tests;

[TestFixture]
[CancelAfter(120_000)]
public sealed class ConformanceTests : KvmFixture
{
    private static IEnumerable<string> Scripts() => AbiScripts.Create().Select(static script => script.Name);

    [TestCaseSource(nameof(Scripts))]
    public async Task XenSharp_answers_as_Xen_did(string name)
    {
        AbiScript script = AbiScripts.Create().Single(script => script.Name == name);
        ScriptRun run = await ScriptRun.RunAsync(new XenSharpBed(Host), [script]).SingleAsync();
        ScriptComparison comparison = ScriptComparison.Make(script.Subject, RecordedTruth.Of(name), run.Transcript, KnownDifferences.All);
        Assert.That(comparison.Complaints(), Is.Empty, run.Report);
    }

    [Test]
    public async Task Answers_are_the_same_on_every_run([Values("update-va-mapping")] string name)
    {
        List<string> transcripts = [];
        for (int i = 0; i < 3; i++)
        {
            AbiScript script = AbiScripts.Create().Single(script => script.Name == name);
            ScriptRun run = await ScriptRun.RunAsync(new XenSharpBed(Host), [script]).SingleAsync();
            transcripts.Add(run.Transcript.ToText());
        }

        Assert.That(transcripts.Distinct().Count(), Is.EqualTo(1));
    }

    [Test]
    public async Task A_script_that_hangs_is_timed_out_and_says_where()
    {
        var script = new AbiScript("hangs", "nothing", static s => s.Case("a loop", static c =>
        {
            c.Show(1);
            c.Kernel("jmp $", static assembler =>
            {
                Iced.Intel.Label self = assembler.CreateLabel();
                assembler.Label(ref self);
                assembler.jmp(self);
            });
            c.Show(2);
        }));
        var guest = new Oracle.Beds.BedGuest(script.Name, script.Build()) { MemoryMiB = 32, Timeout = TimeSpan.FromSeconds(3) };
        Oracle.Beds.GuestRun run = await new XenSharpBed(Host).RunAsync([guest]).SingleAsync();
        Assert.That(run.Ending, Is.EqualTo(Oracle.Beds.GuestEnding.TimedOut));
        Assert.That(run.Report, Does.Contain("3 s"));
        Assert.That(script.Read(run.Console, "timed out").ToText(), Is.EqualTo(
            "== a loop\n1 = 1\nkernel: jmp $ = (not reached)\n2 = (not reached)\n-- ended: timed out, before the script's end\n"));
    }
}
