// A domain's disks, network interfaces and channels: those of its configuration, and those that come and go while it runs.

using System.Globalization;
using XenSharp.Api;
using XenSharp.Configuration;
using XenSharp.Configuration.Devices;
using XenSharp.Devices.Block;
using XenSharp.Devices.Block.Images;
using XenSharp.Devices.Console;
using XenSharp.Devices.Network;
using XenSharp.Devices.Xenbus;

namespace XenSharp.Toolstack.Management;

/// <content>What block-attach, network-attach and the like do.</content>
public sealed partial class ManagedDomain
{
    private readonly List<BlockBackend> _disks = [];
    private readonly List<NetworkBackend> _interfaces = [];
    private readonly List<ConsoleChannel> _channels = [];

    /// <summary>Its disks, by number.</summary>
    public IReadOnlyList<BlockDeviceInfo> DescribeDisks()
    {
        lock (_gate)
        {
            if (_gone)
                throw IsGone();
            return [.. _disks.OrderBy(static disk => disk.Device.Number).Select(Describe)];
        }
    }

    /// <summary>Its network interfaces, by index.</summary>
    public IReadOnlyList<NetworkDeviceInfo> DescribeInterfaces()
    {
        lock (_gate)
        {
            if (_gone)
                throw IsGone();
            return [.. _interfaces.OrderBy(static device => device.Options.DeviceId).Select(Describe)];
        }
    }

    /// <summary>Its channels, by number.</summary>
    public IReadOnlyList<ChannelInfo> DescribeChannels()
    {
        lock (_gate)
        {
            if (_gone)
                throw IsGone();
            return [.. _channels.OrderBy(static channel => channel.Options.Id).Select(Describe)];
        }
    }

    /// <summary>Where a channel leads to on the host: its socket or terminal.</summary>
    /// <param name="number">Its number among the guest's consoles, from 1 on.</param>
    /// <returns>Null if the domain has no such channel.</returns>
    public string? FindChannel(int number)
    {
        lock (_gate)
            return _channels.FirstOrDefault(channel => channel.Options.Id == number) is { } found ? found.Options.SocketPath ?? found.Terminal : null;
    }

    /// <summary>Plugs a disk in.</summary>
    public async Task<BlockDeviceInfo> AttachAsync(DiskConfiguration disk, CancellationToken cancellation)
    {
        ArgumentNullException.ThrowIfNull(disk);
        BlockBackend? attached = null;
        await WithTurnAsync(
            async ending =>
            {
                lock (_gate)
                    CheckAlive("given a disk");
                attached = await PlugAsync(disk, ending).ConfigureAwait(false);
            },
            cancellation).ConfigureAwait(false);
        Reconfigure(configuration => configuration with { Disks = [.. configuration.Disks, disk] });
        lock (_gate)
            return _gone ? throw IsGone() : Describe(attached!);
    }

    /// <summary>Plugs a network interface in.</summary>
    public async Task<NetworkDeviceInfo> AttachAsync(VifConfiguration vif, CancellationToken cancellation)
    {
        ArgumentNullException.ThrowIfNull(vif);
        NetworkBackend? attached = null;
        await WithTurnAsync(
            ending =>
            {
                lock (_gate)
                    CheckAlive("given a network interface");
                vif = Complete(vif, (int)NetworkBackend.NextId(Store, (ushort)Id));
                attached = Plug(vif);
                return Task.CompletedTask;
            },
            cancellation).ConfigureAwait(false);
        Reconfigure(configuration => configuration with { Vifs = [.. configuration.Vifs, vif] });
        lock (_gate)
            return _gone ? throw IsGone() : Describe(attached!);
    }

    /// <summary>Unplugs a disk.</summary>
    /// <param name="name">"xvda", or its number.</param>
    /// <param name="force">Whether the guest lets go of it in time or not.</param>
    /// <param name="cancellation">Ends the waiting.</param>
    public async Task DetachDiskAsync(string name, bool force, CancellationToken cancellation)
    {
        BlockBackend disk = Lookup(
            _disks,
            disk => disk.Device.Name == name || (uint.TryParse(name, NumberStyles.None, CultureInfo.InvariantCulture, out uint number) && number == disk.Device.Number),
            $"disk {name}");
        await WithTurnAsync(
            async ending =>
            {
                if (!await disk.RemoveAsync(_toolstack.DetachTimeout, force, ending).ConfigureAwait(false))
                    throw StillInUse($"disk {disk.Device.Name}");
                Forget(_disks, disk);
            },
            cancellation).ConfigureAwait(false);
        Reconfigure(configuration => configuration with
        {
            Disks = [.. configuration.Disks.Where(other => other.DeviceId != disk.Device.Number)],
        });
    }

    /// <summary>Unplugs a network interface.</summary>
    /// <param name="name">Its index, or its MAC address.</param>
    /// <param name="force">Whether the guest lets go of it in time or not.</param>
    /// <param name="cancellation">Ends the waiting.</param>
    public async Task DetachInterfaceAsync(string name, bool force, CancellationToken cancellation)
    {
        NetworkBackend device = Lookup(
            _interfaces,
            device => (MacAddress.TryParse(name, out MacAddress mac) && mac == device.Mac)
                || (uint.TryParse(name, NumberStyles.None, CultureInfo.InvariantCulture, out uint id) && id == device.Options.DeviceId),
            $"network interface {name}");
        await WithTurnAsync(
            async ending =>
            {
                if (!await device.RemoveAsync(_toolstack.DetachTimeout, force, ending).ConfigureAwait(false))
                    throw StillInUse($"network interface {device.Options.DeviceId}");
                Forget(_interfaces, device);
            },
            cancellation).ConfigureAwait(false);
        Reconfigure(configuration => configuration with
        {
            Vifs = [.. configuration.Vifs.Where(other => other.DeviceId != (int)device.Options.DeviceId)],
        });
    }

    /// <summary>Numbers and addresses for interfaces that have none, so that they are the same in each incarnation.</summary>
    internal static DomainConfiguration Complete(DomainConfiguration configuration)
    {
        int next = configuration.Vifs.Max(static vif => vif.DeviceId) + 1 ?? 0;
        return configuration.Vifs.Count == 0 ? configuration : configuration with { Vifs = [.. configuration.Vifs.Select(vif => Complete(vif, vif.DeviceId ?? next++))] };
    }

    /// <summary>Plugs in what the configuration says, before the guest runs. What was plugged in stays where a later one fails.</summary>
    internal async Task AttachConfiguredAsync(CancellationToken cancellation)
    {
        foreach (DiskConfiguration disk in Configuration.Disks)
            _ = await PlugAsync(disk, cancellation).ConfigureAwait(false);
        foreach (VifConfiguration vif in Configuration.Vifs)
            _ = Plug(vif);
        foreach ((int i, ChannelConfiguration channel) in Configuration.Channels.Index())
            Plug(channel, (uint)i + 1);
    }

    private static VifConfiguration Complete(VifConfiguration vif, int id)
        => vif with { Mac = vif.Mac ?? MacAddress.Random().ToString(), DeviceId = vif.DeviceId ?? id };

    private static long? Number(string? text)
        => long.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out long number) ? number : null;

    private ToolstackException StillInUse(string what) => new(
        ProblemKind.GuestTimeout,
        $"The guest of {Name} did not let go of its {what} within {_toolstack.DetachTimeout.TotalSeconds:0} s; it goes when the guest does, or at once with --force.");

    private T Lookup<T>(List<T> devices, Func<T, bool> isWanted, string what)
        where T : class
    {
        lock (_gate)
        {
            if (_gone || _dying)
                throw IsGone();
            return devices.FirstOrDefault(isWanted) ?? throw new ToolstackException(ProblemKind.NoSuchDevice, $"The domain {Name} has no {what}.");
        }
    }

    private void Forget<T>(List<T> devices, T device)
    {
        lock (_gate)
            _ = devices.Remove(device);
    }

    private void Report(string sentence) => _toolstack.Log.Write(sentence);

    private async Task<BlockBackend> PlugAsync(DiskConfiguration disk, CancellationToken cancellation)
    {
        IBlockImage? image = null;
        try
        {
            image = disk.Format == DiskFormat.Empty
                ? new EmptyImage()
                : await BlockImage.OpenAsync(
                    disk.Target, disk.Format == DiskFormat.Qcow2 ? BlockImageFormat.Qcow2 : BlockImageFormat.Raw, disk.ReadOnly,
                    direct: disk.DirectIoSafe, cancellation: cancellation).ConfigureAwait(false);
            var backend = BlockBackend.Create(
                Running.Domain, Store,
                new BlockDeviceOptions
                {
                    Device = new Core.VirtualDevice(disk.DeviceId, disk.VirtualDevice),
                    Image = image,
                    IsReadOnly = disk.ReadOnly,
                    IsCdRom = disk.Cdrom,
                    IsRemovable = disk.Cdrom,
                    AllowsDiscard = disk.Discard ?? true,
                },
                Report);
            image = null;
            Keep(_disks, backend, backend.Completion);
            return backend;
        }
        catch (Exception failure) when (failure is BlockImageException or InvalidOperationException)
        {
            throw new ToolstackException(
                failure is BlockImageException ? ProblemKind.BadConfiguration : ProblemKind.WrongState, $"The disk {disk.VirtualDevice} of {Name}: {failure.Message}", failure);
        }
        finally
        {
            if (image is not null)
                await image.DisposeAsync().ConfigureAwait(false);
        }
    }

    private NetworkBackend Plug(VifConfiguration vif)
    {
        var options = new NetworkDeviceOptions
        {
            DeviceId = (uint)vif.DeviceId!.Value,
            Mac = MacAddress.TryParse(vif.Mac, out MacAddress mac) ? mac : null,
            Bridge = vif.Bridge ?? NetworkDeviceOptions.DefaultBridge,
            Rate = vif.Rate is { } rate ? new TransmitRate((ulong)rate.BytesPerInterval, TimeSpan.FromMicroseconds(rate.IntervalMicroseconds)) : null,
            InterfaceName = vif.Name,
            Ip = vif.Ip,
            Mtu = vif.Mtu ?? NetworkDeviceOptions.DefaultMtu,
            Trusted = vif.Trusted ?? true,
        };
        INetworkPort? port = null;
        try
        {
            port = _toolstack.Network.Open(options.Bridge, NetworkBackend.InterfaceName((ushort)Id, options), Report);
            NetworkBackend backend = NetworkBackend.Create(Running.Domain, Store, options, port, Report);
            port = null;
            Keep(_interfaces, backend, backend.Completion);
            return backend;
        }
        catch (Exception failure) when (failure is HostNetworkException or InvalidOperationException or ArgumentException)
        {
            throw new ToolstackException(
                failure switch { HostNetworkException => ProblemKind.HostCannot, ArgumentException => ProblemKind.BadConfiguration, _ => ProblemKind.WrongState },
                $"The network interface {options.DeviceId} of {Name}: {failure.Message}", failure);
        }
        finally
        {
            port?.Dispose();
        }
    }

    private void Plug(ChannelConfiguration channel, uint number)
    {
        try
        {
            var backend = ConsoleChannel.Create(Running.Domain, Store, new ConsoleChannelOptions(number, channel.Name) { SocketPath = channel.Path }, Report);
            Keep(_channels, backend, backend.Completion);
        }
        catch (Exception failure) when (failure is IOException or InvalidOperationException)
        {
            throw new ToolstackException(ProblemKind.HostCannot, $"The channel {channel.Name} of {Name}: {failure.Message}", failure);
        }
    }

    /// <summary>Lists a device as long as it is there: one that the guest did not let go of in time may go later.</summary>
    private void Keep<T>(List<T> devices, T device, Task completion)
    {
        lock (_gate)
            devices.Add(device);
        _ = completion.ContinueWith(_ => Forget(devices, device), CancellationToken.None, TaskContinuationOptions.None, TaskScheduler.Default);
    }

    /// <summary>Takes all devices away at once. With the turn, when the guest does not run any more.</summary>
    private async Task RemoveDevicesAsync()
    {
        IAsyncDisposable[] devices;
        lock (_gate)
            devices = [.. _disks, .. _interfaces, .. _channels];
        foreach (IAsyncDisposable device in devices)
            await device.DisposeAsync().ConfigureAwait(false);
    }

    private DomainIoStatistics DescribeIo()
    {
        BlockStatistics[] disks = [.. _disks.Select(static disk => disk.Statistics)];
        NetworkDeviceStatistics[] interfaces = [.. _interfaces.Select(static device => device.Statistics)];
        return new DomainIoStatistics
        {
            BlockDevices = disks.Length,
            BlockReads = (ulong)disks.Sum(static disk => disk.ReadRequests),
            BlockWrites = (ulong)disks.Sum(static disk => disk.WriteRequests),
            BlockBytesRead = (ulong)disks.Sum(static disk => disk.ReadBytes),
            BlockBytesWritten = (ulong)disks.Sum(static disk => disk.WrittenBytes),
            NetworkDevices = interfaces.Length,
            NetworkBytesSent = (ulong)interfaces.Sum(static device => device.TransmittedBytes),
            NetworkBytesReceived = (ulong)interfaces.Sum(static device => device.ReceivedBytes),
        };
    }

    /// <summary>What the front end's nodes say, which are the guest's to write.</summary>
    private (int State, long? EventChannel) Connection(XenbusDevice device, string eventNode)
    {
        int state = (int)(Number(Store.Read(device.FrontEnd + "/state")) is { } number and >= 0 and <= (int)XenbusState.Reconfigured ? number : 0);
        return (state, Number(Store.Read($"{device.FrontEnd}/{eventNode}")));
    }

    private BlockDeviceInfo Describe(BlockBackend disk)
    {
        // With several queues the first one's nodes are a folder lower; with several pages a ring has a number for each.
        XenbusDevice device = disk.Address;
        string queue = Store.Exists(device.FrontEnd + "/queue-0") ? "queue-0/" : string.Empty;
        (int state, long? channel) = Connection(device, queue + "event-channel");
        BlockStatistics statistics = disk.Statistics;
        return new BlockDeviceInfo
        {
            VirtualDevice = (int)disk.Device.Number,
            Name = disk.Device.Name,
            State = state,
            EventChannel = channel,
            RingReference = Number(Store.Read($"{device.FrontEnd}/{queue}ring-ref")) ?? Number(Store.Read($"{device.FrontEnd}/{queue}ring-ref0")),
            BackendPath = device.BackEnd,
            Target = disk.Image.Description,
            Format = Configuration.Disks.FirstOrDefault(other => other.DeviceId == (int)disk.Device.Number)?.Format.ToString().ToLowerInvariant() ?? string.Empty,
            ReadOnly = disk.IsReadOnly,
            CdRom = disk.IsCdRom,
            Reads = (ulong)statistics.ReadRequests,
            Writes = (ulong)statistics.WriteRequests,
            Flushes = (ulong)statistics.FlushRequests,
            BytesRead = (ulong)statistics.ReadBytes,
            BytesWritten = (ulong)statistics.WrittenBytes,
            Errors = (ulong)statistics.Errors,
        };
    }

    private ChannelInfo Describe(ConsoleChannel channel)
    {
        (int state, long? port) = Connection(channel.Address, "port");
        return new ChannelInfo
        {
            DeviceId = (int)channel.Options.Id,
            Name = channel.Options.Name,
            State = state,
            EventChannel = port,
            RingReference = Number(Store.Read($"{channel.Address.FrontEnd}/ring-ref")),
            BackendPath = channel.Address.BackEnd,
            Connection = channel.Options.SocketPath is null ? "pty" : "socket",
            Path = channel.Options.SocketPath ?? channel.Terminal,
        };
    }

    private NetworkDeviceInfo Describe(NetworkBackend nic)
    {
        XenbusDevice device = nic.Device;
        string queue = Store.Exists(device.FrontEnd + "/queue-0") ? "queue-0/" : string.Empty;
        string channelNode = Store.Exists($"{device.FrontEnd}/{queue}event-channel-tx") ? "event-channel-tx" : "event-channel";
        (int state, long? channel) = Connection(device, queue + channelNode);
        NetworkDeviceStatistics statistics = nic.Statistics;
        return new NetworkDeviceInfo
        {
            DeviceId = (int)nic.Options.DeviceId,
            Mac = nic.Mac.ToString(),
            State = state,
            EventChannel = channel,
            TransmitRingReference = Number(Store.Read($"{device.FrontEnd}/{queue}tx-ring-ref")),
            ReceiveRingReference = Number(Store.Read($"{device.FrontEnd}/{queue}rx-ring-ref")),
            BackendPath = device.BackEnd,
            Bridge = nic.Options.Bridge,
            HostInterface = nic.PortName,
            PacketsSent = (ulong)statistics.TransmittedFrames,
            PacketsReceived = (ulong)statistics.ReceivedFrames,
            BytesSent = (ulong)statistics.TransmittedBytes,
            BytesReceived = (ulong)statistics.ReceivedBytes,
            Dropped = (ulong)(statistics.TransmitDrops + statistics.ReceiveDrops),
        };
    }
}
