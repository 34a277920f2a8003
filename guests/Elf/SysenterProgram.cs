// A 32-bit Linux program that makes its system calls by SYSENTER, as the vDSO of a kernel on an Intel processor does.
using System.Buffers.Binary;
using System.Text;
using Iced.Intel;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Elf;

/// <summary>Builds the program, a static executable for i386 Linux without a C library.</summary>
public static class SysenterProgram
{
    private const int Base = 0x0804_8000;
    private const int HeaderSize = 52;
    private const int ProgramHeaderSize = 32;
    private const int TextOffset = HeaderSize + ProgramHeaderSize;

    // System call numbers of i386 Linux.
    private const int Exit = 1;
    private const int Write = 4;
    private const int Getpid = 20;

    /// <summary>
    /// The file: it writes a text to its standard output a number of times, asking for its process id in between, and exits with a status;
    /// with 1 where a call did not answer what INT 0x80 does.
    /// </summary>
    /// <param name="text">What it writes; ASCII.</param>
    /// <param name="times">1 or more.</param>
    /// <param name="status">Other than 1.</param>
    public static byte[] Build(string text, int times, int status)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(times);
        ArgumentOutOfRangeException.ThrowIfEqual(status, 1);
        byte[] bytes = Encoding.ASCII.GetBytes(text);
        var code = new Assembler(32);
        Label call = code.CreateLabel();
        Label failed = code.CreateLabel();
        Label loop = code.CreateLabel();
        code.mov(esi, times);
        code.mov(eax, Getpid);
        code.@int(0x80);
        code.mov(edi, eax);
        code.Label(ref loop);
        code.mov(eax, Write);
        code.mov(ebx, 1);
        code.mov(ecx, Base + TextOffset);
        code.mov(edx, bytes.Length);
        code.call(call);
        code.cmp(eax, bytes.Length);
        code.jne(failed);
        code.mov(eax, Getpid);
        code.call(call);
        code.cmp(eax, edi);
        code.jne(failed);
        code.dec(esi);
        code.jnz(loop);
        code.mov(ebx, status);
        code.mov(eax, Exit);
        code.call(call);
        code.Label(ref failed);
        code.mov(ebx, 1);
        code.mov(eax, Exit);
        code.@int(0x80);

        // The kernel finds the caller's stack by EBP, and goes on in its vDSO, which takes these three from the stack and returns.
        code.Label(ref call);
        code.push(ecx);
        code.push(edx);
        code.push(ebp);
        code.mov(ebp, esp);
        code.sysenter();
        using var stream = new MemoryStream();
        stream.Write(bytes);
        code.Assemble(new StreamCodeWriter(stream), (ulong)(Base + TextOffset + bytes.Length));
        return Wrap(stream.ToArray(), bytes.Length);
    }

    /// <summary>One segment, of the headers, the text and the code, to be read and executed.</summary>
    private static byte[] Wrap(ReadOnlySpan<byte> contents, int textLength)
    {
        const ushort executable = 2, intel386 = 3;
        const int load = 1, readAndExecute = 5, pageSize = 4096;
        byte[] file = new byte[TextOffset + contents.Length];
        contents.CopyTo(file.AsSpan(TextOffset));

        // e_ident: magic, ELFCLASS32, ELFDATA2LSB, EV_CURRENT.
        ReadOnlySpan<byte> identity = [0x7f, (byte)'E', (byte)'L', (byte)'F', 1, 1, 1];
        identity.CopyTo(file);
        void Half(int offset, ushort value) => BinaryPrimitives.WriteUInt16LittleEndian(file.AsSpan(offset), value);
        void Word(int offset, int value) => BinaryPrimitives.WriteInt32LittleEndian(file.AsSpan(offset), value);

        // Elf32_Ehdr behind e_ident: type, machine, version, entry, program headers, section headers, flags, and sizes and numbers of both.
        Half(16, executable);
        Half(18, intel386);
        Word(20, 1);
        Word(24, Base + TextOffset + textLength);
        Word(28, HeaderSize);
        Half(40, HeaderSize);
        Half(42, ProgramHeaderSize);
        Half(44, 1);

        // Elf32_Phdr: type, offset, virtual and physical address, sizes in the file and in memory, flags, alignment.
        ReadOnlySpan<int> segment = [load, 0, Base, Base, file.Length, file.Length, readAndExecute, pageSize];
        for (int i = 0; i < segment.Length; i++)
            Word(HeaderSize + (i * sizeof(int)), segment[i]);
        return file;
    }
}
