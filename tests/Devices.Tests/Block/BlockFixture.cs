// A domain, a store, a disk, and its front end.
using System.Collections.Concurrent;
using XenSharp.Core;
using XenSharp.Devices.Block;
using XenSharp.Devices.Block.Images;
using XenSharp.Devices.Xenstore;
using XenSharp.Domains;
using XenSharp.Domains.Tests.Grants;

namespace XenSharp.Devices.Tests.Block;

/// <summary>What a test of the block back end needs; disposing it takes everything down and checks that the guest has all its pages back.</summary>
internal sealed class BlockFixture : IAsyncDisposable
{
    public const uint Device = 51712;

    private bool _domainGone;

    private BlockFixture(IBlockImage image, FrontEndOptions? front, Func<BlockDeviceOptions, BlockDeviceOptions>? change)
    {
        Image = image;
        Guest = new GrantDomain(manager: Manager);
        Server = new XenstoreServer();
        var options = new BlockDeviceOptions { Device = VirtualDevice.Parse("xvda"), Image = image, MaxQueues = 2, MaxPersistentGrants = 1056 };
        Backend = BlockBackend.Create(Guest.Fake.Domain, Server.Domain0, change?.Invoke(options) ?? options, Reports.Enqueue);
        Front = new FakeBlkfront(Guest, Server.Domain0, Device, front);
    }

    public DomainManager Manager { get; } = new();

    public GrantDomain Guest { get; }

    public XenstoreServer Server { get; }

    public XenstoreClient Store => Server.Domain0;

    public IBlockImage Image { get; }

    public BlockBackend Backend { get; }

    public FakeBlkfront Front { get; }

    public ConcurrentQueue<string> Reports { get; } = [];

    public static BlockFixture Create(
        IBlockImage image, FrontEndOptions? front = null, Func<BlockDeviceOptions, BlockDeviceOptions>? change = null) => new(image, front, change);

    public static BlockFixture Connected(
        IBlockImage image, FrontEndOptions? front = null, Func<BlockDeviceOptions, BlockDeviceOptions>? change = null)
    {
        BlockFixture fixture = new(image, front, change);
        fixture.Front.Connect();
        return fixture;
    }

    public string? Node(string name) => Store.Read($"{Front.BackEnd}/{name}");

    public void EndDomain()
    {
        _domainGone = true;
        Guest.Dispose();
    }

    public async ValueTask DisposeAsync()
    {
        await Backend.DisposeAsync();
        if (!_domainGone)
        {
            Assert.That(Front.MappedData(), Is.Zero, "data pages are given back");
            Guest.Audit();
            EndDomain();
        }

        Assert.That(Manager.Domains, Is.Empty, "nobody holds memory of the domain");
        Assert.That(Store.Exists(Front.BackEnd), Is.False);
        await Server.DisposeAsync();
    }
}

/// <summary>An image in memory that can be slow, and can fail.</summary>
internal sealed unsafe class FakeImage : IBlockImage
{
    private readonly List<BlockOperation> _held = [];
    private readonly Lock _lock = new();
    private bool _holds;

    public byte[] Contents { get; init; } = new byte[1 << 20];

    public ulong Size => (ulong)Contents.Length;

    public uint SectorSize { get; init; } = 512;

    public uint PhysicalSectorSize => 4096;

    public bool IsReadOnly { get; init; }

    public DiscardLimits? Discard { get; init; } = new DiscardLimits(4096, 0);

    public string Description => "fake image";

    public bool PrefersTogether { get; init; }

    /// <summary>How many operations were submitted together, each time.</summary>
    public ConcurrentQueue<int> Batches { get; } = [];

    /// <summary>What every operation comes to.</summary>
    public int Error { get; set; }

    public bool IsDisposed { get; private set; }

    /// <summary>Kinds of the operations, in the order in which they were submitted.</summary>
    public ConcurrentQueue<BlockOperationKind> Submitted { get; } = [];

    /// <summary>Operations that wait to be let go.</summary>
    public int Held
    {
        get
        {
            lock (_lock)
                return _held.Count;
        }
    }

    /// <summary>From here on operations wait.</summary>
    public void Hold() => _holds = true;

    /// <summary>Does what waits, the last first, and no longer holds what comes if told so.</summary>
    /// <param name="forGood">Whether it does.</param>
    /// <param name="together">As what they are completed; null for each by itself.</param>
    public void LetGo(bool forGood = true, CompletionBatch? together = null)
    {
        BlockOperation[] held;
        lock (_lock)
        {
            _holds = !forGood;
            held = [.. _held];
            _held.Clear();
        }

        foreach (BlockOperation operation in held.Reverse())
        {
            if (together is null)
                operation.Complete(Perform(operation));
            else
                operation.Complete(Perform(operation), together);
        }

        together?.End();
    }

    public void Submit(ReadOnlySpan<BlockOperation> operations)
    {
        Batches.Enqueue(operations.Length);
        foreach (BlockOperation operation in operations)
            Submit(operation);
    }

    public void Submit(BlockOperation operation)
    {
        Submitted.Enqueue(operation.Kind);
        lock (_lock)
        {
            if (_holds)
            {
                _held.Add(operation);
                return;
            }
        }

        operation.Complete(Perform(operation));
    }

    public ValueTask DisposeAsync()
    {
        Assert.That(Held, Is.Zero);
        IsDisposed = true;
        return default;
    }

    private int Perform(BlockOperation operation)
    {
        if (Error != 0)
            return Error;
        Assert.That(operation.Offset + operation.Length, Is.LessThanOrEqualTo(Size));
        int at = (int)operation.Offset;
        for (int i = 0; i < operation.VectorCount && operation.Kind is BlockOperationKind.Read or BlockOperationKind.Write; i++)
        {
            var memory = new Span<byte>(operation.Vectors[i].Base, (int)operation.Vectors[i].Length);
            Span<byte> disk = Contents.AsSpan(at, memory.Length);
            if (operation.Kind == BlockOperationKind.Read)
                disk.CopyTo(memory);
            else
                memory.CopyTo(disk);
            at += memory.Length;
        }

        if (operation.Kind == BlockOperationKind.Discard)
            Contents.AsSpan(at, (int)operation.Length).Clear();
        return 0;
    }
}
