// A process that ends in any of the usual ways leaves the terminal as it found it.

using System.Diagnostics;
using System.Runtime.CompilerServices;
using System.Text;
using Tmds.Linux;
using XenSharp.Cli.Terminal;

namespace XenSharp.Cli.Tests.Terminal;

[TestFixture]
[CancelAfter(60_000)]
public sealed class TerminalExitTests
{
    /// <summary>Set for the child, so that it knows what it is.</summary>
    private const string ChildVariable = "XENSHARP_TEST_TERMINAL_CHILD";

    private PseudoTerminal _terminal = null!;
    private string _before = null!;
    private Process _child = null!;

    [SetUp]
    public void SetUp()
    {
        _terminal = new PseudoTerminal();
        _before = _terminal.Mode;

        // This assembly as a program of its own. Without core files, as some of its ends are meant to be ugly, and with signals that do
        // what they do in a terminal, even where the tests themselves were started to ignore some.
        string dotnet = Path.GetFullPath(Path.Combine(Path.GetDirectoryName(typeof(object).Assembly.Location)!, "../../../dotnet"));
        string self = typeof(TerminalExitTests).Assembly.Location;
        var start = new ProcessStartInfo("/bin/sh", ["-c", "ulimit -c 0; exec env --default-signal=HUP,INT,QUIT \"$0\" exec \"$1\" <\"$2\" >\"$2\"", dotnet, self, _terminal.Name])
        {
            RedirectStandardError = true,
        };
        start.Environment[ChildVariable] = "1";
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
        Assert.That(_child.WaitForExit(60_000));
        Assert.That(_terminal.Mode, Is.EqualTo(_before));
        Assert.That(_child.ExitCode, Is.EqualTo(128 + signal), "the signal's own effect");
    }

    [TestCase("e", 3, TestName = "An exit from anywhere puts the terminal back")]
    [TestCase("t", 128 + 6, TestName = "An unhandled exception puts the terminal back")]
    public void OtherWaysOut(string key, int status)
    {
        _terminal.Type(Encoding.ASCII.GetBytes(key));
        Assert.That(_child.WaitForExit(60_000));
        Assert.That(_terminal.Mode, Is.EqualTo(_before));
        Assert.That(_child.ExitCode, Is.EqualTo(status));
    }

    [Test]
    public void A_stopped_process_gives_the_terminal_back_until_it_continues()
    {
        Send(LibC.SIGTSTP);
        WaitUntil(() => State == 'T');
        Assert.That(_terminal.Mode, Is.EqualTo(_before));
        Send(LibC.SIGCONT);
        WaitUntil(() => _terminal.IsRaw);
        Thread.Sleep(100); // Whatever else .NET does to its terminal after a SIGCONT.
        Assert.That(_terminal.IsRaw, "raw only for a moment");
        Send(LibC.SIGTERM);
        Assert.That(_child.WaitForExit(60_000));
        Assert.That(_terminal.Mode, Is.EqualTo(_before));
    }

    /// <summary>
    /// The child: when this assembly is started with the variable set, it has a session at its standard input and output.
    /// It is given a thread, because the initializer of a module must not wait for what other threads do in it.
    /// </summary>
    [ModuleInitializer]
    internal static void StartChild()
    {
        if (Environment.GetEnvironmentVariable(ChildVariable) is not null)
            new Thread(RunChild).Start();
    }

    private static void RunChild()
    {
        var domain = new FakeDomain();
        _ = new TerminalSession().RunAsync(domain.Console, domain.Completion);
        while (true)
        {
            byte[] typed = domain.Read(1);
            if (typed.Contains((byte)'e'))
                Environment.Exit(3);
            if (typed.Contains((byte)'t'))
                throw new InvalidOperationException("an exception nobody handles");
        }
    }

    /// <summary>The child's state as proc(5) has it: T for stopped.</summary>
    private char State => File.ReadAllText($"/proc/{_child.Id}/stat").Split(") ")[1][0];

    private void Send(int signal) => Assert.That(LibC.kill(_child.Id, signal), Is.Zero);

    private static void WaitUntil(Func<bool> condition) => Assert.That(SpinWait.SpinUntil(condition, TimeSpan.FromSeconds(60)));
}
