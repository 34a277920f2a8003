// The console hub: history, viewers that come and go, slow ones, input of several, the log file and what can go wrong with it.

using System.IO.Pipes;
using System.Text;
using XenSharp.Devices.Console;

namespace XenSharp.Devices.Tests.Console;

[TestFixture]
[CancelAfter(60_000)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
[Parallelizable(ParallelScope.Children)]
public sealed class ConsoleHubTests
{
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(30);

    [Test]
    public async Task A_viewer_gets_what_was_printed_before_and_then_what_is()
    {
        await using ConsoleHub hub = new();
        Print(hub, "before ");
        using ConsoleViewer viewer = hub.Attach();
        Print(hub, "after");
        Assert.That(await ReadAsync(viewer, 12), Is.EqualTo("before after"));
        Assert.That(hub.Printed, Is.EqualTo(12));
    }

    [TestCase(0, "")]
    [TestCase(3, "cde")]
    [TestCase(100, "abcde")]
    public async Task A_viewer_can_ask_for_less_history(int bytes, string seen)
    {
        await using ConsoleHub hub = new();
        Print(hub, "abcde");
        using ConsoleViewer viewer = hub.Attach(bytes);
        Print(hub, "!");
        Assert.That(await ReadAsync(viewer, seen.Length + 1), Is.EqualTo(seen + "!"));
        Assert.That(Encoding.ASCII.GetString(hub.ReadHistory(2)), Is.EqualTo("e!"));
    }

    [Test]
    public async Task The_history_forgets_its_oldest_bytes()
    {
        const int Kept = ConsoleHubOptions.MinimumHistoryBytes;
        await using ConsoleHub hub = new(new ConsoleHubOptions { HistoryBytes = Kept });
        byte[] all = Pattern(100_003);
        for (int at = 0, step = 1; at < all.Length; step = (step * 7 % 4093) + 1)
        {
            int count = Math.Min(step, all.Length - at);
            PrintBytes(hub, all.AsSpan(at, count));
            at += count;
            int kept = Math.Min(at, Kept);
            Assert.That(hub.ReadHistory(), Is.EqualTo(all[(at - kept)..at]).AsCollection, $"after {at} bytes");
        }
    }

    [Test]
    public async Task Viewers_that_come_at_any_time_all_get_the_same_bytes_in_order()
    {
        const int Total = 600_000;
        byte[] all = Pattern(Total);
        await using ConsoleHub hub = new();
        Task<byte[]>[] viewers = new Task<byte[]>[12];
        for (int index = 0; index < viewers.Length; index++)
        {
            int at = index * (Total / viewers.Length);
            PrintBytes(hub, all.AsSpan(at, Total / viewers.Length));
            ConsoleViewer viewer = hub.Attach();
            int batch = (index * 997) + 1;
            viewers[index] = Task.Run(async () => await ReadAllAsync(viewer, batch));
        }
        await hub.CompleteAsync();
        foreach (byte[] seen in await Task.WhenAll(viewers).WaitAsync(Patience))
            Assert.That(seen.AsSpan().SequenceEqual(all), "a gap, a double, or a wrong order");
        Assert.That(hub.Viewers, Is.Zero);
    }

    [Test]
    public async Task A_viewer_that_does_not_read_is_left_behind_and_told_so()
    {
        const int Kept = ConsoleHubOptions.MinimumHistoryBytes;
        await using ConsoleHub hub = new(new ConsoleHubOptions { HistoryBytes = Kept, Patience = TimeSpan.FromMilliseconds(20) });
        using ConsoleViewer stuck = hub.Attach();
        byte[] all = Pattern(5 * Kept);
        PrintBytes(hub, all);
        byte[] seen = new byte[200];
        int count = await stuck.ReadAsync(seen);
        Assert.That(Encoding.ASCII.GetString(seen, 0, count), Is.EqualTo($"\r\n[xensharp: {4 * Kept} bytes of console output were skipped]\r\n"));
        Assert.That(stuck.Skipped, Is.EqualTo(4 * Kept));
        await hub.CompleteAsync();
        Assert.That(await ReadAllAsync(stuck, 1000), Is.EqualTo(all[(4 * Kept)..]).AsCollection, "it goes on with the oldest that is kept");
    }

    [Test]
    public async Task The_guest_waits_for_a_viewer_that_is_merely_slow()
    {
        const int Kept = ConsoleHubOptions.MinimumHistoryBytes;
        await using ConsoleHub hub = new(new ConsoleHubOptions { HistoryBytes = Kept, Patience = Patience });
        ConsoleViewer viewer = hub.Attach();
        byte[] all = Pattern(20 * Kept);
        Task printer = Task.Run(() => PrintBytes(hub, all));
        List<byte> seen = [];
        byte[] batch = new byte[999];
        while (seen.Count < all.Length)
        {
            seen.AddRange(batch.AsSpan(0, await viewer.ReadAsync(batch)));
            Assert.That(hub.Printed - seen.Count, Is.LessThanOrEqualTo(Kept), "bytes were forgotten that it had not read");
            await Task.Yield();
        }
        await printer;
        Assert.That(seen, Is.EqualTo(all).AsCollection);
        Assert.That(viewer.Skipped, Is.Zero);
    }

    [Test]
    public async Task A_write_that_waits_for_a_reader_is_cancelled_without_a_byte_taken()
    {
        const int Kept = ConsoleHubOptions.MinimumHistoryBytes;
        await using ConsoleHub hub = new(new ConsoleHubOptions { HistoryBytes = Kept, Patience = Patience });
        using ConsoleViewer viewer = hub.Attach();
        byte[] block = Pattern(Kept / 4);
        using CancellationTokenSource stop = new();
        Task writer = Task.Run(() =>
        {
            while (true)
                _ = hub.Write(block, stop.Token);
        });
        while (hub.Printed <= Kept / 2)
            await Task.Yield();
        long printed = hub.Printed;
        await stop.CancelAsync();
        Assert.That(async () => await writer, Throws.InstanceOf<OperationCanceledException>());
        Assert.That(hub.Printed, Is.EqualTo(printed));
    }

    [Test]
    public async Task Viewers_end_when_the_console_does()
    {
        await using ConsoleHub hub = new();
        Print(hub, "last words");
        ConsoleViewer early = hub.Attach();
        await hub.CompleteAsync();
        ConsoleViewer late = hub.Attach();
        Assert.That(Encoding.ASCII.GetString(await ReadAllAsync(early, 3)), Is.EqualTo("last words"));
        Assert.That(Encoding.ASCII.GetString(await ReadAllAsync(late, 100)), Is.EqualTo("last words"), "it stays readable");
        Assert.That(hub.Write("more"u8, default), Is.Zero, "closed for good");
        Assert.That(await hub.TypeAsync("x"u8.ToArray()), Is.False);
    }

    [Test]
    public async Task A_read_ends_when_the_viewer_is_disposed_or_cancelled()
    {
        await using ConsoleHub hub = new();
        ConsoleViewer viewer = hub.Attach();
        ValueTask<int> waiting = viewer.ReadAsync(new byte[10]);
        Assert.That(async () => await viewer.ReadAsync(new byte[10]), Throws.InvalidOperationException, "one at a time");
        viewer.Dispose();
        Assert.That(await waiting, Is.Zero);
        Assert.That(await viewer.ReadAsync(new byte[10]), Is.Zero);

        using ConsoleViewer other = hub.Attach();
        using CancellationTokenSource stop = new();
        Task<int> cancelled = other.ReadAsync(new byte[10], stop.Token).AsTask();
        await stop.CancelAsync();
        Assert.That(async () => await cancelled, Throws.InstanceOf<OperationCanceledException>());
        Print(hub, "abc");
        Assert.That(await ReadAsync(other, 3), Is.EqualTo("abc"), "nothing is lost by that");
    }

    [Test]
    public async Task A_guest_is_read_and_typed_to_and_so_is_the_next()
    {
        await using ConsoleHub hub = new();
        using ConsoleViewer viewer = hub.Attach();
        foreach (string name in new[] { "first", "second" })
        {
            using FakeGuest guest = new();
            ConsoleBackend backend = guest.NewBackend();
            Task run = backend.RunAsync(hub);
            hub.Connect(backend.WriteAsync);
            guest.PrintAll(Encoding.ASCII.GetBytes($"I am the {name}\n"), sleeps: false);
            Assert.That(await ReadAsync(viewer, 10 + name.Length), Is.EqualTo($"I am the {name}\n"));
            Assert.That(await viewer.TypeAsync("typed\n"u8.ToArray()), Is.True);
            Assert.That(Encoding.ASCII.GetString(guest.Read()), Is.EqualTo("typed\n"));
            hub.Connect(null);
            await backend.CompleteAsync();
            await run;
            Assert.That(await viewer.TypeAsync("nobody"u8.ToArray()), Is.False);
        }
    }

    [Test]
    public async Task What_several_viewers_type_does_not_mix()
    {
        await using ConsoleHub hub = new();
        using FakeGuest guest = new();
        ConsoleBackend backend = guest.NewBackend();
        Task run = backend.RunAsync(hub);
        hub.Connect(backend.WriteAsync);
        string[] pasted = [.. Enumerable.Range(0, 5).Select(index => new string((char)('a' + index), 3000))];
        Task[] typing = [.. pasted.Select(text => Task.Run(async () =>
        {
            using ConsoleViewer viewer = hub.Attach(0);
            Assert.That(await viewer.TypeAsync(Encoding.ASCII.GetBytes(text)), Is.True);
        }))];
        StringBuilder read = new();
        while (read.Length < 15_000)
        {
            read.Append(Encoding.ASCII.GetString(guest.Read(700)));
            await Task.Yield();
        }
        await Task.WhenAll(typing);
        foreach (string text in pasted)
            Assert.That(read.ToString(), Does.Contain(text));
        await backend.CompleteAsync();
        await run;
    }

    [Test]
    public async Task A_stream_is_bridged_both_ways()
    {
        await using ConsoleHub hub = new();
        TaskCompletionSource<string> typed = new();
        hub.Connect((input, _) =>
        {
            typed.TrySetResult(Encoding.ASCII.GetString(input.Span));
            return new ValueTask<bool>(true);
        });
        string path = Path.Combine(Path.GetTempPath(), $"xensharp-{Guid.NewGuid():N}");
        await using NamedPipeServerStream server = new(path, PipeDirection.InOut, 1, PipeTransmissionMode.Byte, PipeOptions.Asynchronous);
        await using NamedPipeClientStream client = new(".", path, PipeDirection.InOut, PipeOptions.Asynchronous);
        await Task.WhenAll(server.WaitForConnectionAsync(), client.ConnectAsync());
        Print(hub, "hello");
        Task bridge = ConsoleStreamBridge.RunAsync(hub, server, int.MaxValue);
        byte[] seen = new byte[5];
        await client.ReadExactlyAsync(seen);
        Assert.That(Encoding.ASCII.GetString(seen), Is.EqualTo("hello"));
        await client.WriteAsync("ls\n"u8.ToArray());
        Assert.That(await typed.Task.WaitAsync(Patience), Is.EqualTo("ls\n"));
        await hub.CompleteAsync();
        await bridge.WaitAsync(Patience);
        Assert.That(hub.Viewers, Is.Zero);
    }

    private static void Print(ConsoleHub hub, string text) => PrintBytes(hub, Encoding.ASCII.GetBytes(text));

    private static void PrintBytes(ConsoleHub hub, ReadOnlySpan<byte> bytes)
    {
        while (!bytes.IsEmpty)
        {
            int count = hub.Write(bytes, CancellationToken.None);
            Assert.That(count, Is.Positive);
            bytes = bytes[count..];
        }
    }

    private static byte[] Pattern(int length)
    {
        byte[] bytes = new byte[length];
        for (int at = 0; at < length; at++)
            bytes[at] = (byte)((at * 31) ^ (at >> 8));
        return bytes;
    }

    private static async Task<string> ReadAsync(ConsoleViewer viewer, int count)
    {
        byte[] bytes = new byte[count];
        for (int at = 0; at < count;)
        {
            int more = await viewer.ReadAsync(bytes.AsMemory(at)).AsTask().WaitAsync(Patience);
            Assert.That(more, Is.Positive, "the console ended");
            at += more;
        }
        return Encoding.ASCII.GetString(bytes);
    }

    private static async Task<byte[]> ReadAllAsync(ConsoleViewer viewer, int batch)
    {
        using (viewer)
        {
            List<byte> all = [];
            byte[] bytes = new byte[batch];
            int count;
            while ((count = await viewer.ReadAsync(bytes)) > 0)
                all.AddRange(bytes.AsSpan(0, count));
            return [.. all];
        }
    }
}
