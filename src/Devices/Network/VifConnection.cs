// A vif whose front end is connected: its queues, and the choice among them.
using XenSharp.Core;
using XenSharp.Devices.Xenbus;
using XenSharp.Devices.Xenstore;

namespace XenSharp.Devices.Network;

/// <summary>What of a connection with the guest has to be given back when it ends.</summary>
/// <param name="Queue">What serves the queue.</param>
/// <param name="Held">The rings' mappings and the event channels.</param>
internal readonly record struct ConnectedQueue(VifQueue Queue, IReadOnlyList<IDisposable> Held);

/// <summary>
/// Serves the queues of a connected front end, and takes the frames that are for it.
/// </summary>
internal sealed class VifConnection : IXenbusConnection, IFrameReceiver
{
    private readonly ConnectedQueue[] _queues;
    private readonly MulticastFilter _groups;
    private readonly VifCounters _counters;
    private readonly Action<VifConnection> _ended;
    private readonly CancellationTokenSource _stop = new();
    private readonly TaskCompletionSource _failure = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly Task _run;

    /// <param name="queues">The queues, at least one; given back at the end.</param>
    /// <param name="capabilities">What the front end takes.</param>
    /// <param name="groups">Which groups it listens to.</param>
    /// <param name="counters">Counts.</param>
    /// <param name="ended">Called when no frame is to be given any more.</param>
    public VifConnection(
        ConnectedQueue[] queues, FrameCapabilities capabilities, MulticastFilter groups, VifCounters counters, Action<VifConnection> ended)
    {
        (_queues, Capabilities, _groups, _counters, _ended) = (queues, capabilities, groups, counters, ended);
        _run = Task.WhenAll(queues.Select(queue => ServeAsync(queue.Queue)));
    }

    public FrameCapabilities Capabilities { get; }

    public int QueueCount => _queues.Length;

    /// <inheritdoc/>
    public Task Failure => _failure.Task;

    /// <inheritdoc/>
    public void Publish(XenstoreTransaction store, string folder)
    {
        // All that a front end reads was announced before.
    }

    /// <inheritdoc/>
    public void Receive(NetworkFrame frame)
    {
        if (!_groups.Wants(frame.Destination))
            return;
        uint queue = _queues.Length == 1 ? 0 : FlowHash.Of(frame.Data) % (uint)_queues.Length;
        if (!Capabilities.Cover(frame.Offload, frame.Length) || !_queues[queue].Queue.TryEnqueue(frame))
            _counters.ReceiveDropped();
    }

    /// <inheritdoc/>
    public async ValueTask DisposeAsync()
    {
        _ended(this);
        await _stop.CancelAsync().ConfigureAwait(false);
        await _run.ConfigureAwait(false);
        foreach (ConnectedQueue queue in _queues)
        {
            foreach (IDisposable held in queue.Held)
                held.Dispose();
        }

        _stop.Dispose();
    }

    private async Task ServeAsync(VifQueue queue)
    {
        try
        {
            await queue.RunAsync(_stop.Token).ConfigureAwait(false);
        }
        catch (Exception exception)
        {
            // What is not the front end's doing is a defect of ours, and has to end this connection and nothing else.
            _ = _failure.TrySetException(exception as XenbusException ?? new XenbusException(Errno.EIO, $"the back end has failed: {exception.Message}"));
        }

        // One queue that has failed ends them all: a flow could be in any of them.
        await _stop.CancelAsync().ConfigureAwait(false);
    }
}
