// What a benchmark's guest prints, waited for line by line.
using System.Collections.Concurrent;
using XenSharp.Domains;
using XenSharp.Toolstack;

namespace XenSharp.Cli.Bench;

/// <summary>Waits for the lines that the guest's programs print.</summary>
internal sealed class MarkWaiter : IDisposable
{
    private static readonly TimeSpan Patience = TimeSpan.FromMinutes(2);

    private readonly ConcurrentQueue<string> _seen = new();
    private readonly SemaphoreSlim _count = new(0);

    internal MarkWaiter() => Sink = new MarkerSink
    {
        Seen = mark =>
        {
            _seen.Enqueue(mark);
            _ = _count.Release();
        },
    };

    internal MarkerSink Sink { get; }

    /// <summary>Waits for a line that begins so, which is the next.</summary>
    internal async Task<string> WaitAsync(string mark, RunningDomain running, CancellationToken cancellation)
    {
        Task<bool> come = _count.WaitAsync(Patience, cancellation);
        if (await Task.WhenAny(come, running.Completion).ConfigureAwait(false) != come)
        {
            DomainExit exit = await running.Completion.ConfigureAwait(false);
            throw new InvalidOperationException($"The benchmark's guest ended by {exit.Reason}. {exit.Report}");
        }

        _ = await come.ConfigureAwait(false);
        return _seen.TryDequeue(out string? seen) && seen.StartsWith(mark, StringComparison.Ordinal)
            ? seen
            : throw new InvalidOperationException($"The benchmark's guest should have said {mark}, and said {seen ?? "nothing"}.");
    }

    public void Dispose() => _count.Dispose();
}
