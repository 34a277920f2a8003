// xensharp trace with traces that are whole, broken off, and damaged. No KVM is needed.

using System.Text.Json;
using XenSharp.Core;
using XenSharp.Core.Trace;

namespace XenSharp.Cli.Tests;

[TestFixture]
[CancelAfter(120_000)]
[Parallelizable(ParallelScope.Children)]
public sealed class TraceCommandTests
{
    private string _folder = null!;

    [OneTimeSetUp]
    public void MakeFolder()
    {
        _folder = Directory.CreateTempSubdirectory("xensharp-cli-test-").FullName;
        File.WriteAllBytes(PathOf("whole"), Trace(5000));
        File.WriteAllBytes(PathOf("shorter"), Trace(4990));
        byte[] cut = Trace(50_000);
        File.WriteAllBytes(PathOf("cut"), cut[..(cut.Length * 3 / 4)]);
        cut[cut.Length / 2] ^= 1;
        File.WriteAllBytes(PathOf("damaged"), cut);
    }

    [OneTimeTearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public async Task Records_are_listed_a_line_each()
    {
        CommandEnd end = await CommandProcess.RunAsync("trace", PathOf("whole"), "--limit", "3");
        Assert.That((end.Status, end.Error), Is.EqualTo((0, "")));
        string[] lines = end.Output.TrimEnd().Split('\n');
        Assert.That(lines, Has.Length.EqualTo(3));
        Assert.That(lines[1], Does.StartWith("    0.000001  vcpu0 ").And.EndsWith("hypercall  sched_op(yield, 0x3e8) = -EINVAL"));
    }

    [Test]
    public async Task A_list_goes_on_where_the_shell_is_in_its_output()
    {
        string output = PathOf("output");
        using CommandProcess process = CommandProcess.StartInShell(
            $"{{ echo before; \"$0\" \"$@\"; echo after; }} >'{output}'", "trace", PathOf("whole"), "--limit", "2");
        _ = await process.FinishAsync();
        string[] lines = await File.ReadAllLinesAsync(output);
        Assert.That((lines.Length, lines[0], lines[^1]), Is.EqualTo((4, "before", "after")));
    }

    [Test]
    public async Task Json_is_an_object_a_line()
    {
        CommandEnd end = await CommandProcess.RunAsync("trace", PathOf("whole"), "--json", "--errors", "--from", "0.000002");
        string[] lines = end.Output.TrimEnd().Split('\n');
        Assert.That(lines, Has.Length.EqualTo(2499), "every other one fails, and the first of these is too early");
        using JsonDocument record = JsonDocument.Parse(lines[0]);
        JsonElement root = record.RootElement;
        Assert.That(root.GetProperty("name").GetString(), Is.EqualTo("sched_op/yield"));
        Assert.That(root.GetProperty("arguments").EnumerateArray().Select(argument => argument.GetString()), Is.EqualTo(new[] { "0x0", "0xbb8" }));
        Assert.That((root.GetProperty("result").GetInt64(), root.GetProperty("error").GetString()), Is.EqualTo((-22, "EINVAL")));
        Assert.That((root.GetProperty("time").GetDouble(), root.GetProperty("nanoseconds").GetDouble()), Is.EqualTo((3e-6, 100.0)));
    }

    [Test]
    public async Task A_summary_has_figures_and_a_picture()
    {
        string svg = PathOf("picture.svg");
        CommandEnd end = await CommandProcess.RunAsync("trace", "summary", PathOf("whole"), "--json", "--svg", svg);
        Assert.That((end.Status, end.Error), Is.EqualTo((0, "")));
        using JsonDocument summary = JsonDocument.Parse(end.Output);
        JsonElement row = summary.RootElement.GetProperty("rows")[0];
        Assert.That((row.GetProperty("count").GetInt32(), row.GetProperty("errors").GetInt32(), row.GetProperty("total").GetDouble()), Is.EqualTo((5000, 2500, 500_000.0)));
        Assert.That(await File.ReadAllTextAsync(svg), Does.StartWith("<svg ").And.EndWith("</svg>\n"));

        end = await CommandProcess.RunAsync("trace", "summary", PathOf("whole"));
        Assert.That(end.Output, Does.Contain("5,000 records").And.Contain("sched_op/yield"));
    }

    [Test]
    public async Task Two_runs_are_the_same_or_differ_and_the_status_says_so()
    {
        CommandEnd same = await CommandProcess.RunAsync("trace", "diff", PathOf("whole"), PathOf("whole"));
        Assert.That((same.Status, same.Output), Is.EqualTo((0, "The same: 5,000 records.\n")));
        CommandEnd different = await CommandProcess.RunAsync("trace", "diff", PathOf("whole"), PathOf("shorter"));
        Assert.That(different.Status, Is.EqualTo(1));
        Assert.That(different.Output, Does.Contain("\n- sched_op(yield, *) = -EINVAL\n").And.Contain("10 of 5,000 records only in").And.Contain(" 0 of 4,990 only in"));
    }

    [TestCase("cut", "breaks off within the block at byte")]
    [TestCase("damaged", "is damaged in the block at byte")]
    public async Task What_is_left_of_a_trace_is_shown_with_a_note(string name, string note)
    {
        foreach (string[] command in (string[][])[["trace"], ["trace", "summary"]])
        {
            CommandEnd end = await CommandProcess.RunAsync([.. command, PathOf(name)]);
            Assert.That(end.Status, Is.Zero);
            Assert.That(end.Error, Does.StartWith($"xensharp: The trace {PathOf(name)} {note}").And.EndsWith(".\n"));
            Assert.That(end.Output, Is.Not.Empty);
        }
    }

    [Test]
    public async Task A_trace_can_come_through_a_pipe()
    {
        using CommandProcess process = CommandProcess.StartInShell($"cat '{PathOf("whole")}' | \"$0\" \"$@\"", "trace", "/dev/stdin", "--limit", "1");
        CommandEnd end = await process.FinishAsync();
        Assert.That((end.Status, end.Error), Is.EqualTo((0, "")));
        Assert.That(end.Output, Does.Contain("sched_op"));
    }

    [Test]
    public async Task A_reader_that_leaves_ends_the_list_quietly()
    {
        using CommandProcess process = CommandProcess.StartInShell(
            "{ \"$0\" \"$@\"; echo \"status $?\" >&2; } | head -n 1", "trace", PathOf("whole"), "--json");
        CommandEnd end = await process.FinishAsync();
        Assert.That(end.Output.Count(character => character == '\n'), Is.EqualTo(1));
        Assert.That(end.Error, Is.EqualTo("status 141\n"));
    }

    [Test]
    public async Task A_full_output_gets_a_sentence()
    {
        if (!File.Exists("/dev/full"))
            Assert.Ignore("this machine has no /dev/full.");
        using CommandProcess process = CommandProcess.StartInShell("exec \"$0\" \"$@\" >/dev/full", "trace", PathOf("whole"));
        CommandEnd end = await process.FinishAsync();
        Assert.That(end.Status, Is.EqualTo(2));
        Assert.That(end.Error, Is.EqualTo("xensharp: Standard output cannot be written (No space left on device); send it where there is room for it.\n"));
    }

    /// <summary>A trace of so many hypercalls, one a microsecond, every other one refused.</summary>
    internal static byte[] Trace(int count)
    {
        var bytes = new MemoryStream();
        using (var recorder = new TraceRecorder(bytes, new TraceHeader(1_000_000, 0, DateTimeOffset.UnixEpoch, "test", "4.17", "0")))
        {
            for (ulong i = 0; i < (ulong)count; i++)
            {
                recorder.Stream(0).Append(new TraceRecord
                {
                    Kind = TraceKind.Hypercall,
                    Flags = TraceFlags.KernelMode,
                    Start = i * 1000,
                    Duration = 100,
                    Number = (ulong)HypercallNumber.SchedOp,
                    ArgumentCount = 2,
                    Arguments = new HypercallArguments { A1 = i * 1000 },
                    Result = i % 2 == 0 ? 0 : -22,
                });
            }
        }

        return bytes.ToArray();
    }

    private string PathOf(string name) => Path.Combine(_folder, name);
}
