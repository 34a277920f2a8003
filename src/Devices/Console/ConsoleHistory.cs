// The last bytes that a console has printed, found again by how many were printed before them.

namespace XenSharp.Devices.Console;

/// <summary>
/// A byte ring that forgets its oldest bytes. Positions count from the console's first byte on and never start over. Not for
/// several threads at a time.
/// </summary>
/// <remarks>The ring grows with what is in it, so that a quiet console costs little.</remarks>
/// <param name="capacity">Bytes to keep at most; at least 1.</param>
internal sealed class ConsoleHistory(int capacity)
{
    private const int FirstSize = 4096;

    private byte[] _ring = [];

    /// <summary>Bytes kept at most.</summary>
    internal int Capacity => capacity;

    /// <summary>Position of the oldest byte kept.</summary>
    internal long Start { get; private set; }

    /// <summary>Position behind the newest byte: how many were printed in all.</summary>
    internal long End { get; private set; }

    /// <summary>Adds bytes; of more than fit, the last ones are kept.</summary>
    internal void Append(ReadOnlySpan<byte> bytes)
    {
        if (bytes.IsEmpty)
            return;
        long end = End + bytes.Length;
        Grow((int)Math.Min(capacity, end - Start));
        if (bytes.Length > _ring.Length)
            bytes = bytes[^_ring.Length..];
        Start = Math.Max(Start, end - _ring.Length);

        Place(end - bytes.Length, bytes);
        End = end;
    }

    /// <summary>Copies what follows a position, as much as there is and fits.</summary>
    /// <param name="position">From <see cref="Start"/> to <see cref="End"/>.</param>
    /// <param name="destination">Where the bytes go.</param>
    /// <returns>The number of bytes copied.</returns>
    internal int CopyTo(long position, Span<byte> destination)
    {
        int count = (int)Math.Min(End - position, destination.Length);
        if (count == 0)
            return 0;
        int at = Offset(position);
        int first = Math.Min(count, _ring.Length - at);
        _ring.AsSpan(at, first).CopyTo(destination);
        _ring.AsSpan(0, count - first).CopyTo(destination[first..]);
        return count;
    }

    private int Offset(long position) => (int)(position % _ring.Length);

    private void Grow(int needed)
    {
        if (needed <= _ring.Length)
            return;
        long size = Math.Max(_ring.Length, FirstSize);
        while (size < needed)
            size *= 2;
        byte[] kept = new byte[End - Start];
        _ = CopyTo(Start, kept);

        // A byte's place depends on the ring's length.
        _ring = new byte[Math.Min(size, capacity)];
        Place(Start, kept);
    }

    private void Place(long position, ReadOnlySpan<byte> bytes)
    {
        int at = Offset(position);
        int first = Math.Min(bytes.Length, _ring.Length - at);
        bytes[..first].CopyTo(_ring.AsSpan(at));
        bytes[first..].CopyTo(_ring);
    }
}
