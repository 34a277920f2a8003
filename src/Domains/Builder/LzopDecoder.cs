// The container that the lzop tool puts around LZO blocks, which CONFIG_KERNEL_LZO uses unchanged.

using System.Buffers.Binary;

namespace XenSharp.Domains.Builder;

/// <summary>Decodes an lzop file: header, then blocks of up to 64 MiB with their checksums, all numbers big-endian.</summary>
internal static class LzopDecoder
{
    private const uint FlagAdler32OfData = 0x0001;
    private const uint FlagAdler32OfCompressed = 0x0002;
    private const uint FlagExtraField = 0x0040;
    private const uint FlagCrc32OfData = 0x0100;
    private const uint FlagCrc32OfCompressed = 0x0200;
    private const uint FlagFilter = 0x0800;
    private const uint FlagHeaderCrc32 = 0x1000;
    private const int VersionWithLevel = 0x0940;
    private const int LargestBlock = 64 * 1024 * 1024;

    // A length grows by at most 255 per input byte, and what precedes it in an instruction is small.
    private const long LargestRatio = 256;

    public static ReadOnlySpan<byte> Magic => [0x89, (byte)'L', (byte)'Z', (byte)'O', 0x00, 0x0D, 0x0A, 0x1A, 0x0A];

    public static void Decode(ReadOnlySpan<byte> file, DecompressionBuffer output)
    {
        Reader reader = new(file);
        uint flags = ReadHeader(ref reader);
        while (true)
        {
            uint size = reader.UInt32();
            if (size == 0)
                return;
            uint compressedSize = reader.UInt32();
            if (size > LargestBlock || compressedSize == 0 || compressedSize > size || size > compressedSize * LargestRatio)
                throw Damaged("a block has impossible sizes");

            uint? dataAdler = (flags & FlagAdler32OfData) != 0 ? reader.UInt32() : null;
            uint? dataCrc = (flags & FlagCrc32OfData) != 0 ? reader.UInt32() : null;
            // A block that did not shrink is stored, and then has no second pair of checksums.
            bool stored = compressedSize == size;
            uint? compressedAdler = (flags & FlagAdler32OfCompressed) != 0 && !stored ? reader.UInt32() : null;
            uint? compressedCrc = (flags & FlagCrc32OfCompressed) != 0 && !stored ? reader.UInt32() : null;

            ReadOnlySpan<byte> compressed = reader.Bytes(compressedSize);
            Verify(compressed, compressedAdler, compressedCrc);
            Span<byte> data = output.Reserve((int)size);
            if (stored)
                compressed.CopyTo(data);
            else if (!Lzo1xDecoder.TryDecode(compressed, data))
                throw Damaged("a block does not unpack");
            Verify(data, dataAdler, dataCrc);
            output.Advance((int)size);
        }
    }

    private static uint ReadHeader(ref Reader reader)
    {
        reader.Bytes((uint)Magic.Length);
        int start = reader.Position;
        int version = reader.UInt16();
        reader.UInt16(); // version of the LZO library
        if (version >= VersionWithLevel)
            reader.UInt16(); // version needed to extract
        int method = reader.Byte();
        if (method is < 1 or > 3)
            throw Damaged($"it uses the unknown method {method}");
        if (version >= VersionWithLevel)
            reader.Byte(); // level
        uint flags = reader.UInt32();
        if ((flags & FlagFilter) != 0)
            throw Damaged("it uses a filter, which no kernel build does");
        reader.UInt32(); // file mode
        reader.UInt32(); // time, low half
        if (version >= VersionWithLevel)
            reader.UInt32(); // time, high half
        reader.Bytes((uint)reader.Byte()); // file name

        ReadOnlySpan<byte> header = reader.Since(start);
        uint actual = (flags & FlagHeaderCrc32) != 0 ? (uint)ReflectedCrc.Crc32.Compute(header) : Adler32(header);
        if (reader.UInt32() != actual)
            throw Damaged("the checksum of the header is wrong");
        if ((flags & FlagExtraField) != 0)
        {
            reader.Bytes(reader.UInt32());
            reader.UInt32(); // its checksum
        }

        return flags;
    }

    private static void Verify(ReadOnlySpan<byte> data, uint? adler, uint? crc)
    {
        if ((adler is { } expectedAdler && Adler32(data) != expectedAdler)
            || (crc is { } expectedCrc && (uint)ReflectedCrc.Crc32.Compute(data) != expectedCrc))
            throw Damaged("the bytes of a block do not match their checksum");
    }

    /// <summary>Adler-32 as RFC 1950 has it.</summary>
    private static uint Adler32(ReadOnlySpan<byte> data)
    {
        const uint Modulus = 65521;
        const int LongestRun = 5552; // so many bytes cannot overflow the sums between two reductions
        uint low = 1;
        uint high = 0;
        while (!data.IsEmpty)
        {
            int run = Math.Min(LongestRun, data.Length);
            foreach (byte value in data[..run])
            {
                low += value;
                high += low;
            }

            low %= Modulus;
            high %= Modulus;
            data = data[run..];
        }

        return (high << 16) | low;
    }

    private static KernelImageException Damaged(string detail) => KernelDecompressor.Damaged("lzo", detail);

    /// <summary>Reads big-endian numbers; running off the end is the error for a cut file.</summary>
    private ref struct Reader(ReadOnlySpan<byte> file)
    {
        private readonly ReadOnlySpan<byte> _file = file;

        public int Position { get; private set; }

        public int Byte() => Bytes(1)[0];

        public int UInt16() => BinaryPrimitives.ReadUInt16BigEndian(Bytes(2));

        public uint UInt32() => BinaryPrimitives.ReadUInt32BigEndian(Bytes(4));

        public ReadOnlySpan<byte> Bytes(uint count)
        {
            if (count > (uint)(_file.Length - Position))
                throw KernelDecompressor.CutShort("lzo");
            ReadOnlySpan<byte> bytes = _file.Slice(Position, (int)count);
            Position += (int)count;
            return bytes;
        }

        public readonly ReadOnlySpan<byte> Since(int start) => _file[start..Position];
    }
}
