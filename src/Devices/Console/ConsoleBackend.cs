// The backend of a domain's PV console: what the guest prints goes to a sink, what is typed goes to the guest.

using System.Threading.Channels;
using XenSharp.Core;

namespace XenSharp.Devices.Console;

/// <summary>
/// Serves one console ring (<c>xencons_interface</c>, xen/include/public/io/console.h) and its event channel.
/// </summary>
/// <remarks>
/// <para><b>No byte is lost.</b> The ring's consumer index moves only over bytes that the sink has taken. While the sink
/// waits (a stopped terminal, a pipe nobody reads), the ring fills and the guest waits. The exception is a sink that is
/// closed for good: from then on output is discarded, so that the guest goes on running.</para>
/// <para><b>Threads.</b> A run has one thread of its own, because sinks block: never one of the thread pool's, which the
/// other backends need. All members may be called from any thread. Nothing is allocated per wake-up or per batch.</para>
/// <para><b>Hostile guests.</b> The page is the guest's to scribble on; see <see cref="ConsoleRing"/>. A guest that does
/// gets a dead console until its indexes make sense again, and nothing else happens.</para>
/// </remarks>
public sealed class ConsoleBackend
{
    /// <summary>
    /// After so many full rings in a row the guest is notified even though it prints on without a pause. Linux needs no
    /// notification to go on printing, and each costs it an interrupt; a guest that sleeps on a full ring on one vCPU while
    /// another keeps the ring busy does need one.
    /// </summary>
    private const int BatchesPerNotification = 16;

    private readonly ConsoleRing _ring;
    private readonly IEventChannelBackend _channel;
    private readonly byte[] _batch = new byte[ConsoleRing.OutputSize];

    /// <summary>Wakes the output thread: the guest has notified, or the run is to end.</summary>
    private readonly ManualResetEventSlim _outputWake = new();

    /// <summary>Holds at most one token: the guest has notified, so there may be room for input. Completed at the end.</summary>
    private readonly Channel<bool> _inputWake =
        Channel.CreateBounded<bool>(new BoundedChannelOptions(1) { FullMode = BoundedChannelFullMode.DropWrite });

    private readonly SemaphoreSlim _inputTurn = new(1, 1);
    private readonly Lock _lock = new();
    private Task? _run;
    private volatile bool _completed;

    /// <param name="page">The console page as mapped in this process: 4096 bytes, aligned to 4 at least. It must stay mapped
    /// until the last run has ended and no <see cref="WriteAsync"/> is under way.</param>
    /// <param name="channel">The console's event channel. The backend alone may wait on it.</param>
    public unsafe ConsoleBackend(byte* page, IEventChannelBackend channel)
    {
        ArgumentNullException.ThrowIfNull(channel);
        _ring = new ConsoleRing(page);
        _channel = channel;
    }

    /// <summary>
    /// Moves the guest's output to <paramref name="sink"/>, beginning with what is in the ring already, until
    /// <see cref="CompleteAsync"/> or cancellation. After a cancelled run another may follow, with the same or another sink:
    /// it goes on with the first byte that was not taken.
    /// </summary>
    /// <remarks>A closed event channel does not end the run, since a guest may close its port and print on before it powers
    /// off; what it prints then is shown at the end. Only during a run does <see cref="WriteAsync"/> learn that the guest
    /// has made room.</remarks>
    /// <exception cref="InvalidOperationException">A run is already under way.</exception>
    /// <exception cref="OperationCanceledException"><paramref name="cancellation"/> was signalled; output not yet taken by
    /// the sink is still in the ring.</exception>
    public Task RunAsync(IConsoleSink sink, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(sink);
        lock (_lock)
        {
            if (_run is { IsCompleted: false })
                throw new InvalidOperationException("The console has a reader already; cancel that run before starting another.");
            return _run = RunCoreAsync(sink, cancellation);
        }
    }

    /// <summary>Types <paramref name="input"/> to the guest, waiting for room in the ring as often as it takes.</summary>
    /// <remarks>Calls queue up, so the bytes of one call stay together.</remarks>
    /// <returns><see langword="true"/> if all of it is in the ring; <see langword="false"/> if the guest will read no more,
    /// because its end of the channel is closed or <see cref="CompleteAsync"/> was called.</returns>
    /// <exception cref="OperationCanceledException"><paramref name="cancellation"/> was signalled; a part of the input may
    /// be in the ring.</exception>
    public async ValueTask<bool> WriteAsync(ReadOnlyMemory<byte> input, CancellationToken cancellation = default)
    {
        await _inputTurn.WaitAsync(cancellation).ConfigureAwait(false);
        try
        {
            while (!_inputWake.Reader.Completion.IsCompleted)
            {
                int count = _ring.PutInput(input.Span);
                if (count > 0)
                    _channel.Notify();
                input = input[count..];
                if (input.IsEmpty)
                    return true;

                // Whatever token there is may be older than the look at the ring; that costs one more look.
                if (await _inputWake.Reader.WaitToReadAsync(cancellation).ConfigureAwait(false))
                    _inputWake.Reader.TryRead(out _);
            }
            return false;
        }
        finally
        {
            _inputTurn.Release();
        }
    }

    /// <summary>
    /// Says that the guest will print no more (its vCPUs have stopped), and waits until the run has given everything that
    /// was printed to its sink. Without a run under way, the next one will do just that and end.
    /// </summary>
    /// <remarks>How the run ended is for the one who awaits the run; it is not reported here.</remarks>
    /// <exception cref="OperationCanceledException"><paramref name="cancellation"/> was signalled while the sink still
    /// waited; the run goes on.</exception>
    public Task CompleteAsync(CancellationToken cancellation = default)
    {
        _completed = true;
        _inputWake.Writer.TryComplete();
        _outputWake.Set();
        lock (_lock)
            return _run is null ? Task.CompletedTask : Task.WhenAny(_run).WaitAsync(cancellation);
    }

    private async Task RunCoreAsync(IConsoleSink sink, CancellationToken cancellation)
    {
        using var stop = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        using CancellationTokenRegistration wake = stop.Token.UnsafeRegister(static e => ((ManualResetEventSlim)e!).Set(), _outputWake);

        Task output = StartOutputThread(sink, stop.Token);
        Task watch = WatchChannelAsync(stop.Token);
        if (await Task.WhenAny(output, watch).ConfigureAwait(false) == watch && watch.IsFaulted)
            await stop.CancelAsync().ConfigureAwait(false);
        try
        {
            await output.ConfigureAwait(false);
        }
        finally
        {
            await stop.CancelAsync().ConfigureAwait(false);
            await watch.ConfigureAwait(false);
        }
    }

    /// <summary>Passes each of the guest's notifications on to both directions: one channel serves both rings.</summary>
    private async Task WatchChannelAsync(CancellationToken cancellation)
    {
        // A guest that rings without a pause may keep this loop busy: it must never run on the caller of RunAsync.
        await Task.Yield();
        try
        {
            while (await _channel.WaitAsync(cancellation).ConfigureAwait(false))
            {
                _outputWake.Set();
                _inputWake.Writer.TryWrite(true);
            }
            _inputWake.Writer.TryComplete();
            _outputWake.Set();
        }
        catch (OperationCanceledException) when (cancellation.IsCancellationRequested)
        {
        }
    }

    private Task StartOutputThread(IConsoleSink sink, CancellationToken cancellation)
    {
        var ended = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        var thread = new Thread(() =>
        {
            try
            {
                MoveOutput(sink, cancellation);
                ended.SetResult();
            }
            catch (OperationCanceledException) when (cancellation.IsCancellationRequested)
            {
                ended.SetCanceled(cancellation);
            }
            catch (Exception failure)
            {
                // A sink that throws, against its contract: the one who awaits the run gets to know.
                ended.SetException(failure);
            }
        })
        {
            IsBackground = true,
            Name = "console output",
        };
        thread.Start();
        return ended.Task;
    }

    private void MoveOutput(IConsoleSink sink, CancellationToken cancellation)
    {
        bool discard = false;
        int unannounced = 0;
        try
        {
            while (true)
            {
                // In this order: what was printed before the event was set, or before the end was declared, is seen below.
                _outputWake.Reset();
                bool last = _completed;

                while (MoveBatch(sink, ref discard, ref unannounced, cancellation))
                {
                    if (unannounced >= BatchesPerNotification)
                        Announce(ref unannounced);
                    if (last)
                        break; // One look holds everything that was printed before the end; more can only come from a guest still running.
                }
                if (last)
                    return;

                Announce(ref unannounced);
                cancellation.ThrowIfCancellationRequested();
                _outputWake.Wait(CancellationToken.None);
            }
        }
        finally
        {
            Announce(ref unannounced);
        }
    }

    /// <summary>Moves what is in the ring at this moment.</summary>
    /// <returns><see langword="false"/> if there was nothing.</returns>
    private bool MoveBatch(IConsoleSink sink, ref bool discard, ref int unannounced, CancellationToken cancellation)
    {
        int count = _ring.PeekOutput(_batch, out uint consumer);
        if (count == 0)
            return false;

        unannounced++;
        int moved = 0;
        while (moved < count)
        {
            int taken = discard ? count - moved : sink.Write(_batch.AsSpan(moved, count - moved), cancellation);
            if (taken < 0 || taken > count - moved)
                throw new InvalidOperationException($"The console sink {sink.GetType().Name} says it took {taken} of {count - moved} bytes.");
            discard |= taken == 0;
            moved += taken;
            _ring.ConsumeOutput(consumer, moved);
        }
        return true;
    }

    private void Announce(ref int unannounced)
    {
        if (unannounced == 0)
            return;
        unannounced = 0;
        _channel.Notify();
    }
}
