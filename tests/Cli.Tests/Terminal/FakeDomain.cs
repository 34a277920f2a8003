// A domain that is nothing but a console page and an event channel.

using System.Runtime.InteropServices;
using System.Threading.Channels;
using XenSharp.Core;
using XenSharp.Devices.Console;

namespace XenSharp.Cli.Tests.Terminal;

/// <summary>The guest's side of xen/include/public/io/console.h, and the event of the domain's end.</summary>
internal sealed unsafe partial class FakeDomain : IEventChannelBackend, IDisposable
{
    private const int OutputRing = 1024;
    private const int Indexes = 3072;

    private readonly byte* _page = (byte*)NativeMemory.AlignedAlloc(4096, 4096);
    private readonly Channel<bool> _toBackend =
        Channel.CreateBounded<bool>(new BoundedChannelOptions(1) { FullMode = BoundedChannelFullMode.DropWrite });

    private readonly TaskCompletionSource _end = new(TaskCreationOptions.RunContinuationsAsynchronously);

    internal FakeDomain()
    {
        new Span<byte>(_page, 4096).Clear();
        Console = new ConsoleBackend(_page, this);
    }

    internal ConsoleBackend Console { get; }

    internal Task Completion => _end.Task;

    /// <summary>How many bytes have ever been typed into the ring.</summary>
    internal uint InputProduced => Volatile.Read(ref Index(1));

    internal void PowerOff() => _end.TrySetResult();

    /// <summary>Prints what there is room for.</summary>
    internal int Print(ReadOnlySpan<byte> text)
    {
        uint producer = Index(3);
        int count = 0;
        while (count < text.Length && producer - Volatile.Read(ref Index(2)) < 2048)
            _page[OutputRing + (producer++ & 2047)] = text[count++];
        Volatile.Write(ref Index(3), producer);
        _toBackend.Writer.TryWrite(true);
        return count;
    }

    /// <summary>Takes all typed input there is.</summary>
    internal byte[] Read()
    {
        var bytes = new List<byte>();
        uint consumer = Index(0);
        while (consumer != Volatile.Read(ref Index(1)))
            bytes.Add(_page[consumer++ & 1023]);
        Volatile.Write(ref Index(0), consumer);
        if (bytes.Count > 0)
            _toBackend.Writer.TryWrite(true);
        return [.. bytes];
    }

    /// <summary>Takes typed input until there is this much, or a minute is over.</summary>
    internal byte[] Read(int count)
    {
        var bytes = new List<byte>();
        SpinWait.SpinUntil(
            () =>
            {
                bytes.AddRange(Read());
                return bytes.Count >= count;
            },
            TimeSpan.FromSeconds(60));
        return [.. bytes];
    }

    private ref uint Index(int number) => ref ((uint*)(_page + Indexes))[number];

    void IEventChannelBackend.Notify()
    {
    }

    public void Dispose() => NativeMemory.AlignedFree(_page);
}

// The part that awaits, which code marked unsafe must not.
internal sealed partial class FakeDomain
{
    async ValueTask<bool> IEventChannelBackend.WaitAsync(CancellationToken cancellation)
    {
        if (!await _toBackend.Reader.WaitToReadAsync(cancellation))
            return false;
        _toBackend.Reader.TryRead(out _);
        return true;
    }
}
