// The symbol table that BSD kernels want behind their image (note BSD_SYMTAB).

using System.Buffers.Binary;

namespace XenSharp.Domains.Builder;

/// <summary>
/// Lays out what a kernel with BSD_SYMTAB finds right behind its last segment, 8-byte aligned: a 32-bit size, then an ELF header
/// with three section headers (none, symbol table, string table) and those two sections. Offsets in it count from the ELF header,
/// and so does the size.
/// </summary>
internal static class KernelSymbolTable
{
    private const int SizeField = 4;
    private const int SectionCount = 3;
    private const int FixedSize = SizeField + ElfFile.HeaderSize + SectionCount * ElfFile.SectionHeaderSize;

    /// <summary>The bytes to load, a multiple of 8, or null if the kernel was stripped of its symbols (it is started without).</summary>
    /// <exception cref="KernelImageException">The symbols are not in the file.</exception>
    public static byte[]? Build(ElfFile elf)
    {
        if (FindSymbolTable(elf) is not { } symbolIndex)
            return null;
        ElfSectionHeader symbolHeader = elf.Section(symbolIndex);
        ElfSectionHeader stringHeader = elf.Section((int)symbolHeader.Link);
        if (stringHeader.Type != ElfSectionHeader.TypeStringTable)
            return null;
        ReadOnlySpan<byte> symbols = elf.Range(symbolHeader.Offset, symbolHeader.Size, "its symbol table").Span;
        ReadOnlySpan<byte> strings = elf.Range(stringHeader.Offset, stringHeader.Size, "its symbol names").Span;

        int symbolOffset = Align(FixedSize);
        long stringOffset = AlignLong((long)symbolOffset + symbols.Length);
        long total = AlignLong(stringOffset + strings.Length);
        if (total > Array.MaxLength)
            throw new KernelImageException(
                "The kernel's symbol table is larger than 2 GiB; strip the kernel of its symbols and try again.");

        byte[] table = new byte[total];
        BinaryPrimitives.WriteUInt32LittleEndian(table, (uint)(stringOffset + strings.Length - SizeField));
        WriteElfHeader(elf, table.AsSpan(SizeField, ElfFile.HeaderSize));
        Span<byte> sections = table.AsSpan(SizeField + ElfFile.HeaderSize);
        WriteSectionHeader(
            elf.SectionHeaderBytes(symbolIndex), sections[ElfFile.SectionHeaderSize..], (uint)symbolOffset - SizeField, link: 2);
        WriteSectionHeader(
            elf.SectionHeaderBytes((int)symbolHeader.Link), sections[(2 * ElfFile.SectionHeaderSize)..],
            (uint)stringOffset - SizeField, link: null);
        symbols.CopyTo(table.AsSpan(symbolOffset));
        strings.CopyTo(table.AsSpan((int)stringOffset));
        return table;
    }

    private static int? FindSymbolTable(ElfFile elf)
    {
        for (int index = 1; index < elf.SectionCount; index++)
        {
            ElfSectionHeader section = elf.Section(index);
            if (section.Type == ElfSectionHeader.TypeSymbolTable)
                return section.Link != 0 && section.Link < elf.SectionCount ? index : null;
        }

        return null;
    }

    /// <summary>The kernel's own header, changed to describe three sections right behind it and no segments.</summary>
    private static void WriteElfHeader(ElfFile elf, Span<byte> header)
    {
        elf.HeaderBytes.CopyTo(header);
        BinaryPrimitives.WriteUInt32LittleEndian(header[20..], 1); // e_version
        BinaryPrimitives.WriteUInt64LittleEndian(header[32..], 0); // e_phoff
        BinaryPrimitives.WriteUInt64LittleEndian(header[40..], ElfFile.HeaderSize); // e_shoff
        BinaryPrimitives.WriteUInt16LittleEndian(header[52..], ElfFile.HeaderSize); // e_ehsize
        BinaryPrimitives.WriteUInt16LittleEndian(header[54..], 0); // e_phentsize
        BinaryPrimitives.WriteUInt16LittleEndian(header[56..], 0); // e_phnum
        BinaryPrimitives.WriteUInt16LittleEndian(header[58..], ElfFile.SectionHeaderSize); // e_shentsize
        BinaryPrimitives.WriteUInt16LittleEndian(header[60..], SectionCount); // e_shnum
        BinaryPrimitives.WriteUInt16LittleEndian(header[62..], 0); // e_shstrndx
    }

    private static void WriteSectionHeader(ReadOnlySpan<byte> original, Span<byte> copy, uint offset, uint? link)
    {
        original.CopyTo(copy);
        BinaryPrimitives.WriteUInt64LittleEndian(copy[24..], offset); // sh_offset
        if (link is { } index)
            BinaryPrimitives.WriteUInt32LittleEndian(copy[40..], index); // sh_link
    }

    private static int Align(int size) => (size + 7) & ~7;

    private static long AlignLong(long size) => (size + 7) & ~7L;
}
