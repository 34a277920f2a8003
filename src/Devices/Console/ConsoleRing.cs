// The shared page of a PV console: struct xencons_interface of xen/include/public/io/console.h, seen from the backend.

using System.Diagnostics;

namespace XenSharp.Devices.Console;

/// <summary>
/// The backend's view of the console page: two byte rings and their four free-running 32-bit indexes.
/// </summary>
/// <remarks>
/// <para>Layout (bytes from the start of the page): <c>in[1024]</c> at 0, <c>out[2048]</c> at 1024, then <c>in_cons</c>,
/// <c>in_prod</c>, <c>out_cons</c>, <c>out_prod</c>, each a uint32. "In" and "out" are the guest's: what it prints goes to
/// <c>out</c>. An index is masked only when it is used, so <c>prod - cons</c> is the number of bytes in the ring, also
/// across the wrap at 2^32.</para>
/// <para>The guest can write all of the page at any moment. Each index is therefore read once per operation, and no value
/// of it leads outside the page: the mask keeps every access within its ring. Indexes further apart than the ring is long
/// mean nothing; as Xen's console daemon does, the operation then moves no byte and touches no index. Because both indexes
/// are taken from the page afresh each time, everything is in order again as soon as the guest has put them right.</para>
/// </remarks>
internal readonly unsafe struct ConsoleRing
{
    internal const int PageSize = 4096;
    internal const int InputSize = 1024;
    internal const int OutputSize = 2048;

    private const int OutputOffset = InputSize;
    private const int IndexOffset = InputSize + OutputSize;

    private readonly byte* _page;

    internal ConsoleRing(byte* page)
    {
        ArgumentNullException.ThrowIfNull(page);
        if ((nuint)page % sizeof(uint) != 0)
            throw new ArgumentException("The console page must be aligned to 4 bytes; pass the start of the guest's page.", nameof(page));
        _page = page;
    }

    private ref uint InputConsumer => ref ((uint*)(_page + IndexOffset))[0];
    private ref uint InputProducer => ref ((uint*)(_page + IndexOffset))[1];
    private ref uint OutputConsumer => ref ((uint*)(_page + IndexOffset))[2];
    private ref uint OutputProducer => ref ((uint*)(_page + IndexOffset))[3];

    /// <summary>Copies all that the guest has printed, without consuming it.</summary>
    /// <param name="destination">At least <see cref="OutputSize"/> bytes.</param>
    /// <param name="consumer">The index of the first copied byte, for <see cref="ConsumeOutput"/>.</param>
    /// <returns>The number of bytes copied; 0 if the ring is empty, or if its indexes make no sense.</returns>
    internal int PeekOutput(Span<byte> destination, out uint consumer)
    {
        Debug.Assert(destination.Length >= OutputSize);
        consumer = Volatile.Read(ref OutputConsumer);

        // Acquire: the bytes are read after the index that announces them.
        uint available = Volatile.Read(ref OutputProducer) - consumer;
        if (available is 0 or > OutputSize)
            return 0;

        CopyFrom(_page + OutputOffset, OutputSize, consumer, destination[..(int)available]);
        return (int)available;
    }

    /// <summary>Gives the guest back the room of <paramref name="count"/> bytes that begin at <paramref name="consumer"/>.</summary>
    internal void ConsumeOutput(uint consumer, int count)
    {
        // Release: the bytes have been read before the guest may overwrite them. The full barrier after it is for guests that
        // notify only if they see the ring empty: the next look at out_prod must not be taken before this store is visible.
        Volatile.Write(ref OutputConsumer, consumer + (uint)count);
        Interlocked.MemoryBarrier();
    }

    /// <summary>Puts as much of <paramref name="source"/> into the guest's input as there is room for.</summary>
    /// <returns>The number of bytes placed; 0 if the ring is full, or if its indexes make no sense.</returns>
    internal int PutInput(ReadOnlySpan<byte> source)
    {
        uint producer = Volatile.Read(ref InputProducer);
        uint used = producer - Volatile.Read(ref InputConsumer);
        if (used > InputSize)
            return 0;

        int count = Math.Min(source.Length, InputSize - (int)used);
        if (count == 0)
            return 0;

        CopyTo(source[..count], _page, InputSize, producer);
        Volatile.Write(ref InputProducer, producer + (uint)count);
        Interlocked.MemoryBarrier();
        return count;
    }

    private static void CopyFrom(byte* ring, uint size, uint index, Span<byte> destination)
    {
        int start = (int)(index & (size - 1));
        int first = Math.Min(destination.Length, (int)size - start);
        new ReadOnlySpan<byte>(ring + start, first).CopyTo(destination);
        new ReadOnlySpan<byte>(ring, destination.Length - first).CopyTo(destination[first..]);
    }

    private static void CopyTo(ReadOnlySpan<byte> source, byte* ring, uint size, uint index)
    {
        int start = (int)(index & (size - 1));
        int first = Math.Min(source.Length, (int)size - start);
        source[..first].CopyTo(new Span<byte>(ring + start, first));
        source[first..].CopyTo(new Span<byte>(ring, source.Length - first));
    }
}
