// A Linux program that reads or writes a file or block device in blocks, many at once, with Linux's asynchronous I/O.
using System.Text;
using Iced.Intel;
using XenSharp.Guests.Elf;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Benchmark;

/// <summary>What the program does.</summary>
public sealed record QueuedTransferPlan
{
    /// <summary>Transfers under way at once, 1..64.</summary>
    public required int Depth { get; init; }

    /// <summary>Transfers in all, a multiple of <see cref="Depth"/>.</summary>
    public required int Count { get; init; }

    /// <summary>Bytes of a transfer, a multiple of 4096.</summary>
    public required int BlockSize { get; init; }

    /// <summary>Blocks of that size at the start of the file that are used; a power of two.</summary>
    public required int Blocks { get; init; }

    /// <summary>Whether in an order like chance, or one after the other.</summary>
    public bool IsRandom { get; init; }

    /// <summary>Whether it writes.</summary>
    public bool IsWrite { get; init; }

    /// <summary>Whether by O_DIRECT.</summary>
    public bool IsDirect { get; init; }
}

/// <summary>
/// Builds the program, a static executable without a C library. Its first argument is what it reads or writes. It prints two lines: one when
/// all is prepared, its memory too, and one at the end, followed by a space and how long it took meanwhile: ticks of the processor's time-stamp
/// counter, 16 hexadecimal digits. As soon as a transfer is done another is
/// begun, so that there are always as many under way.
/// </summary>
public static class QueuedTransfers
{
    private const int PageSize = 4096;
    private const int MaxDepth = 64;
    private const int Digits = 2 * sizeof(ulong);

    // System call numbers of x86-64 Linux.
    private const int Write = 1;
    private const int Open = 2;
    private const int IoSetup = 206;
    private const int IoGetEvents = 208;
    private const int IoSubmit = 209;

    private const int StandardOutput = 1;
    private const int ReadOnly = 0;
    private const int WriteOnly = 1;
    private const int Direct = 0x4000;

    // struct iocb: aio_data, aio_lio_opcode, aio_fildes, aio_buf, aio_nbytes, aio_offset. IOCB_CMD_PREAD is 0.
    private const int ControlSize = 64;
    private const int ControlOperation = 16;
    private const int OperationWrite = 1;
    private const int ControlFile = 20;
    private const int ControlBuffer = 24;
    private const int ControlLength = 32;
    private const int ControlOffset = 40;

    // struct io_event: data, obj, res, res2.
    private const int EventSize = 32;
    private const int EventControl = 8;
    private const int EventResult = 16;

    // Where things are in the program's data, from its start.
    private const int Context = 0;
    private const int Started = 8;
    private const int Pointers = 64;
    private const int Events = Pointers + (MaxDepth * sizeof(ulong));
    private const int Controls = Events + (MaxDepth * EventSize);
    private const int Lines = Controls + (MaxDepth * ControlSize);
    private const int Buffers = 0x4000;

    /// <summary>The program.</summary>
    /// <param name="plan">What it does.</param>
    /// <param name="started">The line that it prints before the first transfer.</param>
    /// <param name="ended">What the line begins with that it prints after the last.</param>
    /// <returns>The file; its exit status is 0, or 1 if something failed.</returns>
    public static byte[] Build(QueuedTransferPlan plan, string started, string ended)
    {
        ArgumentNullException.ThrowIfNull(plan);
        (int depth, int count) = (plan.Depth, plan.Count);
        ArgumentOutOfRangeException.ThrowIfLessThan(depth, 1);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(depth, MaxDepth);
        ArgumentOutOfRangeException.ThrowIfLessThan(count, depth);
        ArgumentOutOfRangeException.ThrowIfNotEqual(count % depth, 0);
        ArgumentOutOfRangeException.ThrowIfLessThan(plan.BlockSize, PageSize);
        ArgumentOutOfRangeException.ThrowIfNotEqual(plan.BlockSize % PageSize, 0);
        ArgumentOutOfRangeException.ThrowIfNotEqual(int.IsPow2(plan.Blocks), true);
        byte[] first = Encoding.ASCII.GetBytes(started + "\n");
        byte[] last = Encoding.ASCII.GetBytes(ended + " " + new string('0', Digits) + "\n");
        ArgumentOutOfRangeException.ThrowIfGreaterThan(Lines + first.Length + last.Length, Buffers);
        byte[] data = new byte[Lines + first.Length + last.Length];
        first.CopyTo(data, Lines);
        last.CopyTo(data, Lines + first.Length);
        var code = new Assembler(64);
        Label failed = code.CreateLabel();
        EmitStart(code, plan, failed);
        EmitPrint(code, Lines, first.Length);
        EmitReadCounter(code);
        code.mov(__qword_ptr[rbx + Started], rax);

        // RBX: the data; R12: the file; R13, R14: reads to begin and to await; R15: those in the list to begin; RBP: the position.
        Label round = code.CreateLabel();
        Label position = code.CreateLabel();
        Label submitted = code.CreateLabel();
        Label collect = code.CreateLabel();
        Label collected = code.CreateLabel();
        code.mov(r13d, count - depth);
        code.mov(r14d, count);
        code.mov(r15d, depth);
        code.mov(ebp, 1);

        code.Label(ref round);
        code.test(r15d, r15d);
        code.jz(submitted);
        code.xor(ecx, ecx);
        code.Label(ref position);
        if (plan.IsRandom)
        {
            // A linear congruential generator; its upper bits are the better ones.
            code.mov(rax, 6364136223846793005);
            code.imul(rbp, rax);
            code.mov(rax, 1442695040888963407);
            code.add(rbp, rax);
            code.mov(rax, rbp);
            code.shr(rax, 33);
        }
        else
        {
            code.inc(rbp);
            code.mov(rax, rbp);
        }

        code.and(eax, plan.Blocks - 1);
        code.mov(rdx, (long)plan.BlockSize);
        code.imul(rax, rdx);
        code.mov(rdx, __qword_ptr[rbx + (rcx * 8) + Pointers]);
        code.mov(__qword_ptr[rdx + ControlOffset], rax);
        code.inc(ecx);
        code.cmp(ecx, r15d);
        code.jne(position);
        code.mov(rdi, __qword_ptr[rbx + Context]);
        code.mov(esi, r15d);
        code.lea(rdx, __qword_ptr[rbx + Pointers]);
        code.mov(eax, IoSubmit);
        code.syscall();
        code.cmp(rax, r15);
        code.jne(failed);

        code.Label(ref submitted);
        code.mov(rdi, __qword_ptr[rbx + Context]);
        code.mov(esi, 1);
        code.mov(edx, depth);
        code.lea(r10, __qword_ptr[rbx + Events]);
        code.xor(r8d, r8d);
        code.mov(eax, IoGetEvents);
        code.syscall();
        code.test(rax, rax);
        code.jle(failed);
        code.xor(r15d, r15d);
        code.lea(rdx, __qword_ptr[rbx + Events]);
        code.Label(ref collect);
        code.cmp(__qword_ptr[rdx + EventResult], plan.BlockSize);
        code.jne(failed);
        code.dec(r14d);
        code.test(r13d, r13d);
        code.jz(collected);
        code.dec(r13d);
        code.mov(rcx, __qword_ptr[rdx + EventControl]);
        code.mov(__qword_ptr[rbx + (r15 * 8) + Pointers], rcx);
        code.inc(r15d);
        code.Label(ref collected);
        code.add(rdx, EventSize);
        code.dec(eax);
        code.jnz(collect);
        code.test(r14d, r14d);
        code.jnz(round);
        EmitReadCounter(code);
        code.sub(rax, __qword_ptr[rbx + Started]);
        EmitHexadecimal(code, Lines + first.Length + last.Length - 1 - Digits);
        EmitPrint(code, Lines + first.Length, last.Length);
        LinuxProgram.EmitExit(code, 0);
        code.Label(ref failed);
        LinuxProgram.EmitExit(code, 1);

        return LinuxProgram.Build(code, data, Buffers + ((ulong)depth * (ulong)plan.BlockSize));
    }

    /// <summary>RAX: the time-stamp counter.</summary>
    private static void EmitReadCounter(Assembler code)
    {
        code.rdtsc();
        code.shl(rdx, 32);
        code.or(rax, rdx);
    }

    /// <summary>Writes RAX into the data.</summary>
    private static void EmitHexadecimal(Assembler code, int offset)
    {
        Label digit = code.CreateLabel();
        Label written = code.CreateLabel();
        code.mov(ecx, Digits);
        code.Label(ref digit);
        code.mov(edx, eax);
        code.and(edx, 0xf);
        code.add(edx, '0');
        code.cmp(edx, '9');
        code.jbe(written);
        code.add(edx, 'a' - '9' - 1);
        code.Label(ref written);
        code.mov(__byte_ptr[rbx + rcx + (offset - 1)], dl);
        code.shr(rax, 4);
        code.dec(ecx);
        code.jnz(digit);
    }

    private static void EmitPrint(Assembler code, int offset, int length)
    {
        code.mov(edi, StandardOutput);
        code.lea(rsi, __qword_ptr[rbx + offset]);
        code.mov(edx, length);
        code.mov(eax, Write);
        code.syscall();
    }

    /// <summary>Opens the file, fills in what stays the same of each transfer, and touches all of the memory.</summary>
    private static void EmitStart(Assembler code, QueuedTransferPlan plan, Label failed)
    {
        Label touch = code.CreateLabel();
        Label fill = code.CreateLabel();
        code.mov(rdi, __qword_ptr[rsp + 16]);
        code.mov(esi, (plan.IsWrite ? WriteOnly : ReadOnly) | (plan.IsDirect ? Direct : 0));
        code.xor(edx, edx);
        code.mov(eax, Open);
        code.syscall();
        code.test(rax, rax);
        code.js(failed);
        code.mov(r12, rax);
        code.mov(ebx, (uint)LinuxProgram.DataAddress);
        code.mov(edi, plan.Depth);
        code.lea(rsi, __qword_ptr[rbx + Context]);
        code.mov(eax, IoSetup);
        code.syscall();
        code.test(rax, rax);
        code.jnz(failed);
        code.lea(rdx, __qword_ptr[rbx + Controls]);
        code.lea(rsi, __qword_ptr[rbx + Buffers]);
        code.xor(ecx, ecx);
        code.Label(ref fill);
        if (plan.IsWrite)
            code.mov(__word_ptr[rdx + ControlOperation], OperationWrite);
        code.mov(__dword_ptr[rdx + ControlFile], r12d);
        code.mov(__qword_ptr[rdx + ControlBuffer], rsi);
        code.mov(__qword_ptr[rdx + ControlLength], plan.BlockSize);
        code.mov(__qword_ptr[rbx + (rcx * 8) + Pointers], rdx);
        code.add(rdx, ControlSize);
        code.add(rsi, plan.BlockSize);
        code.inc(ecx);
        code.cmp(ecx, plan.Depth);
        code.jne(fill);

        // RSI is where the memory ends. What is written is not zeroes, which some would not store.
        code.Label(ref touch);
        code.sub(rsi, PageSize);
        code.mov(__qword_ptr[rsi], rsi);
        code.lea(rax, __qword_ptr[rbx + Buffers]);
        code.cmp(rsi, rax);
        code.ja(touch);
    }
}
