// The linked image, read from its ELF file and placed in this process as it would be in a monitor: copied, and nothing else.
using System.Buffers.Binary;
using System.Text;
using Tmds.Linux;

namespace XenSharp.Freestanding.Tests;

/// <summary>A stretch of the image as its program header describes it.</summary>
/// <param name="Type">PT_*: 1 is loaded, 2 is what a dynamic linker reads, 7 is thread-local.</param>
/// <param name="Flags">1 executable, 2 writable, 4 readable.</param>
/// <param name="Offset">In the file.</param>
/// <param name="Address">From the image's start.</param>
/// <param name="Size">Bytes in the file.</param>
/// <param name="MemorySize">Bytes in memory.</param>
internal readonly record struct Segment(uint Type, uint Flags, int Offset, int Address, int Size, int MemorySize)
{
    public bool IsLoaded => Type == 1;

    public bool IsCode => IsLoaded && (Flags & 1) != 0;

    public bool IsConstants => IsLoaded && Flags == 4;
}

/// <summary>One copy of the image in memory, at an address that the kernel chose.</summary>
internal sealed unsafe class HotImage : IDisposable
{
    private readonly byte[] _file;
    private readonly byte* _base;
    private readonly int _length;

    public HotImage(string path)
    {
        _file = File.ReadAllBytes(path);
        int headers = (int)U64(32);
        for (int i = 0; i < U16(56); i++)
        {
            int at = headers + (i * U16(54));
            Segments.Add(new Segment(U32(at), U32(at + 4), (int)U64(at + 8), (int)U64(at + 16), (int)U64(at + 32), (int)U64(at + 40)));
        }

        for (int at = Segments.Single(s => s.Type == 2).Offset; U64(at) != 0; at += 16)
            Dynamic[U64(at)] = U64(at + 8);
        ReadSymbols();

        // Code and constants, and no more.
        _length = Segments.Where(s => s.IsCode || s.IsConstants).Max(s => s.Address + s.MemorySize + 4095) & ~4095;
        _base = (byte*)LibC.mmap(null, (size_t)_length, LibC.PROT_READ | LibC.PROT_WRITE, LibC.MAP_PRIVATE | LibC.MAP_ANONYMOUS, -1, 0);
        foreach (Segment segment in Segments.Where(s => s.IsCode || s.IsConstants))
        {
            _file.AsSpan(segment.Offset, segment.Size).CopyTo(new Span<byte>(_base + segment.Address, segment.MemorySize));
            int rights = LibC.PROT_READ | (segment.IsCode ? LibC.PROT_EXEC : 0);
            Assert.That(LibC.mprotect(_base + segment.Address, (size_t)((segment.MemorySize + 4095) & ~4095), rights), Is.Zero);
        }
    }

    public static string FilePath => Path.Combine(TestContext.CurrentContext.TestDirectory, "xensharp-hot.so");

    public List<Segment> Segments { get; } = [];

    /// <summary>DT_* tags and what they say.</summary>
    public Dictionary<ulong, ulong> Dynamic { get; } = [];

    /// <summary>Exported symbols by name: offsets from the image's start.</summary>
    public Dictionary<string, int> Symbols { get; } = [];

    /// <summary>Names that are to be found elsewhere.</summary>
    public List<string> Undefined { get; } = [];

    public ReadOnlySpan<byte> Code
    {
        get
        {
            Segment code = Segments.Single(s => s.IsCode);
            return _file.AsSpan(code.Offset, code.Size);
        }
    }

    public void* AddressOf(string symbol) => _base + Symbols[symbol];

    public void Dispose() => LibC.munmap(_base, (size_t)_length);

    private void ReadSymbols()
    {
        int table = FileOffset(Dynamic[6]);
        int names = FileOffset(Dynamic[5]);

        // The names begin where the symbols end; entry 0 is none.
        for (int at = table + 24; at < names; at += 24)
        {
            int start = names + (int)U32(at);
            string name = Encoding.ASCII.GetString(_file, start, Array.IndexOf(_file, (byte)0, start) - start);
            if (U16(at + 6) == 0)
                Undefined.Add(name);
            else
                Symbols[name] = (int)U64(at + 8);
        }
    }

    private int FileOffset(ulong address)
    {
        Segment segment = Segments.Single(s => s.IsLoaded && address >= (ulong)s.Address && address < (ulong)(s.Address + s.Size));
        return segment.Offset + (int)address - segment.Address;
    }

    private ushort U16(int at) => BinaryPrimitives.ReadUInt16LittleEndian(_file.AsSpan(at));

    private uint U32(int at) => BinaryPrimitives.ReadUInt32LittleEndian(_file.AsSpan(at));

    private ulong U64(int at) => BinaryPrimitives.ReadUInt64LittleEndian(_file.AsSpan(at));
}
