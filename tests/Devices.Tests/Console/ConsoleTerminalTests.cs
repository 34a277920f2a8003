// The pseudo-terminal of a console, opened as screen or cat would.

using System.Text;
using XenSharp.Devices.Console;

namespace XenSharp.Devices.Tests.Console;

[TestFixture]
[CancelAfter(60_000)]
public sealed class ConsoleTerminalTests
{
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(30);

    /// <summary>Raw in both directions; the first sees what was kept, and a later one what the one before has not seen.</summary>
    [Test]
    public async Task Whoever_opens_it_sees_what_nobody_has_seen_there_and_is_heard()
    {
        await using ConsoleHub hub = new();
        StringBuilder typed = new();
        hub.Connect((input, cancellation) =>
        {
            lock (typed)
                _ = typed.Append(Encoding.ASCII.GetString(input.Span));
            return new ValueTask<bool>(true);
        });
        Assert.That(hub.Terminal, Is.Null);
        hub.OfferTerminal();
        Print(hub, "before ");
        await using (FileStream screen = Open(hub))
        {
            Assert.That(Read(screen, 7), Is.EqualTo("before "));
            Print(hub, "now\r\n\u0003");
            Assert.That(Read(screen, 6), Is.EqualTo("now\r\n\u0003"));
            screen.Write("in\u0003\r\n"u8);
            Assert.That(SpinWait.SpinUntil(() => Typed() == "in\u0003\r\n", Patience), Is.True, Typed());
        }

        // It has left when it no longer counts as a viewer.
        Assert.That(SpinWait.SpinUntil(() => hub.Viewers == 0, Patience), Is.True);
        Print(hub, "later");
        await using (FileStream screen = Open(hub))
            Assert.That(Read(screen, 5), Is.EqualTo("later"));

        string Typed()
        {
            lock (typed)
                return typed.ToString();
        }
    }

    /// <summary>More than the terminal itself holds goes through to one who reads.</summary>
    [Test]
    public async Task A_lot_comes_through_in_order()
    {
        await using ConsoleHub hub = new();
        hub.OfferTerminal();
        string all = string.Concat(Enumerable.Range(0, 50_000).Select(static i => $"{i} "));
        await using FileStream screen = Open(hub);
        Task printing = Task.Run(() => Print(hub, all));
        Assert.That(Read(screen, all.Length), Is.EqualTo(all));
        await printing;
    }

    [Test]
    public async Task The_last_words_are_read_before_it_ends()
    {
        int descriptors = Descriptors();
        await using ConsoleHub hub = new();
        hub.OfferTerminal();
        await using (FileStream screen = Open(hub))
        {
            Print(hub, "halted");
            Task complete = hub.CompleteAsync();
            Assert.That(Read(screen, 6), Is.EqualTo("halted"));
            await complete.WaitAsync(Patience);

            Assert.That(IsHungUp(screen), Is.True);
        }

        Assert.That(SpinWait.SpinUntil(() => Descriptors() <= descriptors, Patience), Is.True, "its descriptors are closed");
    }

    /// <summary>Nor does one who has it open and does not read, or who is not there, hold up the end.</summary>
    [Test]
    public async Task Nobody_has_to_read_the_last_words([Values] bool open)
    {
        await using ConsoleHub hub = new();
        hub.OfferTerminal();
        await using FileStream? screen = open ? Open(hub) : null;
        Print(hub, new string('x', 100_000));
        if (open)
            Assert.That(SpinWait.SpinUntil(() => hub.Viewers == 1, Patience), Is.True);
        await hub.CompleteAsync().WaitAsync(Patience);
    }

    /// <summary>Whether the other end is gone: an error to one who was reading, the end to one who comes later.</summary>
    private static bool IsHungUp(FileStream screen)
    {
        try
        {
            return screen.ReadByte() < 0;
        }
        catch (IOException)
        {
            return true;
        }
    }

    private static int Descriptors() => Directory.GetFileSystemEntries("/proc/self/fd").Length;

    private static FileStream Open(ConsoleHub hub)
        => new(hub.Terminal!, new FileStreamOptions { Mode = FileMode.Open, Access = FileAccess.ReadWrite, BufferSize = 0 });

    private static void Print(ConsoleHub hub, string text)
    {
        ReadOnlySpan<byte> bytes = Encoding.ASCII.GetBytes(text);
        while (!bytes.IsEmpty)
            bytes = bytes[hub.Write(bytes, CancellationToken.None)..];
    }

    private static string Read(FileStream screen, int count)
    {
        byte[] bytes = new byte[count];
        screen.ReadExactly(bytes);
        return Encoding.ASCII.GetString(bytes);
    }
}
