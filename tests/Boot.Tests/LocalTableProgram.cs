// A Linux program that lives on its local descriptor table, as threads libraries of old and Windows programs under Wine do.
using Iced.Intel;
using XenSharp.Guests.Elf;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Boot.Tests;

/// <summary>Builds the program, a static executable without a C library: its status is 0, or says where it went wrong.</summary>
internal static class LocalTableProgram
{
    private const ulong Descriptor = LinuxProgram.DataAddress;
    private const ulong Magic = LinuxProgram.DataAddress + 16;
    private const ulong Status = LinuxProgram.DataAddress + 24;
    private const uint MagicValue = 0x1234_5678;

    /// <summary>What is read through the segment lies at this offset.</summary>
    private const int Offset = 8;

    /// <summary>The first descriptor of the local table, at CPL 3.</summary>
    private const int Selector = 7;

    private const int Rounds = 200;

    // System call numbers of x86-64 Linux.
    private const int SchedYield = 24;
    private const int Fork = 57;
    private const int Exit = 60;
    private const int Wait4 = 61;
    private const int ModifyLdt = 154;

    /// <summary>The program.</summary>
    public static byte[] Build()
    {
        var code = new Assembler(64);
        Label failed = code.CreateLabel();
        Label loop = code.CreateLabel();
        Label end = code.CreateLabel();

        // modify_ldt(write, descriptor, its size), the form that takes all of struct user_desc.
        code.mov(edi, 0x11);
        code.mov(esi, (uint)Descriptor);
        code.mov(edx, 16);
        Call(code, ModifyLdt);
        code.test(eax, eax);
        code.mov(ebx, 1);
        code.jnz(failed);
        code.mov(eax, Selector);
        code.mov(fs, eax);
        Check(code, 2, failed);

        // The child has a copy; both go on at once, so that the table is switched with them.
        Call(code, Fork);
        code.mov(r12d, eax);
        code.mov(r13d, Rounds);
        code.Label(ref loop);
        Call(code, SchedYield);
        Check(code, 3, failed);
        code.dec(r13d);
        code.jnz(loop);
        code.test(r12d, r12d);
        code.jz(end);
        code.mov(edi, r12d);
        code.mov(esi, (uint)Status);
        code.xor(edx, edx);
        code.xor(r10d, r10d);
        Call(code, Wait4);
        code.mov(ebx, 4);
        code.cmp(__dword_ptr[Status], 0);
        code.jne(failed);
        code.Label(ref end);
        code.xor(ebx, ebx);
        code.Label(ref failed);
        code.mov(edi, ebx);
        Call(code, Exit);

        // struct user_desc: number, base, limit, and the flags of a 32-bit data segment whose limit counts pages.
        byte[] data =
        [
            .. BitConverter.GetBytes(0), .. BitConverter.GetBytes((uint)Magic - Offset), .. BitConverter.GetBytes(0xf_ffff), .. BitConverter.GetBytes(0x51),
            .. BitConverter.GetBytes((ulong)MagicValue), .. BitConverter.GetBytes(0UL),
        ];
        return LinuxProgram.Build(code, data, (ulong)data.Length);
    }

    private static void Check(Assembler code, int status, Label failed)
    {
        code.mov(ebx, status);
        code.cmp(__dword_ptr.fs[Offset], MagicValue);
        code.jne(failed);
    }

    private static void Call(Assembler code, int number)
    {
        code.mov(eax, number);
        code.syscall();
    }
}
