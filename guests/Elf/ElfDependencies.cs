// Reads which shared libraries an ELF file needs.
using System.Buffers.Binary;
using System.Text;

namespace XenSharp.Guests.Elf;

/// <summary>The dynamic section of ELF64 little-endian files, as far as loading goes (System V ABI, chapter 5).</summary>
public static class ElfDependencies
{
    const int ProgramHeaderSize = 56;
    const uint PtLoad = 1;
    const uint PtDynamic = 2;
    const long DtNull = 0;
    const long DtNeeded = 1;
    const long DtStrtab = 5;

    /// <summary>The names of DT_NEEDED, in order; empty for a static file.</summary>
    /// <exception cref="InvalidDataException">It is no such file, or is damaged.</exception>
    public static IReadOnlyList<string> Needed(ReadOnlySpan<byte> file)
    {
        try
        {
            return Read(file);
        }
        catch (ArgumentOutOfRangeException e)
        {
            throw new InvalidDataException("The ELF file points outside of itself.", e);
        }
    }

    static List<string> Read(ReadOnlySpan<byte> file)
    {
        if (file.Length < 64 || !file.StartsWith("\u007fELF"u8) || file[4] != 2 || file[5] != 1)
            throw new InvalidDataException("Not a 64-bit little-endian ELF file.");
        ReadOnlySpan<byte> headers = Slice(file, U64(file, 0x20), (ulong)(U16(file, 0x38) * ProgramHeaderSize));

        List<ulong> nameOffsets = [];
        ulong? stringAddress = null;
        foreach (Segment segment in Segments(headers).Where(segment => segment.Type == PtDynamic))
        {
            ReadOnlySpan<byte> dynamic = Slice(file, segment.Offset, segment.Size);
            for (int at = 0; at + 16 <= dynamic.Length && (long)U64(dynamic, at) != DtNull; at += 16)
            {
                if ((long)U64(dynamic, at) == DtNeeded)
                    nameOffsets.Add(U64(dynamic, at + 8));
                else if ((long)U64(dynamic, at) == DtStrtab)
                    stringAddress = U64(dynamic, at + 8);
            }
        }
        if (nameOffsets.Count == 0)
            return [];

        // DT_STRTAB is an address; the segment that it is in leads to the file's offset.
        Segment? holder = Segments(headers).FirstOrDefault(segment =>
            segment.Type == PtLoad && stringAddress >= segment.Address && stringAddress - segment.Address < segment.Size);
        if (holder is null)
            throw new InvalidDataException("The ELF file names libraries without a string table.");
        ulong strings = stringAddress!.Value - holder.Address + holder.Offset;
        List<string> names = [];
        foreach (ulong offset in nameOffsets)
        {
            ReadOnlySpan<byte> name = Slice(file, strings + offset, 0, toEnd: true);
            int end = name.IndexOf((byte)0);
            names.Add(Encoding.UTF8.GetString(end < 0 ? throw new InvalidDataException("A library's name has no end.") : name[..end]));
        }
        return names;
    }

    sealed record Segment(uint Type, ulong Offset, ulong Address, ulong Size);

    static List<Segment> Segments(ReadOnlySpan<byte> headers)
    {
        List<Segment> segments = [];
        for (int at = 0; at < headers.Length; at += ProgramHeaderSize)
            segments.Add(new Segment(
                BinaryPrimitives.ReadUInt32LittleEndian(headers[at..]), U64(headers, at + 8), U64(headers, at + 16), U64(headers, at + 32)));
        return segments;
    }

    static ushort U16(ReadOnlySpan<byte> file, int at) => BinaryPrimitives.ReadUInt16LittleEndian(file[at..]);

    static ulong U64(ReadOnlySpan<byte> file, int at) => BinaryPrimitives.ReadUInt64LittleEndian(file[at..]);

    static ReadOnlySpan<byte> Slice(ReadOnlySpan<byte> file, ulong offset, ulong size, bool toEnd = false)
    {
        if (offset > (ulong)file.Length || size > (ulong)file.Length - offset)
            throw new InvalidDataException("The ELF file points outside of itself.");
        return toEnd ? file[(int)offset..] : file.Slice((int)offset, (int)size);
    }
}
