// Where console output goes: streams, several places at once, raw descriptors with full pipes and vanished readers.

using System.Text;
using CsCheck;
using Tmds.Linux;
using XenSharp.Devices.Console;

namespace XenSharp.Devices.Tests.Console;

[TestFixture]
[CancelAfter(60_000)]
public sealed unsafe class ConsoleSinkTests
{
    /// <summary>F_GETPIPE_SZ of fcntl(2).</summary>
    private const int GetPipeSize = 1032;

    [Test]
    public void A_stream_that_fails_closes_its_sink()
    {
        var stream = new MemoryStream(new byte[4]);
        var sink = new StreamSink(stream);
        Assert.That(sink.Write("ab"u8, default), Is.EqualTo(2));
        Assert.That(sink.Write("abc"u8, default), Is.Zero);
        Assert.That(sink.Failure, Is.TypeOf<NotSupportedException>());
        Assert.That(sink.Write("a"u8, default), Is.Zero);
    }

    [Test]
    public void All_branches_of_a_tee_get_the_same_bytes_however_little_they_take_and_whenever_they_are_cancelled()
    {
        // For each of three sinks a script: how many bytes each call takes, where 0 stands for "waits until cancelled".
        Gen.Select(Gen.Byte.Array[1, 200], Gen.Int[0, 9].Array[1, 40].Array[3]).Sample(
            (text, scripts) =>
            {
                var results = new MemoryStream[3];
                var sinks = new IConsoleSink[3];
                using var cancelled = new CancellationTokenSource();
                cancelled.Cancel();
                for (int i = 0; i < 3; i++)
                {
                    MemoryStream result = results[i] = new MemoryStream();
                    int[] script = scripts[i];
                    int call = 0;
                    sinks[i] = new FakeSink((bytes, cancellation) =>
                    {
                        int most = call < script.Length ? script[call++] : bytes.Length;
                        if (most == 0)
                            throw new OperationCanceledException(cancellation);
                        result.Write(bytes[..Math.Min(most, bytes.Length)]);
                        return Math.Min(most, bytes.Length);
                    });
                }

                var tee = new TeeSink(sinks);
                int position = 0;
                while (position < text.Length)
                {
                    try
                    {
                        position += tee.Write(text.AsSpan(position, Math.Min(20, text.Length - position)), cancelled.Token);
                    }
                    catch (OperationCanceledException)
                    {
                    }
                }
                foreach (MemoryStream result in results)
                    Assert.That(result.ToArray(), Is.EqualTo(text));
            },
            iter: 2000,
            threads: 1);
    }

    [Test]
    public void A_tee_goes_on_while_one_branch_is_open()
    {
        var log = new MemoryStream();
        bool logOpen = true;
        var tee = new TeeSink(
            new FakeSink((_, _) => 0),
            new FakeSink((bytes, _) =>
            {
                log.Write(bytes);
                return logOpen ? bytes.Length : 0;
            }));
        Assert.That(tee.Write("one"u8, default), Is.EqualTo(3));
        Assert.That(tee.Write("two"u8, default), Is.EqualTo(3));
        Assert.That(log.ToArray(), Is.EqualTo("onetwo"u8.ToArray()));
        logOpen = false;
        Assert.That(tee.Write("x"u8, default), Is.Zero);
    }

    [Test]
    public void A_full_pipe_makes_the_write_wait_and_a_reader_or_the_token_ends_the_wait()
    {
        using var pipe = new Pipe();
        using var sink = new FileDescriptorSink(pipe.WriteEnd);
        byte[] block = new byte[2048];
        long written = 0;
        int room = LibC.fcntl(pipe.WriteEnd, GetPipeSize);
        using (var soon = new CancellationTokenSource())
        {
            Assert.That(
                () =>
                {
                    while (true)
                    {
                        written += sink.Write(block, soon.Token);
                        if (written == room)
                            soon.CancelAfter(50);
                    }
                },
                Throws.InstanceOf<OperationCanceledException>());
        }
        Assert.That(written, Is.EqualTo(room));
        Assert.That(LibC.fcntl(pipe.WriteEnd, LibC.F_GETFL) & LibC.O_NONBLOCK, Is.Zero, "the shared open file was made non-blocking");

        // The eventfd of the cancelled wait must not end the next one.
        Task<int> next = Task.Run(() => sink.Write(block, default));
        Assert.That(next.Wait(50), Is.False);
        long read = 0;
        while (read < 8192)
            read += pipe.Read(4096).Length;
        Assert.That(next.Wait(20_000));
        Assert.That(next.Result, Is.InRange(1, 2048));
    }

    [Test]
    public void A_reader_that_goes_away_closes_the_sink_and_not_the_process()
    {
        using var pipe = new Pipe();
        using var sink = new FileDescriptorSink(pipe.WriteEnd);
        Assert.That(sink.Write("a"u8, default), Is.EqualTo(1));
        Assert.That(sink.Closed.IsCompleted, Is.False);
        pipe.CloseReadEnd();
        Assert.That(sink.Write("b"u8, default), Is.Zero);
        Assert.That(sink.Closed.Wait(20_000) && sink.Closed.Result.ReaderGone);
        Assert.That(sink.Write("c"u8, default), Is.Zero);
    }

    [Test]
    public void A_socket_is_written_without_blocking_and_its_closed_peer_is_seen()
    {
        int* ends = stackalloc int[2];
        Assert.That(LibC.socketpair(LibC.AF_UNIX, LibC.SOCK_STREAM | LibC.SOCK_CLOEXEC, 0, ends), Is.Zero);
        using var sink = new FileDescriptorSink(ends[0], ownsDescriptor: true);
        using (var soon = new CancellationTokenSource(50))
        {
            Assert.That(
                () =>
                {
                    while (true)
                        sink.Write(new byte[2048], soon.Token);
                },
                Throws.InstanceOf<OperationCanceledException>());
        }
        LibC.close(ends[1]);
        Assert.That(sink.Write("b"u8, default), Is.Zero);
        Assert.That(sink.Closed.Result.ReaderGone);
    }

    [Test]
    public void A_full_disk_closes_the_sink_with_its_reason()
    {
        using var sink = FileDescriptorSink.OpenLog("/dev/full");
        Assert.That(sink.Write("a"u8, default), Is.Zero);
        Assert.That(sink.Closed.Result, Is.EqualTo(new OutputClosed(LibC.ENOSPC, "No space left on device")));
        Assert.That(sink.Closed.Result.ReaderGone, Is.False);
    }

    [Test]
    public void A_log_is_appended_to()
    {
        string path = Path.Combine(Path.GetTempPath(), $"xensharp-console-{Guid.NewGuid():N}.log");
        try
        {
            foreach (string text in new[] { "first\n", "second\n" })
            {
                using var log = FileDescriptorSink.OpenLog(path);
                Assert.That(log.Write(Encoding.ASCII.GetBytes(text), default), Is.EqualTo(text.Length));
            }
            Assert.That(File.ReadAllText(path), Is.EqualTo("first\nsecond\n"));
        }
        finally
        {
            File.Delete(path);
        }
    }

    [Test]
    public void A_log_that_cannot_be_opened_is_named_with_the_reason()
    {
        Assert.That(
            () => FileDescriptorSink.OpenLog("/nowhere/at/all.log"),
            Throws.TypeOf<IOException>().With.Message.EqualTo("The console log /nowhere/at/all.log cannot be opened for writing: No such file or directory."));
        Assert.That(() => new FileDescriptorSink(-1), Throws.TypeOf<IOException>().With.Message.Contains("Bad file descriptor"));
    }

    /// <summary>A pipe whose ends are plain descriptors.</summary>
    private sealed class Pipe : IDisposable
    {
        private int _readEnd;

        internal Pipe()
        {
            int* ends = stackalloc int[2];
            Assert.That(LibC.pipe2(ends, LibC.O_CLOEXEC), Is.Zero);
            _readEnd = ends[0];
            WriteEnd = ends[1];
        }

        internal int WriteEnd { get; }

        internal byte[] Read(int most)
        {
            byte[] bytes = new byte[most];
            fixed (byte* start = bytes)
                return bytes[..(int)(nint)LibC.read(_readEnd, start, most)];
        }

        internal void CloseReadEnd()
        {
            LibC.close(_readEnd);
            _readEnd = -1;
        }

        public void Dispose()
        {
            LibC.close(WriteEnd);
            if (_readEnd >= 0)
                LibC.close(_readEnd);
        }
    }
}
