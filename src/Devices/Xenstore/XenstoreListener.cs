// The Unix socket on which the host's own tools find the store, with the wire format of Xen's xenstored.
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;
using Tmds.Linux;

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
    private readonly HashSet<XenstoreConnection> _clients = [];
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
        UnixDomainSocketEndPoint endPoint = XenstoreSocketPath.EndPoint(path);
        RemoveStale(path, endPoint);
        var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            // Between bind and listen nobody can connect, so nobody gets in before the mode is set.
            socket.Bind(endPoint);
            SetMode(path, options.Mode);
            socket.Listen(Backlog);
        }
        catch (Exception failure) when (failure is SocketException or IOException or UnauthorizedAccessException)
        {
            socket.Dispose();
            throw new IOException($"The xenstore socket {path} cannot be made: {failure.Message.TrimEnd('.')}. Its folder must exist, and this user must " +
                "be allowed to write there.", failure);
        }
        return new XenstoreListener(server, path, socket, options);
    }

    /// <summary>Removes the socket and disconnects its clients; completes when none is served any longer.</summary>
    public async ValueTask DisposeAsync()
    {
        await _stop.CancelAsync().ConfigureAwait(false);
        await _accepting.ConfigureAwait(false);

        // The runtime removes the file of a bound socket when that is closed.
        _socket.Dispose();
        XenstoreConnection[] clients;
        lock (_clients)
            clients = [.. _clients];
        foreach (XenstoreConnection client in clients)
            client.Stop();
        foreach (XenstoreConnection client in clients)
            await client.Completion.ConfigureAwait(false);
    }

    private static void RemoveStale(string path, UnixDomainSocketEndPoint endPoint)
    {
        if (!File.Exists(path))
            return;
        using var probe = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            probe.Connect(endPoint);
        }
        catch (SocketException failure) when (failure.SocketErrorCode == SocketError.ConnectionRefused && IsSocket(path))
        {
            // Bound, but nobody listens: whoever made it is dead.
            File.Delete(path);
            return;
        }
        catch (SocketException)
        {
            throw new IOException($"{path} exists and is no socket that can be replaced; remove it, or name another path for xenstore's socket.");
        }
        throw new IOException($"Another xenstore serves {path}; end it, or name another path for the socket.");
    }

    // Connecting to a file of any other kind is refused, too.
    private static unsafe bool IsSocket(string path)
    {
        stat status;
        fixed (byte* name = Encoding.UTF8.GetBytes(path + '\0'))
            return LibC.stat(name, &status) == 0 && ((uint)status.st_mode & (uint)LibC.S_IFMT) == (uint)LibC.S_IFSOCK;
    }

    private static unsafe void SetMode(string path, UnixFileMode mode)
    {
        // The members of UnixFileMode are the bits of the system's mode.
        fixed (byte* name = Encoding.UTF8.GetBytes(path + '\0'))
        {
            if (LibC.chmod(name, (mode_t)(uint)mode) != 0)
                throw new IOException($"its mode cannot be set ({Marshal.GetPInvokeErrorMessage(Marshal.GetLastPInvokeError())})");
        }
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
            _ = _clients.Add(connection);
        connection.Completion.ContinueWith(
            _ =>
            {
                transport.Dispose();
                lock (_clients)
                    _clients.Remove(connection);
            },
            CancellationToken.None, TaskContinuationOptions.None, TaskScheduler.Default);
    }
}
