// The back end's view of a ring page, with the rules of ring.h about who is told when.
using System.Runtime.CompilerServices;

namespace XenSharp.Devices.Network;

/// <summary>
/// A ring of requests and responses in one page. One thread at a time. The page is the guest's to scribble on: a slot is read
/// once, and what the back end itself has counted is never read back.
/// </summary>
/// <typeparam name="TRequest">A request, as it is in a slot.</typeparam>
internal sealed unsafe class SharedRing<TRequest>
    where TRequest : unmanaged
{
    private const int PageSize = 4096;

    private readonly RingIndexes* _indexes;
    private readonly byte* _slots;
    private readonly int _slotSize;
    private uint _consumer;
    private uint _responses;
    private uint _published;

    /// <param name="page">The ring's page; has to stay mapped.</param>
    /// <param name="slotSize">Bytes of a slot, the larger of request and response.</param>
    public SharedRing(byte* page, int slotSize)
    {
        ArgumentNullException.ThrowIfNull(page);
        ArgumentOutOfRangeException.ThrowIfLessThan(slotSize, sizeof(TRequest));
        _indexes = (RingIndexes*)page;
        _slots = page + RingIndexes.Size;
        _slotSize = slotSize;
        Size = (uint)System.Numerics.BitOperations.RoundUpToPowerOf2((uint)((PageSize - RingIndexes.Size) / slotSize) + 1) / 2;

        // A back end that takes over from an earlier one goes on where that one stopped (Linux's BACK_RING_ATTACH): what it has
        // answered it has consumed.
        _consumer = _responses = _published = Volatile.Read(ref _indexes->ResponseProducer);
    }

    /// <summary>Slots of the ring, a power of two.</summary>
    public uint Size { get; }

    /// <summary>Index of the next request.</summary>
    public uint Consumer => _consumer;

    /// <summary>How many requests there are.</summary>
    /// <returns>False if the guest says that there are more than the ring has slots.</returns>
    public bool TryCount(out uint available)
    {
        // Acquire: the slots are read after the index that announces them.
        available = Volatile.Read(ref _indexes->RequestProducer) - _consumer;
        return available <= Size;
    }

    /// <summary>Copies a request, or what else is in its slot.</summary>
    public T Peek<T>(uint index)
        where T : unmanaged
        => Unsafe.ReadUnaligned<T>(Slot(index));

    /// <summary>Copies a request.</summary>
    public TRequest Peek(uint index) => Peek<TRequest>(index);

    /// <summary>Takes requests out; they are to be answered in their slots, in that order.</summary>
    public void Consume(uint count) => _consumer += count;

    /// <summary>Puts the next response, in the slot of the request that it answers. Nobody sees it before <see cref="Publish"/>.</summary>
    public void Respond<T>(in T response)
        where T : unmanaged
        => Unsafe.WriteUnaligned(Slot(_responses++), response);

    /// <summary>Shows the responses to the guest (RING_PUSH_RESPONSES_AND_CHECK_NOTIFY).</summary>
    /// <returns>Whether it wants to be told.</returns>
    public bool Publish()
    {
        uint old = _published;
        if (old == _responses)
            return false;
        _published = _responses;

        // Release, and then a full barrier: the guest sets the event before it looks at the index for the last time.
        Volatile.Write(ref _indexes->ResponseProducer, _responses);
        Interlocked.MemoryBarrier();
        return _responses - Volatile.Read(ref _indexes->ResponseEvent) < _responses - old;
    }

    /// <summary>Asks to be told when there are more requests than were counted (RING_FINAL_CHECK_FOR_REQUESTS).</summary>
    /// <param name="counted">How many there were.</param>
    /// <returns>Whether there are more by now, so that nobody may have told.</returns>
    public bool RequestEvent(uint counted)
    {
        uint expected = _consumer + counted;
        Volatile.Write(ref _indexes->RequestEvent, expected + 1);
        Interlocked.MemoryBarrier();
        return Volatile.Read(ref _indexes->RequestProducer) != expected;
    }

    /// <summary>Where a slot is: within the page, whatever the guest makes of the indexes.</summary>
    private byte* Slot(uint index) => _slots + ((index & (Size - 1)) * (uint)_slotSize);
}
