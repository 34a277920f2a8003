// A Linux program that uses an address which no process has.
using Iced.Intel;
using XenSharp.Guests.Elf;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Boot.Tests;

internal static class TouchProgram
{
    /// <summary>The program: it ends with status 0 if it may.</summary>
    /// <param name="address">What it uses.</param>
    /// <param name="writes">Whether it writes there, or reads.</param>
    public static byte[] Build(ulong address, bool writes)
    {
        var code = new Assembler(64);
        code.mov(rbx, address);
        if (writes)
            code.mov(__qword_ptr[rbx], rax);
        else
            code.mov(rax, __qword_ptr[rbx]);
        LinuxProgram.EmitExit(code, 0);
        return LinuxProgram.Build(code, [], 0);
    }
}
