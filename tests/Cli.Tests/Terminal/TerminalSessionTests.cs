// Sessions at a console over real pseudo-terminals, pipes and files.

using System.Text;
using XenSharp.Cli.Terminal;
using XenSharp.Devices.Console;

namespace XenSharp.Cli.Tests.Terminal;

[TestFixture]
[CancelAfter(60_000)]
public sealed class TerminalSessionTests
{
    private FakeDomain _domain = null!;
    private PseudoTerminal _terminal = null!;
    private string _before = null!;

    [SetUp]
    public void SetUp()
    {
        _domain = new FakeDomain();
        _terminal = new PseudoTerminal();
        _before = _terminal.Mode;
    }

    [TearDown]
    public void TearDown()
    {
        _domain.Dispose();
        _terminal.Dispose();

        // A thread that was joined may be in the kernel's list for a moment longer.
        bool none = SpinWait.SpinUntil(
            () => !Directory.GetDirectories("/proc/self/task").Any(task => ThreadName(task).StartsWith("console ", StringComparison.Ordinal)),
            TimeSpan.FromSeconds(60));
        Assert.That(none, "threads left behind");
    }

    [Test]
    public async Task The_terminal_is_raw_during_the_session_and_as_before_after_it()
    {
        Assert.That(_terminal.IsRaw, Is.False);
        Task<SessionEnd> session = Attach();
        Assert.That(_terminal.IsRaw);
        _domain.PowerOff();
        Assert.That(await session, Is.EqualTo(new SessionEnd(SessionEndReason.DomainEnded)));
        Assert.That(_terminal.Mode, Is.EqualTo(_before));
    }

    [Test]
    public async Task Every_other_key_goes_to_the_guest_and_every_byte_to_the_screen()
    {
        Task<SessionEnd> session = Attach();
        byte[] keys = [.. Enumerable.Range(0, 256).Select(i => (byte)i).Where(key => key != 0x1d)];
        _terminal.Type(keys);
        Assert.That(_domain.Read(keys.Length), Is.EqualTo(keys));

        byte[] text = [.. Enumerable.Range(0, 256).Select(i => (byte)i)];
        _domain.Print(text);
        Assert.That(ReadScreen(text.Length), Is.EqualTo(text));
        _domain.PowerOff();
        await session;
    }

    [Test]
    public async Task The_last_words_are_shown()
    {
        Task<SessionEnd> session = Attach();
        _domain.Print("reboot: Power down\r\n"u8);
        _domain.PowerOff();
        await session;
        Assert.That(Encoding.ASCII.GetString(ReadScreen("reboot: Power down\r\n".Length)), Is.EqualTo("reboot: Power down\r\n"));
    }

    [Test]
    public async Task The_detach_key_leaves_the_domain_running()
    {
        Task<SessionEnd> session = Attach();
        _terminal.Type("ls\x1dnot for the guest"u8);
        Assert.That((await session).Reason, Is.EqualTo(SessionEndReason.Detached));
        Assert.That(_terminal.Mode, Is.EqualTo(_before));
        Assert.That(Encoding.ASCII.GetString(_domain.Read()), Is.EqualTo("ls").Or.Empty);

        // Another session goes on where this one ended.
        _domain.Print("still here"u8);
        session = Attach();
        Assert.That(Encoding.ASCII.GetString(ReadScreen(10)), Is.EqualTo("still here"));
        _domain.PowerOff();
        await session;
    }

    [Test]
    public async Task The_detach_key_works_behind_much_that_the_guest_does_not_read()
    {
        Task<SessionEnd> session = Attach();
        _terminal.Type(new byte[100_000]);
        _terminal.Type([0x1d]);
        Assert.That((await session).Reason, Is.EqualTo(SessionEndReason.Detached));
        Assert.That(_domain.Read(), Has.Length.EqualTo(1024));
    }

    [TestCase(false)]
    [TestCase(true)]
    public async Task The_detach_key_works_while_the_screen_is_stuck(bool atTheEnd)
    {
        Task<SessionEnd> session = Attach();
        FillScreen();
        if (atTheEnd)
            _domain.PowerOff();
        _terminal.Type([0x1d]);
        Assert.That((await session).Reason, Is.EqualTo(SessionEndReason.Detached));
        Assert.That(_terminal.Mode, Is.EqualTo(_before));
    }

    [Test]
    public async Task Cancellation_ends_a_session_with_a_stuck_screen_and_puts_the_terminal_back()
    {
        using var cancel = new CancellationTokenSource();
        Task<SessionEnd> session = Attach(cancellation: cancel.Token);
        FillScreen();
        await cancel.CancelAsync();
        Assert.That(async () => await session, Throws.InstanceOf<OperationCanceledException>());
        Assert.That(_terminal.Mode, Is.EqualTo(_before));
    }

    [Test]
    public async Task A_closed_window_is_no_end_of_file_for_the_guest()
    {
        Task<SessionEnd> session = Attach();
        _terminal.CloseWindow();
        _domain.Print("x"u8);
        SessionEnd end = await session;
        Assert.That(end.Reason, Is.EqualTo(SessionEndReason.OutputClosed));
        Assert.That(end.Output!.Message, Is.EqualTo("Input/output error"));
        Assert.That(end.InputFailure, Is.Null);
        Assert.That(_domain.InputProduced, Is.Zero);
    }

    [TestCase("")]
    [TestCase("uname -a\n")]
    // Under a name with such characters its result is not recorded.
    [TestCase("with a ^] in it: \x1d, and a ^D: \x04.\n", TestName = "The_end_of_a_pipe_is_one_end_of_file_behind_keys_that_mean_something_at_a_terminal")]
    public async Task The_end_of_a_pipe_is_one_end_of_file_for_the_guest_and_no_end_of_the_session(string text)
    {
        (int readEnd, int writeEnd) = Descriptors.Pipe();
        Task<SessionEnd> session = new TerminalSession(readEnd, _terminal.Slave).RunAsync(_domain.Console, _domain.Completion);
        Descriptors.Write(writeEnd, Encoding.ASCII.GetBytes(text));
        Descriptors.Close(writeEnd);
        Assert.That(Encoding.ASCII.GetString(_domain.Read(text.Length + 1)), Is.EqualTo(text + "\x04"));
        Assert.That(_terminal.Mode, Is.EqualTo(_before), "a terminal that is not the input stays as it is");

        _domain.Print("goodbye"u8);
        Assert.That(ReadScreen(7), Is.EqualTo("goodbye"u8.ToArray()));
        Assert.That(session.IsCompleted, Is.False);
        _domain.PowerOff();
        Assert.That(await session, Is.EqualTo(new SessionEnd(SessionEndReason.DomainEnded)));
        Assert.That(_domain.Read(), Is.Empty, "more than one ^D");
        Descriptors.Close(readEnd);
    }

    [Test]
    public async Task A_file_larger_than_all_buffers_arrives_complete()
    {
        byte[] script = new byte[300_000];
        new Random(7).NextBytes(script);
        string path = Path.Combine(Path.GetTempPath(), $"xensharp-input-{Guid.NewGuid():N}");
        await File.WriteAllBytesAsync(path, script);
        try
        {
            using var file = new FileStream(path, FileMode.Open);
            Task<SessionEnd> session = new TerminalSession((int)file.SafeFileHandle.DangerousGetHandle(), _terminal.Slave)
                .RunAsync(_domain.Console, _domain.Completion);
            Assert.That(_domain.Read(script.Length + 1), Is.EqualTo((byte[])[.. script, 0x04]));
            _domain.PowerOff();
            await session;
        }
        finally
        {
            File.Delete(path);
        }
    }

    [Test]
    public async Task A_domain_that_ends_stops_input_that_waits()
    {
        (int readEnd, int writeEnd) = Descriptors.Pipe();
        Task<SessionEnd> session = new TerminalSession(readEnd, _terminal.Slave).RunAsync(_domain.Console, _domain.Completion);
        Descriptors.Write(writeEnd, new byte[60_000]);
        Assert.That(SpinWait.SpinUntil(() => _domain.InputProduced == 1024, TimeSpan.FromSeconds(20)));
        _domain.PowerOff();
        Assert.That((await session).Reason, Is.EqualTo(SessionEndReason.DomainEnded));
        Descriptors.Close(readEnd);
        Descriptors.Close(writeEnd);
    }

    private static string[] ThreadNames()
        => [.. Directory.GetDirectories("/proc/self/task").Select(static task =>
        {
            try
            {
                return File.ReadAllText(Path.Combine(task, "comm")).TrimEnd();
            }
            catch (IOException)
            {
                return "gone";
            }
        })];

    [Test]
    public async Task An_input_that_cannot_be_read_is_reported_and_the_domain_runs_on()
    {
        (int readEnd, int writeEnd) = Descriptors.Pipe();
        Descriptors.Close(readEnd); // Makes poll(2) return for the write end, which cannot be read.
        Task<SessionEnd> session = new TerminalSession(writeEnd, _terminal.Slave).RunAsync(_domain.Console, _domain.Completion);
        _domain.Print("running"u8);
        Assert.That(ReadScreen(7), Is.EqualTo("running"u8.ToArray()));

        // Before the domain ends the reader must have met its error, on which its thread ends.
        Assert.That(() => ThreadNames(), Does.Not.Contain("console input").After(20_000, 10));
        _domain.PowerOff();
        Assert.That((await session).InputFailure, Is.EqualTo("The console's input cannot be read: Bad file descriptor."));
        Assert.That(_domain.InputProduced, Is.Zero);
        Descriptors.Close(writeEnd);
    }

    [Test]
    public async Task A_reader_of_the_output_that_goes_away_ends_the_session_and_not_the_domain()
    {
        (int readEnd, int writeEnd) = Descriptors.Pipe();
        Task<SessionEnd> session = new TerminalSession(_terminal.Slave, writeEnd).RunAsync(_domain.Console, _domain.Completion);
        _domain.Print("first\n"u8);
        Assert.That(Encoding.ASCII.GetString(Descriptors.Read(readEnd)), Is.EqualTo("first\n"));
        Descriptors.Close(readEnd);
        _domain.Print("second\n"u8);
        SessionEnd end = await session;
        Assert.That(end.Reason, Is.EqualTo(SessionEndReason.OutputClosed));
        Assert.That(end.Output!.ReaderGone);
        Assert.That(_terminal.Mode, Is.EqualTo(_before));
        Descriptors.Close(writeEnd);
    }

    [Test]
    public async Task A_log_gets_what_the_screen_gets()
    {
        using var log = new MemoryStream();
        Task<SessionEnd> session = Attach(new StreamSink(log));
        _domain.Print("logged"u8);
        Assert.That(ReadScreen(6), Is.EqualTo("logged"u8.ToArray()));
        _domain.PowerOff();
        await session;
        Assert.That(log.ToArray(), Is.EqualTo("logged"u8.ToArray()));
    }

    private Task<SessionEnd> Attach(IConsoleSink? log = null, CancellationToken cancellation = default) =>
        new TerminalSession(_terminal.Slave, _terminal.Slave).RunAsync(_domain.Console, _domain.Completion, log, cancellation);

    private byte[] ReadScreen(int count)
    {
        var bytes = new List<byte>();
        while (bytes.Count < count)
            bytes.AddRange(_terminal.ReadScreen());
        return [.. bytes];
    }

    /// <summary>Prints until nothing moves any more, as nobody looks at the screen, and not because a thread is held up.</summary>
    private void FillScreen()
    {
        while (SpinWait.SpinUntil(() => _domain.Print(new byte[2048]) > 0, 100) || !_terminal.IsFull || !Sleeps("console output"))
            ;
    }

    /// <summary>Whether the thread of that name waits for something, and would run otherwise.</summary>
    private static bool Sleeps(string name)
        => Directory.GetDirectories("/proc/self/task").Where(task => ThreadName(task).TrimEnd() == name)
            .Any(static task => File.ReadAllText(Path.Combine(task, "stat")).Split(") ")[1][0] == 'S');

    private static string ThreadName(string task)
    {
        try
        {
            return File.ReadAllText(Path.Combine(task, "comm"));
        }
        catch (IOException)
        {
            return ""; // It has ended meanwhile.
        }
    }
}
