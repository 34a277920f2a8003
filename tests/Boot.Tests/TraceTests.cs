// run and demo --trace: what is known of a guest is in its trace, and what cannot be written gets a sentence.

using System.Text.Json;
using XenSharp.Cli.Tests;
using XenSharp.Core;
using XenSharp.Core.Trace;
using XenSharp.Guests;
using XenSharp.Toolstack;

namespace XenSharp.Boot.Tests;

[TestFixture]
[Parallelizable(ParallelScope.Self)]
[CancelAfter(600_000)]
public sealed class TraceTests : KvmFixture
{
    /// <summary>What the talkative guest prints: some thousand hypercalls.</summary>
    private const int FloodBytes = 2_000_000;

    private string _folder = null!;

    [OneTimeSetUp]
    public void MakeFolder() => _folder = Directory.CreateTempSubdirectory("xensharp-boot-test-").FullName;

    [OneTimeTearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public async Task The_tiny_guest_is_there_from_its_start_to_its_shutdown_and_twice_the_same()
    {
        foreach (string name in (string[])["tiny1", "tiny2"])
        {
            CommandEnd run = await CommandProcess.RunAsync("demo", "--tiny", "--trace", PathOf(name));
            Assert.That((run.Status, run.Output), Is.EqualTo((0, new TinyGuestOptions().Message)), run.Error);
        }

        using TraceFile file = Open("tiny1");
        Assert.That(file.Damage, Is.Null);
        Assert.That((file.Header.GuestName, file.Header.XenVersion), Is.EqualTo(("demo", "4.17")));
        Assert.That(file.Header.TscKiloHertz, Is.EqualTo(Host.Capabilities.TimeStampCounter.KiloHertz));
        Assert.That(file.Header.StartTime, Is.EqualTo(DateTimeOffset.UtcNow).Within(TimeSpan.FromMinutes(5)));

        // It asks where the M2P is, prints through the ring, and is done.
        TraceRecord[] records = [.. file.Records()];
        Assert.That(records.Select(record => (record.Kind, record.Number, record.Arguments.A0, record.Result)), Is.EqualTo(new[]
        {
            (TraceKind.Boot, 0UL, 0UL, 0L),
            (TraceKind.Hypercall, (ulong)HypercallNumber.MemoryOp, 12UL, 0L),
            (TraceKind.Hypercall, (ulong)HypercallNumber.EventChannelOp, 4UL, 0L),
            (TraceKind.Hypercall, (ulong)HypercallNumber.SchedOp, 2UL, 0L),
        }));
        Assert.That(records.Select(record => record.Rip >> 32), Is.All.EqualTo(0xffff_ffff));

        CommandEnd diff = await CommandProcess.RunAsync("trace", "diff", PathOf("tiny1"), PathOf("tiny2"));
        Assert.That((diff.Status, diff.Output), Is.EqualTo((0, "The same: 4 records.\n")), diff.Error);
    }

    [Test]
    public async Task Another_guest_differs()
    {
        _ = await CommandProcess.RunAsync([.. RunOf(TinyGuestBehaviour.PowerOff), "--trace", PathOf("poweroff")]);
        CommandEnd crash = await CommandProcess.RunAsync([.. RunOf(TinyGuestBehaviour.UndefinedInstruction), "--trace", PathOf("undefined")]);
        Assert.That(crash.Status, Is.EqualTo(1), "the guest's own end");
        CommandEnd diff = await CommandProcess.RunAsync("trace", "diff", PathOf("poweroff"), PathOf("undefined"));
        Assert.That(diff.Status, Is.EqualTo(1), diff.Error);
        Assert.That(diff.Output, Does.Contain("\n- sched_op(shutdown, *) = 0\n+ #UD(error 0) ud2 -> crashed\n"));
    }

    [Test]
    public async Task Each_boot_of_a_guest_that_reboots_is_in_one_trace()
    {
        using CommandProcess process = CommandProcess.Start([.. RunOf(TinyGuestBehaviour.Reboot), "--on-reboot", "restart", "--trace", PathOf("reboots")]);
        var seen = new byte[18];
        await process.Output.ReadExactlyAsync(seen);
        process.Send(15);
        Task drained = process.Output.CopyToAsync(Stream.Null);
        Assert.That(await process.WaitAsync(), Is.EqualTo(143));
        await drained;
        using TraceFile file = Open("reboots");
        Assert.That(file.Damage, Is.Null, "a signal ends it in order");
        Assert.That(file.Records().Count(record => record.Kind == TraceKind.Boot), Is.GreaterThanOrEqualTo(3));
    }

    [Test]
    public async Task What_a_killed_command_leaves_is_read()
    {
        using CommandProcess process = CommandProcess.Start([.. RunOf(TinyGuestBehaviour.SpinForever), "--trace", PathOf("killed")]);
        Assert.That(SpinWait.SpinUntil(() => IsReadable("killed"), 60_000), process.Error);
        process.Send(9);
        _ = await process.WaitAsync();
        CommandEnd end = await CommandProcess.RunAsync("trace", PathOf("killed"));
        Assert.That(end.Status, Is.Zero);
        Assert.That(end.Error, Does.Contain("has no end: the run that wrote it was killed, or goes on still."));
        Assert.That(end.Output, Does.Contain("the domain starts").And.Contain("event_channel_op(send, {port 1}) = 0"));
    }

    [TestCase("a-text", "exists and is no trace")]
    [TestCase("", "empty name")]
    [TestCase(".", "is a folder")]
    [TestCase("missing/trace", "its folder does not exist")]
    [TestCase("/dev/full", "No space left on device")]
    public async Task A_trace_that_cannot_be_begun_gets_a_sentence_and_nothing_is_booted(string path, string sentence)
    {
        await File.WriteAllTextAsync(PathOf("a-text"), "precious");
        string full = path.Length == 0 || path.StartsWith('/') ? path : PathOf(path);
        CommandEnd end = await CommandProcess.RunAsync([.. RunOf(TinyGuestBehaviour.PowerOff), "--trace", full]);
        Assert.That(end.Status, Is.EqualTo(2));
        Assert.That(end.Error, Does.Contain(sentence).And.StartWith("xensharp: ").And.EndsWith(".\n"));
        Assert.That(end.Error.Count(character => character == '\n'), Is.EqualTo(1));
        Assert.That(end.Output, Is.Empty);
        Assert.That(await File.ReadAllTextAsync(PathOf("a-text")), Is.EqualTo("precious"));
    }

    [Test]
    public async Task A_trace_without_permission_gets_a_sentence()
    {
        string secret = PathOf("secret");
        await File.WriteAllTextAsync(secret, "");
        Assert.That(Cli.Tests.Terminal.Descriptors.ChangeMode(secret, 0), Is.Zero);
        Assert.That(Cli.Tests.Terminal.Descriptors.ChangeMode(_folder, 0b111_101_101), Is.Zero);
        if (Environment.UserName == "root")
        {
            // The superuser may write everything but what the kernel says no to.
            secret = "/proc/version";
        }

        CommandEnd end = await CommandProcess.RunAsync([.. RunOf(TinyGuestBehaviour.PowerOff), "--trace", secret]);
        Assert.That(end.Status, Is.EqualTo(2));
        Assert.That(end.Error, Does.Contain("no permission to write").Or.Contain("cannot be written"));
    }

    [Test]
    public async Task A_disk_that_fills_up_ends_the_trace_and_not_the_guest()
    {
        // A file system of 16 KiB that only the command sees.
        string disk = Directory.CreateDirectory(PathOf("disk")).FullName;
        string isolate = Environment.UserName == "root" ? "unshare --mount" : "unshare --map-root-user --mount";
        using (CommandProcess probe = CommandProcess.StartInShell($"{isolate} mount -t tmpfs -o size=16k none '{disk}'"))
        {
            if ((await probe.FinishAsync()).Status != 0)
                Assert.Ignore("this machine lets nobody mount a small file system.");
        }

        string path = Path.Combine(disk, "trace");
        string kept = PathOf("kept");
        using CommandProcess process = CommandProcess.StartInShell(
            $"exec {isolate} sh -c \"mount -t tmpfs -o size=16k none '{disk}' && \\\"\\$@\\\"; s=\\$?; cp '{path}' '{kept}'; exit \\$s\" sh \"$0\" \"$@\"",
            Flood(path));
        CommandEnd end = await process.FinishAsync();
        Assert.That(end.Output, Has.Length.EqualTo(FloodBytes), "the guest ran to its end: " + end.Error);
        Assert.That(end.Status, Is.EqualTo(2));
        Assert.That(end.Error, Does.Contain($"The trace {path} ends early, since it could not be written (No space left on device)"));
        CommandEnd list = await CommandProcess.RunAsync("trace", kept);
        Assert.That(list.Error, Does.Contain("breaks off").Or.Contain("has no end").Or.Contain("no whole block"));
    }

    [Test]
    public async Task A_reader_of_the_trace_that_leaves_ends_it_and_not_the_guest()
    {
        string path = PathOf("pipe");
        using CommandProcess process = CommandProcess.StartInShell($"mkfifo '{path}'; head -c 100 '{path}' >/dev/null & exec \"$0\" \"$@\"", Flood(path));
        CommandEnd end = await process.FinishAsync();
        Assert.That(end.Output, Has.Length.EqualTo(FloodBytes), "the guest ran to its end: " + end.Error);
        Assert.That(end.Status, Is.EqualTo(2));
        Assert.That(end.Error, Does.Contain($"The trace {path} ends early, since it could not be written (Broken pipe)"));
    }

    [Test]
    public async Task A_trace_can_go_through_a_pipe()
    {
        string path = PathOf("sound-pipe");
        string copy = PathOf("copy");
        using CommandProcess process = CommandProcess.StartInShell(
            $"mkfifo '{path}'; cat '{path}' >'{copy}' & \"$0\" \"$@\"; s=$?; wait; exit $s", [.. RunOf(TinyGuestBehaviour.PowerOff), "--trace", path]);
        CommandEnd end = await process.FinishAsync();
        Assert.That(end.Status, Is.Zero, end.Error);
        using TraceFile file = Open("copy");
        Assert.That((file.Damage, file.Count), Is.EqualTo(((string?)null, 4UL)));
    }

    [Test]
    [Category("Debian")]
    public async Task A_Debian_boot_is_there_as_a_whole()
    {
        string path = PathOf("debian");
        CommandEnd run = await CommandProcess.RunAsync("cat /proc/interrupts\n", ["demo", "--trace", path]);
        Assert.That(run.Status, Is.Zero, run.Error);
        using TraceFile file = Open("debian");
        Assert.That(file.Damage, Is.Null);
        var counts = new Dictionary<(TraceKind, ulong), int>();
        ulong last = 0;
        int[] depths = [0, 0];
        foreach (TraceRecord record in file.Records())
        {
            (TraceKind Kind, ulong) key = (record.Kind, record.Kind == TraceKind.Hypercall ? record.Number : 0);
            counts[key] = counts.GetValueOrDefault(key) + 1;
            depths[record.Has(TraceFlags.Nested) ? 1 : 0]++;
            Assert.That(record.Start, Is.GreaterThanOrEqualTo(last), "in order");
            last = record.Start;
        }

        int Hypercalls(HypercallNumber number) => counts.GetValueOrDefault((TraceKind.Hypercall, (ulong)number));
        Assert.Multiple(() =>
        {
            // What a boot of this kernel makes, see the notes on the platform: the numbers move by a few per cent.
            Assert.That(Hypercalls(HypercallNumber.MmuUpdate), Is.InRange(20_000, 100_000));
            Assert.That(Hypercalls(HypercallNumber.MmuextOp), Is.InRange(5_000, 40_000));
            Assert.That(Hypercalls(HypercallNumber.Iret), Is.InRange(500, 20_000));
            Assert.That(Hypercalls(HypercallNumber.Multicall), Is.GreaterThan(50));
            Assert.That(Hypercalls(HypercallNumber.SetTrapTable), Is.GreaterThan(0));
            Assert.That(counts[(TraceKind.Boot, 0)], Is.EqualTo(1));
            Assert.That(counts[(TraceKind.Exception, 0)], Is.InRange(300, 20_000), "page faults");
            Assert.That(counts[(TraceKind.Upcall, 0)], Is.InRange(200, 20_000), "timer ticks");
            Assert.That(counts[(TraceKind.Emulation, 0)], Is.InRange(3_000, 40_000), "rdmsr, cpuid, cli, stores to page tables");
            Assert.That(counts[(TraceKind.SystemCall, 0)], Is.InRange(100, 20_000));
            Assert.That(depths[1], Is.GreaterThan(200), "calls in multicalls");
        });

        // A kernel shuts down once, and says so last.
        CommandEnd shutdown = await CommandProcess.RunAsync("trace", path, "--hypercall", "sched_op/shutdown", "--json");
        using JsonDocument only = JsonDocument.Parse(shutdown.Output);
        Assert.That(only.RootElement.GetProperty("kind").GetString(), Is.EqualTo("hypercall"));
    }

    [Test]
    public async Task The_domain_s_own_count_of_hypercalls_is_the_trace_s()
    {
        using var bytes = new MemoryStream();
        ulong counted;
        using (var recorder = new TraceRecorder(bytes, new TraceHeader(1_000_000, 0, DateTimeOffset.UnixEpoch, "tiny", "4.17", "test")))
        {
            await using var running = RunningDomain.Create(
                Host, Tiny(TinyGuestBehaviour.ConsoleFlood, floodBytes: 200_000) with { Trace = recorder }, new Devices.Console.StreamSink(Stream.Null));
            running.Start();
            Assert.That((await running.Completion).Reason, Is.EqualTo(Domains.ShutdownReason.PowerOff));
            counted = running.Domain.HypercallCount;
            Assert.That(running.Domain.AllocatedBytes, Is.LessThan(4096), "no allocation a record");
        }

        using TraceFile file = TraceFile.Open(new MemoryStream(bytes.ToArray()));
        Assert.That(file.Records().Count(record => record.Kind == TraceKind.Hypercall && !record.Has(TraceFlags.Nested)), Is.EqualTo((int)counted));
        Assert.That(counted, Is.GreaterThan(50));
    }

    private string[] Flood(string trace) =>
    [
        "run", "--kernel", Write("flood", new TinyGuestOptions { Message = "", Behaviour = TinyGuestBehaviour.ConsoleFlood, FloodBytes = FloodBytes }),
        "--memory", "16", "--trace", trace,
    ];

    private bool IsReadable(string name)
    {
        try
        {
            using TraceFile file = Open(name);
            return file.Count >= 3;
        }
        catch (Exception failure) when (failure is IOException or TraceFormatException)
        {
            return false;
        }
    }

    private TraceFile Open(string name) => TraceFile.Open(new FileStream(PathOf(name), FileMode.Open, FileAccess.Read, FileShare.ReadWrite | FileShare.Delete));

    private string[] RunOf(TinyGuestBehaviour behaviour)
        => ["run", "--kernel", Write(behaviour.ToString(), new TinyGuestOptions { Message = "hello\n", Behaviour = behaviour }), "--memory", "16"];

    private string Write(string name, TinyGuestOptions options)
    {
        string path = PathOf("kernel-" + name);
        File.WriteAllBytes(path, TinyGuest.Build(options));
        return path;
    }

    private string PathOf(string name) => Path.Combine(_folder, name);
}
