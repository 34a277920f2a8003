// Writes the small static ELF64 executables that PV guests are loaded from: program headers, segments and notes, no sections.
using System.Buffers.Binary;
using System.Text;

namespace XenSharp.Guests.Elf;

/// <summary>Access rights of a loadable segment (p_flags of the ELF program header).</summary>
[Flags]
public enum ElfSegmentFlags : uint
{
    Execute = 1,
    Write = 2,
    Read = 4,
}

/// <summary>One PT_LOAD segment.</summary>
/// <param name="VirtualAddress">Where the guest sees it (p_vaddr).</param>
/// <param name="PhysicalAddress">Where it is loaded (p_paddr); for Xen, pseudo-physical, before PADDR_OFFSET is taken off.</param>
/// <param name="Flags">Access rights.</param>
/// <param name="Contents">The bytes that are in the file (p_filesz).</param>
/// <param name="MemorySize">Bytes in memory (p_memsz); what exceeds the contents is zeroed by the loader.</param>
public sealed record ElfSegment(
    ulong VirtualAddress, ulong PhysicalAddress, ElfSegmentFlags Flags, ReadOnlyMemory<byte> Contents, ulong MemorySize);

/// <summary>
/// Collects segments and notes and lays them out as an ELF64 little-endian x86-64 executable (ELF-64 Object File Format 1.5).
/// </summary>
/// <remarks>Segments start in the file at a page-aligned offset congruent with their virtual address, notes sit between the
/// program headers and the first segment and are not loaded: Xen's domain builder reads them from the file.</remarks>
public sealed class ElfWriter
{
    const int HeaderSize = 64;
    const int ProgramHeaderSize = 56;
    const ulong PageSize = 4096;
    const ushort ExecutableFile = 2;
    const ushort MachineX86_64 = 62;
    const uint LoadSegment = 1;
    const uint NoteSegment = 4;

    readonly List<ElfSegment> segments = [];
    readonly MemoryStream notes = new();

    /// <summary>e_entry: the virtual address where execution starts (for Xen the ENTRY note has the last word).</summary>
    public ulong EntryPoint { get; set; }

    /// <summary>Adds a PT_LOAD segment; the file keeps the order of the calls.</summary>
    /// <exception cref="ArgumentException">The memory size is smaller than the contents, or the segment wraps round the end of
    /// the address space.</exception>
    public void AddSegment(ElfSegment segment)
    {
        ArgumentNullException.ThrowIfNull(segment);
        if (segment.MemorySize < (ulong)segment.Contents.Length)
            throw new ArgumentException(
                $"The segment at 0x{segment.VirtualAddress:x} has {segment.Contents.Length} bytes of contents but only " +
                $"{segment.MemorySize} bytes of memory; make the memory size at least as large.", nameof(segment));
        if (segment.MemorySize != 0 && segment.VirtualAddress + (segment.MemorySize - 1) < segment.VirtualAddress)
            throw new ArgumentException(
                $"The segment at 0x{segment.VirtualAddress:x} of 0x{segment.MemorySize:x} bytes runs past the end of the address space.",
                nameof(segment));
        segments.Add(segment);
    }

    /// <summary>Adds a note whose descriptor is these bytes.</summary>
    /// <param name="owner">The note's name, "Xen" for the notes of Xen's public elfnote.h; ASCII without NUL.</param>
    /// <param name="type">The note's type.</param>
    /// <param name="descriptor">The payload; padded in the file to a multiple of 4 bytes.</param>
    public void AddNote(string owner, uint type, ReadOnlySpan<byte> descriptor)
    {
        byte[] name = [.. Encoding.ASCII.GetBytes(owner), 0];
        Span<byte> head = stackalloc byte[12];
        BinaryPrimitives.WriteUInt32LittleEndian(head, (uint)name.Length);
        BinaryPrimitives.WriteUInt32LittleEndian(head[4..], (uint)descriptor.Length);
        BinaryPrimitives.WriteUInt32LittleEndian(head[8..], type);
        notes.Write(head);
        notes.Write(name);
        Pad(notes, 4);
        notes.Write(descriptor);
        Pad(notes, 4);
    }

    /// <summary>Adds a note whose descriptor is a NUL-terminated ASCII string.</summary>
    public void AddNote(string owner, uint type, string text) => AddNote(owner, type, [.. Encoding.ASCII.GetBytes(text), 0]);

    /// <summary>Adds a note whose descriptor is a 64-bit number.</summary>
    public void AddNote(string owner, uint type, ulong number)
    {
        Span<byte> descriptor = stackalloc byte[8];
        BinaryPrimitives.WriteUInt64LittleEndian(descriptor, number);
        AddNote(owner, type, descriptor);
    }

    /// <summary>The whole file.</summary>
    public byte[] ToArray()
    {
        int headers = segments.Count + (notes.Length == 0 ? 0 : 1);
        ulong noteOffset = (ulong)(HeaderSize + headers * ProgramHeaderSize);
        ulong end = noteOffset + (ulong)notes.Length;

        ulong[] offsets = new ulong[segments.Count];
        for (int i = 0; i < segments.Count; i++)
        {
            // ELF demands p_offset ≡ p_vaddr modulo the alignment, which lets a loader map the file instead of copying it.
            ulong wanted = segments[i].VirtualAddress % PageSize;
            offsets[i] = end + (wanted + PageSize - end % PageSize) % PageSize;
            end = offsets[i] + (ulong)segments[i].Contents.Length;
        }

        byte[] file = new byte[end];
        WriteFileHeader(file, headers);
        Span<byte> programHeader = file.AsSpan(HeaderSize);
        for (int i = 0; i < segments.Count; i++)
        {
            ElfSegment segment = segments[i];
            WriteProgramHeader(programHeader, LoadSegment, segment.Flags, offsets[i], segment.VirtualAddress,
                segment.PhysicalAddress, (ulong)segment.Contents.Length, segment.MemorySize, PageSize);
            programHeader = programHeader[ProgramHeaderSize..];
            segment.Contents.Span.CopyTo(file.AsSpan((int)offsets[i]));
        }
        if (notes.Length != 0)
        {
            WriteProgramHeader(programHeader, NoteSegment, ElfSegmentFlags.Read, noteOffset, 0, 0,
                (ulong)notes.Length, (ulong)notes.Length, 4);
            notes.GetBuffer().AsSpan(0, (int)notes.Length).CopyTo(file.AsSpan((int)noteOffset));
        }
        return file;
    }

    void WriteFileHeader(Span<byte> header, int programHeaders)
    {
        // EI_CLASS 2: 64-bit; EI_DATA 1: little-endian; EI_VERSION 1; the ABI bytes stay 0 (System V).
        ReadOnlySpan<byte> identification = [0x7f, (byte)'E', (byte)'L', (byte)'F', 2, 1, 1];
        identification.CopyTo(header);
        BinaryPrimitives.WriteUInt16LittleEndian(header[16..], ExecutableFile);
        BinaryPrimitives.WriteUInt16LittleEndian(header[18..], MachineX86_64);
        BinaryPrimitives.WriteUInt32LittleEndian(header[20..], 1);
        BinaryPrimitives.WriteUInt64LittleEndian(header[24..], EntryPoint);
        BinaryPrimitives.WriteUInt64LittleEndian(header[32..], HeaderSize);
        BinaryPrimitives.WriteUInt16LittleEndian(header[52..], HeaderSize);
        BinaryPrimitives.WriteUInt16LittleEndian(header[54..], ProgramHeaderSize);
        BinaryPrimitives.WriteUInt16LittleEndian(header[56..], (ushort)programHeaders);
        BinaryPrimitives.WriteUInt16LittleEndian(header[58..], 64);
    }

    static void WriteProgramHeader(Span<byte> header, uint type, ElfSegmentFlags flags, ulong offset, ulong virtualAddress,
        ulong physicalAddress, ulong fileSize, ulong memorySize, ulong alignment)
    {
        BinaryPrimitives.WriteUInt32LittleEndian(header, type);
        BinaryPrimitives.WriteUInt32LittleEndian(header[4..], (uint)flags);
        BinaryPrimitives.WriteUInt64LittleEndian(header[8..], offset);
        BinaryPrimitives.WriteUInt64LittleEndian(header[16..], virtualAddress);
        BinaryPrimitives.WriteUInt64LittleEndian(header[24..], physicalAddress);
        BinaryPrimitives.WriteUInt64LittleEndian(header[32..], fileSize);
        BinaryPrimitives.WriteUInt64LittleEndian(header[40..], memorySize);
        BinaryPrimitives.WriteUInt64LittleEndian(header[48..], alignment);
    }

    static void Pad(Stream stream, int alignment)
    {
        while (stream.Length % alignment != 0)
            stream.WriteByte(0);
    }
}
