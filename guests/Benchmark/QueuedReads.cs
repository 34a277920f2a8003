// A Linux program that reads a file or block device in blocks, many at once, with Linux's asynchronous I/O.
using Iced.Intel;
using XenSharp.Guests.Elf;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Benchmark;

/// <summary>
/// Builds the program, a static executable without a C library. Its argument is what it reads. It says nothing; its caller takes the time.
/// As soon as a read is done another is begun, so that there are always as many under way.
/// </summary>
public static class QueuedReads
{
    private const int BlockSize = 4096;
    private const int MaxDepth = 64;

    // System call numbers of x86-64 Linux.
    private const int Open = 2;
    private const int IoSetup = 206;
    private const int IoGetEvents = 208;
    private const int IoSubmit = 209;

    private const int ReadOnly = 0;
    private const int Direct = 0x4000;

    // struct iocb: aio_data, aio_fildes, aio_buf, aio_nbytes, aio_offset. IOCB_CMD_PREAD is 0.
    private const int ControlSize = 64;
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
    private const int Pointers = 64;
    private const int Events = Pointers + (MaxDepth * sizeof(ulong));
    private const int Controls = Events + (MaxDepth * EventSize);
    private const int Buffers = 0x4000;
    private const int DataSize = Buffers + (MaxDepth * BlockSize);

    /// <summary>The program.</summary>
    /// <param name="depth">Reads under way at once, 1..64.</param>
    /// <param name="count">Reads in all, a multiple of <paramref name="depth"/>.</param>
    /// <param name="blocks">Blocks of 4096 bytes that are read from; a power of two.</param>
    /// <param name="random">Whether in an order like chance, or one after the other.</param>
    /// <param name="direct">Whether by O_DIRECT.</param>
    /// <returns>The file; its exit status is 0, or 1 if something failed.</returns>
    public static byte[] Build(int depth, int count, int blocks, bool random, bool direct)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(depth, 1);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(depth, MaxDepth);
        ArgumentOutOfRangeException.ThrowIfLessThan(count, depth);
        ArgumentOutOfRangeException.ThrowIfNotEqual(count % depth, 0);
        ArgumentOutOfRangeException.ThrowIfNotEqual(int.IsPow2(blocks), true);
        var code = new Assembler(64);
        Label failed = code.CreateLabel();
        EmitStart(code, depth, direct, failed);

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
        if (random)
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

        code.and(eax, blocks - 1);
        code.shl(rax, 12);
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
        code.cmp(__qword_ptr[rdx + EventResult], BlockSize);
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
        LinuxProgram.EmitExit(code, 0);
        code.Label(ref failed);
        LinuxProgram.EmitExit(code, 1);

        return LinuxProgram.Build(code, [], DataSize);
    }

    /// <summary>Opens the file and fills in what stays the same of each read.</summary>
    private static void EmitStart(Assembler code, int depth, bool direct, Label failed)
    {
        Label fill = code.CreateLabel();
        code.mov(rdi, __qword_ptr[rsp + 16]);
        code.mov(esi, ReadOnly | (direct ? Direct : 0));
        code.xor(edx, edx);
        code.mov(eax, Open);
        code.syscall();
        code.test(rax, rax);
        code.js(failed);
        code.mov(r12, rax);
        code.mov(ebx, (uint)LinuxProgram.DataAddress);
        code.mov(edi, depth);
        code.lea(rsi, __qword_ptr[rbx + Context]);
        code.mov(eax, IoSetup);
        code.syscall();
        code.test(rax, rax);
        code.jnz(failed);
        code.lea(rdx, __qword_ptr[rbx + Controls]);
        code.lea(rsi, __qword_ptr[rbx + Buffers]);
        code.xor(ecx, ecx);
        code.Label(ref fill);
        code.mov(__dword_ptr[rdx + ControlFile], r12d);
        code.mov(__qword_ptr[rdx + ControlBuffer], rsi);
        code.mov(__qword_ptr[rdx + ControlLength], BlockSize);
        code.mov(__qword_ptr[rbx + (rcx * 8) + Pointers], rdx);
        code.add(rdx, ControlSize);
        code.add(rsi, BlockSize);
        code.inc(ecx);
        code.cmp(ecx, depth);
        code.jne(fill);
    }
}
