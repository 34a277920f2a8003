// A block device that is connected: its rings, and what the front end is told of the disk.
using System.Globalization;
using XenSharp.Core;
using XenSharp.Devices.Xenbus;
using XenSharp.Devices.Xenstore;
using XenSharp.Domains;
using XenSharp.Domains.Grants;
using XenSharp.EventChannels;

namespace XenSharp.Devices.Block;

/// <summary>The block device's part of the xenbus protocol: what is announced, how a front end is connected to.</summary>
internal sealed class BlockDriver(Domain domain, BlockDeviceOptions options, BlockQueueSettings settings) : IXenbusDriver
{
    private BlockConnection? _connection;

    /// <summary>Pages of the guest's that stay mapped between requests at the moment.</summary>
    internal int PersistentGrants => Volatile.Read(in _connection)?.PersistentGrants ?? 0;

    /// <inheritdoc/>
    public void Announce(XenstoreTransaction store, string folder)
    {
        store.Write(folder + "/max-ring-page-order", Number((uint)options.MaxRingPageOrder));
        store.Write(folder + "/max-ring-pages", Number(1u << options.MaxRingPageOrder));
        store.Write(folder + "/multi-queue-max-queues", Number((uint)options.MaxQueues));
    }

    /// <inheritdoc/>
    public ValueTask DisposeAsync() => options.Image.DisposeAsync();

    /// <inheritdoc/>
    public ValueTask<IXenbusConnection> ConnectAsync(XenbusFrontEnd frontEnd, CancellationToken cancellation)
    {
        BlkifAbi abi = frontEnd.Read("protocol") switch
        {
            null => BlkifAbi.X64,
            { } name when name == BlkifAbi.X64.Name => BlkifAbi.X64,
            { } name when name == BlkifAbi.X32.Name => BlkifAbi.X32,
            { } other => throw new XenbusException(Errno.EINVAL, $"the front end's protocol \"{XenbusFrontEnd.Shown(other)}\" is unknown"),
        };
        int persistent = frontEnd.ReadFeature("feature-persistent") ? options.MaxPersistentGrants : 0;
        uint queueCount = frontEnd.ReadOptional("multi-queue-num-queues") ?? 1;
        if (queueCount == 0 || queueCount > options.MaxQueues)
            throw new XenbusException(Errno.ENOSYS, $"the front end wants {queueCount} queues, and can have from 1 to {options.MaxQueues}");
        int pages = RingPages(frontEnd);

        var queues = new List<BlockQueue>();
        try
        {
            for (uint i = 0; i < queueCount; i++)
                queues.Add(Connect(queueCount == 1 ? frontEnd : frontEnd.Below($"queue-{Number(i)}"), pages, abi, persistent));
        }
        catch
        {
            // None of them has started, so nothing is waited for.
            foreach (BlockQueue queue in queues)
                queue.DisposeAsync().AsTask().GetAwaiter().GetResult();
            throw;
        }

        var connection = new BlockConnection(options, settings, queues);
        Volatile.Write(ref _connection, connection);
        return ValueTask.FromResult<IXenbusConnection>(connection);
    }

    internal static string Number(ulong number) => number.ToString(CultureInfo.InvariantCulture);

    /// <summary>How many pages each ring has: by its order, or in the older way by their number.</summary>
    private int RingPages(XenbusFrontEnd frontEnd)
    {
        uint most = 1u << options.MaxRingPageOrder;
        if (frontEnd.ReadOptional("ring-page-order", (uint)options.MaxRingPageOrder) is { } order)
            return 1 << (int)order;
        uint pages = frontEnd.ReadOptional("num-ring-pages", most) ?? 1;
        return uint.IsPow2(pages) ? (int)pages : throw new XenbusException(Errno.EINVAL, $"a ring cannot have {pages} pages, but a power of two");
    }

    private BlockQueue Connect(XenbusFrontEnd nodes, int pageCount, BlkifAbi abi, int persistent)
    {
        var references = new uint[pageCount];
        for (int i = 0; i < pageCount; i++)
            references[i] = pageCount == 1 && nodes.ReadOptional("ring-ref") is { } single ? single : nodes.ReadNumber($"ring-ref{Number((uint)i)}");
        uint port = nodes.ReadNumber("event-channel");

        MappedGrants pages = domain.Granted.Prepare();
        GrantStatus status = pages.TryMap(references, writable: true);
        if (status != GrantStatus.Okay)
            throw new XenbusException(Errno.EINVAL, $"mapping the ring of {nodes.Folder} (ring-ref {string.Join(' ', references)}): {status}");
        var ring = new BlkifRing(pages, abi);
        if (domain.TryConnect(port, out EventChannelBackend? channel))
            return new BlockQueue(settings, domain.Granted, ring, channel, abi, persistent);
        ring.Dispose();
        throw new XenbusException(Errno.EINVAL, $"binding the event channel of {nodes.Folder}: port {port} does not wait for this domain");
    }
}

/// <summary>The rings of a device in use.</summary>
internal sealed class BlockConnection : IXenbusConnection
{
    private readonly BlockDeviceOptions _options;
    private readonly BlockQueueSettings _settings;
    private readonly IReadOnlyList<BlockQueue> _queues;

    internal BlockConnection(BlockDeviceOptions options, BlockQueueSettings settings, IReadOnlyList<BlockQueue> queues)
    {
        (_options, _settings, _queues) = (options, settings, queues);
        Failure = Task.WhenAny(queues.Select(static queue => queue.Failure)).Unwrap();
        foreach (BlockQueue queue in queues)
            queue.Start();
    }

    /// <inheritdoc/>
    public Task Failure { get; }

    internal int PersistentGrants => _queues.Sum(static queue => queue.PersistentGrants);

    /// <inheritdoc/>
    public void Publish(XenstoreTransaction store, string folder)
    {
        string writable = _settings.IsReadOnly ? "0" : "1";
        List<(string Name, string Value)> nodes =
        [
            ("feature-flush-cache", writable), ("feature-barrier", writable), ("feature-persistent", _options.MaxPersistentGrants > 0 ? "1" : "0"),
            ("feature-max-indirect-segments", BlockDriver.Number((uint)_options.MaxIndirectSegments)),
            ("sectors", BlockDriver.Number(_settings.Sectors)), ("info", BlockDriver.Number(Info())),
            ("sector-size", BlockDriver.Number(_settings.Image.SectorSize)), ("physical-sector-size", BlockDriver.Number(_settings.Image.PhysicalSectorSize)),
        ];
        if (_settings.CanDiscard && _settings.Image.Discard is { } limits)
        {
            nodes.AddRange(
            [
                ("discard-granularity", BlockDriver.Number(limits.Granularity)), ("discard-alignment", BlockDriver.Number(limits.Alignment)),
                ("discard-secure", "0"), ("feature-discard", "1"),
            ]);
        }

        foreach ((string name, string value) in nodes)
            store.Write($"{folder}/{name}", value);
    }

    public async ValueTask DisposeAsync()
    {
        foreach (BlockQueue queue in _queues)
            await queue.DisposeAsync().ConfigureAwait(false);
    }

    /// <summary>VDISK_CDROM, VDISK_REMOVABLE, VDISK_READONLY.</summary>
    private uint Info() => (_options.IsCdRom ? 1u : 0) | (_options.IsRemovable || _options.IsCdRom ? 2u : 0) | (_settings.IsReadOnly ? 4u : 0);
}
