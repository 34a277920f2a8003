using System.Buffers.Binary;
using XenSharp.Core;

namespace XenSharp.Domains;

/// <summary>The page of hypercall stubs for kernels that do not execute <c>syscall</c> by themselves.</summary>
internal static class HypercallPage
{
    private const int StubSize = 32;

    /// <summary>Writes one stub per hypercall number, 32 bytes apart (hypercall page of xen/arch-x86/xen-x86_64.h).</summary>
    public static void Fill(Span<byte> page)
    {
        page.Fill(0xcc);
        for (int number = 0; number < page.Length / StubSize; number++)
            FillStub(page.Slice(number * StubSize, StubSize), number);
    }

    private static void FillStub(Span<byte> stub, int number)
    {
        // push rcx; push r11; mov eax, number; syscall; pop r11; pop rcx; ret
        // iret never comes back, and takes RAX from the stack: push rcx; push r11; push rax; mov eax, number; syscall
        bool iret = number == (int)HypercallNumber.Iret;
        ReadOnlySpan<byte> head = iret ? [0x51, 0x41, 0x53, 0x50, 0xb8] : [0x51, 0x41, 0x53, 0xb8];
        ReadOnlySpan<byte> tail = iret ? [0x0f, 0x05] : [0x0f, 0x05, 0x41, 0x5b, 0x59, 0xc3];
        head.CopyTo(stub);
        BinaryPrimitives.WriteInt32LittleEndian(stub[head.Length..], number);
        tail.CopyTo(stub[(head.Length + sizeof(int))..]);
    }
}
