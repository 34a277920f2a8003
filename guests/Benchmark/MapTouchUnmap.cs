// A Linux program that measures memory that comes and goes: it maps some, touches every page, and unmaps it.
using Iced.Intel;
using XenSharp.Guests.Elf;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Benchmark;

/// <summary>Builds the program, a static executable without a C library. It says nothing; its caller takes the time.</summary>
public static class MapTouchUnmap
{
    private const int PageSize = 4096;

    // System call numbers of x86-64 Linux.
    private const int Mmap = 9;
    private const int Munmap = 11;

    // PROT_READ | PROT_WRITE, and MAP_PRIVATE | MAP_ANONYMOUS.
    private const int ReadWrite = 3;
    private const int PrivateAnonymous = 0x22;

    /// <summary>The program.</summary>
    /// <param name="bytes">How much to map at once; a multiple of the page size.</param>
    /// <param name="rounds">How often.</param>
    /// <returns>The file; its exit status is 0, or 1 if a system call failed.</returns>
    public static byte[] Build(int bytes, int rounds)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(bytes);
        ArgumentOutOfRangeException.ThrowIfNotEqual(bytes % PageSize, 0);
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(rounds);
        var code = new Assembler(64);
        Label round = code.CreateLabel();
        Label touch = code.CreateLabel();
        Label failed = code.CreateLabel();
        code.mov(r12d, rounds);
        code.Label(ref round);
        code.xor(edi, edi);
        code.mov(esi, bytes);
        code.mov(edx, ReadWrite);
        code.mov(r10d, PrivateAnonymous);
        code.mov(r8, -1L);
        code.xor(r9d, r9d);
        code.mov(eax, Mmap);
        code.syscall();
        code.test(rax, rax);
        code.js(failed);
        code.mov(rdi, rax);
        code.mov(ecx, bytes / PageSize);
        code.Label(ref touch);
        code.mov(__byte_ptr[rax], 1);
        code.add(rax, PageSize);
        code.dec(ecx);
        code.jnz(touch);
        code.mov(esi, bytes);
        code.mov(eax, Munmap);
        code.syscall();
        code.test(rax, rax);
        code.jnz(failed);
        code.dec(r12d);
        code.jnz(round);
        LinuxProgram.EmitExit(code, 0);
        code.Label(ref failed);
        LinuxProgram.EmitExit(code, 1);

        return LinuxProgram.Build(code, [], 0);
    }
}
