// The checksum of IP, TCP and UDP (RFC 1071).
using System.Buffers.Binary;
using System.Runtime.InteropServices;

namespace XenSharp.Devices.Network;

/// <summary>Ones' complement sums of 16-bit words in network order.</summary>
internal static class InternetChecksum
{
    /// <summary>Adds bytes to a sum; of an odd number of them the last one is the high half of a word.</summary>
    /// <param name="bytes">At most 2^31 of them; a part of something that is summed in parts has to have an even length.</param>
    /// <param name="sum">What to add to: 16-bit words in network order, added up in 64 bits.</param>
    public static ulong Add(ReadOnlySpan<byte> bytes, ulong sum)
    {
        // The sum is the same in either byte order but for its own, so it is computed in the processor's, 32 bits at a time.
        ulong first = 0;
        ulong second = 0;
        ReadOnlySpan<ulong> words = MemoryMarshal.Cast<byte, ulong>(bytes);
        foreach (ulong word in words)
        {
            first += (uint)word;
            second += word >> 32;
        }

        first += second;
        ReadOnlySpan<byte> rest = bytes[(words.Length * sizeof(ulong))..];
        while (rest.Length >= 2)
        {
            first += BinaryPrimitives.ReadUInt16LittleEndian(rest);
            rest = rest[2..];
        }

        if (!rest.IsEmpty)
            first += rest[0];
        return sum + BinaryPrimitives.ReverseEndianness(Fold(first));
    }

    /// <summary>Brings a sum to 16 bits.</summary>
    public static ushort Fold(ulong sum)
    {
        sum = (sum & 0xffff_ffff) + (sum >> 32);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        return (ushort)((sum & 0xffff) + (sum >> 16));
    }

    /// <summary>
    /// Fills in a checksum whose field holds the sum of the pseudo header (0 of a protocol that has none): the sum of all bytes, the field
    /// with them, complemented.
    /// </summary>
    /// <param name="covered">What the checksum covers.</param>
    /// <param name="offset">Where its field is; the two bytes lie within <paramref name="covered"/>.</param>
    public static void Complete(Span<byte> covered, int offset)
    {
        ushort sum = (ushort)~Fold(Add(covered, 0));

        // Zero means "none" to UDP; to the others both zeros are the same.
        BinaryPrimitives.WriteUInt16BigEndian(covered[offset..], sum == 0 ? (ushort)0xffff : sum);
    }
}
