// The file around the records: a header, then blocks that can each be checked and read by itself, then an end. All little-endian.
using System.Buffers.Binary;
using System.Numerics;
using System.Runtime.InteropServices;
using System.Text;

namespace XenSharp.Core.Trace;

/// <summary>What a trace says of itself before its first record.</summary>
/// <param name="TscKiloHertz">Frequency of the counter that times are given in; not 0.</param>
/// <param name="StartTsc">The counter when the trace was begun.</param>
/// <param name="StartTime">The wall clock then, to the millisecond.</param>
/// <param name="GuestName">The domain's name.</param>
/// <param name="XenVersion">The version of Xen whose ABI the guest saw.</param>
/// <param name="XenSharpVersion">The version of XenSharp that wrote it.</param>
public sealed record TraceHeader(
    uint TscKiloHertz, ulong StartTsc, DateTimeOffset StartTime, string GuestName, string XenVersion, string XenSharpVersion);

/// <summary>What stands before the records of a block.</summary>
/// <param name="Kind">What the block holds.</param>
/// <param name="Vcpu">Whose records they are.</param>
/// <param name="Count">How many; for the end, 0.</param>
/// <param name="Length">Bytes that follow this header.</param>
/// <param name="BaseTime">What the first record's start is a difference from.</param>
/// <param name="Checksum">CRC-32C of the header without its checksum, and of the bytes that follow.</param>
public readonly record struct TraceBlockHeader(TraceBlockKind Kind, ushort Vcpu, uint Count, int Length, ulong BaseTime, uint Checksum);

/// <summary>What a block holds.</summary>
public enum TraceBlockKind : ushort
{
    /// <summary>Records of one vCPU, in the order in which they ended.</summary>
    Records = 1,

    /// <summary>Nothing follows. The block's bytes are the number of records in the whole file (8 bytes).</summary>
    End = 2,
}

/// <summary>Layout of the file.</summary>
public static class TraceFormat
{
    /// <summary>The version that is written, and the only one that is read.</summary>
    public const ushort Version = 1;

    /// <summary>Bytes of a block header.</summary>
    public const int BlockHeaderSize = 32;

    /// <summary>The most bytes of records in a block.</summary>
    public const int MaxBlockLength = 1 << 20;

    /// <summary>Bytes of an end block's contents.</summary>
    public const int EndLength = sizeof(ulong);

    /// <summary>Bytes of the part of the header that is always there: magic, version, and length of the whole.</summary>
    public const int PreambleSize = 12;

    /// <summary>The most bytes of a header.</summary>
    public const int MaxHeaderSize = 4096;

    private const int MaxText = 1024;
    private const uint BlockMagic = 0x4b4c4258; // "XBLK"
    private const int ChecksumOffset = BlockHeaderSize - sizeof(uint);

    /// <summary>The file's first bytes. The last is no text, so that a transfer that takes the file for text is noticed.</summary>
    public static ReadOnlySpan<byte> Magic => "XenTrc\r\u0000"u8;

    /// <summary>Makes the header's bytes.</summary>
    public static byte[] WriteHeader(TraceHeader header)
    {
        ArgumentNullException.ThrowIfNull(header);
        using var stream = new MemoryStream();
        using var writer = new BinaryWriter(stream);
        writer.Write(Magic);
        writer.Write(Version);
        writer.Write((ushort)0);
        writer.Write(header.TscKiloHertz);
        writer.Write(header.StartTsc);
        writer.Write(header.StartTime.ToUnixTimeMilliseconds());
        foreach (string text in (ReadOnlySpan<string>)[header.GuestName, header.XenVersion, header.XenSharpVersion])
        {
            byte[] bytes = Encoding.UTF8.GetBytes(text);
            int length = Math.Min(bytes.Length, MaxText);
            writer.Write((ushort)length);
            writer.Write(bytes, 0, length);
        }

        byte[] all = new byte[stream.Length + sizeof(uint)];
        stream.GetBuffer().AsSpan(0, (int)stream.Length).CopyTo(all);
        BinaryPrimitives.WriteUInt16LittleEndian(all.AsSpan(PreambleSize - sizeof(ushort)), (ushort)all.Length);
        BinaryPrimitives.WriteUInt32LittleEndian(all.AsSpan(all.Length - sizeof(uint)), Checksum(0, all.AsSpan(..^sizeof(uint))));
        return all;
    }

    /// <summary>Reads the length of the whole header and the version from the header's first part.</summary>
    /// <param name="preamble"><see cref="PreambleSize"/> bytes that begin with <see cref="Magic"/>.</param>
    public static (ushort Version, int Length) ReadPreamble(ReadOnlySpan<byte> preamble) => (
        BinaryPrimitives.ReadUInt16LittleEndian(preamble[Magic.Length..]),
        BinaryPrimitives.ReadUInt16LittleEndian(preamble[(PreambleSize - sizeof(ushort))..]));

    /// <summary>Reads a header of this version.</summary>
    /// <param name="bytes">All of it.</param>
    /// <returns>The header, or null where the bytes are damaged.</returns>
    public static TraceHeader? ReadHeader(ReadOnlySpan<byte> bytes)
    {
        const int fixedPart = PreambleSize + sizeof(uint) + sizeof(ulong) + sizeof(long);
        if (bytes.Length < fixedPart + (3 * sizeof(ushort)) + sizeof(uint)
            || BinaryPrimitives.ReadUInt32LittleEndian(bytes[^sizeof(uint)..]) != Checksum(0, bytes[..^sizeof(uint)]))
        {
            return null;
        }

        uint frequency = BinaryPrimitives.ReadUInt32LittleEndian(bytes[PreambleSize..]);
        ulong start = BinaryPrimitives.ReadUInt64LittleEndian(bytes[(PreambleSize + 4)..]);
        long time = BinaryPrimitives.ReadInt64LittleEndian(bytes[(PreambleSize + 12)..]);
        ReadOnlySpan<byte> rest = bytes[fixedPart..^sizeof(uint)];
        if (frequency == 0 || time < DateTimeOffset.MinValue.ToUnixTimeMilliseconds() || time > DateTimeOffset.MaxValue.ToUnixTimeMilliseconds()
            || !TryReadText(ref rest, out string name) || !TryReadText(ref rest, out string xen) || !TryReadText(ref rest, out string own))
        {
            return null;
        }

        return new TraceHeader(frequency, start, DateTimeOffset.FromUnixTimeMilliseconds(time), name, xen, own);
    }

    /// <summary>Completes a block: writes its header before its contents.</summary>
    /// <param name="block">Room for the header, then the contents.</param>
    /// <param name="kind">What it holds.</param>
    /// <param name="vcpu">Whose records.</param>
    /// <param name="count">How many.</param>
    /// <param name="baseTime">What the first record's start is a difference from.</param>
    public static void WriteBlockHeader(Span<byte> block, TraceBlockKind kind, ushort vcpu, uint count, ulong baseTime)
    {
        BinaryPrimitives.WriteUInt32LittleEndian(block, BlockMagic);
        BinaryPrimitives.WriteUInt16LittleEndian(block[4..], (ushort)kind);
        BinaryPrimitives.WriteUInt16LittleEndian(block[6..], vcpu);
        BinaryPrimitives.WriteUInt32LittleEndian(block[8..], count);
        BinaryPrimitives.WriteInt32LittleEndian(block[12..], block.Length - BlockHeaderSize);
        BinaryPrimitives.WriteUInt64LittleEndian(block[16..], baseTime);
        BinaryPrimitives.WriteUInt32LittleEndian(block[24..], 0);
        BinaryPrimitives.WriteUInt32LittleEndian(
            block[ChecksumOffset..], Checksum(Checksum(0, block[..ChecksumOffset]), block[BlockHeaderSize..]));
    }

    /// <summary>Reads a block header.</summary>
    /// <param name="bytes"><see cref="BlockHeaderSize"/> bytes.</param>
    /// <param name="header">What it says.</param>
    /// <returns>False when it is none.</returns>
    public static bool TryReadBlockHeader(ReadOnlySpan<byte> bytes, out TraceBlockHeader header)
    {
        header = new TraceBlockHeader(
            (TraceBlockKind)BinaryPrimitives.ReadUInt16LittleEndian(bytes[4..]),
            BinaryPrimitives.ReadUInt16LittleEndian(bytes[6..]),
            BinaryPrimitives.ReadUInt32LittleEndian(bytes[8..]),
            BinaryPrimitives.ReadInt32LittleEndian(bytes[12..]),
            BinaryPrimitives.ReadUInt64LittleEndian(bytes[16..]),
            BinaryPrimitives.ReadUInt32LittleEndian(bytes[ChecksumOffset..]));
        return BinaryPrimitives.ReadUInt32LittleEndian(bytes) == BlockMagic
            && header.Kind is TraceBlockKind.Records or TraceBlockKind.End
            && (header.Kind == TraceBlockKind.End ? header.Length == EndLength : header.Length is > 0 and <= MaxBlockLength);
    }

    /// <summary>Whether a block is as it was written.</summary>
    /// <param name="header">The bytes of its header.</param>
    /// <param name="contents">Its contents.</param>
    public static bool IsIntact(ReadOnlySpan<byte> header, ReadOnlySpan<byte> contents)
        => Checksum(Checksum(0, header[..ChecksumOffset]), contents) == BinaryPrimitives.ReadUInt32LittleEndian(header[ChecksumOffset..]);

    /// <summary>CRC-32C, without the usual inversions: continued by passing the value so far.</summary>
    private static uint Checksum(uint value, ReadOnlySpan<byte> bytes)
    {
        // Begun with something else than 0, so that missing bytes in front are noticed.
        if (value == 0)
            value = uint.MaxValue;
        ReadOnlySpan<ulong> words = MemoryMarshal.Cast<byte, ulong>(bytes);
        foreach (ulong word in words)
            value = BitOperations.Crc32C(value, word);
        foreach (byte rest in bytes[(words.Length * sizeof(ulong))..])
            value = BitOperations.Crc32C(value, rest);
        return value;
    }

    private static bool TryReadText(ref ReadOnlySpan<byte> bytes, out string text)
    {
        text = string.Empty;
        if (bytes.Length < sizeof(ushort))
            return false;
        int length = BinaryPrimitives.ReadUInt16LittleEndian(bytes);
        if (bytes.Length - sizeof(ushort) < length)
            return false;
        text = Encoding.UTF8.GetString(bytes.Slice(sizeof(ushort), length));
        bytes = bytes[(sizeof(ushort) + length)..];
        return true;
    }
}
