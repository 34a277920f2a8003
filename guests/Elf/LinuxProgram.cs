// What programs for Linux have in common that are assembled here: static executables without a C library.
using Iced.Intel;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Elf;

/// <summary>Turns assembled code into an executable for x86-64 Linux, and assembles what every such program needs.</summary>
public static class LinuxProgram
{
    /// <summary>Where its data is; low enough for a 32-bit immediate.</summary>
    public const ulong DataAddress = 0x600000;

    private const ulong CodeAddress = 0x400000;

    // System call number of x86-64 Linux.
    private const int Exit = 60;

    /// <summary>Ends the process.</summary>
    /// <param name="code">The program.</param>
    /// <param name="status">Its exit status.</param>
    public static void EmitExit(Assembler code, int status)
    {
        ArgumentNullException.ThrowIfNull(code);
        code.mov(edi, status);
        code.mov(eax, Exit);
        code.syscall();
    }

    /// <summary>Ends the process with a status that a register has.</summary>
    /// <inheritdoc cref="EmitExit(Assembler, int)"/>
    public static void EmitExit(Assembler code, AssemblerRegister32 status)
    {
        ArgumentNullException.ThrowIfNull(code);
        code.mov(edi, status);
        code.mov(eax, Exit);
        code.syscall();
    }

    /// <summary>The file, whose first instruction is the code's first.</summary>
    /// <param name="code">The program.</param>
    /// <param name="data">What its data begins with.</param>
    /// <param name="dataSize">Bytes of its data; 0 for a program without.</param>
    public static byte[] Build(Assembler code, byte[] data, ulong dataSize)
    {
        ArgumentNullException.ThrowIfNull(code);
        using var stream = new MemoryStream();
        code.Assemble(new StreamCodeWriter(stream), CodeAddress);
        var elf = new ElfWriter { EntryPoint = CodeAddress };
        elf.AddSegment(new ElfSegment(CodeAddress, CodeAddress, ElfSegmentFlags.Read | ElfSegmentFlags.Execute, stream.ToArray(), (ulong)stream.Length));
        if (dataSize != 0)
            elf.AddSegment(new ElfSegment(DataAddress, DataAddress, ElfSegmentFlags.Read | ElfSegmentFlags.Write, data, dataSize));
        return elf.ToArray();
    }
}
