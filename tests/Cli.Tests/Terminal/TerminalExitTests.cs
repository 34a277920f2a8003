// A process that ends in any of the usual ways leaves the terminal as it found it.

using System.Diagnostics;
using System.Runtime.CompilerServices;
using Tmds.Linux;
using XenSharp.Cli.Terminal;

namespace XenSharp.Cli.Tests.Terminal;

[TestFixture]
[CancelAfter(60_000)]
public sealed class TerminalExitTests
{
    /// <summary>Set for the child: the path of its terminal.</summary>
    private const string TerminalVariable = "XENSHARP_TEST_TERMINAL";

    private PseudoTerminal _terminal = null!;
    private string _before = null!;
    private Process _child = null!;

    [SetUp]
    public void SetUp()
    {
        _terminal = new PseudoTerminal();
        _before = _terminal.Mode;

        // This assembly as a program of its own. Without core files, as some of its ends are meant to be ugly.
        string dotnet = Path.GetFullPath(Path.Combine(Path.GetDirectoryName(typeof(object).Assembly.Location)!, "../../../dotnet"));
        string self = typeof(TerminalExitTests).Assembly.Location;
        var start = new ProcessStartInfo("/bin/sh", ["-c", "ulimit -c 0; exec \"$0\" exec \"$1\"", dotnet, self])
        {
            RedirectStandardInput = true,
            RedirectStandardError = true,
        };
        start.Environment[TerminalVariable] = _terminal.Name;
        _child = Process.Start(start)!;
        _child.ErrorDataReceived += (_, _) => { };
        _child.BeginErrorReadLine();
        WaitUntil(() => _terminal.IsRaw);
    }

    [TearDown]
    public void TearDown()
    {
        if (!_child.HasExited)
            _child.Kill();
        _child.Dispose();
        _terminal.Dispose();
    }

    [TestCase(1, TestName = "SIGHUP puts the terminal back")]
    [TestCase(2, TestName = "SIGINT puts the terminal back")]
    [TestCase(3, TestName = "SIGQUIT puts the terminal back")]
    [TestCase(15, TestName = "SIGTERM puts the terminal back")]
    public void Signals(int signal)
    {
        Send(signal);
        Assert.That(_child.WaitForExit(20_000));
        Assert.That(_terminal.Mode, Is.EqualTo(_before));
        Assert.That(_child.ExitCode, Is.EqualTo(128 + signal), "the signal's own effect");
    }

    [TestCase("exit", 3)]
    [TestCase("throw", 128 + 6)]
    public void Other_ways_out(string way, int status)
    {
        _child.StandardInput.WriteLine(way);
        Assert.That(_child.WaitForExit(20_000));
        Assert.That(_terminal.Mode, Is.EqualTo(_before));
        Assert.That(_child.ExitCode, Is.EqualTo(status));
    }

    [Test]
    public void A_stopped_process_gives_the_terminal_back_until_it_continues()
    {
        Send(LibC.SIGTSTP);
        WaitUntil(() => _terminal.Mode == _before);
        Send(LibC.SIGCONT);
        WaitUntil(() => _terminal.IsRaw);
        Send(LibC.SIGTERM);
        Assert.That(_child.WaitForExit(20_000));
        Assert.That(_terminal.Mode, Is.EqualTo(_before));
    }

    /// <summary>
    /// The child: when this assembly is started with a terminal's path in the environment, it has a session there.
    /// It is given a thread, because the initializer of a module must not wait for what other threads do in it.
    /// </summary>
    [ModuleInitializer]
    internal static void StartChild()
    {
        if (Environment.GetEnvironmentVariable(TerminalVariable) is string path)
            new Thread(() => RunChild(path)).Start();
    }

    private static void RunChild(string path)
    {
        int descriptor = PseudoTerminal.Open(path);
        var domain = new FakeDomain();
        _ = new TerminalSession(descriptor, descriptor).RunAsync(domain.Console, domain.Completion);
        switch (Console.ReadLine())
        {
            case "exit":
                Environment.Exit(3);
                break;
            case "throw":
                throw new InvalidOperationException("an exception nobody handles");
        }
    }

    private void Send(int signal) => Assert.That(LibC.kill(_child.Id, signal), Is.Zero);

    private static void WaitUntil(Func<bool> condition) => Assert.That(SpinWait.SpinUntil(condition, TimeSpan.FromSeconds(20)));
}
