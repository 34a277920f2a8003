// The command itself with tiny guests: statuses, reports, terminal, pipes, signals.

using System.Text;
using System.Text.Json;
using XenSharp.Cli.Tests;
using XenSharp.Cli.Tests.Terminal;
using XenSharp.Guests;

namespace XenSharp.Boot.Tests;

[TestFixture]
[Parallelizable(ParallelScope.Self)]
[CancelAfter(600_000)]
public sealed class CommandTests : KvmFixture
{
    private const string Hello = "hello\n";

    private string _folder = null!;

    [OneTimeSetUp]
    public void MakeFolder() => _folder = Directory.CreateTempSubdirectory("xensharp-boot-test-").FullName;

    [OneTimeTearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public async Task The_tiny_demo_says_hello()
    {
        CommandEnd end = await CommandProcess.RunAsync("demo", "--tiny");
        Assert.That(end.Status, Is.Zero);
        Assert.That(end.Output, Is.EqualTo(new TinyGuestOptions().Message));
        Assert.That(end.Error, Is.EqualTo("xensharp: Booting the tiny guest with 512 MiB of memory.\n"));
    }

    [TestCase(TinyGuestBehaviour.PowerOff, 0, "")]
    [TestCase(TinyGuestBehaviour.Reboot, 3, "asked for a reboot")]
    [TestCase(TinyGuestBehaviour.Crash, 1, "reported that it has crashed")]
    [TestCase(TinyGuestBehaviour.Suspend, 4, "suspended itself")]
    [TestCase(TinyGuestBehaviour.Watchdog, 5, "stopped by its own watchdog")]
    [TestCase(TinyGuestBehaviour.SoftReset, 6, "asked for a soft reset")]
    [TestCase(TinyGuestBehaviour.UndefinedInstruction, 1, "Code: 0f0b")]
    [TestCase(TinyGuestBehaviour.WriteTo, 1, "PageFault")]
    public async Task The_status_says_how_the_guest_ended(TinyGuestBehaviour behaviour, int status, string said)
    {
        CommandEnd end = await CommandProcess.RunAsync(RunOf(behaviour));
        Assert.That(end.Status, Is.EqualTo(status), end.Error);
        Assert.That(end.Output, Is.EqualTo(Hello));
        Assert.That(end.Error, Does.Contain(said));
    }

    [Test]
    public async Task A_guest_that_reboots_is_booted_again_until_the_command_is_told_to_end()
    {
        using CommandProcess process = CommandProcess.Start([.. RunOf(TinyGuestBehaviour.Reboot), "--on-reboot", "restart"]);
        var seen = new byte[3 * Hello.Length];
        await process.Output.ReadExactlyAsync(seen);
        Assert.That(Encoding.ASCII.GetString(seen), Is.EqualTo(Hello + Hello + Hello));
        process.Send(15);
        Task drained = process.Output.CopyToAsync(Stream.Null);
        Assert.That(await process.WaitAsync(), Is.EqualTo(128 + 15));
        await drained;
        Assert.That(process.Error, Does.Contain("was destroyed: signal 15"));
    }

    [TestCase(1)]
    [TestCase(2)]
    [TestCase(3)]
    [TestCase(15)]
    public async Task A_signal_destroys_the_domain_and_restores_the_terminal(int signal)
    {
        using var terminal = new PseudoTerminal();
        string before = terminal.Mode;
        using CommandProcess process = CommandProcess.StartAt(terminal.Name, RunOf(TinyGuestBehaviour.SpinForever));
        new Screen(terminal).WaitFor(Hello);
        Assert.That(terminal.IsRaw);
        process.Send(signal);
        Assert.That(await process.WaitAsync(), Is.EqualTo(128 + signal));
        Assert.That(terminal.Mode, Is.EqualTo(before));
        Assert.That(process.Error, Does.Contain($"was destroyed: signal {signal} asked"));
    }

    [Test]
    public async Task Keys_reach_the_guest_and_the_detach_key_leaves()
    {
        using var terminal = new PseudoTerminal();
        string before = terminal.Mode;
        using CommandProcess process = CommandProcess.StartAt(terminal.Name, RunOf(TinyGuestBehaviour.EchoInput));
        var screen = new Screen(terminal);
        screen.WaitFor(Hello);
        terminal.Type("Hello, guest\x03\r"u8);
        screen.WaitFor("HELLO, GUEST\x03\r");
        terminal.Type([0x1d]);
        Assert.That(await process.WaitAsync(), Is.Zero);
        Assert.That(terminal.Mode, Is.EqualTo(before));
        Assert.That(process.Error, Does.Contain("Ctrl-] ends the domain and leaves.").And.Contain("The domain guest was destroyed."));
    }

    [Test]
    public async Task The_terminal_is_restored_after_a_crash_and_the_report_comes_after_it()
    {
        using var terminal = new PseudoTerminal();
        string before = terminal.Mode;
        using CommandProcess process = CommandProcess.StartAt(terminal.Name, RunOf(TinyGuestBehaviour.UndefinedInstruction));
        new Screen(terminal).WaitFor(Hello);
        Assert.That(await process.WaitAsync(), Is.EqualTo(1));
        Assert.That(terminal.Mode, Is.EqualTo(before));
        Assert.That(process.Error, Does.Contain("InvalidOpcode"));
    }

    [Test]
    public async Task Piped_input_reaches_the_guest_with_its_end()
    {
        string text = string.Concat(Enumerable.Range(0, 2000).Select(i => $"line {i}\n"));
        CommandEnd end = await CommandProcess.RunAsync(text, RunOf(TinyGuestBehaviour.EchoInput));
        Assert.That(end.Status, Is.Zero, end.Error);
        Assert.That(end.Output, Is.EqualTo(Hello + text.ToUpperInvariant()));
    }

    [Test]
    public async Task A_flood_through_a_pipe_is_byte_exact()
    {
        const int Length = 50_000_000;
        string kernel = Write("flood", new TinyGuestOptions { Message = "", Behaviour = TinyGuestBehaviour.ConsoleFlood, FloodBytes = Length });
        using CommandProcess process = CommandProcess.Start("run", "--kernel", kernel, "--memory", "16");
        var buffer = new byte[1 << 16];
        long total = 0;
        int count;
        while ((count = await process.Output.ReadAsync(buffer)) > 0)
        {
            for (int i = 0; i < count; i++, total++)
            {
                if (buffer[i] != TinyGuest.FloodByte(total))
                    Assert.Fail($"byte {total} is {buffer[i]:x2} and should be {TinyGuest.FloodByte(total):x2}");
            }
        }
        Assert.That(total, Is.EqualTo(Length));
        Assert.That(await process.WaitAsync(), Is.Zero);
    }

    [Test]
    public async Task An_output_whose_reader_goes_away_ends_the_command_quietly()
    {
        string kernel = Write("endless", new TinyGuestOptions { Message = "", Behaviour = TinyGuestBehaviour.ConsoleFlood, FloodBytes = 1L << 40 });
        using CommandProcess process = CommandProcess.StartInShell(
            "{ \"$0\" \"$@\"; echo status $? >&2; } | head -c 10000 | wc -c", "run", "--kernel", kernel, "--memory", "16");
        CommandEnd end = await process.FinishAsync();
        Assert.That(end.Output.Trim(), Is.EqualTo("10000"));
        Assert.That(end.Error, Is.EqualTo($"xensharp: Booting {kernel} with 16 MiB of memory.\nstatus 141\n"));
    }

    [Test]
    public async Task A_full_output_gets_a_sentence()
    {
        if (!File.Exists("/dev/full"))
            Assert.Ignore("this machine has no /dev/full.");
        using CommandProcess process = CommandProcess.StartInShell("exec \"$0\" \"$@\" >/dev/full", RunOf(TinyGuestBehaviour.SpinForever));
        CommandEnd end = await process.FinishAsync();
        Assert.That(end.Status, Is.EqualTo(2));
        Assert.That(end.Error, Does.Contain("cannot be written (No space left on device)"));
    }

    [Test]
    public async Task A_log_holds_what_the_guest_printed()
    {
        string log = Path.Combine(_folder, "log");
        CommandEnd end = await CommandProcess.RunAsync([.. RunOf(TinyGuestBehaviour.PowerOff), "--console-log", log]);
        Assert.That(end.Status, Is.Zero);
        Assert.That(await File.ReadAllTextAsync(log), Is.EqualTo(Hello));

        end = await CommandProcess.RunAsync([.. RunOf(TinyGuestBehaviour.PowerOff), "--console-log", _folder]);
        Assert.That(end.Status, Is.EqualTo(2));
        Assert.That(end.Error, Does.Contain($"The console log {_folder} cannot be opened for writing"));
    }

    [Test]
    public async Task Too_little_memory_gets_a_sentence()
    {
        string ramdisk = Path.Combine(_folder, "ramdisk");
        await File.WriteAllBytesAsync(ramdisk, new byte[15 << 20]);
        CommandEnd end = await CommandProcess.RunAsync([.. RunOf(TinyGuestBehaviour.PowerOff), "--ramdisk", ramdisk]);
        Assert.That(end.Status, Is.EqualTo(2));
        Assert.That(end.Error, Does.Contain("16 MiB of memory are too few").And.Contain("--memory"));
        Assert.That(end.Error, Does.Not.Contain("   at "));
    }

    [Test]
    public async Task No_permission_for_the_device_gets_a_sentence()
    {
        string device = Path.Combine(_folder, "kvm");
        await File.WriteAllTextAsync(device, "");
        Assert.That(Descriptors.ChangeMode(device, 0), Is.Zero);
        Assert.That(Descriptors.ChangeMode(_folder, 0b111_101_101), Is.Zero);
        string kernel = Write(nameof(TinyGuestBehaviour.PowerOff), new TinyGuestOptions());

        // The superuser may open everything, and so becomes somebody else first.
        string become = Environment.UserName == "root" ? "exec setpriv --reuid 65534 --regid 65534 --clear-groups " : "exec ";
        using CommandProcess process = CommandProcess.StartInShell(become + "\"$0\" \"$@\"", "--kvm-device", device, "run", "--kernel", kernel);
        CommandEnd end = await process.FinishAsync();
        Assert.That(end.Error, Does.Contain($"No permission to open {device}"));
        Assert.That(end.Status, Is.EqualTo(2));
    }

    [Test]
    public async Task Info_shows_what_the_probes_found()
    {
        CommandEnd end = await CommandProcess.RunAsync("info", "--json");
        Assert.That(end.Status, Is.Zero, end.Error);
        using JsonDocument report = JsonDocument.Parse(end.Output);
        JsonElement kvm = report.RootElement.GetProperty("kvm");
        Assert.That(kvm.GetProperty("shadowPageTables").GetBoolean(), Is.EqualTo(Host.Capabilities.ShadowPageTables));
        Assert.That(kvm.GetProperty("syscallEntryLevel").GetInt32(), Is.EqualTo(Host.Capabilities.SyscallEntryLevel));
        Assert.That(kvm.GetProperty("tscKiloHertz").GetUInt32(), Is.GreaterThan(100_000u));
        Assert.That(report.RootElement.GetProperty("kvmError").ValueKind, Is.EqualTo(JsonValueKind.Null));

        end = await CommandProcess.RunAsync("info");
        Assert.That(end.Status, Is.Zero);
        Assert.That(end.Output, Does.Contain("SYSCALL entry").And.Contain("L4 slot 256").And.Contain("Usable."));
        Assert.That(end.Error, Is.Empty);
    }

    private string[] RunOf(TinyGuestBehaviour behaviour) =>
        ["run", "--kernel", Write(behaviour.ToString(), new TinyGuestOptions { Message = Hello, Behaviour = behaviour }), "--memory", "16"];

    private string Write(string name, TinyGuestOptions options)
    {
        string path = Path.Combine(_folder, name);
        File.WriteAllBytes(path, TinyGuest.Build(options));
        return path;
    }
}
