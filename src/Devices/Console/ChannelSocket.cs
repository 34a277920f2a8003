// A channel that leads to a Unix socket: connection=socket in xl.cfg(5).

using System.Net.Sockets;

namespace XenSharp.Devices.Console;

/// <summary>Listens on a socket; one client at a time is connected to the guest, others wait until it leaves.</summary>
internal sealed class ChannelSocket : ChannelEndpoint
{
    private const UnixFileMode Mode = UnixFileMode.UserRead | UnixFileMode.UserWrite;
    private const int Backlog = 8;
    private const int Batch = 1024;

    private static readonly TimeSpan Breath = TimeSpan.FromMilliseconds(100);

    private readonly Socket _listener;
    private readonly CancellationTokenSource _stop = new();

    // Held while bytes are written to the client; taken by the one who lets go of it, after it has cancelled the write.
    private readonly Lock _writing = new();
    private Client? _client;
    private Task _serving = Task.CompletedTask;

    /// <exception cref="IOException">The socket cannot be made; a sentence says why.</exception>
    internal ChannelSocket(string path) => _listener = LocalSocket.Listen(path, Mode, Backlog, "the channel's socket");

    internal override void Start() => _serving = ServeAsync();

    /// <inheritdoc/>
    public override int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation)
    {
        lock (_writing)
        {
            if (_client is not { } client)
                return bytes.Length;
            using var either = CancellationTokenSource.CreateLinkedTokenSource(cancellation, client.Gone.Token);
            try
            {
                int count = client.Sink.Write(bytes, either.Token);
                return count > 0 ? count : bytes.Length;
            }
            catch (OperationCanceledException) when (!cancellation.IsCancellationRequested)
            {
                // The client has left in the middle; nobody hears the rest.
                return bytes.Length;
            }
        }
    }

    /// <inheritdoc/>
    public override async ValueTask DisposeAsync()
    {
        await _stop.CancelAsync().ConfigureAwait(false);
        await _serving.ConfigureAwait(false);
        _listener.Dispose();
        _stop.Dispose();
    }

    private async Task ServeAsync()
    {
        await Task.Yield();
        while (!_stop.IsCancellationRequested)
        {
            try
            {
                using Socket socket = await _listener.AcceptAsync(_stop.Token).ConfigureAwait(false);
                await ServeAsync(socket).ConfigureAwait(false);
            }
            catch (Exception failure) when (failure is SocketException or IOException)
            {
                // The client has gone already, or there are no descriptors left: those who wait are accepted later.
                await Task.Delay(Breath, _stop.Token).ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
            }
            catch (OperationCanceledException)
            {
            }
        }
    }

    private async Task ServeAsync(Socket socket)
    {
        using Client client = new(socket);
        lock (_writing)
            _client = client;
        try
        {
            byte[] batch = new byte[Batch];
            int count;
            while ((count = await socket.ReceiveAsync(batch, _stop.Token).ConfigureAwait(false)) > 0)
                await TypeAsync(batch.AsMemory(0, count), _stop.Token).ConfigureAwait(false);
        }
        catch (SocketException)
        {
            // It has left without a word.
        }
        finally
        {
            await client.Gone.CancelAsync().ConfigureAwait(false);
            lock (_writing)
                _client = null;
        }
    }

    private sealed class Client(Socket socket) : IDisposable
    {
        internal FileDescriptorSink Sink { get; } = new((int)socket.Handle);

        internal CancellationTokenSource Gone { get; } = new();

        public void Dispose()
        {
            Sink.Dispose();
            Gone.Dispose();
        }
    }
}
