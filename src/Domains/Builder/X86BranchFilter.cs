// The x86 BCJ filter of xz, decoding direction: turns the absolute targets of CALL and JMP back into relative ones.

using System.Buffers.Binary;
using System.Numerics;

namespace XenSharp.Domains.Builder;

/// <summary>
/// Undoes xz's x86 branch filter (filter id 0x04). The encoder added the instruction's end address to the 32-bit operand of each
/// E8 (CALL) and E9 (JMP) whose operand's top byte is 00 or FF, so that calls to one function look alike; the kernel's build uses it.
/// SharpCompress 0.50.8 has this filter but decodes a real kernel wrongly (the block's CRC fails), hence this one.
/// </summary>
internal static class X86BranchFilter
{
    private const int InstructionLength = 5;

    /// <param name="code">The whole output of one block, decoded in place.</param>
    /// <param name="startOffset">Address of the block's first byte, from the filter's properties; 0 unless given.</param>
    public static void Decode(Span<byte> code, uint startOffset)
    {
        // Which of the last three bytes were branch opcodes that were left alone: bit 0 the byte just before, bit 2 three before.
        // Encoder and decoder must agree on what is an operand, so an opcode inside a possible operand has rules of its own.
        uint recent = 0;
        int position = 0;
        int last = code.Length - InstructionLength;
        while (position <= last)
        {
            if (recent == 0)
            {
                int skip = code[position..(last + 1)].IndexOfAny<byte>(0xE8, 0xE9);
                if (skip < 0)
                    return;
                position += skip;
            }
            else if ((code[position] & 0xFE) != 0xE8)
            {
                recent = (recent << 1) & 7;
                position++;
                continue;
            }

            if (TryConvert(code.Slice(position, InstructionLength), startOffset + (uint)position + InstructionLength, recent))
            {
                recent = 0;
                position += InstructionLength;
            }
            else
            {
                recent = ((recent << 1) | 1) & 7;
                position++;
            }
        }
    }

    private static bool TryConvert(Span<byte> instruction, uint endAddress, uint recent)
    {
        if (!IsSignByte(instruction[4]))
            return false;

        // At most one earlier opcode may be near, and then the byte that would have been its sign byte must not look like one.
        int distance = 0;
        if (recent != 0)
        {
            if (!BitOperations.IsPow2(recent))
                return false;
            distance = BitOperations.TrailingZeroCount(recent) + 1;
            if (IsSignByte(instruction[4 - distance]))
                return false;
        }

        uint value = BinaryPrimitives.ReadUInt32LittleEndian(instruction[1..]);
        while (true)
        {
            value -= endAddress;
            if (distance == 0 || !IsSignByte((byte)(value >> (24 - 8 * distance))))
                break;
            // The sum made that byte look like a sign byte: the encoder flipped the low bits and tried again, so undo that too.
            value ^= (1u << (32 - 8 * distance)) - 1;
        }

        // The operand is 25 bits wide and sign extended.
        value = (value & 0x01FFFFFF) | ((value & 0x01000000) != 0 ? 0xFE000000 : 0);
        BinaryPrimitives.WriteUInt32LittleEndian(instruction[1..], value);
        return true;
    }

    private static bool IsSignByte(byte value) => value is 0x00 or 0xFF;
}
