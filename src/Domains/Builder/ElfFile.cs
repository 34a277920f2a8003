// Reading an ELF64 file: its header, and its program and section headers, checked against the bytes that are there.

using System.Buffers.Binary;

namespace XenSharp.Domains.Builder;

/// <summary>A program header (Elf64_Phdr), without the fields a loader has no use for.</summary>
internal readonly record struct ElfProgramHeader(
    uint Type, uint Flags, ulong Offset, ulong PhysicalAddress, ulong FileSize, ulong MemorySize)
{
    public const uint TypeLoad = 1;
    public const uint TypeNote = 4;
    private const uint AnyPermission = 7;

    /// <summary>Takes memory: PT_LOAD with some permission, as Xen's loader has it.</summary>
    public bool IsLoadable => Type == TypeLoad && (Flags & AnyPermission) != 0;
}

/// <summary>A section header (Elf64_Shdr), without the fields a loader has no use for.</summary>
internal readonly record struct ElfSectionHeader(uint NameOffset, uint Type, ulong Offset, ulong Size, uint Link)
{
    public const uint TypeSymbolTable = 2;
    public const uint TypeStringTable = 3;
    public const uint TypeNote = 7;
}

/// <summary>An ELF64 file for x86-64. Every range it hands out lies within the file.</summary>
internal sealed class ElfFile
{
    public const int HeaderSize = 64;
    public const int SectionHeaderSize = 64;
    private const int ProgramHeaderSize = 56;
    private const byte Class32 = 1;
    private const byte Class64 = 2;
    private const byte LittleEndian = 1;
    private const ushort TypeExecutable = 2;
    private const ushort TypeShared = 3;
    private const ushort Machine386 = 3;
    private const ushort MachineX86X64 = 62;

    private readonly ReadOnlyMemory<byte> _file;
    private readonly int _sectionHeadersOffset;

    public static ReadOnlySpan<byte> Magic => [0x7F, (byte)'E', (byte)'L', (byte)'F'];

    /// <exception cref="KernelImageException">Not an ELF64 executable for x86-64, or its header tables are not in the file.</exception>
    public ElfFile(ReadOnlyMemory<byte> file)
    {
        _file = file;
        ReadOnlySpan<byte> header = file.Span;
        // The first 20 bytes are the same for both classes, and enough to name the wrong kind of kernel.
        if (header.Length < 20)
            throw CutShort("its header");
        ushort machine = BinaryPrimitives.ReadUInt16LittleEndian(header[18..]);
        if (header[4] == Class32 && (machine == Machine386 || machine == MachineX86X64))
            throw new KernelImageException(
                "This is a 32-bit kernel, and only 64-bit PV guests run here; use an x86-64 kernel (CONFIG_64BIT with CONFIG_XEN_PV).");
        if (header[4] is not (Class32 or Class64) || header[5] is not (1 or 2))
            throw new KernelImageException(
                "The ELF header of the kernel is damaged (unknown class or byte order); copy or download the file again.");
        if (header[4] != Class64 || header[5] != LittleEndian || machine != MachineX86X64)
            throw new KernelImageException(
                $"This kernel was built for another processor ({MachineName(header[5], header[18..20])}); use one for x86-64.");
        if (header.Length < HeaderSize)
            throw CutShort("its header");
        ushort type = BinaryPrimitives.ReadUInt16LittleEndian(header[16..]);
        if (type is not (TypeExecutable or TypeShared))
            throw new KernelImageException(
                $"This ELF file is not an executable kernel (its type is {type}: an object file, module or core dump); "
                + "use the vmlinux or bzImage of the kernel's build.");

        Entry = BinaryPrimitives.ReadUInt64LittleEndian(header[24..]);
        int programHeaders = TableOffset(32, 54, 56, ProgramHeaderSize, "program", out int programHeaderCount);
        _sectionHeadersOffset = TableOffset(40, 58, 60, SectionHeaderSize, "section", out int sectionCount);
        SectionCount = sectionCount;
        SectionNamesIndex = BinaryPrimitives.ReadUInt16LittleEndian(header[62..]);

        ElfProgramHeader[] headers = new ElfProgramHeader[programHeaderCount];
        for (int index = 0; index < headers.Length; index++)
        {
            ReadOnlySpan<byte> entry = header.Slice(programHeaders + index * ProgramHeaderSize, ProgramHeaderSize);
            headers[index] = new ElfProgramHeader(
                BinaryPrimitives.ReadUInt32LittleEndian(entry),
                BinaryPrimitives.ReadUInt32LittleEndian(entry[4..]),
                BinaryPrimitives.ReadUInt64LittleEndian(entry[8..]),
                BinaryPrimitives.ReadUInt64LittleEndian(entry[24..]),
                BinaryPrimitives.ReadUInt64LittleEndian(entry[32..]),
                BinaryPrimitives.ReadUInt64LittleEndian(entry[40..]));
        }

        ProgramHeaders = headers;
    }

    /// <summary>e_entry.</summary>
    public ulong Entry { get; }

    public IReadOnlyList<ElfProgramHeader> ProgramHeaders { get; }

    public int SectionCount { get; }

    private int SectionNamesIndex { get; }

    /// <summary>The ELF header as it stands in the file.</summary>
    public ReadOnlySpan<byte> HeaderBytes => _file.Span[..HeaderSize];

    public ElfSectionHeader Section(int index)
    {
        ReadOnlySpan<byte> entry = SectionHeaderBytes(index);
        return new ElfSectionHeader(
            BinaryPrimitives.ReadUInt32LittleEndian(entry),
            BinaryPrimitives.ReadUInt32LittleEndian(entry[4..]),
            BinaryPrimitives.ReadUInt64LittleEndian(entry[24..]),
            BinaryPrimitives.ReadUInt64LittleEndian(entry[32..]),
            BinaryPrimitives.ReadUInt32LittleEndian(entry[40..]));
    }

    /// <summary>A section header as it stands in the file.</summary>
    public ReadOnlySpan<byte> SectionHeaderBytes(int index) =>
        _file.Span.Slice(_sectionHeadersOffset + index * SectionHeaderSize, SectionHeaderSize);

    /// <summary>A range of the file.</summary>
    /// <exception cref="KernelImageException">The range is not in the file.</exception>
    public ReadOnlyMemory<byte> Range(ulong offset, ulong size, string what)
    {
        ulong length = (ulong)_file.Length;
        if (offset > length || size > length - offset)
            throw CutShort(what);
        return _file.Slice((int)offset, (int)size);
    }

    /// <summary>The first section with a name, or null.</summary>
    public ElfSectionHeader? FindSection(ReadOnlySpan<byte> name)
    {
        if (SectionNamesIndex == 0 || SectionNamesIndex >= SectionCount)
            return null;
        ElfSectionHeader namesHeader = Section(SectionNamesIndex);
        ReadOnlySpan<byte> names = Range(namesHeader.Offset, namesHeader.Size, "its section names").Span;
        for (int index = 1; index < SectionCount; index++)
        {
            ElfSectionHeader section = Section(index);
            if (section.NameOffset >= (uint)names.Length)
                continue;
            ReadOnlySpan<byte> candidate = names[(int)section.NameOffset..];
            if (candidate.Length > name.Length && candidate.StartsWith(name) && candidate[name.Length] == 0)
                return section;
        }

        return null;
    }

    private int TableOffset(int offsetField, int entrySizeField, int countField, int entrySize, string kind, out int count)
    {
        ReadOnlySpan<byte> header = _file.Span;
        ulong offset = BinaryPrimitives.ReadUInt64LittleEndian(header[offsetField..]);
        count = BinaryPrimitives.ReadUInt16LittleEndian(header[countField..]);
        if (count == 0)
            return 0;
        ushort actualSize = BinaryPrimitives.ReadUInt16LittleEndian(header[entrySizeField..]);
        if (actualSize != entrySize)
            throw new KernelImageException(
                $"The ELF header of the kernel is damaged: its {kind} headers are {actualSize} bytes long instead of {entrySize}; "
                + "copy or download the file again.");
        Range(offset, (ulong)(count * entrySize), $"its {kind} headers");
        return (int)offset;
    }

    private static string MachineName(byte byteOrder, ReadOnlySpan<byte> field)
    {
        ushort machine = byteOrder == LittleEndian
            ? BinaryPrimitives.ReadUInt16LittleEndian(field)
            : BinaryPrimitives.ReadUInt16BigEndian(field);
        return machine switch
        {
            Machine386 => "32-bit x86",
            20 => "32-bit PowerPC",
            21 => "64-bit PowerPC",
            22 => "S/390",
            40 => "32-bit Arm",
            183 => "64-bit Arm",
            243 => "RISC-V",
            _ => $"ELF machine number {machine}",
        };
    }

    private static KernelImageException CutShort(string what) => new(
        $"The kernel's ELF file ends before {what}: it was cut short or is damaged, so copy or download it again.");
}
