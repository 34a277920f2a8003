// The .xz container (The .xz File Format, version 1.1): headers, filter chain, checks, index. LZMA2 itself is SharpCompress'.

using System.Buffers.Binary;
using System.Security.Cryptography;

namespace XenSharp.Domains.Builder;

/// <summary>
/// Decodes .xz data as the kernel's build makes it (x86 branch filter and LZMA2, CRC32) and as the xz tool does by default
/// (LZMA2 alone, CRC64). Every checksum in the file is verified. SharpCompress' own container reader is not used: its branch
/// filter spoils real kernels, and it takes as much memory for the dictionary as the header asks for.
/// </summary>
internal static class XzDecoder
{
    private const int StreamHeaderSize = 12;
    private const byte IndexIndicator = 0;
    private const ulong FilterX86 = 0x04;
    private const ulong FilterLzma2 = 0x21;

    private static ReadOnlySpan<byte> HeaderMagic => [0xFD, (byte)'7', (byte)'z', (byte)'X', (byte)'Z', 0];

    private static ReadOnlySpan<byte> FooterMagic => "YZ"u8;

    /// <summary>What a block's header says about how it was made.</summary>
    private readonly record struct BlockHeader(int Size, byte DictionarySizeCode, uint? BranchFilterStart);

    /// <summary>Decodes all streams of <paramref name="file"/> into <paramref name="output"/>.</summary>
    public static void Decode(ReadOnlyMemory<byte> file, DecompressionBuffer output)
    {
        int position = 0;
        do
        {
            position += DecodeStream(file[position..], output);
            // Between and after streams there may be padding, four zero bytes at a time.
            while (file.Length - position >= 4 && file.Span.Slice(position, 4).IndexOfAnyExcept((byte)0) < 0)
                position += 4;
        }
        while (position < file.Length);
    }

    private static int DecodeStream(ReadOnlyMemory<byte> stream, DecompressionBuffer output)
    {
        ReadOnlySpan<byte> bytes = stream.Span;
        if (bytes.Length < StreamHeaderSize)
            throw CutShort();
        if (!bytes.StartsWith(HeaderMagic))
            throw Damaged("bytes that are not xz data follow the compressed stream");
        ReadOnlySpan<byte> flags = bytes.Slice(6, 2);
        RequireCrc32(flags, bytes[8..], "stream header");
        int checkSize = CheckSize(flags);

        List<(ulong Unpadded, ulong Uncompressed)> blocks = [];
        int position = StreamHeaderSize;
        while (true)
        {
            if (position >= bytes.Length)
                throw CutShort();
            if (bytes[position] == IndexIndicator)
                break;
            BlockHeader header = ReadBlockHeader(bytes[position..]);
            int start = output.Length;
            int compressedSize = Lzma.DecodeLzma2(stream[(position + header.Size)..], header.DictionarySizeCode, output);
            Span<byte> decoded = output.Written.Span[start..];
            if (header.BranchFilterStart is { } offset)
                X86BranchFilter.Decode(decoded, offset);

            int unpadded = header.Size + compressedSize;
            int padded = (unpadded + 3) & ~3;
            if (bytes.Length - position < padded + checkSize)
                throw CutShort();
            VerifyCheck(flags[1], decoded, bytes.Slice(position + padded, checkSize));
            blocks.Add(((ulong)(unpadded + checkSize), (ulong)decoded.Length));
            position += padded + checkSize;
        }

        int indexSize = VerifyIndex(bytes[position..], blocks);
        position += indexSize;
        VerifyFooter(bytes[position..], flags, indexSize);
        return position + StreamHeaderSize;
    }

    private static int CheckSize(ReadOnlySpan<byte> flags) => flags[0] != 0
        ? throw Unsupported($"stream flags {flags[0]:x2}{flags[1]:x2}")
        : flags[1] switch
        {
            0x00 => 0,
            0x01 => 4,
            0x04 => 8,
            0x0A => 32,
            _ => throw Unsupported($"check type {flags[1]:x2}"),
        };

    private static void VerifyCheck(byte type, ReadOnlySpan<byte> data, ReadOnlySpan<byte> expected)
    {
        bool matches = type switch
        {
            0x01 => BinaryPrimitives.ReadUInt32LittleEndian(expected) == ReflectedCrc.Crc32.Compute(data),
            0x04 => BinaryPrimitives.ReadUInt64LittleEndian(expected) == ReflectedCrc.Crc64.Compute(data),
            0x0A => expected.SequenceEqual(SHA256.HashData(data)),
            _ => true,
        };
        if (!matches)
            throw Damaged("the unpacked bytes do not match their checksum");
    }

    private static BlockHeader ReadBlockHeader(ReadOnlySpan<byte> bytes)
    {
        int size = (bytes[0] + 1) * 4;
        if (bytes.Length < size)
            throw CutShort();
        ReadOnlySpan<byte> header = bytes[..(size - 4)];
        RequireCrc32(header, bytes[(size - 4)..], "block header");

        byte blockFlags = header[1];
        if ((blockFlags & 0x3C) != 0)
            throw Unsupported($"block flags {blockFlags:x2}");
        int position = 2;
        // The sizes are optional; the index at the end has them again, and is checked against what was found.
        if ((blockFlags & 0x40) != 0)
            ReadInteger(header, ref position);
        if ((blockFlags & 0x80) != 0)
            ReadInteger(header, ref position);

        int filterCount = (blockFlags & 3) + 1;
        uint? branchFilterStart = null;
        for (int index = 0; index < filterCount; index++)
        {
            ulong id = ReadInteger(header, ref position);
            ulong propertiesSize = ReadInteger(header, ref position);
            if (propertiesSize > (ulong)(header.Length - position))
                throw Damaged("a filter's properties do not fit the block header");
            ReadOnlySpan<byte> properties = header.Slice(position, (int)propertiesSize);
            position += (int)propertiesSize;

            bool isLast = index == filterCount - 1;
            if (id == FilterLzma2 && isLast && properties.Length == 1)
                return new BlockHeader(size, properties[0], branchFilterStart);
            if (id == FilterX86 && !isLast && branchFilterStart is null && properties.Length is 0 or 4)
                branchFilterStart = properties.Length == 4 ? BinaryPrimitives.ReadUInt32LittleEndian(properties) : 0;
            else
                throw Unsupported($"filter {id:x} as number {index + 1} of {filterCount}");
        }

        throw Unsupported("a filter chain without LZMA2");
    }

    private static int VerifyIndex(ReadOnlySpan<byte> bytes, List<(ulong Unpadded, ulong Uncompressed)> blocks)
    {
        int position = 1;
        if (ReadInteger(bytes, ref position) != (ulong)blocks.Count)
            throw Damaged("the index does not list the blocks that are there");
        foreach ((ulong unpadded, ulong uncompressed) in blocks)
            if (ReadInteger(bytes, ref position) != unpadded || ReadInteger(bytes, ref position) != uncompressed)
                throw Damaged("the index does not list the blocks that are there");

        while (position % 4 != 0)
        {
            if (position >= bytes.Length)
                throw CutShort();
            if (bytes[position++] != 0)
                throw Damaged("the padding of the index is not zero");
        }

        if (bytes.Length - position < 4)
            throw CutShort();
        RequireCrc32(bytes[..position], bytes[position..], "index");
        return position + 4;
    }

    private static void VerifyFooter(ReadOnlySpan<byte> footer, ReadOnlySpan<byte> flags, int indexSize)
    {
        if (footer.Length < StreamHeaderSize)
            throw CutShort();
        RequireCrc32(footer.Slice(4, 6), footer, "stream footer");
        ulong backwardSize = ((ulong)BinaryPrimitives.ReadUInt32LittleEndian(footer[4..]) + 1) * 4;
        if (backwardSize != (ulong)indexSize || !footer.Slice(8, 2).SequenceEqual(flags)
            || !footer.Slice(10, 2).SequenceEqual(FooterMagic))
            throw Damaged("the stream footer does not match the stream");
    }

    /// <summary>A variable-length integer: seven bits a byte, low bits first, at most nine bytes.</summary>
    private static ulong ReadInteger(ReadOnlySpan<byte> bytes, ref int position)
    {
        ulong value = 0;
        for (int shift = 0; shift < 63; shift += 7)
        {
            if (position >= bytes.Length)
                throw CutShort();
            byte next = bytes[position++];
            value |= (ulong)(next & 0x7F) << shift;
            if ((next & 0x80) == 0)
                return value;
        }

        throw Damaged("a number in a header is longer than the format allows");
    }

    private static void RequireCrc32(ReadOnlySpan<byte> data, ReadOnlySpan<byte> stored, string what)
    {
        if (BinaryPrimitives.ReadUInt32LittleEndian(stored) != ReflectedCrc.Crc32.Compute(data))
            throw Damaged($"the checksum of the {what} is wrong");
    }

    private static KernelImageException CutShort() => KernelDecompressor.CutShort("xz");

    private static KernelImageException Damaged(string detail) => KernelDecompressor.Damaged("xz", detail);

    private static KernelImageException Unsupported(string detail) => new(
        $"The kernel's xz data uses {detail}, which this program cannot read; "
        + "compress the kernel with the kernel build's own settings (x86 filter and LZMA2), or give it uncompressed.");
}
