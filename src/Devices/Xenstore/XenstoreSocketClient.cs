// The other end of the socket: a client of the wire format, for xensharp's own commands and for anyone in another process.
using System.Globalization;
using System.Net.Sockets;
using System.Text;
using System.Threading.Channels;

namespace XenSharp.Devices.Xenstore;

/// <summary>A change that a watch tells.</summary>
/// <param name="Path">What changed, in the form in which the watched path was given: absolute or relative.</param>
/// <param name="Token">What the watch was set with.</param>
public readonly record struct XenstoreEvent(string Path, string Token);

/// <summary>
/// A connection to a store's socket, this one's or a real xenstored's. Any thread may use it, and requests of several may be under
/// way at a time.
/// </summary>
/// <remarks>Every request fails with <see cref="XenstoreException"/> when the store refuses it, and with <see cref="IOException"/>
/// when the connection is lost. A transaction is named by its number; 0 is none.</remarks>
public sealed class XenstoreSocketClient : IAsyncDisposable
{
    private readonly string _path;
    private readonly NetworkStream _stream;
    private readonly SemaphoreSlim _sendTurn = new(1, 1);
    private readonly Dictionary<uint, TaskCompletionSource<byte[]>> _pending = [];
    private readonly Channel<XenstoreEvent> _events =
        Channel.CreateUnbounded<XenstoreEvent>(new UnboundedChannelOptions { SingleWriter = true });

    private readonly Task _receiving;
    private uint _lastRequest;
    private Exception? _lost;

    private XenstoreSocketClient(string path, NetworkStream stream)
    {
        _path = path;
        _stream = stream;
        _receiving = ReceiveAsync();
    }

    /// <summary>Connects to a store.</summary>
    /// <param name="path">Its socket.</param>
    /// <param name="cancellation">Ends the attempt.</param>
    /// <exception cref="IOException">Nobody serves there; a sentence says so.</exception>
    public static async Task<XenstoreSocketClient> ConnectAsync(string path, CancellationToken cancellation = default)
    {
        ArgumentException.ThrowIfNullOrEmpty(path);
        UnixDomainSocketEndPoint endPoint = LocalSocket.EndPoint(path);
        var socket = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            await socket.ConnectAsync(endPoint, cancellation).ConfigureAwait(false);
            return new XenstoreSocketClient(path, new NetworkStream(socket, ownsSocket: true));
        }
        catch (SocketException failure)
        {
            socket.Dispose();
            throw new IOException(failure.SocketErrorCode == SocketError.AccessDenied
                ? $"You may not connect to the xenstore at {path}; ask for the rights on that socket, or be root."
                : $"No xenstore answers at {path} ({Reason(path, failure)}); start the daemon, or name its socket.", failure);
        }
        catch (OperationCanceledException)
        {
            socket.Dispose();
            throw;
        }
    }

    /// <summary>Watch events as they come, until the connection ends.</summary>
    public ChannelReader<XenstoreEvent> Events => _events.Reader;

    /// <summary>The value of a node.</summary>
    public Task<byte[]> ReadAsync(string path, uint transaction = 0, CancellationToken cancellation = default) =>
        CallAsync(XenstoreMessageType.Read, transaction, Strings(path), "read", path, cancellation);

    /// <summary>The names of a node's children, however many there are.</summary>
    public async Task<IReadOnlyList<string>> ListAsync(string path, uint transaction = 0, CancellationToken cancellation = default)
    {
        try
        {
            byte[] names = await CallAsync(XenstoreMessageType.Directory, transaction, Strings(path), "list", path, cancellation)
                .ConfigureAwait(false);
            return Split(names);
        }
        catch (XenstoreException refusal) when (refusal.Error == XenstoreError.E2BIG)
        {
            return await ListInPartsAsync(path, transaction, cancellation).ConfigureAwait(false);
        }
    }

    /// <summary>Sets the value of a node, and creates it and missing ones above.</summary>
    public Task WriteAsync(string path, ReadOnlyMemory<byte> value, uint transaction = 0, CancellationToken cancellation = default) =>
        CallAsync(XenstoreMessageType.Write, transaction, [.. Strings(path), .. value.Span], "write", path, cancellation);

    /// <summary>Creates a node and missing ones above, with empty values.</summary>
    public Task MakeDirectoryAsync(string path, uint transaction = 0, CancellationToken cancellation = default) =>
        CallAsync(XenstoreMessageType.MakeDirectory, transaction, Strings(path), "mkdir", path, cancellation);

    /// <summary>Removes a node and everything below.</summary>
    public Task RemoveAsync(string path, uint transaction = 0, CancellationToken cancellation = default) =>
        CallAsync(XenstoreMessageType.Remove, transaction, Strings(path), "rm", path, cancellation);

    /// <summary>The permission list of a node.</summary>
    public async Task<XenstorePermissions> GetPermissionsAsync(string path, uint transaction = 0, CancellationToken cancellation = default)
    {
        byte[] reply = await CallAsync(XenstoreMessageType.GetPermissions, transaction, Strings(path), "permissions", path, cancellation)
            .ConfigureAwait(false);
        List<XenstorePermission> entries = [];
        foreach (string text in Split(reply))
        {
            if (!XenstorePermission.TryParse(text, out XenstorePermission entry))
                throw Nonsense($"the permission \"{text}\"");
            entries.Add(entry);
        }
        return entries.Count > 0 ? new XenstorePermissions([.. entries]) : throw Nonsense("an empty permission list");
    }

    /// <summary>Sets the permission list of a node.</summary>
    public Task SetPermissionsAsync(
        string path, XenstorePermissions permissions, uint transaction = 0, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(permissions);
        string[] entries = [.. permissions.Entries.Select(static entry => entry.ToString())];
        return CallAsync(XenstoreMessageType.SetPermissions, transaction, Strings([path, .. entries]), "chmod", path, cancellation);
    }

    /// <summary>Sets a watch; it fires at once, then on every change. What it tells comes out of <see cref="Events"/>.</summary>
    /// <param name="path">What is watched; need not exist.</param>
    /// <param name="token">Comes back with each event.</param>
    /// <param name="depth">How many levels below the path are watched; <see langword="null"/> for all. Not every store knows that.</param>
    /// <param name="cancellation">Ends the wait for the answer.</param>
    public Task WatchAsync(string path, string token, int? depth = null, CancellationToken cancellation = default) =>
        CallAsync(
            XenstoreMessageType.Watch, 0,
            depth is { } levels ? Strings(path, token, levels.ToString(CultureInfo.InvariantCulture)) : Strings(path, token),
            "watch", path, cancellation);

    /// <summary>Ends a watch.</summary>
    public Task UnwatchAsync(string path, string token, CancellationToken cancellation = default) =>
        CallAsync(XenstoreMessageType.Unwatch, 0, Strings(path, token), "unwatch", path, cancellation);

    /// <summary>Starts a transaction.</summary>
    /// <returns>Its number.</returns>
    public async Task<uint> BeginTransactionAsync(CancellationToken cancellation = default)
    {
        byte[] reply = await CallAsync(XenstoreMessageType.TransactionStart, 0, Strings(""), "transaction start", "", cancellation)
            .ConfigureAwait(false);
        return Split(reply) is [string text] && uint.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out uint number)
            ? number
            : throw Nonsense("no transaction number");
    }

    /// <summary>Ends a transaction.</summary>
    /// <returns><see langword="false"/> if it was to be committed but met a conflicting change: start it again.</returns>
    public async Task<bool> EndTransactionAsync(uint transaction, bool commit, CancellationToken cancellation = default)
    {
        try
        {
            _ = await CallAsync(XenstoreMessageType.TransactionEnd, transaction, Strings(commit ? "T" : "F"), "transaction end", "", cancellation)
                .ConfigureAwait(false);
            return true;
        }
        catch (XenstoreException refusal) when (refusal.Error == XenstoreError.EAGAIN)
        {
            return false;
        }
    }

    /// <summary>Asks the store about itself (XS_CONTROL).</summary>
    /// <param name="arguments">The command and its parameters.</param>
    /// <returns>The answer without its closing NUL.</returns>
    public async Task<string> ControlAsync(params string[] arguments)
    {
        byte[] reply = await CallAsync(XenstoreMessageType.Control, 0, Strings(arguments), "control", arguments.FirstOrDefault(""), default)
            .ConfigureAwait(false);
        return Encoding.Latin1.GetString(reply).TrimEnd('\0');
    }

    /// <summary>Closes the connection; its watches and open transactions go.</summary>
    public async ValueTask DisposeAsync()
    {
        await _stream.DisposeAsync().ConfigureAwait(false);
        await _receiving.ConfigureAwait(false);
    }

    private static string Reason(string path, SocketException failure) => failure.SocketErrorCode switch
    {
        _ when !File.Exists(path) => "there is no such file",
        SocketError.ConnectionRefused => "nobody listens there",
        _ => failure.Message,
    };

    private static byte[] Strings(params ReadOnlySpan<string> strings) => Encoding.Latin1.GetBytes(string.Join('\0', strings!) + '\0');

    // What is behind the last NUL is a string, too: some stores leave a closing one out.
    private static string[] Split(ReadOnlySpan<byte> payload) =>
        payload.IsEmpty ? [] : Encoding.Latin1.GetString(payload[^1] == 0 ? payload[..^1] : payload).Split('\0');

    private IOException Nonsense(string what) => new($"The xenstore at {_path} has answered with {what}, which means nothing.");

    private async Task<IReadOnlyList<string>> ListInPartsAsync(string path, uint transaction, CancellationToken cancellation)
    {
        // Each part begins with the node's generation, and an empty name ends the list. Another generation: begin again.
        List<string> names = [];
        string? generation = null;
        int offset = 0;
        while (true)
        {
            byte[] part = await CallAsync(
                XenstoreMessageType.DirectoryPart, transaction, Strings(path, offset.ToString(CultureInfo.InvariantCulture)), "list", path,
                cancellation).ConfigureAwait(false);
            int head = part.AsSpan().IndexOf((byte)0);
            if (head < 0)
                throw Nonsense("a part of a list without its generation");
            string now = Encoding.Latin1.GetString(part, 0, head);
            if (generation is not null && generation != now)
            {
                names.Clear();
                generation = null;
                offset = 0;
                continue;
            }
            generation = now;
            ReadOnlySpan<byte> rest = part.AsSpan(head + 1);
            while (!rest.IsEmpty)
            {
                int length = rest.IndexOf((byte)0);
                if (length < 0)
                    throw Nonsense("a name without an end");
                if (length == 0)
                    return names;
                names.Add(Encoding.Latin1.GetString(rest[..length]));
                offset += length + 1;
                rest = rest[(length + 1)..];
            }
            if (part.Length == head + 1)
                throw Nonsense("an empty part of a list");
        }
    }

    private async Task<byte[]> CallAsync(
        XenstoreMessageType type, uint transaction, byte[] payload, string request, string path, CancellationToken cancellation)
    {
        if (payload.Length > XenstoreWire.PayloadMaximum)
            throw new XenstoreException(XenstoreError.E2BIG, Describe(request, path));
        var reply = new TaskCompletionSource<byte[]>(TaskCreationOptions.RunContinuationsAsynchronously);
        uint id;
        lock (_pending)
        {
            if (_lost is not null)
                throw Lost();
            while (_pending.ContainsKey(++_lastRequest))
            {
            }
            id = _lastRequest;
            _pending.Add(id, reply);
        }
        byte[] message = new byte[XenstoreWire.HeaderSize + payload.Length];
        new XenstoreHeader(type, id, transaction, (uint)payload.Length).Encode(message);
        payload.CopyTo(message, XenstoreWire.HeaderSize);
        try
        {
            await _sendTurn.WaitAsync(cancellation).ConfigureAwait(false);
        }
        catch (OperationCanceledException)
        {
            // Nobody will ever answer what was not asked.
            lock (_pending)
                _ = _pending.Remove(id);
            throw;
        }
        try
        {
            // Not cancelled half way: the rest of the stream would mean something else.
            await _stream.WriteAsync(message, CancellationToken.None).ConfigureAwait(false);
        }
        catch (Exception failure) when (failure is IOException or ObjectDisposedException)
        {
            throw Lost();
        }
        finally
        {
            _ = _sendTurn.Release();
        }
        try
        {
            return await reply.Task.WaitAsync(cancellation).ConfigureAwait(false);
        }
        catch (RefusedException refusal)
        {
            throw new XenstoreException(XenstoreErrors.OfName(refusal.Name), Describe(request, path));
        }
    }

    private static string Describe(string request, string path) => path.Length == 0 ? request : $"{request} of \"{path}\"";

    private IOException Lost() => new($"The xenstore at {_path} has ended the connection; is the daemon still there?", _lost);

    private async Task ReceiveAsync()
    {
        byte[] header = new byte[XenstoreWire.HeaderSize];
        Exception why;
        try
        {
            while (true)
            {
                await _stream.ReadExactlyAsync(header).ConfigureAwait(false);
                XenstoreHeader message = XenstoreHeader.Decode(header);
                if (message.Length > XenstoreWire.PayloadMaximum)
                    throw Nonsense($"a message of {message.Length} bytes");
                byte[] payload = new byte[message.Length];
                await _stream.ReadExactlyAsync(payload).ConfigureAwait(false);
                Deliver(message, payload);
            }
        }
        catch (Exception failure) when (failure is IOException or ObjectDisposedException)
        {
            why = failure;
        }
        TaskCompletionSource<byte[]>[] waiting;
        lock (_pending)
        {
            _lost = why;
            waiting = [.. _pending.Values];
            _pending.Clear();
        }
        foreach (TaskCompletionSource<byte[]> reply in waiting)
            _ = reply.TrySetException(Lost());
        _ = _events.Writer.TryComplete();
    }

    private void Deliver(XenstoreHeader message, byte[] payload)
    {
        if (message.Type == XenstoreMessageType.WatchEvent)
        {
            if (Split(payload) is [string path, string token])
                _ = _events.Writer.TryWrite(new XenstoreEvent(path, token));
            return;
        }
        TaskCompletionSource<byte[]>? reply;
        lock (_pending)
            _ = _pending.Remove(message.RequestId, out reply);
        if (message.Type == XenstoreMessageType.Error)
            _ = reply?.TrySetException(new RefusedException(Encoding.Latin1.GetString(payload).TrimEnd('\0')));
        else
            _ = reply?.TrySetResult(payload);
    }

    /// <summary>An XS_ERROR reply on its way to who asked.</summary>
    private sealed class RefusedException(string name) : Exception(name)
    {
        internal string Name { get; } = name;
    }
}
