// A guest's side of the console ring, on a page between two pages that fault, and the event channel between the two sides.

using System.Threading.Channels;
using Tmds.Linux;
using XenSharp.Core;
using XenSharp.Devices.Console;

namespace XenSharp.Devices.Tests.Console;

/// <summary>
/// The front end, written from xen/include/public/io/console.h by itself: byte by byte, sharing no code with the backend.
/// Any access of the backend outside the page ends the test process.
/// </summary>
internal sealed unsafe partial class FakeGuest : IEventChannelBackend, IDisposable
{
    internal const int PageSize = 4096;
    internal const int OutputRing = 1024;
    internal const int Indexes = 3072;
    internal const int EndOfInterface = 3088;

    private readonly byte* _mapping;
    private readonly Channel<bool> _toBackend =
        Channel.CreateBounded<bool>(new BoundedChannelOptions(1) { FullMode = BoundedChannelFullMode.DropWrite });

    private int _notifications;

    internal FakeGuest(uint firstIndex = 0)
    {
        _mapping = (byte*)LibC.mmap(null, 3 * PageSize, LibC.PROT_NONE, LibC.MAP_PRIVATE | LibC.MAP_ANONYMOUS, -1, 0);
        Assert.That((nint)_mapping, Is.Not.EqualTo((nint)(-1)));
        Page = _mapping + PageSize;
        Assert.That(LibC.mprotect(Page, PageSize, LibC.PROT_READ | LibC.PROT_WRITE), Is.Zero);
        for (int i = 0; i < 4; i++)
            Index(i) = firstIndex;
        Canary.Fill(0xc5);
    }

    internal byte* Page { get; }

    internal Span<byte> WholePage => new(Page, PageSize);

    /// <summary>What of the page is no part of the interface.</summary>
    internal Span<byte> Canary => new(Page + EndOfInterface, PageSize - EndOfInterface);

    internal ref uint InputConsumer => ref Index(0);
    internal ref uint InputProducer => ref Index(1);
    internal ref uint OutputConsumer => ref Index(2);
    internal ref uint OutputProducer => ref Index(3);

    /// <summary>How often the backend has notified the guest.</summary>
    internal int Notifications => Volatile.Read(ref _notifications);

    /// <summary>Set by each notification.</summary>
    internal AutoResetEvent Interrupt { get; } = new(false);

    internal ConsoleBackend NewBackend() => new(Page, this);

    internal ref uint Index(int number) => ref ((uint*)(Page + Indexes))[number];

    internal void NotifyBackend() => _toBackend.Writer.TryWrite(true);

    internal void ClosePort() => _toBackend.Writer.TryComplete();

    /// <summary>Puts into the ring what fits, as a front end does, without a notification.</summary>
    internal int Print(ReadOnlySpan<byte> text)
    {
        uint producer = OutputProducer;
        int count = 0;
        while (count < text.Length && producer - Volatile.Read(ref OutputConsumer) < 2048)
            Page[OutputRing + (producer++ & 2047)] = text[count++];
        Volatile.Write(ref OutputProducer, producer);
        return count;
    }

    /// <summary>Prints all, asking again while the ring is full (Linux), or sleeping until it is notified (others).</summary>
    internal void PrintAll(ReadOnlySpan<byte> text, bool sleeps)
    {
        while (!text.IsEmpty)
        {
            int count = Print(text);
            text = text[count..];
            if (count > 0)
                NotifyBackend();
            else if (sleeps)
                Assert.That(Interrupt.WaitOne(TimeSpan.FromSeconds(20)), "the backend made no room, or did not say so");
            else
                Thread.Yield();
        }
    }

    /// <summary>Takes up to <paramref name="most"/> bytes of typed input, and notifies if there were any.</summary>
    internal byte[] Read(int most = int.MaxValue)
    {
        var bytes = new List<byte>();
        uint consumer = InputConsumer;
        while (bytes.Count < most && consumer != Volatile.Read(ref InputProducer))
            bytes.Add(Page[consumer++ & 1023]);
        Volatile.Write(ref InputConsumer, consumer);
        if (bytes.Count > 0)
            NotifyBackend();
        return [.. bytes];
    }

    void IEventChannelBackend.Notify()
    {
        Interlocked.Increment(ref _notifications);
        Interrupt.Set();
    }

    public void Dispose()
    {
        Interrupt.Dispose();
        _ = LibC.munmap(_mapping, 3 * PageSize);
    }
}

// The part that awaits, which code marked unsafe must not.
internal sealed partial class FakeGuest
{
    async ValueTask<bool> IEventChannelBackend.WaitAsync(CancellationToken cancellation)
    {
        if (!await _toBackend.Reader.WaitToReadAsync(cancellation))
            return false;
        _toBackend.Reader.TryRead(out _);
        return true;
    }
}
