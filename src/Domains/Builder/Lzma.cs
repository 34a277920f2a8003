// LZMA and LZMA2 by way of SharpCompress, with the dictionary held to what the data can need.

using System.Buffers.Binary;
using SharpCompress.Compressors.LZMA;

namespace XenSharp.Domains.Builder;

/// <summary>
/// The two LZMA formats of kernels: raw LZMA2 (inside xz) and the legacy .lzma file ("LZMA alone"). SharpCompress allocates the
/// dictionary a header asks for, up to 4 GiB; a dictionary larger than the output is never used, so it is cut to that here.
/// </summary>
internal static class Lzma
{
    private const int AloneHeaderSize = 13;
    private const int SmallestDictionary = 4096;

    // The shortest code LZMA has is 14 bits that cost 0.022 bits each, for 273 bytes: no file unpacks to more than this many times
    // its size.
    private const long LargestRatio = 8192;

    /// <summary>Decodes one LZMA2 chunk sequence at the start of <paramref name="data"/>.</summary>
    /// <param name="data">Starts with the first chunk; what follows the end marker is left alone.</param>
    /// <param name="dictionarySizeCode">The filter's one property byte.</param>
    /// <param name="output">Where the bytes go.</param>
    /// <returns>The length of the chunk sequence in bytes, its end marker included.</returns>
    public static int DecodeLzma2(ReadOnlyMemory<byte> data, byte dictionarySizeCode, DecompressionBuffer output)
    {
        (int compressedSize, long uncompressedSize) = MeasureChunks(data.Span);
        // Codes 38 to 40 ask for 2 GiB and more; with the output bounded, 37 is as good. Above 40 the format says nothing.
        if (dictionarySizeCode > 40)
            throw KernelDecompressor.Damaged("xz", "the dictionary size is out of range");
        int code = 0;
        while (code < Math.Min(dictionarySizeCode, (byte)37) && DictionarySize(code) < DictionaryNeeded(uncompressedSize, compressedSize))
            code++;

        using LzmaStream stream = LzmaStream.Create(
            [(byte)code], KernelDecompressor.Open(data[..compressedSize]), -1, -1, null, isLzma2: true);
        int start = output.Length;
        output.ReadAll(stream);
        if (output.Length - start != uncompressedSize)
            throw KernelDecompressor.Damaged("xz", "a chunk unpacks to another size than it says");
        return compressedSize;
    }

    /// <summary>Decodes a whole .lzma file: properties, dictionary size, uncompressed size (or -1), range-coded data.</summary>
    public static void DecodeAlone(ReadOnlyMemory<byte> file, DecompressionBuffer output)
    {
        if (file.Length < AloneHeaderSize)
            throw KernelDecompressor.CutShort("lzma");
        byte[] properties = file.Span[..5].ToArray();
        long uncompressedSize = BinaryPrimitives.ReadInt64LittleEndian(file.Span[5..]);
        uint dictionary = BinaryPrimitives.ReadUInt32LittleEndian(properties.AsSpan(1));
        long needed = DictionaryNeeded(uncompressedSize < 0 ? long.MaxValue : uncompressedSize, file.Length);
        BinaryPrimitives.WriteUInt32LittleEndian(
            properties.AsSpan(1), (uint)Math.Min(Math.Max(dictionary, SmallestDictionary), Math.Min(needed, int.MaxValue)));

        int start = output.Length;
        ReadOnlyMemory<byte> data = file[AloneHeaderSize..];
        using LzmaStream stream = LzmaStream.Create(
            properties, KernelDecompressor.Open(data), data.Length, uncompressedSize < 0 ? -1 : uncompressedSize, null, isLzma2: false);
        output.ReadAll(stream);
        if (uncompressedSize >= 0 && output.Length - start != uncompressedSize)
            throw KernelDecompressor.CutShort("lzma");
    }

    private static long DictionaryNeeded(long uncompressedSize, int compressedSize) =>
        Math.Max(SmallestDictionary, Math.Min(uncompressedSize, compressedSize * LargestRatio));

    private static long DictionarySize(int code) => (2L | (code & 1L)) << (code / 2 + 11);

    /// <summary>Walks the chunk headers: how long the sequence is, and what it says it unpacks to.</summary>
    private static (int CompressedSize, long UncompressedSize) MeasureChunks(ReadOnlySpan<byte> data)
    {
        int position = 0;
        long uncompressedSize = 0;
        while (true)
        {
            if (position >= data.Length)
                throw KernelDecompressor.CutShort("xz");
            byte control = data[position];
            if (control == 0)
                return (position + 1, uncompressedSize);

            // 1, 2: stored, two bytes of size. 80 and above: LZMA, 21 bits of unpacked size, 16 of packed size, and from C0 a
            // byte of properties.
            if (control is > 2 and < 0x80)
                throw KernelDecompressor.Damaged("xz", "a chunk has an unknown kind");
            bool stored = control < 0x80;
            int headerSize = stored ? 3 : control >= 0xC0 ? 6 : 5;
            if (data.Length - position < headerSize)
                throw KernelDecompressor.CutShort("xz");
            int low = BinaryPrimitives.ReadUInt16BigEndian(data[(position + 1)..]) + 1;
            uncompressedSize += stored ? low : low + ((control & 0x1F) << 16);
            int size = headerSize + (stored ? low : BinaryPrimitives.ReadUInt16BigEndian(data[(position + 3)..]) + 1);
            if (data.Length - position < size)
                throw KernelDecompressor.CutShort("xz");
            position += size;
        }
    }
}
