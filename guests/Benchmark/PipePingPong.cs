// A Linux program that measures context switches: two processes hand a byte to and fro through two pipes.
using Iced.Intel;
using XenSharp.Guests.Elf;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Benchmark;

/// <summary>Builds the program, a static executable without a C library. It says nothing; its caller takes the time.</summary>
public static class PipePingPong
{
    private const int DataSize = 64;

    // Two pairs of descriptors, read end first, as pipe(2) writes them, and the byte.
    private const ulong Forth = LinuxProgram.DataAddress;
    private const ulong Back = LinuxProgram.DataAddress + 8;
    private const ulong Byte = LinuxProgram.DataAddress + 16;

    // System call numbers of x86-64 Linux.
    private const int Read = 0;
    private const int Write = 1;
    private const int Pipe = 22;
    private const int Fork = 57;

    /// <summary>The program.</summary>
    /// <param name="rounds">Times that the byte goes there and comes back: two context switches each.</param>
    /// <returns>The file; its exit status is 0, or 1 if a system call failed.</returns>
    public static byte[] Build(int rounds)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(rounds);
        var code = new Assembler(64);
        Label parent = code.CreateLabel();
        Label child = code.CreateLabel();
        Label failed = code.CreateLabel();
        foreach (ulong pair in (ReadOnlySpan<ulong>)[Forth, Back])
        {
            code.mov(edi, (uint)pair);
            code.mov(eax, Pipe);
            code.syscall();
            code.test(eax, eax);
            code.jnz(failed);
        }
        code.mov(r12d, rounds);
        code.mov(eax, Fork);
        code.syscall();
        code.test(eax, eax);
        code.js(failed);
        code.jz(child);
        EmitLoop(code, ref parent, Write, Forth + 4, Read, Back, failed);
        EmitLoop(code, ref child, Read, Forth, Write, Back + 4, failed);
        code.Label(ref failed);
        LinuxProgram.EmitExit(code, 1);

        return LinuxProgram.Build(code, [], DataSize);
    }

    /// <summary>Two transfers of the byte, R12 times, then the end of the process.</summary>
    private static void EmitLoop(Assembler code, ref Label loop, int firstCall, ulong first, int secondCall, ulong second, Label failed)
    {
        code.Label(ref loop);
        EmitTransfer(code, firstCall, first, failed);
        EmitTransfer(code, secondCall, second, failed);
        code.dec(r12d);
        code.jnz(loop);
        LinuxProgram.EmitExit(code, 0);
    }

    private static void EmitTransfer(Assembler code, int call, ulong descriptor, Label failed)
    {
        code.mov(edi, __dword_ptr[descriptor]);
        code.mov(esi, (uint)Byte);
        code.mov(edx, 1);
        code.mov(eax, call);
        code.syscall();
        code.cmp(eax, 1);
        code.jne(failed);
    }
}
