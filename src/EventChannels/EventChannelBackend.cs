using System.Threading.Channels;
using XenSharp.Core;

namespace XenSharp.EventChannels;

/// <summary>
/// The far end, in domain 0's name, of an interdomain channel of a guest. <see cref="Dispose"/> closes this end: the guest's
/// port becomes unbound and can be bound again. A guest that closes its own leaves this one unbound, for the guest to bind
/// another port to.
/// </summary>
public sealed class EventChannelBackend : IEventChannelBackend, IDisposable
{
    private readonly EventChannelDomain _domain;
    private readonly Channel<bool> _notifications = Channel.CreateBounded<bool>(
        new BoundedChannelOptions(1) { FullMode = BoundedChannelFullMode.DropWrite });

    internal EventChannelBackend(EventChannelDomain domain, EventChannelPort port, EventChannelPort guestPort)
    {
        _domain = domain;
        Port = port;
        GuestPort = guestPort;
    }

    /// <summary>The number of this end, among domain 0's; no other back end of the guest's has it.</summary>
    public EventChannelPort Port { get; }

    /// <summary>The guest's end; port 0, which no guest has, while there is none.</summary>
    public EventChannelPort GuestPort { get; internal set; }

    /// <inheritdoc/>
    public void Notify() => _domain.NotifyGuest(this);

    /// <inheritdoc/>
    public async ValueTask<bool> WaitAsync(CancellationToken cancellation = default)
    {
        ChannelReader<bool> reader = _notifications.Reader;
        while (await reader.WaitToReadAsync(cancellation).ConfigureAwait(false))
        {
            if (reader.TryRead(out _))
                return true;
        }

        return false;
    }

    /// <summary>Closes this end. Later calls, and calls after the guest has closed its own, do nothing.</summary>
    public void Dispose() => _domain.Disconnect(this);

    /// <summary>The guest has sent.</summary>
    internal void Signal() => _notifications.Writer.TryWrite(true);

    /// <summary>The channel is gone for good.</summary>
    internal void Complete() => _notifications.Writer.TryComplete();
}
