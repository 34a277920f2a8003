// The shared ring of a block device, as its back end sees it (xen/include/public/io/ring.h).
using XenSharp.Domains.Grants;

namespace XenSharp.Devices.Block;

/// <summary>
/// One or more granted pages with the four indexes and the entries. The guest can write all of it at any moment: only req_prod and
/// rsp_event are ever read after the start, once per use, and an entry is copied before it is looked at.
/// </summary>
internal sealed unsafe class BlkifRing : IDisposable
{
    private const int PageSize = 4096;
    private const int RequestEvent = 1;
    private const int ResponseProducer = 2;
    private const int ResponseEvent = 3;

    private readonly MappedGrants _pages;
    private readonly BlkifAbi _abi;
    private readonly uint* _indexes;
    private uint _consumed;
    private uint _produced;
    private uint _pushed;

    /// <param name="pages">The pages in order; the ring's from here on.</param>
    /// <param name="abi">The layout of its entries.</param>
    internal BlkifRing(MappedGrants pages, BlkifAbi abi)
    {
        (_pages, _abi) = (pages, abi);
        _indexes = (uint*)pages.AddressOf(0);
        Size = abi.RingSize(pages.Count);

        // BACK_RING_ATTACH: a front end that was connected before goes on from where the answers ended.
        _consumed = _produced = _pushed = Volatile.Read(ref _indexes[ResponseProducer]);
    }

    /// <summary>Entries.</summary>
    internal uint Size { get; }

    /// <summary>Requests that were taken and have no response in the ring yet.</summary>
    internal uint Unanswered => _consumed - _produced;

    /// <summary>Whether there are responses that the front end does not see yet.</summary>
    internal bool HasUnseen => _pushed != _produced;

    /// <summary>Whether the front end has room for no request before it sees a response.</summary>
    internal bool IsFull => _consumed - _pushed >= Size;

    /// <summary>Copies the next request, if there is one.</summary>
    /// <param name="request">As long as an entry.</param>
    /// <param name="overflow">Whether the front end says that there are more requests than it has entries for.</param>
    internal bool TryTake(Span<byte> request, out bool overflow)
    {
        // Acquire: the entry is read after the index that announces it.
        uint producer = Volatile.Read(ref _indexes[0]);
        overflow = producer - _produced > Size;
        if (overflow || producer == _consumed)
            return false;
        Read(OffsetOf(_consumed), request[.._abi.RequestSize]);
        _consumed++;
        return true;
    }

    /// <summary>Requests that the front end says it has made, and that were not taken; whatever it says.</summary>
    internal uint Untaken => Volatile.Read(ref _indexes[0]) - _consumed;

    /// <summary>Asks to be told of the next request, and looks once more (RING_FINAL_CHECK_FOR_REQUESTS).</summary>
    /// <returns>Whether there are requests after all.</returns>
    internal bool AwaitRequests()
    {
        Volatile.Write(ref _indexes[RequestEvent], _consumed + 1);
        Interlocked.MemoryBarrier();
        return Volatile.Read(ref _indexes[0]) != _consumed;
    }

    /// <summary>Puts a response into the ring, which the front end sees after <see cref="Push"/>.</summary>
    internal void Put(ulong id, BlkifOperation operation, BlkifStatus status)
    {
        Span<byte> response = stackalloc byte[BlkifAbi.LongestResponse];
        BlkifAbi.WriteResponse(response, id, operation, status);
        Write(OffsetOf(_produced), response[.._abi.ResponseSize]);
        _produced++;
    }

    /// <summary>Shows the front end all responses (RING_PUSH_RESPONSES_AND_CHECK_NOTIFY).</summary>
    /// <returns>Whether it wants to be notified.</returns>
    internal bool Push()
    {
        if (_pushed == _produced)
            return false;
        uint old = _pushed;
        _pushed = _produced;

        // Release: the responses are there before the index that announces them; and it is seen before rsp_event is looked at.
        Volatile.Write(ref _indexes[ResponseProducer], _pushed);
        Interlocked.MemoryBarrier();
        return _pushed - Volatile.Read(ref _indexes[ResponseEvent]) < _pushed - old;
    }

    public void Dispose()
    {
        _pages.Dispose();
    }

    private int OffsetOf(uint index) => BlkifAbi.RingHeaderSize + ((int)(index & (Size - 1)) * _abi.RequestSize);

    // An entry may lie across two pages, which need not be neighbours here.
    private void Read(int offset, Span<byte> bytes)
    {
        while (!bytes.IsEmpty)
        {
            int count = Math.Min(bytes.Length, PageSize - (offset % PageSize));
            new ReadOnlySpan<byte>(_pages.AddressOf(offset / PageSize) + (offset % PageSize), count).CopyTo(bytes);
            bytes = bytes[count..];
            offset += count;
        }
    }

    private void Write(int offset, ReadOnlySpan<byte> bytes)
    {
        while (!bytes.IsEmpty)
        {
            int count = Math.Min(bytes.Length, PageSize - (offset % PageSize));
            bytes[..count].CopyTo(new Span<byte>(_pages.AddressOf(offset / PageSize) + (offset % PageSize), count));
            bytes = bytes[count..];
            offset += count;
        }
    }
}
