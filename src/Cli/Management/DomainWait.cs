// Waiting for domains to end, by the daemon's events.

using System.Globalization;
using XenSharp.Api;

namespace XenSharp.Cli.Management;

/// <summary>Follows the daemon's events from when it is made, so that what is asked for afterwards cannot be missed.</summary>
internal sealed class DomainWait : IAsyncDisposable
{
    private readonly DaemonClient _daemon;
    private readonly IAsyncEnumerator<DomainEvent> _events;
    private readonly HashSet<int> _domains = [];

    private DomainWait(DaemonClient daemon, IAsyncEnumerator<DomainEvent> events)
    {
        _daemon = daemon;
        _events = events;
    }

    /// <summary>Begins to follow events.</summary>
    internal static async Task<DomainWait> BeginAsync(DaemonClient daemon, CancellationToken cancellation)
    {
        var wait = new DomainWait(daemon, daemon.FollowEventsAsync(cancellation).GetAsyncEnumerator(cancellation));
        try
        {
            // The first says that from here on nothing is missed.
            await wait.NextAsync().ConfigureAwait(false);
            return wait;
        }
        catch
        {
            await wait.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    /// <summary>Waits for this domain, too.</summary>
    internal void Add(int domain) => _domains.Add(domain);

    /// <summary>Waits until all domains have shut down, or have been destroyed.</summary>
    /// <param name="untilDestroyed">A domain that has shut down is waited for until it is gone.</param>
    /// <param name="cancellation">Gives up.</param>
    internal async Task WaitAsync(bool untilDestroyed, CancellationToken cancellation)
    {
        while (_domains.Count > 0)
        {
            DomainEvent happened = await NextAsync().ConfigureAwait(false);
            if (happened.Kind == DomainEventKind.Overrun)
                await LookAsync(untilDestroyed, cancellation).ConfigureAwait(false);
            else if (happened.Kind == DomainEventKind.Destroyed || (happened.Kind == DomainEventKind.Shutdown && !untilDestroyed))
                _domains.Remove(happened.Id);
        }
    }

    public ValueTask DisposeAsync() => _events.DisposeAsync();

    private async ValueTask<DomainEvent> NextAsync()
        => await _events.MoveNextAsync().ConfigureAwait(false)
            ? _events.Current
            : throw new DaemonException($"The daemon at {_daemon.Socket} has ended, and what it ran with it.");

    /// <summary>Asks which domains there are, where events were lost.</summary>
    private async Task LookAsync(bool untilDestroyed, CancellationToken cancellation)
    {
        var there = (await _daemon.ListAsync(cancellation).ConfigureAwait(false))
            .Where(domain => untilDestroyed || !(domain.State.Shutdown || domain.State.Crashed)).Select(static domain => domain.Id).ToHashSet();
        _domains.IntersectWith(there);
    }
}
