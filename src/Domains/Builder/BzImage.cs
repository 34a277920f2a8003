// The Linux x86 boot protocol, as far as it takes to find the compressed kernel in a bzImage.

using System.Buffers.Binary;

namespace XenSharp.Domains.Builder;

/// <summary>
/// A bzImage is a real-mode boot sector and setup code, then a protected-mode decompressor with the compressed vmlinux inside.
/// A PV domain starts at none of those: only the vmlinux matters. Offsets are those of the boot protocol's documentation
/// (Documentation/x86/boot.rst in the kernel).
/// </summary>
internal static class BzImage
{
    private const int SetupSectorsOffset = 0x1F1;
    private const int MagicOffset = 0x202;
    private const int VersionOffset = 0x206;
    private const int PayloadOffsetOffset = 0x248;
    private const int PayloadLengthOffset = 0x24C;
    private const int InitSizeOffset = 0x260;
    private const int SmallestHeader = 0x250;
    private const int VersionWithPayload = 0x208;
    private const int VersionWithInitSize = 0x20A;
    private const int SectorSize = 512;
    private const int DefaultSetupSectors = 4;

    public static bool IsBzImage(ReadOnlySpan<byte> file) =>
        file.Length >= MagicOffset + 4 && file.Slice(MagicOffset, 4).SequenceEqual("HdrS"u8);

    /// <summary>The ELF kernel inside, unpacked.</summary>
    /// <param name="file">A file for which <see cref="IsBzImage"/> holds.</param>
    /// <param name="limit">Most bytes the kernel may unpack to.</param>
    /// <param name="compression">How it was compressed.</param>
    /// <exception cref="KernelImageException">The headers or the compressed kernel are not usable.</exception>
    public static ReadOnlyMemory<byte> Unpack(ReadOnlyMemory<byte> file, int limit, out KernelCompression compression)
    {
        ReadOnlyMemory<byte> payload = FindPayload(file, ref limit);
        if (payload.Span.StartsWith(ElfFile.Magic))
        {
            compression = KernelCompression.None;
            return payload;
        }

        compression = KernelDecompressor.Identify(payload.Span) ?? throw new KernelImageException(
            $"The kernel inside this bzImage is compressed in a way that this program does not know (it starts with "
            + $"{Convert.ToHexString(payload.Span[..Math.Min(8, payload.Length)])}); rebuild it with one of the modes gzip, bzip2, "
            + "lzma, xz, lzo, lz4 or zstd.");
        if (payload.Length < 4)
            throw KernelDecompressor.CutShort(KernelDecompressor.Name(compression));

        // The kernel's build ends each payload with the unpacked size as 32 bits: it appends it to all formats but gzip, which
        // has it there by itself.
        uint size = BinaryPrimitives.ReadUInt32LittleEndian(payload.Span[^4..]);
        ReadOnlyMemory<byte> data = compression == KernelCompression.Gzip ? payload : payload[..^4];
        ReadOnlyMemory<byte> kernel = KernelDecompressor.Decompress(compression, data, limit, size);
        return (uint)kernel.Length == size
            ? kernel
            : throw KernelDecompressor.Damaged(
                KernelDecompressor.Name(compression), $"it unpacks to {kernel.Length} bytes, not the {size} recorded behind it");
    }

    private static ReadOnlyMemory<byte> FindPayload(ReadOnlyMemory<byte> file, ref int limit)
    {
        ReadOnlySpan<byte> header = file.Span;
        if (header.Length < VersionOffset + 2)
            throw CutShort();
        int version = BinaryPrimitives.ReadUInt16LittleEndian(header[VersionOffset..]);
        if (version < VersionWithPayload)
            throw new KernelImageException(
                $"This bzImage speaks boot protocol {version >> 8}.{version & 0xFF:D2}, which does not say where the kernel inside "
                + "begins (2.08, Linux 2.6.26, is the first that does); give the uncompressed vmlinux of the same build instead.");
        if (header.Length < SmallestHeader)
            throw CutShort();

        if (version >= VersionWithInitSize && header.Length >= InitSizeOffset + 4)
        {
            // The memory that the decompressor needs, output included. Zero would not boot anywhere; take it as "not given".
            uint initSize = BinaryPrimitives.ReadUInt32LittleEndian(header[InitSizeOffset..]);
            if (initSize != 0)
                limit = (int)Math.Min((uint)limit, initSize);
        }

        int setupSectors = header[SetupSectorsOffset] == 0 ? DefaultSetupSectors : header[SetupSectorsOffset];
        ulong offset = (ulong)(setupSectors + 1) * SectorSize + BinaryPrimitives.ReadUInt32LittleEndian(header[PayloadOffsetOffset..]);
        uint length = BinaryPrimitives.ReadUInt32LittleEndian(header[PayloadLengthOffset..]);
        if (length == 0)
            throw new KernelImageException(
                "This bzImage has no kernel inside (its payload length is 0); give the file that the kernel's build made.");
        if (offset + length > (ulong)header.Length)
            throw CutShort();
        return file.Slice((int)offset, (int)length);
    }

    private static KernelImageException CutShort() => new(
        "The bzImage ends before the kernel that its header announces: the file was cut short, so copy or download it again.");
}
