// The back end of a virtual disk (vbd), for stock blkfront and others.
using System.Globalization;
using XenSharp.Core;
using XenSharp.Devices.Block.Images;
using XenSharp.Devices.Xenbus;
using XenSharp.Devices.Xenstore;
using XenSharp.Domains;

namespace XenSharp.Devices.Block;

/// <summary>
/// A disk of a guest's: its nodes in the store, its rings, and its image. It can be attached before the domain starts and while it runs,
/// and detached while it runs. Any thread may call any member.
/// </summary>
public sealed class BlockBackend : IAsyncDisposable
{
    private readonly BlockDeviceOptions _options;
    private readonly BlockCounters _counters = new();
    private readonly BlockDriver _driver;
    private readonly XenbusBackend _xenbus;

    private BlockBackend(Domain domain, XenstoreClient store, BlockDeviceOptions options, Action<string>? report)
    {
        _options = options;
        bool readOnly = options.IsReadOnly || options.IsCdRom || options.Image.IsReadOnly;
        bool discards = options.AllowsDiscard && !readOnly && options.Image.Discard is not null;
        var settings = new BlockQueueSettings(
            options.Image, readOnly, discards, options.MaxIndirectSegments, _counters, sentence => _xenbus?.Report(sentence));
        _driver = new BlockDriver(domain, options, settings);
        IsReadOnly = readOnly;
        _xenbus = new XenbusBackend(
            domain, store, new XenbusDevice("vbd", domain.Id.Value, options.Device.Number), Nodes(options, readOnly, discards), _driver, report);
    }

    /// <summary>As which disk the guest sees it.</summary>
    public VirtualDevice Device => _options.Device;

    /// <summary>What is on it.</summary>
    public IBlockImage Image => _options.Image;

    /// <summary>Whether the guest may only read.</summary>
    public bool IsReadOnly { get; }

    /// <summary>Whether it is shown as a CD-ROM.</summary>
    public bool IsCdRom => _options.IsCdRom;

    /// <summary>Its paths in the store.</summary>
    public XenbusDevice Address => _xenbus.Device;

    /// <summary>The back end's state.</summary>
    public XenbusState State => _xenbus.State;

    /// <summary>What it has done.</summary>
    public BlockStatistics Statistics => _counters.Snapshot();

    /// <summary>Pages of the guest's that are mapped between requests at the moment.</summary>
    public int PersistentGrants => _driver.PersistentGrants;

    /// <summary>Completes when the disk is gone from the guest, and its image closed.</summary>
    public Task Completion => _xenbus.Completion;

    /// <summary>Attaches a disk.</summary>
    /// <param name="domain">The guest.</param>
    /// <param name="store">The store that it uses.</param>
    /// <param name="options">The disk. Where this throws, its image stays the caller's.</param>
    /// <param name="report">Takes sentences for people about what goes wrong; any thread.</param>
    /// <exception cref="InvalidOperationException">The guest has that disk already.</exception>
    /// <exception cref="ArgumentOutOfRangeException">A limit is out of its range.</exception>
    public static BlockBackend Create(Domain domain, XenstoreClient store, BlockDeviceOptions options, Action<string>? report = null)
    {
        ArgumentNullException.ThrowIfNull(domain);
        ArgumentNullException.ThrowIfNull(store);
        ArgumentNullException.ThrowIfNull(options);
        options.Check();
        return new BlockBackend(domain, store, options, report);
    }

    /// <summary>Detaches it, as <c>xl block-detach</c> does: the guest is asked to let go.</summary>
    /// <param name="timeout">How long to wait for the guest.</param>
    /// <param name="force">Whether to take it away from a guest that does not let go by then.</param>
    /// <param name="cancellation">Ends the waiting.</param>
    /// <returns>False if the guest still has it; it goes by itself when the guest lets go after all.</returns>
    public Task<bool> RemoveAsync(TimeSpan timeout, bool force = false, CancellationToken cancellation = default)
        => _xenbus.RemoveAsync(timeout, force, cancellation);

    /// <summary>Takes it away at once, as at the domain's end; requests under way are waited for.</summary>
    public ValueTask DisposeAsync() => _xenbus.DisposeAsync();

    private static XenbusNodes Nodes(BlockDeviceOptions options, bool readOnly, bool discards)
    {
        string type = options.IsCdRom ? "cdrom" : "disk";
        return new XenbusNodes
        {
            BackEnd =
            [
                ("params", options.Image.Description), ("removable", options.IsRemovable ? "1" : "0"), ("bootable", "1"),
                ("dev", options.Device.Name), ("type", "phy"), ("mode", readOnly ? "r" : "w"), ("device-type", type),
                ("discard-enable", discards ? "1" : "0"), ("specification", "xen"),
            ],
            FrontEnd =
            [
                ("virtual-device", options.Device.Number.ToString(CultureInfo.InvariantCulture)), ("device-type", type), ("trusted", "1"),
                ("protocol", BlkifAbi.X64.Name),
            ],
        };
    }
}
