// One queue of a vif: a transmit and a receive ring with their event channels, and what serves them.
using System.Threading.Channels;
using XenSharp.Core;
using XenSharp.Devices.Xenbus;

namespace XenSharp.Devices.Network;

/// <summary>
/// Serves a queue: a loop for each direction on the thread pool, which do a bounded piece of work at a time.
/// </summary>
internal sealed class VifQueue
{
    /// <summary>Frames of one turn, as Linux's NAPI has them.</summary>
    private const int Budget = 64;

    /// <summary>How often a front end's receive ring is looked at that does not tell of new pages (no feature-rx-notify).</summary>
    private static readonly TimeSpan PollInterval = TimeSpan.FromMilliseconds(30);

    private readonly TransmitQueue _transmit;
    private readonly ReceiveQueue _receive;
    private readonly IEventChannelBackend _transmitChannel;
    private readonly IEventChannelBackend _receiveChannel;
    private readonly bool _polls;
    private readonly TimeProvider _time;

    /// <summary>Hold at most one token: there may be something to do.</summary>
    private readonly Channel<bool> _transmitWake = NewWake();
    private readonly Channel<bool> _receiveWake = NewWake();
    private int _receiveSleeps;

    /// <param name="transmit">The guest's frames.</param>
    /// <param name="receive">Frames for the guest.</param>
    /// <param name="transmitChannel">The transmit ring's channel.</param>
    /// <param name="receiveChannel">The receive ring's, which may be the same.</param>
    /// <param name="polls">Whether the guest does not tell of new pages.</param>
    /// <param name="time">The clock of waiting.</param>
    public VifQueue(
        TransmitQueue transmit, ReceiveQueue receive, IEventChannelBackend transmitChannel, IEventChannelBackend receiveChannel, bool polls,
        TimeProvider time)
    {
        (_transmit, _receive, _transmitChannel, _receiveChannel) = (transmit, receive, transmitChannel, receiveChannel);
        (_polls, _time) = (polls, time);
    }

    /// <summary>Whether one event channel serves both rings.</summary>
    private bool IsShared => _transmitChannel == _receiveChannel;

    /// <summary>Lets a frame for the guest wait for its turn.</summary>
    /// <returns>False if too many wait.</returns>
    public bool TryEnqueue(NetworkFrame frame)
    {
        if (!_receive.TryEnqueue(frame))
            return false;

        // The loop says that it sleeps before it looks for the last time. While it is awake it needs no token.
        if (Interlocked.Exchange(ref _receiveSleeps, 0) != 0)
            _ = _receiveWake.Writer.TryWrite(true);
        return true;
    }

    /// <summary>Serves the queue until cancellation.</summary>
    /// <exception cref="XenbusException">The guest has put something into a ring that no front end does.</exception>
    public async Task RunAsync(CancellationToken cancellation)
    {
        using var stop = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        Task[] loops =
        [
            Task.Run(() => TransmitAsync(stop.Token), CancellationToken.None),
            Task.Run(() => ReceiveAsync(stop.Token), CancellationToken.None),
            Task.Run(() => WatchAsync(stop.Token), CancellationToken.None),
        ];
        try
        {
            // The first to end has failed, or all are to end.
            await await Task.WhenAny(loops).ConfigureAwait(false);
        }
        catch (OperationCanceledException) when (stop.IsCancellationRequested)
        {
        }
        finally
        {
            await stop.CancelAsync().ConfigureAwait(false);
            await Task.WhenAll(loops).ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
            _receive.Close();
        }
    }

    private static Channel<bool> NewWake()
        => Channel.CreateBounded<bool>(new BoundedChannelOptions(1) { FullMode = BoundedChannelFullMode.DropWrite, SingleReader = true });

    private async Task TransmitAsync(CancellationToken cancellation)
    {
        while (true)
        {
            cancellation.ThrowIfCancellationRequested();
            switch (_transmit.Process(Budget, _transmitChannel, out TimeSpan wait))
            {
                case QueueStep.More:
                    await Task.Yield();
                    break;
                case QueueStep.Later:
                    await Task.Delay(wait, _time, cancellation).ConfigureAwait(false);
                    break;
                default:
                    await WaitToTransmitAsync(cancellation).ConfigureAwait(false);
                    break;
            }
        }
    }

    private async Task ReceiveAsync(CancellationToken cancellation)
    {
        while (true)
        {
            cancellation.ThrowIfCancellationRequested();
            switch (_receive.Process(Budget, _receiveChannel))
            {
                case QueueStep.More:
                    await Task.Yield();
                    continue;
                case QueueStep.NoPages when _polls:
                    await Task.Delay(PollInterval, _time, cancellation).ConfigureAwait(false);
                    continue;
                case QueueStep.Idle:
                    // In this order: a frame that came before this is seen here, one that comes later leaves a token.
                    _ = Interlocked.Exchange(ref _receiveSleeps, 1);
                    if (_receive.HasFrames)
                        continue;
                    break;
                default:
                    // New frames change nothing.
                    break;
            }

            _ = await _receiveWake.Reader.ReadAsync(cancellation).ConfigureAwait(false);
        }
    }

    /// <summary>Waits until the guest may have sent something.</summary>
    private async ValueTask WaitToTransmitAsync(CancellationToken cancellation)
    {
        if (IsShared)
            _ = await _transmitWake.Reader.ReadAsync(cancellation).ConfigureAwait(false);
        else if (!await _transmitChannel.WaitAsync(cancellation).ConfigureAwait(false))
            await Task.Delay(Timeout.Infinite, cancellation).ConfigureAwait(false);
    }

    /// <summary>Passes the guest's notifications on. A closed channel ends nothing: the domain's end does.</summary>
    private async Task WatchAsync(CancellationToken cancellation)
    {
        while (await _receiveChannel.WaitAsync(cancellation).ConfigureAwait(false))
        {
            _ = _receiveWake.Writer.TryWrite(true);
            if (IsShared)
                _ = _transmitWake.Writer.TryWrite(true);
        }

        await Task.Delay(Timeout.Infinite, cancellation).ConfigureAwait(false);
    }
}
