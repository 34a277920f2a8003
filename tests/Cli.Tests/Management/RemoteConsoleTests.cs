// The terminal at the console of a domain that the daemon runs.

using System.Text;
using System.Text.Json;
using XenSharp.Api;
using XenSharp.Cli.Tests.Terminal;

namespace XenSharp.Cli.Tests.Management;

[TestFixture]
[CancelAfter(120_000)]
public sealed class RemoteConsoleTests
{
    private const string Console = "GET /v1/domains/3/console?history=true&channel=0";

    private static readonly DomainInfo s_domain = new()
    {
        Id = 3, Name = "web", Uuid = Guid.Empty, State = new DomainStateInfo(), MemoryKiB = 1, TargetMemoryKiB = 1, MaximumMemoryKiB = 1, OnlineVcpus = 1,
        MaximumVcpus = 1, ProcessorSeconds = 0, StartTime = DateTimeOffset.UnixEpoch, UptimeSeconds = 0,
    };

    private static readonly string s_json = JsonSerializer.Serialize(s_domain, ApiJson.Default.DomainInfo);

    private FakeDaemon _daemon = null!;

    [SetUp]
    public void StartDaemon() => _daemon = new FakeDaemon().On("GET /v1/domains/web", s_json);

    [TearDown]
    public void StopDaemon() => _daemon.Dispose();

    [Test]
    public async Task KeysGoToTheGuestItsOutputToTheScreenAndTheDetachKeyLeaves()
    {
        var typed = new TaskCompletionSource<string>(TaskCreationOptions.RunContinuationsAsynchronously);
        _daemon.OnStream(Console, async (_, stream) =>
        {
            await UpgradeAsync(stream, "login: ");
            byte[] keys = new byte[5];
            await stream.ReadExactlyAsync(keys);
            typed.SetResult(Encoding.UTF8.GetString(keys));
            await stream.WriteAsync("welcome"u8.ToArray());
            await stream.CopyToAsync(System.IO.Stream.Null);
        });
        using var terminal = new PseudoTerminal();
        string before = terminal.Mode;
        using CommandProcess command = CommandProcess.StartAt(terminal.Name, "console", "web", "--daemon", _daemon.Path);
        Assert.That(ReadScreen(terminal, 7), Is.EqualTo("login: "));
        terminal.Type("root\r"u8);
        Assert.That(await typed.Task, Is.EqualTo("root\r"));
        Assert.That(ReadScreen(terminal, 7), Is.EqualTo("welcome"));
        terminal.Type([0x1d]);
        Assert.That(await command.WaitAsync(), Is.Zero);
        Assert.That(terminal.Mode, Is.EqualTo(before));
        Assert.That(command.Error.Trim(), Is.Empty);
    }

    [Test]
    public async Task TheDomainsEndIsTheSessionsAndPipedInputIsTyped()
    {
        var typed = new TaskCompletionSource<string>(TaskCreationOptions.RunContinuationsAsynchronously);
        _daemon.OnStream(Console, async (_, stream) =>
        {
            await UpgradeAsync(stream, "# ");
            byte[] keys = new byte[9];
            await stream.ReadExactlyAsync(keys);
            typed.SetResult(Encoding.UTF8.GetString(keys));
            await stream.WriteAsync("bye"u8.ToArray());
        });
        CommandEnd end = await CommandProcess.RunAsync("poweroff", ["console", "web", "--daemon", _daemon.Path]);
        Assert.That(end, Is.EqualTo(new CommandEnd(0, "# bye", "")));
        Assert.That(await typed.Task, Is.EqualTo("poweroff\u0004"));
    }

    [Test]
    public async Task CreateWithAConsoleUnpausesTheDomainOnceSomebodyLooks()
    {
        var unpaused = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        _daemon.On("POST /v1/domains", JsonSerializer.Serialize(new CreateDomainResult { Domain = s_domain }, ApiJson.Default.CreateDomainResult));
        _daemon.OnStream("POST /v1/domains/3/unpause", async (_, stream) =>
        {
            await stream.WriteAsync(FakeDaemon.Answer("204 No Content", "text/plain", ""));
            unpaused.SetResult();
        });
        _daemon.OnStream(Console, async (_, stream) =>
        {
            await UpgradeAsync(stream, string.Empty);
            await unpaused.Task;
            await stream.WriteAsync("booting"u8.ToArray());
        });
        CommandEnd end = await CommandProcess.RunAsync(
            "create", "-c", "--name", "web", "--kernel", "/k", "--memory", "64", "--daemon", _daemon.Path);
        Assert.That((end.Status, end.Output), Is.EqualTo((0, "booting")), end.Error);
        Assert.That(_daemon.Requests.Select(static request => request.Line), Is.EqualTo(new[] { "POST /v1/domains", Console, "POST /v1/domains/3/unpause" }));
        Assert.That(_daemon.Requests[0].Body, Does.Contain("\"paused\":true"));
    }

    [Test]
    public async Task AConsoleThatIsNotToBeHadIsSaid()
    {
        _daemon.OnProblem(Console, 409, ProblemKind.WrongState, "The domain web has no such console.");
        CommandEnd end = await CommandProcess.RunAsync("console", "web", "--daemon", _daemon.Path);
        Assert.That((end.Status, end.Output, end.Error), Is.EqualTo((1, "", "xensharp: The domain web has no such console.\n")));
    }

    [Test]
    public async Task TopDrawsWhatTheWindowHasRoomForTakesKeysAndLeavesTheTerminalAsItWas()
    {
        _daemon.On("GET /v1/domains", $"[{s_json}]");
        _daemon.On("GET /v1/host", JsonSerializer.Serialize(
            new HostInfo
            {
                Host = "h", Release = "6.1", Machine = "x86_64", Processors = 8, TotalMemoryMiB = 16000, FreeMemoryMiB = 9000, Version = "1", XenVersion = "4.17",
                KvmDevice = "/dev/kvm", Domains = 1, StartTime = DateTimeOffset.UnixEpoch, ProcessId = 1, StateFolder = "/state",
            },
            ApiJson.Default.HostInfo));
        using var terminal = new PseudoTerminal();
        terminal.Resize(40, 10);
        string before = terminal.Mode;

        // An hour between two looks: what is drawn a second time is drawn for the key.
        using CommandProcess command = CommandProcess.StartAt(terminal.Name, "top", "--delay", "3600", "--daemon", _daemon.Path);
        string screen = ReadScreenTo(terminal, "\e[J");
        Assert.That(screen, Does.StartWith("\e[?1049h\e[?25l\e[H"));

        // The terminal itself makes \r\n of each \n.
        string[] lines = screen.Replace("\r", string.Empty, StringComparison.Ordinal).Split("\e[K\n");
        Assert.That(lines, Has.Length.LessThanOrEqualTo(10).And.Some.StartsWith(" ").And.Some.Contains(" web "));
        Assert.That(lines.Select(static line => line[(line.LastIndexOf('H') is var at && line.StartsWith('\e') ? at + 1 : 0)..].Length), Is.All.LessThanOrEqualTo(40));
        terminal.Type("x "u8);
        Assert.That(ReadScreenTo(terminal, "\e[J"), Does.Contain("\e[H"));
        Assert.That(_daemon.Requests.Count(static request => request.Line == "GET /v1/domains"), Is.EqualTo(2));
        terminal.Type("q"u8);
        Assert.That(ReadScreenTo(terminal, "\e[?1049l"), Does.EndWith("\e[?25h\e[?1049l"));
        Assert.That(await command.WaitAsync(), Is.Zero);
        Assert.That(terminal.Mode, Is.EqualTo(before));
        Assert.That(command.Error.Trim(), Is.Empty);
    }

    [Test]
    public async Task BashCompletesWithWhatTheCommandSays()
    {
        if (!File.Exists("/bin/bash"))
            Assert.Ignore("There is no bash here to complete in.");
        _daemon.On("GET /v1/domains", $"[{s_json}]");

        // The command under its own name, as bash finds it in PATH; the script as bash would read it; and the words as readline gives them.
        string script = """
            set -e
            folder=$(mktemp -d); trap 'rm -r "$folder"' EXIT
            printf '#!/bin/sh\nexec "%s" exec "%s" "$@"\n' "$0" "$2" > "$folder/xensharp"; chmod +x "$folder/xensharp"
            PATH="$folder:$PATH"
            export XENSHARP_SOCKET="$3"
            bash -c '
                eval "$(xensharp completion bash)"
                try() { COMP_LINE="$1"; COMP_POINT=${#1}; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _xensharp; echo "${COMPREPLY[*]}"; }
                try "xensharp vcpu-" xensharp vcpu-
                try "xensharp pause " xensharp pause ""
                try "xensharp pause w" xensharp pause w
                try "xensharp shutdown --a" xensharp shutdown --a
            '
            """;
        using CommandProcess command = CommandProcess.StartInShell(script, _daemon.Path);
        CommandEnd end = await command.FinishAsync();
        Assert.That(end.Output.Split('\n'), Is.EqualTo(new[] { "vcpu-list vcpu-pin vcpu-set", "web", "web", "--all", "" }), end.Error);
    }

    private static async Task UpgradeAsync(Stream stream, string text)
        => await stream.WriteAsync(Encoding.UTF8.GetBytes($"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {ApiRoutes.ConsoleProtocol}\r\n\r\n{text}"));

    private static string ReadScreenTo(PseudoTerminal terminal, string end)
    {
        var text = new StringBuilder();
        while (!text.ToString().Contains(end, StringComparison.Ordinal))
            text.Append(Encoding.UTF8.GetString(terminal.ReadScreen()));
        return text.ToString();
    }

    private static string ReadScreen(PseudoTerminal terminal, int length)
    {
        var text = new StringBuilder();
        while (text.Length < length)
            text.Append(Encoding.UTF8.GetString(terminal.ReadScreen()));
        return text.ToString();
    }
}
