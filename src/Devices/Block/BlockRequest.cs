// A request of a front end's on its way through the image.
using System.Runtime.InteropServices;
using XenSharp.Devices.Block.Images;
using XenSharp.Domains.Grants;

namespace XenSharp.Devices.Block;

/// <summary>
/// One request with the pages that it uses. A flush with data, and so a barrier, is three operations on the image one after the other:
/// what came before is made safe, then its own data are written, then made safe too.
/// </summary>
/// <param name="queue">Its ring's.</param>
/// <param name="mapped">Takes its pages, where they are mapped for it alone.</param>
internal sealed unsafe class BlockRequest(BlockQueue queue, MappedGrants mapped) : BlockOperation, IDisposable
{
    private readonly List<GrantedBlockPage> _pages = new(BlkifAbi.MaxDirectSegments);
    private IoVector* _memory;
    private int _capacity;
    private ulong _writeOffset;
    private ulong _writeLength;
    private int _steps;

    /// <summary>The guest's own number of it.</summary>
    internal ulong Id { get; private set; }

    /// <summary>What the response says that it was.</summary>
    internal BlkifOperation Operation { get; private set; }

    /// <summary>Bytes that it moves.</summary>
    internal ulong Bytes { get; private set; }

    /// <summary>The pages that it uses of those that stay mapped; to be given back by who got them.</summary>
    internal List<GrantedBlockPage> Pages => _pages;

    /// <summary>The pages that are mapped for it alone; to be unmapped by who mapped them.</summary>
    internal MappedGrants Mapped => mapped;

    /// <summary>Starts describing a request.</summary>
    /// <param name="id">The guest's number.</param>
    /// <param name="operation">What it is.</param>
    /// <param name="segments">Pieces of memory that it has.</param>
    internal void Begin(ulong id, BlkifOperation operation, int segments)
    {
        (Id, Operation, Bytes, VectorCount) = (id, operation, 0, 0);
        if (_capacity < segments)
        {
            _capacity = Math.Max(segments, BlkifAbi.MaxDirectSegments);
            _memory = (IoVector*)NativeMemory.Realloc(_memory, (nuint)(_capacity * sizeof(IoVector)));
        }

        Vectors = _memory;
    }

    /// <summary>Adds a piece of a page, which is the request's from here on.</summary>
    internal void Add(GrantedBlockPage page, in BlkifSegment segment)
    {
        _pages.Add(page);
        Add(page.Mapping.Address, segment);
    }

    /// <summary>Adds a piece of a page that is mapped at an address.</summary>
    internal void Add(byte* page, in BlkifSegment segment)
    {
        byte* start = page + (segment.FirstSector << BlkifAbi.SectorShift);
        nuint length = (nuint)segment.Sectors << BlkifAbi.SectorShift;
        Bytes += length;
        if (VectorCount > 0 && _memory[VectorCount - 1].Base + _memory[VectorCount - 1].Length == start)
            _memory[VectorCount - 1].Length += length;
        else
            _memory[VectorCount++] = new IoVector { Base = start, Length = length };
    }

    /// <summary>Makes it a read or write, of all the pieces added.</summary>
    internal void Transfer(BlockOperationKind kind, ulong sector)
        => (Kind, Offset, Length, _steps) = (kind, sector << BlkifAbi.SectorShift, Bytes, 1);

    /// <summary>Makes it a discard.</summary>
    internal void Discard(ulong sector, ulong sectors)
        => (Kind, Offset, Length, _steps) = (BlockOperationKind.Discard, sector << BlkifAbi.SectorShift, sectors << BlkifAbi.SectorShift, 1);

    /// <summary>Makes it a flush, before and after the pieces added are written, if there are any.</summary>
    internal void Flush(ulong sector)
    {
        (_writeOffset, _writeLength) = (sector << BlkifAbi.SectorShift, Bytes);
        (Kind, Offset, Length, _steps) = (BlockOperationKind.Flush, 0, 0, VectorCount == 0 ? 1 : 3);
    }

    /// <summary>Goes on to the next operation.</summary>
    /// <returns>False if there is none.</returns>
    internal bool Proceed()
    {
        switch (--_steps)
        {
            case 2:
                (Kind, Offset, Length) = (BlockOperationKind.Write, _writeOffset, _writeLength);
                return true;
            case 1:
                (Kind, Offset, Length, VectorCount) = (BlockOperationKind.Flush, 0, 0, 0);
                return true;
            default:
                return false;
        }
    }

    /// <inheritdoc/>
    public override void Complete(int error) => queue.Completed(this, error, batch: null);

    /// <inheritdoc/>
    internal override void Complete(int error, CompletionBatch batch) => queue.Completed(this, error, batch);

    public void Dispose()
    {
        mapped.Dispose();
        NativeMemory.Free(_memory);
        _memory = null;
        _capacity = 0;
    }
}
