// The console backend against a front end of the test's own: nothing lost, nothing doubled, order and back-pressure kept.

using System.Diagnostics;
using System.Text;
using XenSharp.Devices.Console;

namespace XenSharp.Devices.Tests.Console;

[TestFixture]
[CancelAfter(60_000)]
public sealed class ConsoleBackendTests
{
    private FakeGuest _guest = null!;
    private ConsoleBackend _console = null!;
    private CancellationTokenSource _stop = null!;

    [SetUp]
    public void SetUp()
    {
        _guest = new FakeGuest();
        _console = _guest.NewBackend();
        _stop = new CancellationTokenSource(TimeSpan.FromSeconds(50));
    }

    [TearDown]
    public void TearDown()
    {
        Assert.That(_guest.Canary.IndexOfAnyExcept((byte)0xc5), Is.EqualTo(-1), "the backend wrote outside the interface");
        _stop.Dispose();
        _guest.Dispose();
    }

    [TestCase(false, TestName = "A flood of 50 MB from a guest that spins arrives complete at a slow sink")]
    [TestCase(true, TestName = "A flood of 50 MB from a guest that sleeps arrives complete at a slow sink")]
    public void Flood(bool guestSleeps)
    {
        const long Total = 50_000_000;
        long position = 0;
        long firstWrong = -1;
        int writes = 0;
        long allocatedBefore = 0;
        long allocatedAfter = 0;
        var sink = new FakeSink((bytes, _) =>
        {
            // Takes now all, now a part; and every so often is slow enough for the ring to fill up.
            writes++;
            int count = writes % 7 == 0 ? 1 + (bytes.Length / 3) : bytes.Length;
            if (writes % 512 == 0)
                Thread.Sleep(1);
            for (int i = 0; i < count; i++)
            {
                if (bytes[i] != Pattern(position + i) && firstWrong < 0)
                    firstWrong = position + i;
            }
            position += count;
            if (writes == 1000)
                allocatedBefore = GC.GetAllocatedBytesForCurrentThread();
            if (writes == 11000)
                allocatedAfter = GC.GetAllocatedBytesForCurrentThread();
            return count;
        });

        Task run = _console.RunAsync(sink, _stop.Token);
        var clock = Stopwatch.StartNew();
        Task printer = Task.Factory.StartNew(() =>
        {
            byte[] text = new byte[5000];
            for (long at = 0; at < Total; at += text.Length)
            {
                for (int i = 0; i < text.Length; i++)
                    text[i] = Pattern(at + i);
                _guest.PrintAll(text, guestSleeps);
            }
        }, TaskCreationOptions.LongRunning);
        printer.Wait();
        _console.CompleteAsync(_stop.Token).Wait();
        run.Wait();
        TestContext.Out.WriteLine($"{Total / 1e6 / clock.Elapsed.TotalSeconds:F0} MB/s in {writes} writes, {_guest.Notifications} notifications");

        Assert.Multiple(() =>
        {
            Assert.That(firstWrong, Is.EqualTo(-1), "first wrong byte");
            Assert.That(position, Is.EqualTo(Total));
            Assert.That(_guest.OutputConsumer, Is.EqualTo((uint)Total));
            Assert.That(allocatedAfter - allocatedBefore, Is.LessThan(1000), "bytes allocated by the output thread in 10,000 writes");
        });
    }

    [Test]
    public async Task What_is_printed_before_the_run_is_delivered()
    {
        _guest.Print("early"u8);
        using var output = new MemoryStream();
        await RunToEnd(output);
        Assert.That(Text(output), Is.EqualTo("early"));
    }

    [Test]
    public async Task What_is_printed_without_a_notification_before_the_end_is_delivered()
    {
        using var output = new MemoryStream();
        Task run = _console.RunAsync(new StreamSink(output), _stop.Token);
        _guest.PrintAll("last words: "u8, sleeps: false);
        _guest.Print("reboot: System halted"u8);
        await _console.CompleteAsync(_stop.Token);
        await run;
        Assert.That(Text(output), Is.EqualTo("last words: reboot: System halted"));
    }

    [Test]
    public async Task A_guest_that_closes_its_port_and_prints_on_is_shown_at_the_end()
    {
        using var output = new MemoryStream();
        Task run = _console.RunAsync(new StreamSink(output), _stop.Token);
        _guest.PrintAll("one,"u8, sleeps: false);
        _guest.ClosePort();
        _guest.Print("two"u8);
        await _console.CompleteAsync(_stop.Token);
        await run;
        Assert.That(Text(output), Is.EqualTo("one,two"));
    }

    [Test]
    public void A_sink_that_waits_holds_the_guest_back()
    {
        byte[] text = Patterned(3000);
        var sink = new MeteredSink();
        Task run = _console.RunAsync(sink, _stop.Token);
        Assert.That(_guest.Print(text), Is.EqualTo(2048));
        _guest.NotifyBackend();

        Assert.That(_guest.Print(text.AsSpan(2048)), Is.Zero, "room without a byte taken");
        sink.Allow(100);
        WaitUntil(() => sink.Taken.Length == 100 && Volatile.Read(ref _guest.OutputConsumer) == 100);
        Assert.That(_guest.Print(text.AsSpan(2048)), Is.EqualTo(100));
        _guest.NotifyBackend();
        sink.Allow(2048);
        WaitUntil(() => sink.Taken.Length == 2148);
        Assert.That(sink.Taken, Is.EqualTo(text[..2148]));

        _console.CompleteAsync(_stop.Token).Wait();
        Assert.That(run.IsCompletedSuccessfully);
    }

    [Test]
    public void A_cancelled_run_is_continued_at_the_first_byte_not_taken()
    {
        byte[] text = Patterned(1500);
        var sink = new MeteredSink();
        using (var detach = CancellationTokenSource.CreateLinkedTokenSource(_stop.Token))
        {
            Task run = _console.RunAsync(sink, detach.Token);
            _guest.Print(text);
            _guest.NotifyBackend();
            sink.Allow(700);
            WaitUntil(() => sink.Taken.Length == 700);
            detach.Cancel();
            Assert.That(async () => await run, Throws.InstanceOf<OperationCanceledException>());
        }
        Assert.That(_guest.OutputConsumer, Is.EqualTo(700));

        using var output = new MemoryStream();
        RunToEnd(output).Wait();
        Assert.That((byte[])[.. sink.Taken, .. output.ToArray()], Is.EqualTo(text));
    }

    [Test]
    public void A_second_reader_is_refused()
    {
        Task run = _console.RunAsync(new MeteredSink(), _stop.Token);
        Assert.That(() => _console.RunAsync(new MeteredSink(), _stop.Token), Throws.InvalidOperationException);
        _console.CompleteAsync(_stop.Token).Wait();
        Assert.That(run.IsCompletedSuccessfully);
    }

    [Test]
    public async Task A_closed_sink_leaves_the_guest_running()
    {
        int calls = 0;
        Task run = _console.RunAsync(new FakeSink((_, _) => { calls++; return 0; }), _stop.Token);
        _guest.PrintAll(Patterned(100_000), sleeps: true);
        await _console.CompleteAsync(_stop.Token);
        await run;
        Assert.That(_guest.OutputConsumer, Is.EqualTo(100_000));
        Assert.That(calls, Is.EqualTo(1));
    }

    [Test]
    public async Task A_sink_that_breaks_its_contract_fails_the_run_and_not_the_process()
    {
        _guest.Print("abc"u8);
        Task run = _console.RunAsync(new FakeSink((bytes, _) => bytes.Length + 1), _stop.Token);
        Assert.That(async () => await run, Throws.InvalidOperationException.With.Message.Contains("took 4 of 3"));
        await _console.CompleteAsync(_stop.Token);
        Assert.That(_guest.OutputConsumer, Is.Zero);
    }

    [Test]
    public async Task Indexes_wrap_at_two_to_the_32()
    {
        using var guest = new FakeGuest(uint.MaxValue - 2);
        var console = guest.NewBackend();
        using var output = new MemoryStream();
        Task run = console.RunAsync(new StreamSink(output), _stop.Token);
        guest.PrintAll("across the wrap"u8, sleeps: false);
        Assert.That(await console.WriteAsync("typed"u8.ToArray(), _stop.Token));
        Assert.That(guest.Read(), Is.EqualTo("typed"u8.ToArray()));
        await console.CompleteAsync(_stop.Token);
        await run;
        Assert.That(Text(output), Is.EqualTo("across the wrap"));
        Assert.That(guest.OutputConsumer, Is.EqualTo(12));
    }

    [Test]
    public void Input_larger_than_the_ring_waits_for_the_guest()
    {
        byte[] typed = Patterned(100_000);
        Task run = _console.RunAsync(new MeteredSink(), _stop.Token);
        Task<bool> write = _console.WriteAsync(typed, _stop.Token).AsTask();
        Assert.That(_guest.InputProducer, Is.EqualTo(1024));
        Assert.That(write.IsCompleted, Is.False);

        var read = new List<byte>();
        int most = 1;
        while (read.Count < typed.Length)
        {
            byte[] part = _guest.Read(most = (most * 5 % 1021) + 1);
            if (part.Length == 0)
                Assert.That(_guest.Interrupt.WaitOne(TimeSpan.FromSeconds(20)), "no input, and no notification of any");
            read.AddRange(part);
        }
        Assert.That(write.Result, Is.True);
        Assert.That(read, Is.EqualTo(typed));
        _console.CompleteAsync(_stop.Token).Wait();
        Assert.That(run.IsCompletedSuccessfully);
    }

    [Test]
    public async Task Input_goes_on_while_output_waits()
    {
        var sink = new MeteredSink();
        using var detach = CancellationTokenSource.CreateLinkedTokenSource(_stop.Token);
        Task run = _console.RunAsync(sink, detach.Token);
        _guest.PrintAll("a prompt nobody reads"u8, sleeps: false);
        Task<bool> write = _console.WriteAsync(Patterned(1500), _stop.Token).AsTask();
        Assert.That(_guest.Read(), Has.Length.EqualTo(1024));
        Assert.That(await write, Is.True);
        Assert.That(_guest.Read(), Has.Length.EqualTo(476));
        await detach.CancelAsync();
        Assert.That(async () => await run, Throws.InstanceOf<OperationCanceledException>());
    }

    [Test]
    public async Task Inputs_of_two_callers_are_not_mixed()
    {
        Task run = _console.RunAsync(new MeteredSink(), _stop.Token);
        Task<bool> first = _console.WriteAsync(Enumerable.Repeat((byte)'a', 3000).ToArray(), _stop.Token).AsTask();
        Task<bool> second = _console.WriteAsync(Enumerable.Repeat((byte)'b', 3000).ToArray(), _stop.Token).AsTask();
        var read = new StringBuilder();
        while (read.Length < 6000)
            read.Append(Encoding.ASCII.GetString(_guest.Read()));
        Assert.That(await first && await second);
        Assert.That(read.ToString(), Is.EqualTo(new string('a', 3000) + new string('b', 3000)));
        await _console.CompleteAsync(_stop.Token);
        await run;
    }

    [TestCase(true)]
    [TestCase(false)]
    public async Task Input_that_waits_ends_with_the_guest(bool byClosedPort)
    {
        Task run = _console.RunAsync(new MeteredSink(), _stop.Token);
        Task<bool> write = _console.WriteAsync(new byte[2000], _stop.Token).AsTask();
        if (byClosedPort)
            _guest.ClosePort();
        else
            await _console.CompleteAsync(_stop.Token);
        Assert.That(await write, Is.False);
        Assert.That(await _console.WriteAsync(new byte[1], _stop.Token), Is.False);
        await _console.CompleteAsync(_stop.Token);
        await run;
    }

    [Test]
    public void Input_that_waits_can_be_cancelled_and_leaves_the_turn_to_the_next()
    {
        using var cancel = new CancellationTokenSource();
        Task<bool> write = _console.WriteAsync(new byte[2000], cancel.Token).AsTask();
        cancel.Cancel();
        Assert.That(async () => await write, Throws.InstanceOf<OperationCanceledException>());
        Assert.That(_guest.Read(), Has.Length.EqualTo(1024));
        Assert.That(_console.WriteAsync(new byte[10]).AsTask().Wait(20_000));
    }

    [Test]
    public unsafe void Misaligned_and_missing_pages_are_refused()
    {
        Assert.That(() => new ConsoleBackend(null, _guest), Throws.ArgumentNullException);
        Assert.That(() => new ConsoleBackend(_guest.Page + 2, _guest), Throws.ArgumentException.With.Message.Contains("aligned"));
    }

    private async Task RunToEnd(Stream output)
    {
        await _console.CompleteAsync(_stop.Token);
        await _console.RunAsync(new StreamSink(output), _stop.Token);
    }

    private static string Text(MemoryStream stream) => Encoding.ASCII.GetString(stream.ToArray());

    private static byte Pattern(long position) => (byte)(((ulong)position * 0x9E3779B97F4A7C15) >> 56);

    private static byte[] Patterned(int length) => [.. Enumerable.Range(0, length).Select(i => Pattern(i))];

    private static void WaitUntil(Func<bool> condition) => Assert.That(SpinWait.SpinUntil(condition, TimeSpan.FromSeconds(20)));
}
