// The cyclic redundancy checks of the xz and lzop containers: CRC-32 and CRC-64 with reflected polynomials.

using System.Buffers.Binary;

namespace XenSharp.Domains.Builder;

/// <summary>
/// CRC with reflected input and output, preset and final inversion, eight bytes at a step. System.IO.Hashing has the 32-bit one
/// but not the 64-bit one of xz (it offers the unreflected ECMA-182), so both come from here.
/// </summary>
internal sealed class ReflectedCrc
{
    /// <summary>CRC-32 (IEEE 802.3), in the low half of the result.</summary>
    public static readonly ReflectedCrc Crc32 = new(0xEDB88320, 32);

    /// <summary>CRC-64 of the .xz file format, section 6.</summary>
    public static readonly ReflectedCrc Crc64 = new(0xC96C5795D7870F42, 64);

    private readonly ulong[] _table = new ulong[8 * 256];
    private readonly ulong _inversion;

    private ReflectedCrc(ulong polynomial, int width)
    {
        _inversion = width == 64 ? ulong.MaxValue : (1UL << width) - 1;
        for (int value = 0; value < 256; value++)
        {
            ulong remainder = (ulong)value;
            for (int bit = 0; bit < 8; bit++)
                remainder = (remainder & 1) != 0 ? (remainder >> 1) ^ polynomial : remainder >> 1;
            _table[value] = remainder;
        }

        // Row k: the same byte followed by k zero bytes.
        for (int index = 256; index < _table.Length; index++)
        {
            ulong previous = _table[index - 256];
            _table[index] = (previous >> 8) ^ _table[(byte)previous];
        }
    }

    public ulong Compute(ReadOnlySpan<byte> data)
    {
        ReadOnlySpan<ulong> table = _table;
        ulong crc = _inversion;
        while (data.Length >= 8)
        {
            ulong word = BinaryPrimitives.ReadUInt64LittleEndian(data) ^ crc;
            crc = table[0x700 + (byte)word]
                ^ table[0x600 + (byte)(word >> 8)]
                ^ table[0x500 + (byte)(word >> 16)]
                ^ table[0x400 + (byte)(word >> 24)]
                ^ table[0x300 + (byte)(word >> 32)]
                ^ table[0x200 + (byte)(word >> 40)]
                ^ table[0x100 + (byte)(word >> 48)]
                ^ table[(byte)(word >> 56)];
            data = data[8..];
        }

        foreach (byte value in data)
            crc = (crc >> 8) ^ table[(byte)(crc ^ value)];
        return crc ^ _inversion;
    }
}
