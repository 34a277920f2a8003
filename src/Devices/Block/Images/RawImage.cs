// Images that are the disk byte for byte: files, and block devices of the host.
using Tmds.Linux;

namespace XenSharp.Devices.Block.Images;

/// <summary>
/// A raw file or block device. What is in the host's page cache is read on the spot, what goes past it is transferred by the kernel's
/// asynchronous I/O where the host has that; all else is done by threads that may wait. Data moves between the host's cache, or the disk,
/// and the operation's memory without a copy in between; a flush is fdatasync.
/// </summary>
/// <remarks>The size is what it was when the image was opened; a file that is cut short meanwhile comes to EIO behind its end.</remarks>
public sealed unsafe class RawImage : IBlockImage
{
    /// <summary>Reads that wait for the disk at the same time: as many as a ring of one page holds.</summary>
    private const int MaxReaders = 32;

    /// <summary>The file system lets one writer into a file, who only copies into the page cache; a second has the next ready.</summary>
    private const int MaxWriters = 2;

    /// <summary>Flushes and discards at the same time.</summary>
    private const int MaxOthers = 4;
    private const uint DefaultSector = 512;
    private const uint PageUnit = 4096;

    private readonly ImageFile _file;
    private readonly BlockWorkers _readers;
    private readonly BlockWorkers _writers;

    /// <summary>For flushes and discards, behind which no write is to wait.</summary>
    private readonly BlockWorkers _others;
    private readonly bool _isDevice;
    private readonly DirectTransfers? _direct;
    private volatile bool _usesDirect;
    private volatile bool _readsOnTheSpot = true;
    private volatile int _flushError;

    private RawImage(ImageFile file, uint directUnit, bool asynchronous)
    {
        _file = file;
        _isDevice = file.Device is not null;
        (SectorSize, PhysicalSectorSize) = (DefaultSector, DefaultSector);
        if (file.Device is { } device)
        {
            (SectorSize, PhysicalSectorSize) = (device.SectorSize, Math.Max(device.SectorSize, device.PhysicalSectorSize));
            Discard = device.Discard;
        }
        else
        {
            // A disk has to be a whole number of these.
            PhysicalSectorSize = file.Size % PageUnit == 0 ? PageUnit : DefaultSector;
            Discard = new DiscardLimits(file.BlockSize, 0);
        }

        if (directUnit != 0)
        {
            // Nothing is in the cache; and a read without waiting would wait for the disk all the same.
            _readsOnTheSpot = false;
            SectorSize = Math.Max(SectorSize, directUnit);
            PhysicalSectorSize = Math.Max(PhysicalSectorSize, SectorSize);
        }

        Size = file.Size & ~(ulong)(SectorSize - 1);
        void Work(BlockOperation operation, CompletionBatch batch) => operation.Complete(Perform(operation), batch);
        _readers = new BlockWorkers("block read", Work, MaxReaders);
        _writers = directUnit == 0 ? new BlockWorkers("block write", Work, MaxWriters, isQuick: true) : new BlockWorkers("block write", Work, MaxReaders);
        _others = new BlockWorkers("block flush", Work, MaxOthers);
        if (directUnit != 0 && asynchronous)
            _direct = DirectTransfers.TryStart(file.Descriptor, Queue, () => _usesDirect = false);
        _usesDirect = _direct is not null;
    }

    /// <inheritdoc/>
    public ulong Size { get; }

    /// <inheritdoc/>
    public uint SectorSize { get; }

    /// <inheritdoc/>
    public uint PhysicalSectorSize { get; }

    /// <inheritdoc/>
    public bool IsReadOnly => _file.IsReadOnly;

    /// <inheritdoc/>
    public DiscardLimits? Discard { get; }

    /// <inheritdoc/>
    public string Description => _file.Path;

    /// <inheritdoc/>
    public bool PrefersTogether => _usesDirect;

    /// <summary>Opens a file or block device, and locks it against a second use to write.</summary>
    /// <param name="path">The file.</param>
    /// <param name="readOnly">Whether it is only read.</param>
    /// <param name="direct">Whether it is used past the host's page cache (O_DIRECT); what the host's memory is saved by that is the guest's
    /// to have in its own cache.</param>
    /// <exception cref="BlockImageException">It cannot be opened or is in use, or not be used directly; the message says what to do.</exception>
    public static RawImage Open(string path, bool readOnly, bool direct = false) => Open(path, readOnly, direct, asynchronous: true);

    /// <summary>As <see cref="Open(string, bool, bool)"/>.</summary>
    /// <param name="path">The file.</param>
    /// <param name="readOnly">Whether it is only read.</param>
    /// <param name="direct">Whether it is used past the page cache.</param>
    /// <param name="asynchronous">Whether that is by asynchronous I/O, where the host has it.</param>
    internal static RawImage Open(string path, bool readOnly, bool direct, bool asynchronous)
    {
        ImageFile file = ImageFile.Open(path, readOnly, direct);
        try
        {
            uint directUnit = direct ? file.FindDirectUnit() : 0;
            return file.Size >= Math.Max(DefaultSector, directUnit)
                ? new RawImage(file, directUnit, asynchronous)
                : throw new BlockImageException($"{path} holds less than one sector; make it as large as the disk is to be (truncate --size=8G FILE).");
        }
        catch
        {
            file.Dispose();
            throw;
        }
    }

    /// <inheritdoc/>
    public void Submit(BlockOperation operation)
    {
        ArgumentNullException.ThrowIfNull(operation);
        Submit([operation]);
    }

    /// <inheritdoc/>
    public void Submit(ReadOnlySpan<BlockOperation> operations)
    {
        while (!operations.IsEmpty)
        {
            int count = 0;
            while (count < operations.Length && IsDirectTransfer(operations[count]))
                count++;
            if (count > 0)
            {
                _direct!.Submit(operations[..count]);
                operations = operations[count..];
                continue;
            }

            BlockOperation operation = operations[0];
            operations = operations[1..];
            if (operation.Kind == BlockOperationKind.Read && _readsOnTheSpot && TryReadCached(operation))
                operation.Complete(0);
            else
                Queue(operation);
        }
    }

    /// <inheritdoc/>
    public ValueTask DisposeAsync()
    {
        return new ValueTask(Task.Run(() =>
        {
            // What these have left to others is the workers' before they let go of it.
            _direct?.Stop();
            _readers.Stop();
            _writers.Stop();
            _others.Stop();
            _file.Dispose();
        }));
    }

    /// <summary>Whether an operation is one for asynchronous I/O. A write to what may not be written to is answered elsewhere.</summary>
    private bool IsDirectTransfer(BlockOperation operation)
        => _usesDirect && (operation.Kind == BlockOperationKind.Read || (operation.Kind == BlockOperationKind.Write && !IsReadOnly));

    /// <summary>Leaves an operation to a thread that may wait.</summary>
    private void Queue(BlockOperation operation)
    {
        BlockWorkers workers = operation.Kind switch
        {
            BlockOperationKind.Read => _readers,
            BlockOperationKind.Write => _writers,
            _ => _others,
        };
        workers.Queue(operation);
    }

    /// <summary>Reads if all of it is in the page cache.</summary>
    private bool TryReadCached(BlockOperation operation)
    {
        long read = HostIo.Transfer(
            _file.Descriptor, write: false, operation.Vectors, operation.VectorCount, operation.Offset, HostIo.NoWait);
        if (read == (long)operation.Length)
            return true;

        // Not every file system knows this; then all reads are the workers'.
        if (read == -LibC.EOPNOTSUPP)
            _readsOnTheSpot = false;
        return false;
    }

    private int Perform(BlockOperation operation)
    {
        if (operation.Kind != BlockOperationKind.Read && IsReadOnly && operation.Kind != BlockOperationKind.Flush)
            return LibC.EROFS;
        switch (operation.Kind)
        {
            case BlockOperationKind.Flush:
                return IsReadOnly ? 0 : Flush();

            case BlockOperationKind.Discard:
                if (_isDevice)
                    return HostIo.DiscardDevice(_file.Descriptor, operation.Offset, operation.Length);
                int mode = LibC.FALLOC_FL_PUNCH_HOLE | LibC.FALLOC_FL_KEEP_SIZE;
                return LibC.fallocate(_file.Descriptor, mode, (long)operation.Offset, (long)operation.Length) == 0 ? 0 : LibC.errno;

            default:
                return Transfer(operation);
        }
    }

    // Linux reports a write that failed in the background once, and then holds the page for clean: a later flush must not say that all is well.
    private int Flush()
    {
        if (_flushError == 0 && LibC.fdatasync(_file.Descriptor) != 0)
            _flushError = LibC.errno;
        return _flushError;
    }

    private int Transfer(BlockOperation operation)
    {
        IoVector* vectors = operation.Vectors;
        int count = operation.VectorCount;
        ulong offset = operation.Offset;
        ulong left = operation.Length;
        while (left > 0)
        {
            long moved = HostIo.Transfer(_file.Descriptor, operation.Kind == BlockOperationKind.Write, vectors, count, offset, flags: 0);
            if (moved < 0)
                return (int)-moved;

            // The file has become shorter.
            if (moved == 0)
                return LibC.EIO;
            offset += (ulong)moved;
            left -= (ulong)moved;
            HostIo.Advance(ref vectors, ref count, (ulong)moved);
        }

        return 0;
    }
}
