// Where the partitions of a disk are: MBR with logical partitions, GPT, or none.

using System.Buffers.Binary;

namespace XenSharp.Configuration.Boot;

/// <summary>A part of a disk that may have a file system.</summary>
/// <param name="Number">As Linux counts it, from 1 on; 0 for the whole disk.</param>
/// <param name="Offset">Where it begins, in bytes.</param>
/// <param name="Length">How long it is, in bytes.</param>
/// <param name="Active">It is marked as the one to boot from.</param>
internal sealed record Partition(int Number, long Offset, long Length, bool Active);

/// <summary>Reads partition tables.</summary>
internal static class PartitionTable
{
    private const int Sector = 512;
    private const int MbrEntries = 446;
    private const int MbrEntrySize = 16;
    private const byte GptProtective = 0xee;

    /// <summary>Logical partitions that are looked at: the chain of them can be a circle.</summary>
    private const int MostLogical = 64;

    /// <summary>GPT entries that are looked at; tables have 128.</summary>
    private const int MostGptEntries = 256;

    /// <summary>The partitions, those to boot from first; empty if there is no table.</summary>
    internal static IReadOnlyList<Partition> Read(ImageReader disk)
    {
        Span<byte> sector = stackalloc byte[Sector];
        disk.Read(0, sector);
        if (sector[510] != 0x55 || sector[511] != 0xaa)
            return [];
        var partitions = new List<Partition>();
        for (int at = 0; at < 4; at++)
        {
            ReadOnlySpan<byte> entry = sector.Slice(MbrEntries + (at * MbrEntrySize), MbrEntrySize);
            byte type = entry[4];
            long start = BinaryPrimitives.ReadUInt32LittleEndian(entry[8..]);
            long length = BinaryPrimitives.ReadUInt32LittleEndian(entry[12..]);

            // A boot sector of a file system has the signature too, and code where the table would be.
            if (entry[0] is not (0 or 0x80))
                return [];
            if (type == 0 || start == 0 || length == 0)
                continue;
            if (type == GptProtective)
                return ReadGpt(disk);
            if (type is 0x05 or 0x0f or 0x85)
                ReadLogical(disk, start, partitions);
            else
                partitions.Add(new Partition(at + 1, start * Sector, length * Sector, entry[0] == 0x80));
        }

        return [.. partitions.OrderBy(static partition => partition.Active ? 0 : 1).ThenBy(static partition => partition.Number)];
    }

    /// <summary>Follows the chain of extended boot records.</summary>
    private static void ReadLogical(ImageReader disk, long extended, List<Partition> partitions)
    {
        Span<byte> sector = stackalloc byte[Sector];
        long record = extended;
        for (int number = 5; number < 5 + MostLogical; number++)
        {
            disk.Read(record * Sector, sector);
            if (sector[510] != 0x55 || sector[511] != 0xaa)
                return;
            ReadOnlySpan<byte> entry = sector.Slice(MbrEntries, MbrEntrySize);
            ReadOnlySpan<byte> next = sector.Slice(MbrEntries + MbrEntrySize, MbrEntrySize);
            long start = BinaryPrimitives.ReadUInt32LittleEndian(entry[8..]);
            long length = BinaryPrimitives.ReadUInt32LittleEndian(entry[12..]);
            if (entry[4] != 0 && length != 0)
                partitions.Add(new Partition(number, (record + start) * Sector, length * Sector, entry[0] == 0x80));
            long offset = BinaryPrimitives.ReadUInt32LittleEndian(next[8..]);
            if (next[4] == 0 || offset == 0)
                return;
            record = extended + offset;
        }
    }

    private static IReadOnlyList<Partition> ReadGpt(ImageReader disk)
    {
        byte[] header = new byte[92];
        foreach (int sector in new[] { Sector, 4096 })
        {
            disk.Read(sector, header);
            if (header.AsSpan().StartsWith("EFI PART"u8))
                return ReadGptEntries(disk, header, sector);
        }

        throw new BootException("The disk has the mark of a GUID partition table, and none at its beginning: repair it with gdisk or sgdisk.");
    }

    private static List<Partition> ReadGptEntries(ImageReader disk, ReadOnlySpan<byte> header, int sector)
    {
        long table = (long)BinaryPrimitives.ReadUInt64LittleEndian(header[72..]);
        int count = (int)Math.Min(BinaryPrimitives.ReadUInt32LittleEndian(header[80..]), MostGptEntries);
        uint size = BinaryPrimitives.ReadUInt32LittleEndian(header[84..]);
        if (table is < 1 or > long.MaxValue / 4096 || size is < 128 or > 4096)
            throw new BootException("The disk's GUID partition table is damaged: repair it with gdisk or sgdisk.");
        var partitions = new List<Partition>();
        Span<byte> entry = stackalloc byte[128];
        for (int at = 0; at < count; at++)
        {
            disk.Read((table * sector) + (at * size), entry);
            ulong first = BinaryPrimitives.ReadUInt64LittleEndian(entry[32..]);
            ulong last = BinaryPrimitives.ReadUInt64LittleEndian(entry[40..]);
            bool used = entry[..16].ContainsAnyExcept((byte)0);
            if (!used || first == 0 || last < first || last > long.MaxValue / 4096)
                continue;

            // Attribute bit 2: to be booted from by a BIOS.
            bool active = (entry[48] & 4) != 0;
            partitions.Add(new Partition(at + 1, (long)first * sector, (long)(last - first + 1) * sector, active));
        }

        return [.. partitions.OrderBy(static partition => partition.Active ? 0 : 1).ThenBy(static partition => partition.Number)];
    }
}
