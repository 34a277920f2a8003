// The network back end for the toolstack: attaches an interface to a guest, counts, and takes it away.
using System.Globalization;
using XenSharp.Devices.Xenbus;
using XenSharp.Devices.Xenstore;
using XenSharp.Domains;

namespace XenSharp.Devices.Network;

/// <summary>
/// A network interface of a guest, served in this process. It can be attached before the guest runs and while it does.
/// </summary>
public sealed class NetworkBackend : IAsyncDisposable
{
    private const string Kind = "vif";

    private readonly XenbusBackend _device;
    private readonly VifDriver _driver;
    private readonly INetworkPort _port;

    private NetworkBackend(XenbusBackend device, VifDriver driver, INetworkPort port, NetworkDeviceOptions options, MacAddress mac)
        => (_device, _driver, _port, Options, Mac) = (device, driver, port, options, mac);

    /// <summary>What was asked for.</summary>
    public NetworkDeviceOptions Options { get; }

    /// <summary>The guest's address, given or chosen.</summary>
    public MacAddress Mac { get; }

    /// <summary>Which device it is, and where its nodes are.</summary>
    public XenbusDevice Device => _device.Device;

    /// <summary>The back end's state, as in its node.</summary>
    public XenbusState State => _device.State;

    /// <summary>Queues that the guest uses; 0 while it is not connected.</summary>
    public int QueueCount => _driver.QueueCount;

    /// <summary>What went through it.</summary>
    public NetworkDeviceStatistics Statistics => _driver.Counters.Read();

    /// <summary>The name of the port that it is plugged into.</summary>
    public string PortName => _port.Name;

    /// <summary>What went through its port.</summary>
    public PortStatistics PortStatistics => _port.Statistics;

    /// <summary>Completes when the interface is gone, and its port with it.</summary>
    public Task Completion => _device.Completion;

    /// <summary>Attaches an interface: writes its nodes as libxl does, and serves whatever front end connects.</summary>
    /// <param name="domain">The guest; it may be running.</param>
    /// <param name="store">The guest's store, with all rights.</param>
    /// <param name="options">What it is to be.</param>
    /// <param name="port">Where it is plugged in; it belongs to the interface from here on, and goes with it.</param>
    /// <param name="report">Takes sentences for people; called on any thread, must not block for long.</param>
    /// <param name="time">The clock of rates and of waiting; null for the system's.</param>
    /// <exception cref="ArgumentException">An option makes no sense; the message says which.</exception>
    /// <exception cref="InvalidOperationException">The guest has a device of that number. The port is not disposed.</exception>
    public static NetworkBackend Create(
        Domain domain, XenstoreClient store, NetworkDeviceOptions options, INetworkPort port, Action<string>? report = null,
        TimeProvider? time = null)
    {
        ArgumentNullException.ThrowIfNull(domain);
        ArgumentNullException.ThrowIfNull(store);
        ArgumentNullException.ThrowIfNull(options);
        ArgumentNullException.ThrowIfNull(port);
        Check(options);
        MacAddress mac = options.Mac ?? MacAddress.Random();
        var driver = new VifDriver(domain, port, options, time ?? TimeProvider.System);
        var device = new XenbusBackend(
            domain, store, new XenbusDevice(Kind, domain.Id.Value, options.DeviceId), Nodes(options, mac), driver, report);
        port.Connect(driver);
        return new NetworkBackend(device, driver, port, options, mac);
    }

    /// <summary>The number that the next interface of a guest gets: one more than the highest that it has, from 0.</summary>
    public static uint NextId(XenstoreAccessor store, ushort domainId)
    {
        ArgumentNullException.ThrowIfNull(store);
        uint next = 0;
        foreach (string name in store.List(string.Create(CultureInfo.InvariantCulture, $"/libxl/{domainId}/device/{Kind}")))
        {
            if (uint.TryParse(name, NumberStyles.None, CultureInfo.InvariantCulture, out uint id) && id >= next)
                next = id + 1;
        }

        return next;
    }

    /// <summary>The name of the interface on the host where none was asked for.</summary>
    public static string InterfaceName(ushort domainId, NetworkDeviceOptions options)
    {
        ArgumentNullException.ThrowIfNull(options);
        return options.InterfaceName ?? string.Create(CultureInfo.InvariantCulture, $"vif{domainId}.{options.DeviceId}");
    }

    /// <inheritdoc cref="XenbusBackend.RemoveAsync"/>
    public Task<bool> RemoveAsync(TimeSpan timeout, bool force, CancellationToken cancellation = default)
        => _device.RemoveAsync(timeout, force, cancellation);

    /// <summary>Takes the interface away at once, whatever the guest does with it.</summary>
    public ValueTask DisposeAsync() => _device.DisposeAsync();

    private static void Check(NetworkDeviceOptions options)
    {
        if (options.Mac is { IsStation: false } mac)
        {
            throw new ArgumentException(
                $"The address {mac} cannot be a network interface's: {(mac.IsMulticast ? "it is a group's, for its first byte is odd" : "it is zero")}. "
                + "Give another one, or none to have one chosen.",
                nameof(options));
        }

        if (options.Rate is { } rate && (rate.Bytes == 0 || rate.Interval < TimeSpan.FromMicroseconds(1) || rate.Interval > TransmitRate.MaximumInterval))
            throw new ArgumentException("A rate needs at least one byte in an interval of 1 µs to 4294 s.", nameof(options));
        if (options.Mtu is < 68 or > 65535)
            throw new ArgumentException($"An MTU of {options.Mtu} is not possible; use 68 to 65535 bytes.", nameof(options));
        if (options.MaximumQueues is < 1 or > 64)
            throw new ArgumentException($"{options.MaximumQueues} queues are not possible; use 1 to 64.", nameof(options));
    }

    /// <summary>libxl__set_xenstore_nic, and "connected" as the hotplug script would say.</summary>
    private static XenbusNodes Nodes(NetworkDeviceOptions options, MacAddress mac)
    {
        string handle = options.DeviceId.ToString(CultureInfo.InvariantCulture);
        string mtu = options.Mtu.ToString(CultureInfo.InvariantCulture);
        List<(string, string)> back = [("script", options.Script)];
        if (options.InterfaceName is { } name)
            back.Add(("vifname", name));
        back.Add(("mac", mac.ToString()));
        if (options.Ip is { } ip)
            back.Add(("ip", ip));
        if (options.Rate is { } rate)
            back.Add(("rate", rate.ToString()));
        if (options.Mtu != NetworkDeviceOptions.DefaultMtu)
            back.Add(("mtu", mtu));
        back.AddRange([("bridge", options.Bridge), ("handle", handle), ("type", "vif"), ("hotplug-status", "connected")]);
        return new XenbusNodes
        {
            BackEnd = back,
            FrontEnd = [("handle", handle), ("mac", mac.ToString()), ("mtu", mtu), ("trusted", options.Trusted ? "1" : "0")],
        };
    }
}
