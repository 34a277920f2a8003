// A Linux program that looks whether its registers, flags and GS base outlast system calls and switches to other processes.
using Iced.Intel;
using XenSharp.Guests.Elf;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Boot.Tests;

internal static class KeptStateProgram
{
    // System call numbers of x86-64 Linux.
    private const int SchedYield = 24;
    private const int GetPid = 39;
    private const int ArchPrctl = 158;
    private const int SetGs = 0x1001;

    /// <summary>Carry, sign and direction.</summary>
    private const int Flags = 0x481;

    /// <summary>The program; its exit status is 0, 1 where a register was changed, 2 for GS and 3 for the flags.</summary>
    /// <param name="mark">What tells it from others of its kind.</param>
    /// <param name="rounds">How often it looks.</param>
    public static byte[] Build(uint mark, int rounds)
    {
        var code = new Assembler(64);
        Label round = code.CreateLabel();
        Label changed = code.CreateLabel();
        Label otherGs = code.CreateLabel();
        Label otherFlags = code.CreateLabel();
        AssemblerRegister64[] kept = [rbx, rbp, rdx, rsi, rdi, r8, r9, r10, r12, r13, r14];
        code.mov(edi, SetGs);
        code.mov(esi, (int)LinuxProgram.DataAddress);
        code.mov(eax, ArchPrctl);
        code.syscall();
        code.mov(__dword_ptr[LinuxProgram.DataAddress], mark);
        code.mov(r15d, rounds);
        code.Label(ref round);
        for (int i = 0; i < kept.Length; i++)
            code.mov(kept[i], ((ulong)mark << 32) + (ulong)i);
        foreach (int call in (int[])[GetPid, SchedYield])
        {
            code.push(Flags);
            code.popfq();
            code.mov(eax, call);
            code.syscall();
            code.pushfq();
            code.pop(rax);
            code.cld();
            code.and(eax, Flags);
            code.cmp(eax, Flags);
            code.jne(otherFlags);
            for (int i = 0; i < kept.Length; i++)
            {
                code.mov(rax, ((ulong)mark << 32) + (ulong)i);
                code.cmp(rax, kept[i]);
                code.jne(changed);
            }

            code.cmp(__dword_ptr.gs[0], mark);
            code.jne(otherGs);
        }

        code.dec(r15d);
        code.jnz(round);
        LinuxProgram.EmitExit(code, 0);
        code.Label(ref changed);
        LinuxProgram.EmitExit(code, 1);
        code.Label(ref otherGs);
        LinuxProgram.EmitExit(code, 2);
        code.Label(ref otherFlags);
        LinuxProgram.EmitExit(code, 3);
        return LinuxProgram.Build(code, [], sizeof(ulong));
    }
}
