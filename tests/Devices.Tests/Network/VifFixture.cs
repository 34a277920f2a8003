// A domain on plain memory with a network interface, its store, and its front end.
using System.Collections.Concurrent;
using System.Globalization;
using XenSharp.Core;
using XenSharp.Devices.Network;
using XenSharp.Devices.Xenbus;
using XenSharp.Devices.Xenstore;
using XenSharp.Domains;
using XenSharp.Domains.Grants;
using XenSharp.Domains.Tests.Grants;

namespace XenSharp.Devices.Tests.Network;

/// <summary>A port that keeps what it is given, and gives what it is told to.</summary>
internal sealed class FakePort : INetworkPort
{
    private readonly Collector _frames = new();
    private volatile IFrameReceiver? _peer;

    public string Name => "fake";

    public bool IsDisposed { get; private set; }

    public IReadOnlyList<(byte[] Data, FrameOffload Offload)> Frames => _frames.Frames;

    public FrameCapabilities Capabilities => _frames.Capabilities;

    public PortStatistics Statistics => default;

    public void Connect(IFrameReceiver? peer) => _peer = peer;

    public void Receive(NetworkFrame frame) => _frames.Receive(frame);

    public FrameDelivery.Result Give(byte[] data, FrameOffload offload = default)
    {
        NetworkFrame frame = TestFrames.ToFrame(data, offload);
        FrameDelivery.Result result = FrameDelivery.Deliver(frame, _peer);
        frame.Release();
        return result;
    }

    public void Dispose() => IsDisposed = true;
}

/// <summary>What a test of the network back end needs; disposing it checks that the guest has all its pages back.</summary>
internal sealed class VifFixture : IAsyncDisposable
{
    private const uint FirstRing = 100;
    private const uint FirstData = 200;
    private const ulong FirstDataPage = 16;
    private const ulong AllocUnbound = 6;
    private const ulong Send = 4;
    private const ulong Close = 3;

    public static readonly TimeSpan Patience = TimeSpan.FromSeconds(20);

    private readonly List<(FrontRing Transmit, FrontRing Receive, uint TransmitPort, uint ReceivePort)> _queues = [];
    private bool _domainGone;

    public VifFixture(Func<NetworkDeviceOptions, NetworkDeviceOptions>? change = null)
    {
        Guest = new GrantDomain(manager: Manager);
        Server = new XenstoreServer();
        var options = new NetworkDeviceOptions { MaximumQueues = 4, Mac = TestFrames.Bob };
        Backend = NetworkBackend.Create(Guest.Fake.Domain, Store, change?.Invoke(options) ?? options, Port, Reports.Enqueue);
        for (uint i = 0; i < 32; i++)
            Guest.PutEntry(FirstData + i, GrantFlags.PermitAccess, GrantDomain.FrameOf(FirstDataPage + i), domain: 0);
        for (uint i = 0; i < 8; i++)
            Guest.PutEntry(FirstRing + i, GrantFlags.PermitAccess, GrantDomain.FrameOf(i), domain: 0);
    }

    public DomainManager Manager { get; } = new();

    public GrantDomain Guest { get; }

    public XenstoreServer Server { get; }

    public XenstoreClient Store => Server.Domain0;

    public NetworkBackend Backend { get; }

    public FakePort Port { get; } = new();

    public ConcurrentQueue<string> Reports { get; } = [];

    public string Front => Backend.Device.FrontEnd;

    public string Back => Backend.Device.BackEnd;

    public XenbusState BackState => (XenbusState)int.Parse(Store.Read(Back + "/state") ?? "0", CultureInfo.InvariantCulture);

    public string? Error => Store.Read(Backend.Device.Error + "/error");

    public FrontRing Transmit(int queue = 0) => _queues[queue].Transmit;

    public FrontRing Receive(int queue = 0) => _queues[queue].Receive;

    public static uint DataReference(int page) => FirstData + (uint)page;

    public unsafe Span<byte> Data(int page) => new(Guest.Fake.Host(GrantDomain.AddressOf(FirstDataPage + (ulong)page)), 4096);

    public void Write(string name, object value) => Store.Write($"{Front}/{name}", string.Create(CultureInfo.InvariantCulture, $"{value}"));

    public void SetState(XenbusState state) => Write("state", (int)state);

    public void AwaitState(XenbusState state)
        => Assert.That(SpinWait.SpinUntil(() => BackState == state, Patience), Is.True, $"the back end comes from {BackState} to {state}; {Error}");

    public static void Await(Func<bool> condition, string what) => Assert.That(SpinWait.SpinUntil(condition, Patience), Is.True, what);

    /// <summary>Writes all that a front end with all features writes.</summary>
    public unsafe void Publish(int queues = 1, bool split = true)
    {
        _queues.Clear();
        if (queues > 1)
            Write("multi-queue-num-queues", queues);
        for (int i = 0; i < queues; i++)
        {
            string prefix = queues > 1 ? string.Create(CultureInfo.InvariantCulture, $"queue-{i}/") : "";
            uint transmitPort = AllocatePort();
            uint receivePort = split ? AllocatePort() : transmitPort;
            var transmit = new FrontRing(Guest.Fake.Host(GrantDomain.AddressOf((ulong)(2 * i))), 12);
            var receive = new FrontRing(Guest.Fake.Host(GrantDomain.AddressOf((ulong)(2 * i) + 1)), 8);
            _queues.Add((transmit, receive, transmitPort, receivePort));
            Write(prefix + "tx-ring-ref", FirstRing + (uint)(2 * i));
            Write(prefix + "rx-ring-ref", FirstRing + (uint)(2 * i) + 1);
            if (split)
            {
                Write(prefix + "event-channel-tx", transmitPort);
                Write(prefix + "event-channel-rx", receivePort);
            }
            else
            {
                Write(prefix + "event-channel", transmitPort);
            }
        }

        foreach (string feature in new[] { "request-rx-copy", "feature-rx-notify", "feature-sg", "feature-gso-tcpv4", "feature-gso-tcpv6", "feature-ipv6-csum-offload" })
            Write(feature, 1);
    }

    public void Connect(int queues = 1, bool split = true)
    {
        AwaitState(XenbusState.InitWait);
        Publish(queues, split);
        SetState(XenbusState.Connected);
        AwaitState(XenbusState.Connected);
    }

    /// <summary>Sends a frame out of the first data pages.</summary>
    public void SendFrame(byte[] frame, int queue = 0)
    {
        frame.CopyTo(Data(queue));
        Transmit(queue).Rearm();
        Transmit(queue).Put(FakeNetfront.Request(DataReference(queue), 0, 0, 7, frame.Length));
        if (Transmit(queue).Push())
            Notify(_queues[queue].TransmitPort);
    }

    /// <summary>Gives a data page to receive into.</summary>
    public void PutPage(int page, int queue = 0)
    {
        byte[] slot = new byte[8];
        BitConverter.TryWriteBytes(slot.AsSpan(4), DataReference(page));
        Receive(queue).Put(slot);
        if (Receive(queue).Push())
            Notify(_queues[queue].ReceivePort);
    }

    public uint AllocatePort()
    {
        Guest.Fake.Write(GrantDomain.Request, (uint)GrantDomain.Self);
        Assert.That(Guest.Fake.Call(HypercallNumber.EventChannelOp, AllocUnbound, GrantDomain.Request), Is.Zero);
        return Guest.Fake.Read<uint>(GrantDomain.Request + 4);
    }

    public void Notify(uint port)
    {
        Guest.Fake.Write(GrantDomain.Request, port);
        Assert.That(Guest.Fake.Call(HypercallNumber.EventChannelOp, Send, GrantDomain.Request), Is.Zero);
    }

    /// <summary>Lets go of the rings, as a driver that is unloaded.</summary>
    public void ClosePorts()
    {
        foreach (uint port in _queues.SelectMany(static queue => new[] { queue.TransmitPort, queue.ReceivePort }).Distinct())
        {
            Guest.Fake.Write(GrantDomain.Request, port);
            Assert.That(Guest.Fake.Call(HypercallNumber.EventChannelOp, Close, GrantDomain.Request), Is.Zero);
        }
    }

    /// <summary>Whether any of the rings' pages is mapped.</summary>
    public bool HasMappings() => Enumerable.Range(0, 8).Any(i => Guest.FlagsOf(FirstRing + (uint)i) != GrantFlags.PermitAccess);

    public void EndDomain()
    {
        _domainGone = true;
        Guest.Dispose();
    }

    public async ValueTask DisposeAsync()
    {
        await Backend.DisposeAsync();
        Assert.That(Port.IsDisposed, Is.True);
        if (!_domainGone)
        {
            Assert.That(HasMappings(), Is.False, "the rings are given back");
            Guest.Audit();
            EndDomain();
        }

        Assert.That(Manager.Domains, Is.Empty, "nobody holds memory of the domain");
        Assert.That(Store.Exists(Back) || Store.Exists(Front) || Store.Exists(Backend.Device.Record), Is.False);
        await Server.DisposeAsync();
    }
}
