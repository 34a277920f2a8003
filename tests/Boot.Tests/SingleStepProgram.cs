// A Linux program that has a child of its own single-stepped over system calls.
using Iced.Intel;
using XenSharp.Guests.Elf;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Boot.Tests;

internal static class SingleStepProgram
{
    // System call numbers of x86-64 Linux.
    private const int GetPid = 39;
    private const int Fork = 57;
    private const int Wait4 = 61;
    private const int Kill = 62;
    private const int Ptrace = 101;

    private const int TraceMe = 0;
    private const int SingleStep = 9;
    private const int StopSignal = 19;
    private const int ExitedMask = 0x7f;

    /// <summary>The program; its exit status is how many steps the child made before its end.</summary>
    /// <param name="calls">System calls that the child makes meanwhile.</param>
    public static byte[] Build(int calls)
    {
        var code = new Assembler(64);
        Label parent = code.CreateLabel();
        Label step = code.CreateLabel();
        Label done = code.CreateLabel();
        code.mov(eax, Fork);
        code.syscall();
        code.test(rax, rax);
        code.jnz(parent);
        code.mov(edi, TraceMe);
        code.mov(eax, Ptrace);
        code.syscall();
        code.mov(eax, GetPid);
        code.syscall();
        code.mov(edi, eax);
        code.mov(esi, StopSignal);
        code.mov(eax, Kill);
        code.syscall();
        for (int i = 0; i < calls; i++)
        {
            code.mov(eax, GetPid);
            code.syscall();
        }

        LinuxProgram.EmitExit(code, 0);

        code.Label(ref parent);
        code.mov(r12, rax);
        code.xor(r13d, r13d);
        EmitWait(code);
        code.Label(ref step);
        code.mov(edi, SingleStep);
        code.mov(rsi, r12);
        code.xor(edx, edx);
        code.xor(r10d, r10d);
        code.mov(eax, Ptrace);
        code.syscall();
        EmitWait(code);
        code.test(__dword_ptr[LinuxProgram.DataAddress], ExitedMask);
        code.jz(done);
        code.inc(r13d);
        code.jmp(step);
        code.Label(ref done);
        LinuxProgram.EmitExit(code, r13d);
        return LinuxProgram.Build(code, [], sizeof(ulong));
    }

    private static void EmitWait(Assembler code)
    {
        code.mov(rdi, r12);
        code.mov(esi, (int)LinuxProgram.DataAddress);
        code.xor(edx, edx);
        code.xor(r10d, r10d);
        code.mov(eax, Wait4);
        code.syscall();
    }
}
