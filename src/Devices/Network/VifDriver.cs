// The back end's part of a vif's xenbus life: what it offers, and how it connects.
using System.Globalization;
using XenSharp.Core;
using XenSharp.Devices.Xenbus;
using XenSharp.Devices.Xenstore;
using XenSharp.Domains;
using XenSharp.Domains.Grants;
using XenSharp.EventChannels;

namespace XenSharp.Devices.Network;

/// <summary>
/// Connects front ends of one network interface to its port, one after the other. Frames for a guest without a connected front end are
/// dropped.
/// </summary>
internal sealed unsafe class VifDriver : IXenbusDriver, IFrameReceiver
{
    /// <summary>Without feature-sg a frame has to fit in one page.</summary>
    private const int PageSize = 4096;

    private readonly Domain _domain;
    private readonly INetworkPort _port;
    private readonly TransmitLimit? _limit;
    private readonly uint _maximumQueues;
    private readonly TimeProvider _time;
    private readonly DomainGrantCopier _grants;
    private volatile VifConnection? _connection;

    /// <param name="domain">The guest.</param>
    /// <param name="port">Where its frames go.</param>
    /// <param name="options">What was asked for.</param>
    /// <param name="time">The clock.</param>
    public VifDriver(Domain domain, INetworkPort port, NetworkDeviceOptions options, TimeProvider time)
    {
        (_domain, _port, _time) = (domain, port, time);
        _limit = options.Rate is { } rate ? new TransmitLimit(rate, time) : null;
        _maximumQueues = (uint)options.MaximumQueues;
        _grants = new DomainGrantCopier(domain.Granted);
    }

    public VifCounters Counters { get; } = new();

    /// <summary>Queues in use; 0 while there is no connection.</summary>
    public int QueueCount => _connection?.QueueCount ?? 0;

    /// <inheritdoc/>
    /// <remarks>Whoever cannot give frames to a guest that is not connected need not work on them.</remarks>
    public FrameCapabilities Capabilities
        => _connection?.Capabilities ?? new FrameCapabilities(AcceptedOffloads.All, NetworkFrame.MaximumLength);

    /// <inheritdoc/>
    public ValueTask DisposeAsync()
    {
        _port.Connect(null);
        _port.Dispose();
        return ValueTask.CompletedTask;
    }

    /// <inheritdoc/>
    public void Receive(NetworkFrame frame)
    {
        if (_connection is { } connection)
            connection.Receive(frame);
        else
            Counters.ReceiveDropped();
    }

    /// <inheritdoc/>
    public void Announce(XenstoreTransaction store, string folder)
    {
        foreach (string feature in (ReadOnlySpan<string>)
                 [
                     "feature-sg", "feature-gso-tcpv4", "feature-gso-tcpv6", "feature-ipv6-csum-offload", "feature-rx-copy",
                     "feature-multicast-control", "feature-split-event-channels",
                 ])
            store.Write($"{folder}/{feature}", "1");

        // Said to be absent where netback is known to say that it has it, so that nobody needs to guess.
        foreach (string feature in (ReadOnlySpan<string>)["feature-rx-flip", "feature-dynamic-multicast-control", "feature-xdp-headroom", "feature-ctrl-ring"])
            store.Write($"{folder}/{feature}", "0");
        store.Write(folder + "/multi-queue-max-queues", _maximumQueues.ToString(CultureInfo.InvariantCulture));
    }

    /// <inheritdoc/>
    public ValueTask<IXenbusConnection> ConnectAsync(XenbusFrontEnd frontEnd, CancellationToken cancellation)
    {
        if (!frontEnd.ReadFeature("request-rx-copy"))
            throw new XenbusException(Errno.EOPNOTSUPP, "the front end does not ask to receive by copy (request-rx-copy), and there is no other way");
        uint count = frontEnd.ReadOptional("multi-queue-num-queues") ?? 1;
        if (count == 0 || count > _maximumQueues)
            throw new XenbusException(Errno.EINVAL, $"the front end asks for {count} queues, but 1 to {_maximumQueues} are possible");
        var groups = new MulticastFilter { IsActive = frontEnd.ReadFeature("request-multicast-control") };
        bool polls = !frontEnd.ReadFeature("feature-rx-notify");
        FrameCapabilities capabilities = ReadCapabilities(frontEnd);

        List<ConnectedQueue> queues = [];
        try
        {
            for (uint i = 0; i < count; i++)
                queues.Add(ConnectQueue(count == 1 ? frontEnd : frontEnd.Below($"queue-{i}"), groups, polls));
        }
        catch
        {
            foreach (IDisposable held in queues.SelectMany(static queue => queue.Held))
                held.Dispose();
            throw;
        }

        var connection = new VifConnection([.. queues], capabilities, groups, Counters, Ended);
        _connection = connection;
        return ValueTask.FromResult<IXenbusConnection>(connection);
    }

    private static FrameCapabilities ReadCapabilities(XenbusFrontEnd frontEnd)
    {
        bool gathers = frontEnd.ReadFeature("feature-sg");
        AcceptedOffloads offloads = AcceptedOffloads.None;
        if (!frontEnd.ReadFeature("feature-no-csum-offload"))
            offloads |= AcceptedOffloads.BlankIpv4;
        if (frontEnd.ReadFeature("feature-ipv6-csum-offload"))
            offloads |= AcceptedOffloads.BlankIpv6;

        // What is to be cut has a blank checksum, and more than one page.
        if (frontEnd.ReadFeature("feature-gso-tcpv4") && gathers && offloads.HasFlag(AcceptedOffloads.BlankIpv4))
            offloads |= AcceptedOffloads.TcpV4;
        if (frontEnd.ReadFeature("feature-gso-tcpv6") && gathers && offloads.HasFlag(AcceptedOffloads.BlankIpv6))
            offloads |= AcceptedOffloads.TcpV6;
        return new FrameCapabilities(offloads, gathers ? NetworkFrame.MaximumLength : PageSize);
    }

    private ConnectedQueue ConnectQueue(XenbusFrontEnd frontEnd, MulticastFilter groups, bool polls)
    {
        List<IDisposable> held = [];
        try
        {
            byte* transmitRing = Map(frontEnd, "tx-ring-ref", held);
            byte* receiveRing = Map(frontEnd, "rx-ring-ref", held);
            EventChannelBackend transmitChannel;
            EventChannelBackend receiveChannel;
            if (frontEnd.Read("event-channel-tx") != null && frontEnd.Read("event-channel-rx") != null)
            {
                transmitChannel = Bind(frontEnd, "event-channel-tx", held);
                receiveChannel = Bind(frontEnd, "event-channel-rx", held);
            }
            else
            {
                transmitChannel = receiveChannel = Bind(frontEnd, "event-channel", held);
            }

            var queue = new VifQueue(
                new TransmitQueue(transmitRing, _grants, _port, _limit, groups, Counters),
                new ReceiveQueue(receiveRing, _grants, Counters, _time),
                transmitChannel, receiveChannel, polls, _time);
            return new ConnectedQueue(queue, held);
        }
        catch
        {
            foreach (IDisposable item in held)
                item.Dispose();
            throw;
        }
    }

    private byte* Map(XenbusFrontEnd frontEnd, string node, List<IDisposable> held)
    {
        uint reference = frontEnd.ReadNumber(node);
        GrantStatus status = _domain.Granted.TryMap(reference, writable: true, out MappedGrant? page);
        if (status != GrantStatus.Okay)
            throw new XenbusException(Errno.EINVAL, $"mapping {frontEnd.Folder}/{node}: grant {reference} gives status {(int)status}");
        held.Add(page!);
        return page!.Address;
    }

    private EventChannelBackend Bind(XenbusFrontEnd frontEnd, string node, List<IDisposable> held)
    {
        uint port = frontEnd.ReadNumber(node);
        if (!_domain.TryConnect(port, out EventChannelBackend? channel))
            throw new XenbusException(Errno.EINVAL, $"binding {frontEnd.Folder}/{node}: port {port} does not wait for domain 0");
        held.Add(channel);
        return channel;
    }

    private void Ended(VifConnection connection) => Interlocked.CompareExchange(ref _connection, null, connection);
}
