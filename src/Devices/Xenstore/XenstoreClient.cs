// The store for the manager itself: domain 0's view, without messages.
using System.Text;

namespace XenSharp.Devices.Xenstore;

/// <summary>Reading and writing of nodes, directly or within a transaction. Relative paths start at /local/domain/0.</summary>
public abstract class XenstoreAccessor
{
    private protected XenstoreAccessor()
    {
    }

    private protected abstract XenstoreSession Session { get; }

    private protected abstract XenstoreTransactionState? State { get; }

    /// <summary>The value of a node as UTF-8 text; <see langword="null"/> if there is no such node.</summary>
    /// <exception cref="XenstoreException">The path is malformed.</exception>
    public string? Read(string path) => ReadBytes(path) is { } value ? Encoding.UTF8.GetString(value) : null;

    /// <summary>The value of a node; <see langword="null"/> if there is no such node.</summary>
    /// <exception cref="XenstoreException">The path is malformed.</exception>
    public byte[]? ReadBytes(string path) => Find(path, "read")?.Value.AsSpan().ToArray();

    /// <summary>Whether there is such a node.</summary>
    /// <exception cref="XenstoreException">The path is malformed.</exception>
    public bool Exists(string path) => Find(path, "lookup") is not null;

    /// <summary>The names of a node's children in the order of their creation; empty if there is no such node.</summary>
    /// <exception cref="XenstoreException">The path is malformed.</exception>
    public IReadOnlyList<string> List(string path)
    {
        if (Find(path, "list") is not { } node)
            return [];
        string[] names = new string[node.Children.Length];
        for (int index = 0; index < names.Length; index++)
            names[index] = node.Children[index].Name;
        return names;
    }

    /// <summary>The permission list of a node; <see langword="null"/> if there is no such node.</summary>
    /// <exception cref="XenstoreException">The path is malformed.</exception>
    public XenstorePermissions? GetPermissions(string path) => Find(path, "permissions")?.Permissions;

    /// <summary>Sets a value as UTF-8 text. Missing nodes are created with the permissions of the nearest existing one above.</summary>
    /// <exception cref="XenstoreException">The path is malformed.</exception>
    public void Write(string path, string value) => Write(path, Encoding.UTF8.GetBytes(value).AsSpan());

    /// <summary>Sets a value. Missing nodes are created with the permissions of the nearest existing one above.</summary>
    /// <exception cref="XenstoreException">The path is malformed.</exception>
    public void Write(string path, ReadOnlySpan<byte> value)
    {
        byte[] copy = value.ToArray();
        lock (Gate())
            Check(Session.Database.Write(Session, State, Absolute(path), copy, null), "write", path);
    }

    /// <summary>Creates a node, and missing ones above, with empty values; an existing one stays as it is.</summary>
    /// <exception cref="XenstoreException">The path is malformed.</exception>
    public void MakeDirectory(string path)
    {
        lock (Gate())
            Check(Session.Database.MakeDirectory(Session, State, Absolute(path), null), "mkdir", path);
    }

    /// <summary>Removes a node and everything below, if it is there.</summary>
    /// <exception cref="XenstoreException">The path is malformed, or "/".</exception>
    public void Remove(string path)
    {
        lock (Gate())
        {
            XenstoreError error = Session.Database.Remove(Session, State, Absolute(path), null);

            // Only the wire cares that the parent was missing, too.
            if (error != XenstoreError.ENOENT)
                Check(error, "rm", path);
        }
    }

    /// <summary>Sets the permission list of a node, or of @introduceDomain or @releaseDomain. The domains named become known.</summary>
    /// <exception cref="XenstoreException">There is no such node, or the path is malformed.</exception>
    public void SetPermissions(string path, XenstorePermissions permissions)
    {
        ArgumentNullException.ThrowIfNull(permissions);
        lock (Gate())
            Check(Session.Database.SetPermissions(Session, State, Absolute(path), permissions, null), "chmod", path);
    }

    /// <summary>Writes a node and sets its permissions.</summary>
    /// <exception cref="XenstoreException">The path is malformed.</exception>
    public void Write(string path, string value, XenstorePermissions permissions)
    {
        Write(path, value);
        SetPermissions(path, permissions);
    }

    private protected static void Check(XenstoreError error, string request, string path)
    {
        if (error != XenstoreError.None)
            throw new XenstoreException(error, $"{request} of \"{path}\"");
    }

    private protected virtual Lock Gate()
    {
        ObjectDisposedException.ThrowIf(Session.Closed, typeof(XenstoreClient));
        return Session.Database.Gate;
    }

    private string Absolute(string path) => XenstorePath.Canonicalize(path, Session.Folder);

    private XenstoreNode? Find(string path, string request)
    {
        lock (Gate())
        {
            XenstoreError error = Session.Database.Read(Session, State, Absolute(path), out XenstoreNode? node);
            if (error != XenstoreError.ENOENT)
                Check(error, request, path);
            return node;
        }
    }
}

/// <summary>
/// An access to the store with all rights and with watches of its own. Any thread may use it; callbacks of its watches run one
/// after the other, in the order of the events, on the thread pool, and may use the store.
/// </summary>
public sealed class XenstoreClient : XenstoreAccessor, IAsyncDisposable
{
    private readonly XenstoreDatabase _database;
    private readonly ClientSession _session;
    private readonly CancellationTokenSource _stop = new();
    private readonly Task _dispatcher;

    internal XenstoreClient(XenstoreDatabase database)
    {
        _database = database;
        _session = new ClientSession(database);
        _dispatcher = Task.Run(DispatchAsync);
    }

    internal bool IsDisposed => _session.Closed;

    private protected override XenstoreSession Session => _session;

    private protected override XenstoreTransactionState? State => null;

    /// <summary>
    /// Calls back on every change of a node or below it, and once at first. For @introduceDomain and @releaseDomain: on each such
    /// event, and once at first.
    /// </summary>
    /// <param name="path">The node, which need not exist.</param>
    /// <param name="callback">Gets the path that changed; relative if <paramref name="path"/> was. Changes that follow each other
    /// quickly can be told by one call.</param>
    /// <param name="depth">How many levels below the path to watch; <see langword="null"/> for all. For a special event 1: the path
    /// told is @releaseDomain/N then, with the domain's id.</param>
    /// <returns>Dispose it to end the watch; a callback may then still be running, but none starts.</returns>
    /// <exception cref="XenstoreException">The path is malformed.</exception>
    public IDisposable Watch(string path, Action<string> callback, int? depth = null)
    {
        ArgumentNullException.ThrowIfNull(callback);
        lock (Gate())
        {
            // The token only has to be unique among this client's watches.
            string token = _database.NextSequence().ToString(System.Globalization.CultureInfo.InvariantCulture);
            Check(_database.AddWatch(_session, path, token, depth, out XenstoreWatch? watch, callback), "watch", path);
            XenstoreDatabase.FireFirst(watch!);
            return new Registration(_database, watch!);
        }
    }

    /// <summary>Starts a transaction: it sees the store as it is now, and what it does is seen by others when it is committed.</summary>
    public XenstoreTransaction BeginTransaction()
    {
        lock (Gate())
        {
            Check(_database.StartTransaction(_session, out XenstoreTransactionState? state), "transaction start", "");
            return new XenstoreTransaction(_session, state!);
        }
    }

    /// <summary>Runs a piece of work in a transaction, again and again until it can be committed.</summary>
    /// <param name="work">What to do; it must do the same when it is run again.</param>
    public void Transact(Action<XenstoreTransaction> work)
    {
        ArgumentNullException.ThrowIfNull(work);
        while (true)
        {
            using XenstoreTransaction transaction = BeginTransaction();
            work(transaction);
            if (transaction.TryCommit())
                return;
        }
    }

    /// <summary>Ends the client: its watches go, open transactions are discarded, and the running callback is waited for.</summary>
    public async ValueTask DisposeAsync()
    {
        lock (_database.Gate)
        {
            if (!_session.Closed)
                _database.Close(_session);
        }
        await _stop.CancelAsync().ConfigureAwait(false);
        await _dispatcher.ConfigureAwait(false);
    }

    private async Task DispatchAsync()
    {
        try
        {
            while (true)
            {
                await _session.Signal.WaitAsync(_stop.Token).ConfigureAwait(false);
                while (Next() is { } message)
                    Call(message);
            }
        }
        catch (OperationCanceledException)
        {
            // Disposed.
        }
    }

    private XenstoreMessage? Next()
    {
        lock (_database.Gate)
            return _session.Dequeue();
    }

    private void Call(XenstoreMessage message)
    {
        XenstoreWatchEvent watchEvent = message.Event!;
        XenstoreCallbackWatch watch = (XenstoreCallbackWatch)watchEvent.Watch;
        try
        {
            if (!watch.Ended)
                watch.Callback(watchEvent.Path);
        }
        catch (Exception exception)
        {
            _database.Options.CallbackFailed(exception);
        }
        finally
        {
            lock (_database.Gate)
                _session.Delivered(message);
        }
    }

    private sealed class ClientSession(XenstoreDatabase database) : XenstoreSession(database, database.Domain0, privileged: true)
    {
        public XenstoreSignal Signal { get; } = new();

        public override void Wake() => Signal.Set();
    }

    private sealed class Registration(XenstoreDatabase database, XenstoreWatch watch) : IDisposable
    {
        public void Dispose()
        {
            lock (database.Gate)
            {
                ((XenstoreCallbackWatch)watch).Ended = true;
                database.RemoveWatch(watch);
                watch.Session.DropEventsOf(watch);
            }
        }
    }
}

/// <summary>A watch of the manager's own.</summary>
internal sealed class XenstoreCallbackWatch(
    XenstoreSession session, string path, string token, bool relative, int depth, ulong sequence, Action<string> callback)
    : XenstoreWatch(session, path, token, relative, depth, sequence)
{
    private volatile bool _ended;

    public Action<string> Callback { get; } = callback;

    public bool Ended
    {
        get => _ended;
        set => _ended = value;
    }
}

/// <summary>A transaction of the manager's own. Dispose it to discard what was not committed. One thread at a time.</summary>
public sealed class XenstoreTransaction : XenstoreAccessor, IDisposable
{
    private readonly XenstoreSession _session;
    private readonly XenstoreTransactionState _state;

    internal XenstoreTransaction(XenstoreSession session, XenstoreTransactionState state)
    {
        _session = session;
        _state = state;
    }

    private protected override XenstoreSession Session => _session;

    private protected override XenstoreTransactionState? State => _state;

    /// <summary>Makes the changes visible, all at once.</summary>
    /// <returns><see langword="false"/> if something that the transaction looked at was changed meanwhile: nothing was done, start
    /// again.</returns>
    /// <exception cref="XenstoreException">A domain that nodes were to be given to is gone.</exception>
    public bool TryCommit()
    {
        lock (Gate())
        {
            XenstoreError error = _session.Database.EndTransaction(_session, _state, commit: true, null);
            if (error == XenstoreError.EAGAIN)
                return false;
            Check(error, "transaction end", "");
            return true;
        }
    }

    /// <summary>Discards the changes unless they were committed.</summary>
    public void Dispose()
    {
        lock (_session.Database.Gate)
        {
            if (IsOpen)
                _session.Database.EndTransaction(_session, _state, commit: false, null);
        }
    }

    private bool IsOpen => _session.Transactions.TryGetValue(_state.Id, out XenstoreTransactionState? open) && open == _state;

    private protected override Lock Gate()
    {
        Lock gate = base.Gate();
        lock (gate)
            ObjectDisposedException.ThrowIf(!IsOpen, this);
        return gate;
    }
}
