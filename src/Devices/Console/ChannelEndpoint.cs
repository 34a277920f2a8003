// The host's end of a guest's channel: who is connected there gets what the guest says, byte for byte, and is heard by it.

namespace XenSharp.Devices.Console;

/// <summary>
/// A place where one program of the host's at a time can meet the guest. It stays while guests' drivers connect to the channel and
/// leave it.
/// </summary>
/// <remarks>
/// A channel carries a protocol, so nothing is added to it and nothing left out while both are there: a program that does not read
/// makes the guest wait in that channel. What a guest says to nobody is dropped, as by QEMU's character devices, and what a program
/// says waits until there is a guest.
/// </remarks>
internal abstract class ChannelEndpoint : IConsoleSink, IAsyncDisposable
{
    private readonly Lock _lock = new();
    private ConsoleInput? _guest;
    private TaskCompletionSource _guestCame = NewSignal();

    /// <summary>What the guest's part of the store says of where the channel leads: the terminal's path.</summary>
    internal virtual string? Terminal => null;

    /// <summary>Begins to serve.</summary>
    internal abstract void Start();

    /// <inheritdoc/>
    public abstract int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation);

    /// <summary>Ends it; not while a call of <see cref="Write"/> is under way.</summary>
    public abstract ValueTask DisposeAsync();

    /// <summary>Says where what is typed goes.</summary>
    /// <param name="guest">The guest's driver; <see langword="null"/> when it has left.</param>
    internal void Connect(ConsoleInput? guest)
    {
        lock (_lock)
        {
            _guest = guest;
            if (guest is not null)
                _ = _guestCame.TrySetResult();
            else if (_guestCame.Task.IsCompleted)
                _guestCame = NewSignal();
        }
    }

    /// <summary>Says something to the guest, waiting until there is one, and room. What one leaves unread is lost with it.</summary>
    /// <exception cref="OperationCanceledException"><paramref name="cancellation"/> was signalled.</exception>
    protected async ValueTask TypeAsync(ReadOnlyMemory<byte> input, CancellationToken cancellation)
    {
        while (true)
        {
            ConsoleInput? guest;
            Task came;
            lock (_lock)
                (guest, came) = (_guest, _guestCame.Task);
            if (guest is not null)
            {
                _ = await guest(input, cancellation).ConfigureAwait(false);
                return;
            }
            await came.WaitAsync(cancellation).ConfigureAwait(false);
        }
    }

    private static TaskCompletionSource NewSignal() => new(TaskCreationOptions.RunContinuationsAsynchronously);
}
