// The store as the manager sees it: the database, the connections of the domains, and the host's own clients.
namespace XenSharp.Devices.Xenstore;

/// <summary>
/// A xenstore in the manager's process. All members may be called by any thread. Domains are served over their rings, the
/// manager itself uses <see cref="Domain0"/>, other processes can be given connections with <see cref="Accept"/>.
/// </summary>
public sealed class XenstoreServer : IAsyncDisposable
{
    private readonly XenstoreDatabase _database;
    private readonly XenstoreRequests _requests;
    private readonly HashSet<XenstoreConnection> _connections = [];
    private readonly List<XenstoreClient> _clients = [];
    private bool _disposed;

    public XenstoreServer(XenstoreOptions? options = null)
    {
        _database = new XenstoreDatabase(options ?? new XenstoreOptions());
        _requests = new XenstoreRequests(_database, new DomainControl(this));
        Domain0 = CreateClient();
    }

    /// <summary>The manager's own access to the store, with all rights.</summary>
    public XenstoreClient Domain0 { get; }

    internal XenstoreDatabase Database => _database;

    /// <summary>Another access like <see cref="Domain0"/>, with watches and an order of events of its own.</summary>
    /// <exception cref="ObjectDisposedException">The server is disposed.</exception>
    public XenstoreClient CreateClient()
    {
        lock (_database.Gate)
        {
            ObjectDisposedException.ThrowIf(_disposed, this);
            XenstoreClient client = new(_database);
            _clients.RemoveAll(static other => other.IsDisposed);
            _clients.Add(client);
            return client;
        }
    }

    /// <summary>
    /// Makes a domain known before it is introduced, so that permissions that others give it from now on count. Introducing it,
    /// or naming it in a permission list as domain 0, does the same.
    /// </summary>
    public void AnnounceDomain(ushort domainId)
    {
        CheckGuest(domainId);
        lock (_database.Gate)
            _database.AddDomain(domainId);
    }

    /// <summary>
    /// Connects the store to a domain (XS_INTRODUCE) and starts serving it. The ring is emptied first, so this is done before the
    /// guest runs. Fires @introduceDomain. If the domain is connected already, that connection is ended and replaced.
    /// </summary>
    /// <param name="domainId">A guest's id, 1 to 0x7fef.</param>
    /// <param name="transport">Its ring. The page behind it must stay mapped until <see cref="ReleaseDomainAsync"/> has
    /// completed.</param>
    /// <returns>The connection, for looking at; it needs no care.</returns>
    /// <exception cref="ArgumentOutOfRangeException">The id is not a guest's.</exception>
    /// <exception cref="ObjectDisposedException">The server is disposed.</exception>
    public XenstoreConnection IntroduceDomain(ushort domainId, IXenstoreTransport transport)
    {
        CheckGuest(domainId);
        ArgumentNullException.ThrowIfNull(transport);

        // The earlier connection lets go of the page first: it may be the same one.
        XenstoreConnection? old;
        lock (_database.Gate)
            old = _database.FindDomain(domainId)?.Connection;
        old?.Quiesce();
        lock (_database.Gate)
        {
            ObjectDisposedException.ThrowIf(_disposed, this);
            return Connect(domainId, transport);
        }
    }

    /// <summary>Whether the store is connected to the domain (XS_IS_DOMAIN_INTRODUCED).</summary>
    public bool IsIntroduced(ushort domainId)
    {
        lock (_database.Gate)
            return _database.FindDomain(domainId) is { Introduced: true };
    }

    /// <summary>
    /// Tells watchers of @releaseDomain that a domain has shut down or crashed. Repetitions are ignored until
    /// <see cref="ResumeDomain"/> or a new introduction; an unknown domain is, too.
    /// </summary>
    public void AnnounceShutdown(ushort domainId)
    {
        lock (_database.Gate)
        {
            if (_database.FindDomain(domainId) is { Introduced: true } domain)
                _database.AnnounceShutdown(domain);
        }
    }

    /// <summary>The domain runs again: its next shutdown is announced again (XS_RESUME).</summary>
    public void ResumeDomain(ushort domainId)
    {
        lock (_database.Gate)
        {
            if (_database.FindDomain(domainId) is { } domain)
                XenstoreDatabase.Resume(domain);
        }
    }

    /// <summary>
    /// Forgets a domain that is gone: its connection, watches, transactions and nodes of its own, and fires @releaseDomain.
    /// What the toolstack wrote for it (<see cref="XenstoreDomainTree"/>) is the toolstack's to remove.
    /// </summary>
    /// <returns>Completes when the ring is no longer touched; <see langword="false"/> if the domain was not known.</returns>
    public async ValueTask<bool> ReleaseDomainAsync(ushort domainId)
    {
        CheckGuest(domainId);
        XenstoreConnection? connection;
        lock (_database.Gate)
        {
            if (_database.FindDomain(domainId) is not { } domain)
                return false;
            connection = _database.Release(domain);
        }
        if (connection is not null)
        {
            connection.Stop();
            await connection.Completion.ConfigureAwait(false);
        }
        return true;
    }

    /// <summary>
    /// Serves a client of the host over any byte stream, with all rights and relative to /local/domain/0: what a connection to
    /// xenstored's socket is. It ends when the stream does.
    /// </summary>
    public XenstoreConnection Accept(IXenstoreTransport transport)
    {
        ArgumentNullException.ThrowIfNull(transport);
        lock (_database.Gate)
        {
            ObjectDisposedException.ThrowIf(_disposed, this);
            XenstoreConnection connection = new(_database, _requests, _database.Domain0, privileged: true, transport);
            Register(connection, reset: false, Task.CompletedTask);
            return connection;
        }
    }

    /// <summary>Ends all connections and clients; completes when no ring is touched any longer.</summary>
    public async ValueTask DisposeAsync()
    {
        XenstoreConnection[] connections;
        XenstoreClient[] clients;
        lock (_database.Gate)
        {
            if (_disposed)
                return;
            _disposed = true;
            connections = [.. _connections];
            clients = [.. _clients];
        }
        foreach (XenstoreConnection connection in connections)
            connection.Stop();
        foreach (XenstoreConnection connection in connections)
            await connection.Completion.ConfigureAwait(false);
        foreach (XenstoreClient client in clients)
            await client.DisposeAsync().ConfigureAwait(false);
    }

    private static void CheckGuest(ushort domainId)
    {
        const ushort FirstReserved = 0x7ff0;
        if (domainId is 0 or >= FirstReserved)
        {
            throw new ArgumentOutOfRangeException(nameof(domainId), domainId,
                "Only guests can be announced, introduced and released: use a domain id from 1 to 32751.");
        }
    }

    private XenstoreConnection Connect(ushort domainId, IXenstoreTransport transport)
    {
        XenstoreDomain domain = _database.AddDomain(domainId);
        Task after = Task.CompletedTask;
        if (domain.Connection is { } old)
        {
            _database.Close(old.Session);
            old.Stop();
            after = old.Completion;
        }
        XenstoreConnection connection = new(_database, _requests, domain, privileged: false, transport);
        domain.Connection = connection;
        Register(connection, reset: true, after);
        _database.Introduced(domain);
        return connection;
    }

    private void Register(XenstoreConnection connection, bool reset, Task after)
    {
        _connections.Add(connection);
        connection.Start(reset, after);
        connection.Completion.ContinueWith(
            _ =>
            {
                lock (_database.Gate)
                    _connections.Remove(connection);
            },
            CancellationToken.None, TaskContinuationOptions.None, TaskScheduler.Default);
    }

    private sealed class DomainControl(XenstoreServer server) : IXenstoreDomainControl
    {
        public XenstoreError Introduce(ushort domainId, ulong frame, uint port)
        {
            // A connection whose event channel was closed is over and is made anew.
            if (server._database.FindDomain(domainId) is { Introduced: true, Connection: { Completion.IsCompleted: false } connection })
            {
                connection.DemandReset();
                return XenstoreError.None;
            }
            if (server._database.Options.Connector is not { } connector)
                return XenstoreError.ENOSYS;
            if (connector(domainId, frame, port) is not { } transport)
                return XenstoreError.EINVAL;
            server.Connect(domainId, transport);
            return XenstoreError.None;
        }

        public void Release(XenstoreDomain domain) => server._database.Release(domain)?.Stop();
    }
}
