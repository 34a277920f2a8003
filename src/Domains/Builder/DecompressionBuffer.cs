// Where a decompressor puts its output: a byte array that grows with the data it really gets, up to a limit.

namespace XenSharp.Domains.Builder;

/// <summary>
/// Growing output of a decompressor. Memory follows the bytes that were produced (at most doubled), never a size that the
/// compressed file merely claims, and passing the limit is an error.
/// </summary>
internal sealed class DecompressionBuffer
{
    private const int SmallestStep = 64 * 1024;

    private readonly int _limit;
    private byte[] _bytes;

    /// <param name="limit">Most bytes that may come out.</param>
    /// <param name="likelySize">A guess at the outcome, to spare copies.</param>
    /// <param name="compressedSize">Bytes there are to decompress; they bound how far the guess is believed.</param>
    public DecompressionBuffer(int limit, long likelySize, int compressedSize)
    {
        // Kernels shrink to a fifth or an eighth; a guess of up to 16 times costs nothing that an honest file would not take.
        long believable = Math.Max(SmallestStep, compressedSize * 16L);
        _limit = limit;
        _bytes = new byte[(int)Math.Min(Math.Min(likelySize, believable), limit)];
    }

    /// <summary>Most bytes that may ever be produced.</summary>
    public int Limit => _limit;

    /// <summary>How many bytes may still be produced.</summary>
    public int Remaining => _limit - Length;

    /// <summary>Bytes there is memory for now.</summary>
    public int Capacity => _bytes.Length;

    /// <summary>Bytes produced so far.</summary>
    public int Length { get; private set; }

    /// <summary>Everything produced so far.</summary>
    public Memory<byte> Written => _bytes.AsMemory(0, Length);

    /// <summary>Room for exactly <paramref name="count"/> bytes behind what was produced; call <see cref="Advance"/> once filled.</summary>
    /// <exception cref="KernelImageException">The limit would be passed.</exception>
    public Span<byte> Reserve(int count)
    {
        if (count > _limit - Length)
            throw TooLarge(_limit);
        if (count > _bytes.Length - Length)
            Grow(Length + count);
        return _bytes.AsSpan(Length, count);
    }

    /// <summary>Counts bytes that were put into the room of <see cref="Reserve"/>.</summary>
    public void Advance(int count) => Length += count;

    /// <summary>Takes everything a decompressing stream gives.</summary>
    /// <exception cref="KernelImageException">The stream gives more than the limit.</exception>
    public void ReadAll(Stream stream)
    {
        // The overload with an array: Stream's own Read(Span) rents a second buffer as large as the span.
        byte[] beyond = new byte[1];
        while (true)
        {
            if (Length == _bytes.Length)
            {
                // Full: only a byte that really comes is a reason to grow.
                if (stream.Read(beyond, 0, 1) == 0)
                    return;
                Reserve(1)[0] = beyond[0];
                Advance(1);
                continue;
            }

            int count = stream.Read(_bytes, Length, _bytes.Length - Length);
            if (count == 0)
                return;
            Advance(count);
        }
    }

    public static KernelImageException TooLarge(int limit) => new(
        $"The kernel unpacks to more than the {Printable.Size((ulong)limit)} allowed for it; the file is damaged or not a kernel, "
        + "so get it anew.");

    private void Grow(int needed)
    {
        long size = Math.Max(needed, Math.Max(SmallestStep, _bytes.Length * 2L));
        Array.Resize(ref _bytes, (int)Math.Min(size, _limit));
    }
}
