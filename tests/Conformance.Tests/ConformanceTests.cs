// XenSharp held against real Xen's recorded transcripts, without QEMU.

using XenSharp.Boot.Tests;
using XenSharp.Cli.Compare;
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts;
using XenSharp.Oracle.Beds;
using XenSharp.Oracle.Comparison;
using XenSharp.Oracle.Differences;

namespace XenSharp.Conformance.Tests;

[TestFixture]
[CancelAfter(300_000)]
public sealed class ConformanceTests : KvmFixture
{
    /// <summary>What stands in the transcript of a script that sets a time at which something is to happen.</summary>
    private static readonly string[] s_wordsOfTime = ["timer", "poll", "watchdog"];

    /// <summary>How often such a script is asked at most.</summary>
    private const int Attempts = 3;

    private static IEnumerable<string> Scripts() => AbiScripts.Create().Select(static script => script.Name);

    /// <summary>
    /// Scripts about timers set one some tens of milliseconds ahead, and then do what it is to interrupt. A machine that holds the guest up for
    /// longer than that makes it another script, so one that does not answer as Xen did is asked again; any other has to at once.
    /// </summary>
    [TestCaseSource(nameof(Scripts))]
    public async Task XenSharp_answers_as_Xen_did(string name)
    {
        Transcript expected = RecordedTruth.Of(name);
        string text = expected.ToText();
        int attempts = s_wordsOfTime.Any(word => text.Contains(word, StringComparison.Ordinal)) ? Attempts : 1;
        IReadOnlyList<string> complaints = [];
        string report = string.Empty;
        for (int attempt = 0; attempt < attempts && (attempt == 0 || complaints.Count > 0); attempt++)
        {
            AbiScript script = AbiScripts.Create().Single(script => script.Name == name);
            ScriptRun run = await ScriptRun.RunAsync(new XenSharpBed(Host), [script]).SingleAsync();
            complaints = ScriptComparison.Make(script.Subject, expected, run.Transcript, KnownDifferences.All).Complaints();
            report = run.Report;
            if (complaints.Count > 0)
                TestContext.Out.WriteLine($"{complaints[0]} {report}");
        }

        Assert.That(complaints, Is.Empty, report);
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
        // Longer where this machine has so much else to do that the guest has not come to the loop.
        string transcript = string.Empty;
        foreach (int seconds in (int[])[2, 10, 60])
        {
            (GuestRun run, transcript) = await HangAsync(seconds);
            Assert.That(run.Ending, Is.EqualTo(GuestEnding.TimedOut));
            Assert.That(run.Report, Does.Contain($"{seconds} s"));
            if (transcript.Contains("1 = 1", StringComparison.Ordinal))
                break;
        }

        Assert.That(transcript, Is.EqualTo(
            "== a loop\n1 = 1\nkernel: jmp $ = (not reached)\n2 = (not reached)\n-- ended: timed out, before the script's end\n"));
    }

    private async Task<(GuestRun Run, string Transcript)> HangAsync(int seconds)
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
        var guest = new BedGuest(script.Name, script.Build()) { MemoryMiB = 32, Timeout = TimeSpan.FromSeconds(seconds) };
        GuestRun run = await new XenSharpBed(Host).RunAsync([guest]).SingleAsync();
        return (run, script.Read(run.Console, "timed out").ToText());
    }
}
