// General-purpose registers by the decoder's names.
using System.Runtime.CompilerServices;
using Iced.Intel;
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>Reads and writes <see cref="CpuRegisters"/> by <see cref="Register"/>, with the rules for partial registers.</summary>
public static unsafe class RegisterFile
{
    // CpuRegisters is in KVM's order, the decoder's numbers are in the instruction encoding's: RAX RCX RDX RBX RSP RBP RSI RDI.
    private static ReadOnlySpan<byte> Index => [0, 2, 3, 1, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15];

    /// <summary>The value, zero-extended from the register's size. <see cref="Register.None"/> reads as 0.</summary>
    public static ulong Read(CpuRegisters* registers, Register register)
    {
        switch (register)
        {
            case Register.None:
                return 0;
            case Register.RIP:
                return registers->Rip;
            case Register.EIP:
                return (uint)registers->Rip;
        }

        ulong value = *Slot(registers, register);
        return register.GetSize() switch
        {
            1 => IsHighByte(register) ? (byte)(value >> 8) : (byte)value,
            2 => (ushort)value,
            4 => (uint)value,
            _ => value,
        };
    }

    /// <summary>Writes a register: 8 and 16 bits leave the rest alone, 32 bits clear the upper half.</summary>
    public static void Write(CpuRegisters* registers, Register register, ulong value)
    {
        ulong* slot = Slot(registers, register);
        *slot = register.GetSize() switch
        {
            1 when IsHighByte(register) => (*slot & ~0xff00UL) | ((value & 0xff) << 8),
            1 => (*slot & ~0xffUL) | (byte)value,
            2 => (*slot & ~0xffffUL) | (ushort)value,
            4 => (uint)value,
            _ => value,
        };
    }

    /// <summary>The offset of an instruction's memory operand in its segment, cut to the width of its address.</summary>
    public static ulong MemoryOffset(CpuRegisters* registers, in Instruction instruction)
    {
        if (instruction.IsIPRelativeMemoryOperand)
            return instruction.IPRelativeMemoryAddress;
        Register basis = instruction.MemoryBase;
        ulong offset = instruction.MemoryDisplacement64 + Read(registers, basis)
            + (Read(registers, instruction.MemoryIndex) * (uint)instruction.MemoryIndexScale);
        int width = basis != Register.None ? basis.GetSize() : instruction.MemoryIndex.GetSize();
        return width switch { 2 => (ushort)offset, 4 => (uint)offset, _ => offset };
    }

    private static bool IsHighByte(Register register) => register is >= Register.AH and <= Register.BH;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static ulong* Slot(CpuRegisters* registers, Register register)
        => (ulong*)registers + Index[register.GetFullRegister() - Register.RAX];
}
