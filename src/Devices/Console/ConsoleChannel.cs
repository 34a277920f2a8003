// A channel of a guest (xen-pv-channel(7)): a further console ring, which the guest's own driver makes, and where it leads on the host.
using System.Globalization;
using XenSharp.Core;
using XenSharp.Devices.Xenbus;
using XenSharp.Devices.Xenstore;
using XenSharp.Domains;
using XenSharp.Domains.Grants;
using XenSharp.EventChannels;

namespace XenSharp.Devices.Console;

/// <summary>Settings of a channel.</summary>
/// <param name="Id">Its number among the guest's consoles, from 1 on; Linux knows those up to 9.</param>
/// <param name="Name">What the guest finds it by, such as "org.example.agent.0".</param>
public sealed record ConsoleChannelOptions(uint Id, string Name)
{
    /// <summary>Where the Unix socket is that it leads to (connection=socket); <see langword="null"/> for a pseudo-terminal
    /// (connection=pty).</summary>
    public string? SocketPath { get; init; }
}

/// <summary>
/// A channel: its nodes in the store, its ring, and the socket or terminal it leads to. It can be attached before the domain starts and
/// while it runs. Any thread may call any member.
/// </summary>
/// <remarks>The nodes are those that libxl of Xen 4.17 writes for a channel, and QEMU the path of its terminal. The first console
/// (number 0) is another thing: its ring comes with the domain.</remarks>
public sealed class ConsoleChannel : IAsyncDisposable
{
    // How much the node "limit" says is buffered for a reader, in bytes.
    private const string Limit = "1048576";

    private const string Protocol = "vt100";

    private readonly ChannelEndpoint _endpoint;
    private readonly XenbusBackend _xenbus;

    private ConsoleChannel(Domain domain, XenstoreClient store, ConsoleChannelOptions options, ChannelEndpoint endpoint, Action<string>? report)
    {
        _endpoint = endpoint;
        Options = options;
        _xenbus = new XenbusBackend(
            domain, store, new XenbusDevice("console", domain.Id.Value, options.Id), Nodes(options, endpoint),
            new Driver(domain, endpoint), report);
    }

    /// <summary>Its settings.</summary>
    public ConsoleChannelOptions Options { get; }

    /// <summary>The path of its pseudo-terminal, for the host's program; <see langword="null"/> if it has a socket.</summary>
    public string? Terminal => _endpoint.Terminal;

    /// <summary>Its paths in the store.</summary>
    public XenbusDevice Address => _xenbus.Device;

    /// <summary>The back end's state.</summary>
    public XenbusState State => _xenbus.State;

    /// <summary>Completes when the channel is gone from the guest, and its socket or terminal closed.</summary>
    public Task Completion => _xenbus.Completion;

    /// <summary>Attaches a channel.</summary>
    /// <param name="domain">The guest.</param>
    /// <param name="store">The store that it uses.</param>
    /// <param name="options">The channel.</param>
    /// <param name="report">Takes sentences for people about what goes wrong; any thread.</param>
    /// <exception cref="ArgumentException">The number is that of the first console, or there is no name.</exception>
    /// <exception cref="InvalidOperationException">The guest has a channel of that number already.</exception>
    /// <exception cref="IOException">The socket or terminal cannot be made; a sentence says why.</exception>
    public static ConsoleChannel Create(Domain domain, XenstoreClient store, ConsoleChannelOptions options, Action<string>? report = null)
    {
        ArgumentNullException.ThrowIfNull(domain);
        ArgumentNullException.ThrowIfNull(store);
        ArgumentNullException.ThrowIfNull(options);
        if (options.Id == 0)
            throw new ArgumentException("Channel 0 is the guest's first console; number channels from 1 on.", nameof(options));
        if (string.IsNullOrEmpty(options.Name))
            throw new ArgumentException("A channel needs a name, for the guest to find it by.", nameof(options));
        ChannelEndpoint endpoint = options.SocketPath is { } path ? new ChannelSocket(path) : new ChannelTerminal();
        try
        {
            var channel = new ConsoleChannel(domain, store, options, endpoint, report);
            endpoint.Start();
            return channel;
        }
        catch
        {
            endpoint.DisposeAsync().AsTask().GetAwaiter().GetResult();
            throw;
        }
    }

    /// <summary>Detaches it: the guest is asked to let go.</summary>
    /// <param name="timeout">How long to wait for the guest.</param>
    /// <param name="force">Whether to take the channel away from a guest that has not let go by then.</param>
    /// <param name="cancellation">Ends the waiting; the detaching goes on.</param>
    /// <returns>False if the guest still has it.</returns>
    public Task<bool> RemoveAsync(TimeSpan timeout, bool force = false, CancellationToken cancellation = default)
        => _xenbus.RemoveAsync(timeout, force, cancellation);

    /// <summary>Takes it away at once. Before the domain's memory and the store go.</summary>
    public ValueTask DisposeAsync() => _xenbus.DisposeAsync();

    private static XenbusNodes Nodes(ConsoleChannelOptions options, ChannelEndpoint endpoint)
    {
        string output = options.SocketPath is null
            ? "pty"
            : string.Create(CultureInfo.InvariantCulture, $"chardev:libxl-channel{options.Id}");
        List<(string Name, string Value)> back =
        [
            ("protocol", Protocol), ("name", options.Name), ("connection", options.SocketPath is null ? "pty" : "socket"),
        ];
        if (options.SocketPath is { } path)
            back.Add(("path", path));
        return new XenbusNodes
        {
            BackEnd = back,
            FrontEnd = [("protocol", Protocol)],
            ReadOnlyFrontEnd =
            [
                ("name", options.Name), ("limit", Limit), ("type", "ioemu"), ("output", output), ("tty", endpoint.Terminal ?? ""),
            ],
        };
    }

    /// <summary>The console's part of the xenbus protocol.</summary>
    private sealed class Driver(Domain domain, ChannelEndpoint endpoint) : IXenbusDriver
    {
        /// <inheritdoc/>
        public void Announce(XenstoreTransaction store, string folder)
        {
        }

        /// <inheritdoc/>
        public ValueTask DisposeAsync() => endpoint.DisposeAsync();

        /// <inheritdoc/>
        public ValueTask<IXenbusConnection> ConnectAsync(XenbusFrontEnd frontEnd, CancellationToken cancellation)
        {
            uint reference = frontEnd.ReadNumber("ring-ref");
            uint port = frontEnd.ReadNumber("port");
            GrantStatus status = domain.Granted.TryMap(reference, writable: true, out MappedGrant? ring);
            if (status != GrantStatus.Okay)
                throw new XenbusException(Errno.EINVAL, $"mapping the ring of {frontEnd.Folder} (ring-ref {reference}): {status}");
            if (domain.TryConnect(port, out EventChannelBackend? channel))
                return ValueTask.FromResult<IXenbusConnection>(new ChannelConnection(ring!, channel, endpoint));
            ring!.Dispose();
            throw new XenbusException(Errno.EINVAL, $"binding the event channel of {frontEnd.Folder}: port {port} does not wait for this domain");
        }
    }
}

/// <summary>A guest's driver that is connected to a channel.</summary>
internal sealed class ChannelConnection : IXenbusConnection
{
    // For what the guest has said before it closed, if nobody reads it.
    private static readonly TimeSpan LastWords = TimeSpan.FromSeconds(1);

    private readonly MappedGrant _ring;
    private readonly EventChannelBackend _channel;
    private readonly ChannelEndpoint _endpoint;
    private readonly ConsoleBackend _console;
    private readonly CancellationTokenSource _stop = new();
    private readonly SemaphoreSlim _inputTurn = new(1, 1);
    private readonly TaskCompletionSource _failure = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly Task _run;
    private bool _closed;

    internal ChannelConnection(MappedGrant ring, EventChannelBackend channel, ChannelEndpoint endpoint)
    {
        (_ring, _channel, _endpoint) = (ring, channel, endpoint);
        _console = BackendOf(ring, channel);
        _run = RunAsync();
        endpoint.Connect(TypeAsync);
    }

    /// <inheritdoc/>
    public Task Failure => _failure.Task;

    /// <inheritdoc/>
    public void Publish(XenstoreTransaction store, string folder)
    {
    }

    /// <inheritdoc/>
    public async ValueTask DisposeAsync()
    {
        _endpoint.Connect(null);
        try
        {
            await _console.CompleteAsync().WaitAsync(LastWords).ConfigureAwait(false);
        }
        catch (TimeoutException)
        {
            // The program on the host does not read.
        }
        await _stop.CancelAsync().ConfigureAwait(false);
        await _run.ConfigureAwait(false);

        // Whoever has the turn ends soon, and whoever takes it later does not touch the ring.
        await _inputTurn.WaitAsync().ConfigureAwait(false);
        _closed = true;
        _ = _inputTurn.Release();
        _channel.Dispose();
        _ring.Dispose();
    }

    private static unsafe ConsoleBackend BackendOf(MappedGrant ring, EventChannelBackend channel) => new(ring.Address, channel);

    private async Task RunAsync()
    {
        try
        {
            await _console.RunAsync(_endpoint, _stop.Token).ConfigureAwait(false);
        }
        catch (OperationCanceledException) when (_stop.IsCancellationRequested)
        {
            // Disposed.
        }
        catch (Exception failure)
        {
            // A defect of ours: it must end this channel, and only this one.
            _ = _failure.TrySetException(new XenbusException(Errno.EIO, failure.Message));
        }
    }

    private async ValueTask<bool> TypeAsync(ReadOnlyMemory<byte> input, CancellationToken cancellation)
    {
        using var either = CancellationTokenSource.CreateLinkedTokenSource(cancellation, _stop.Token);
        try
        {
            await _inputTurn.WaitAsync(either.Token).ConfigureAwait(false);
        }
        catch (OperationCanceledException) when (!cancellation.IsCancellationRequested)
        {
            return false;
        }
        try
        {
            return !_closed && await _console.WriteAsync(input, either.Token).ConfigureAwait(false);
        }
        catch (OperationCanceledException) when (!cancellation.IsCancellationRequested)
        {
            return false;
        }
        finally
        {
            _ = _inputTurn.Release();
        }
    }
}
