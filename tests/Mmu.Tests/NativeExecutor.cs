// Native code that a test makes: one instruction with registers and flags of its choice, or a clock.
using System.Runtime.InteropServices;
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Mmu.Tests;

/// <summary>
/// A page of executable memory with a function that loads registers, executes the instruction under test and stores them
/// again. What the processor does is the reference for what emulation does.
/// </summary>
internal sealed unsafe partial class NativeExecutor : IDisposable
{
    private const int PageSize = 4096;
    private const int ReadWriteExecute = 7;
    private const int PrivateAnonymous = 0x22;
    private readonly byte* _code;

    public NativeExecutor()
    {
        nint page = Map(0, PageSize, ReadWriteExecute, PrivateAnonymous, -1, 0);
        if (page == -1)
            throw new InvalidOperationException($"No executable page could be had (errno {Marshal.GetLastPInvokeError()}).");
        _code = (byte*)page;
    }

    /// <summary>
    /// Executes an instruction on the given registers. It may use all but RSP, RBP and R12–R15, and the flags but TF.
    /// </summary>
    public void Execute(Action<Assembler> instruction, CpuRegisters* registers)
    {
        var assembler = new Assembler(64);
        AssemblerRegister64[] saved = [rbx, rbp, r12, r13, r14, r15];
        foreach (AssemblerRegister64 register in saved)
            assembler.push(register);
        assembler.mov(r15, rdi);
        assembler.push(__qword_ptr[r15 + Offset(nameof(CpuRegisters.Rflags))]);
        assembler.popfq();
        (AssemblerRegister64 Register, string Field)[] loaded =
        [
            (rax, nameof(CpuRegisters.Rax)), (rbx, nameof(CpuRegisters.Rbx)), (rcx, nameof(CpuRegisters.Rcx)), (rdx, nameof(CpuRegisters.Rdx)),
            (rsi, nameof(CpuRegisters.Rsi)), (rdi, nameof(CpuRegisters.Rdi)), (r8, nameof(CpuRegisters.R8)), (r9, nameof(CpuRegisters.R9)),
            (r10, nameof(CpuRegisters.R10)), (r11, nameof(CpuRegisters.R11)),
        ];
        foreach ((AssemblerRegister64 register, string field) in loaded)
            assembler.mov(register, __qword_ptr[r15 + Offset(field)]);
        instruction(assembler);
        foreach ((AssemblerRegister64 register, string field) in loaded)
            assembler.mov(__qword_ptr[r15 + Offset(field)], register);
        assembler.pushfq();
        assembler.pop(__qword_ptr[r15 + Offset(nameof(CpuRegisters.Rflags))]);
        assembler.cld();
        foreach (AssemblerRegister64 register in saved.Reverse())
            assembler.pop(register);
        assembler.ret();
        Install(assembler);
        ((delegate* unmanaged<CpuRegisters*, void>)_code)(registers);
    }

    /// <summary>A clock that only goes on by being looked at.</summary>
    /// <param name="step">By how much.</param>
    public delegate* unmanaged[SuppressGCTransition]<ulong> Clock(uint step)
    {
        var assembler = new Assembler(64);
        Label count = assembler.CreateLabel();
        assembler.mov(eax, step);
        assembler.xadd(__qword_ptr[count], rax);
        assembler.ret();
        assembler.Label(ref count);
        assembler.dq(step);
        Install(assembler);
        return (delegate* unmanaged[SuppressGCTransition]<ulong>)_code;
    }

    private void Install(Assembler assembler)
    {
        using var stream = new MemoryStream();
        _ = assembler.Assemble(new StreamCodeWriter(stream), (ulong)_code);
        stream.ToArray().CopyTo(new Span<byte>(_code, PageSize));
    }

    public void Dispose() => _ = Unmap((nint)_code, PageSize);

    private static int Offset(string field) => (int)Marshal.OffsetOf<CpuRegisters>(field);

    [LibraryImport("libc", EntryPoint = "mmap", SetLastError = true)]
    private static partial nint Map(nint address, nuint length, int protection, int flags, int descriptor, long offset);

    [LibraryImport("libc", EntryPoint = "munmap", SetLastError = true)]
    private static partial int Unmap(nint address, nuint length);
}
