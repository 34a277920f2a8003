// A Linux program that measures a network: one sends so many bytes over TCP, the other takes them and says so.
using System.Buffers.Binary;
using System.Net;
using Iced.Intel;
using XenSharp.Guests.Elf;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Benchmark;

/// <summary>
/// Builds the two programs, static executables without a C library. They say nothing: their caller takes the time from the sender's
/// start to its end, which is when the receiver has had all.
/// </summary>
public static class TcpStream
{
    /// <summary>Bytes of one system call.</summary>
    public const int ChunkSize = 64 << 10;

    private const ulong Address = LinuxProgram.DataAddress;
    private const ulong Buffer = LinuxProgram.DataAddress + 4096;
    private const int AddressSize = 16;

    // System call numbers of x86-64 Linux.
    private const int Read = 0;
    private const int Write = 1;
    private const int Socket = 41;
    private const int Connect = 42;
    private const int Accept = 43;
    private const int Shutdown = 48;
    private const int Bind = 49;
    private const int Listen = 50;

    private const int Internet = 2;
    private const int Stream = 1;

    /// <summary>Connects, sends, says that it is at the end, and waits until the other has closed.</summary>
    /// <param name="receiver">The other's address.</param>
    /// <param name="chunks">How often to send <see cref="ChunkSize"/> bytes.</param>
    /// <returns>The file; its exit status is 0, or 1 if a system call failed, as when nobody listens yet.</returns>
    public static byte[] BuildSender(IPEndPoint receiver, int chunks)
    {
        ArgumentNullException.ThrowIfNull(receiver);
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(chunks);
        var code = new Assembler(64);
        Label failed = code.CreateLabel();
        Label chunk = code.CreateLabel();
        Label more = code.CreateLabel();
        EmitSocket(code, failed);
        EmitCall(code, Connect, Address, AddressSize);
        code.jnz(failed);
        code.mov(r12d, chunks);
        code.Label(ref chunk);
        code.mov(r13d, ChunkSize);
        code.Label(ref more);
        code.mov(edx, r13d);
        code.mov(edi, ebx);
        code.mov(esi, (uint)Buffer);
        code.mov(eax, Write);
        code.syscall();
        code.test(eax, eax);
        code.jle(failed);
        code.sub(r13d, eax);
        code.jnz(more);
        code.dec(r12d);
        code.jnz(chunk);
        EmitCall(code, Shutdown, 1, 0);
        code.jnz(failed);

        // Nothing comes but the end.
        EmitCall(code, Read, Buffer, ChunkSize);
        code.jnz(failed);
        LinuxProgram.EmitExit(code, 0);
        code.Label(ref failed);
        LinuxProgram.EmitExit(code, 1);
        return Finish(code, receiver);
    }

    /// <summary>Listens, takes all that one sender sends, and ends.</summary>
    /// <param name="own">Where to listen.</param>
    /// <returns>The file; its exit status is 0, or 1 if a system call failed.</returns>
    public static byte[] BuildReceiver(IPEndPoint own)
    {
        ArgumentNullException.ThrowIfNull(own);
        var code = new Assembler(64);
        Label failed = code.CreateLabel();
        Label more = code.CreateLabel();
        EmitSocket(code, failed);
        EmitCall(code, Bind, Address, AddressSize);
        code.jnz(failed);
        EmitCall(code, Listen, 1, 0);
        code.jnz(failed);
        EmitCall(code, Accept, 0, 0);
        code.js(failed);
        code.mov(ebx, eax);
        code.Label(ref more);
        EmitCall(code, Read, Buffer, ChunkSize);
        code.js(failed);
        code.jnz(more);
        LinuxProgram.EmitExit(code, 0);
        code.Label(ref failed);
        LinuxProgram.EmitExit(code, 1);
        return Finish(code, own);
    }

    /// <summary>Makes a socket, whose descriptor is in EBX from here on.</summary>
    private static void EmitSocket(Assembler code, Label failed)
    {
        code.mov(edi, Internet);
        code.mov(esi, Stream);
        code.xor(edx, edx);
        code.mov(eax, Socket);
        code.syscall();
        code.test(eax, eax);
        code.js(failed);
        code.mov(ebx, eax);
    }

    /// <summary>A system call on the descriptor in EBX; the flags are those of its result.</summary>
    private static void EmitCall(Assembler code, int call, ulong second, int third)
    {
        code.mov(edi, ebx);
        code.mov(esi, (uint)second);
        code.mov(edx, third);
        code.mov(eax, call);
        code.syscall();
        code.test(eax, eax);
    }

    /// <summary>The file, with struct sockaddr_in of the address in its data.</summary>
    private static byte[] Finish(Assembler code, IPEndPoint address)
    {
        byte[] data = new byte[AddressSize];
        BinaryPrimitives.WriteUInt16LittleEndian(data, Internet);
        BinaryPrimitives.WriteUInt16BigEndian(data.AsSpan(2), (ushort)address.Port);
        if (!address.Address.TryWriteBytes(data.AsSpan(4), out int written) || written != 4)
            throw new ArgumentException("The address has to be of IPv4.", nameof(address));
        return LinuxProgram.Build(code, data, Buffer - LinuxProgram.DataAddress + ChunkSize);
    }
}
