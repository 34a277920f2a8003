// The Unix socket on which the host's own tools find the store, with the wire format of Xen's xenstored.
using System.Net.Sockets;

namespace XenSharp.Devices.Xenstore;

/// <summary>Settings of a <see cref="XenstoreListener"/>.</summary>
public sealed record XenstoreListenerOptions
{
    /// <summary>Who may connect, and so do everything with the store: the socket's mode. xenstored's is the default.</summary>
    public UnixFileMode Mode { get; init; } = UnixFileMode.UserRead | UnixFileMode.UserWrite;

    /// <summary>Clients at the same time; those beyond are disconnected at once.</summary>
    public int MaximumClients { get; init; } = 1024;
}

/// <summary>
/// Listens on a Unix socket and connects its clients to a store, each with all rights, as xenstored does. Members may be called
/// by any thread.
/// </summary>
public sealed class XenstoreListener : IAsyncDisposable
{
    private const int Backlog = 128;

    // How long nobody is accepted after the process ran out of descriptors.
    private static readonly TimeSpan Breath = TimeSpan.FromMilliseconds(100);

    private readonly XenstoreServer _server;
    private readonly XenstoreListenerOptions _options;
    private readonly Socket _socket;
    private readonly CancellationTokenSource _stop = new();

    // With what completes when the client's socket is closed.
    private readonly Dictionary<XenstoreConnection, Task> _clients = [];
    private readonly Task _accepting;

    private XenstoreListener(XenstoreServer server, string path, Socket socket, XenstoreListenerOptions options)
    {
        _server = server;
        Path = path;
        _socket = socket;
        _options = options;
        _accepting = AcceptAsync();
    }

    /// <summary>The socket's path.</summary>
    public string Path { get; }

    /// <summary>How many clients are connected.</summary>
    public int Clients
    {
        get
        {
            lock (_clients)
                return _clients.Count;
        }
    }

    /// <summary>Makes the socket and starts to serve its clients. A socket that a dead process has left there is replaced.</summary>
    /// <param name="server">The store.</param>
    /// <param name="path">Where the socket is to be; its folder must exist.</param>
    /// <param name="options">Settings; <see langword="null"/> for the defaults.</param>
    /// <exception cref="IOException">The socket cannot be made there; a sentence says why, and what to do.</exception>
    public static XenstoreListener Start(XenstoreServer server, string path, XenstoreListenerOptions? options = null)
    {
        ArgumentNullException.ThrowIfNull(server);
        ArgumentException.ThrowIfNullOrEmpty(path);
        options ??= new XenstoreListenerOptions();
        ArgumentOutOfRangeException.ThrowIfLessThan(options.MaximumClients, 1);
        Socket socket = LocalSocket.Listen(path, options.Mode, Backlog, "the xenstore socket");
        return new XenstoreListener(server, path, socket, options);
    }

    /// <summary>Removes the socket and disconnects its clients; completes when none is served any longer.</summary>
    public async ValueTask DisposeAsync()
    {
        await _stop.CancelAsync().ConfigureAwait(false);
        await _accepting.ConfigureAwait(false);

        // The runtime removes the file of a bound socket when that is closed.
        _socket.Dispose();
        KeyValuePair<XenstoreConnection, Task>[] clients;
        lock (_clients)
            clients = [.. _clients];
        foreach ((XenstoreConnection client, _) in clients)
            client.Stop();
        foreach ((_, Task end) in clients)
            await end.ConfigureAwait(false);
    }

    private async Task AcceptAsync()
    {
        await Task.Yield();
        while (!_stop.IsCancellationRequested)
        {
            try
            {
                Socket client = await _socket.AcceptAsync(_stop.Token).ConfigureAwait(false);
                Serve(client);
            }
            catch (SocketException)
            {
                // The client has gone already, or there are no descriptors left: those who wait are accepted later.
                await Task.Delay(Breath, _stop.Token).ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
            }
            catch (OperationCanceledException)
            {
            }
            catch (ObjectDisposedException)
            {
                // The store is at its end.
                return;
            }
        }
    }

    private void Serve(Socket client)
    {
        var transport = new XenstoreSocketTransport(client);
        if (Clients >= _options.MaximumClients)
        {
            transport.Dispose();
            return;
        }
        XenstoreConnection connection;
        try
        {
            connection = _server.Accept(transport);
        }
        catch (ObjectDisposedException)
        {
            transport.Dispose();
            throw;
        }
        lock (_clients)
            _clients.Add(connection, EndAsync(connection, transport));
    }

    private async Task EndAsync(XenstoreConnection connection, XenstoreSocketTransport transport)
    {
        // Not at once: the client is remembered first.
        await Task.Yield();
        await connection.Completion.ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
        transport.Dispose();
        lock (_clients)
            _ = _clients.Remove(connection);
    }
}
