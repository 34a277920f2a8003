// Where the blocks of a file are: extents, or the older trees of block numbers.

using System.Buffers.Binary;

namespace XenSharp.Configuration.Boot.Ext;

/// <summary>Finds the blocks of one inode.</summary>
internal sealed class ExtBlockMap(ExtFileSystem files, ExtInode inode)
{
    private const ushort ExtentMagic = 0xf30a;
    private const int DeepestExtents = 5;
    private const int InitializedLimit = 32768;

    /// <summary>Finds a block.</summary>
    /// <param name="logical">Its number in the file.</param>
    /// <param name="run">Blocks from it on that lie in the file as on the disk, or are holes; one at least.</param>
    /// <returns>Its number on the disk; 0 for a hole, which reads as zeroes.</returns>
    internal ulong Find(long logical, out long run) => inode.HasExtents ? FindExtent(logical, out run) : FindNumber(logical, out run);

    private ulong FindExtent(long logical, out long run)
    {
        ReadOnlySpan<byte> node = inode.Map;
        int expected = -1;
        while (true)
        {
            if (BinaryPrimitives.ReadUInt16LittleEndian(node) != ExtentMagic)
                throw Damaged();
            int entries = BinaryPrimitives.ReadUInt16LittleEndian(node[2..]);
            int depth = BinaryPrimitives.ReadUInt16LittleEndian(node[6..]);

            // Each level is one less deep, so that no tree is a circle.
            if (depth > DeepestExtents || (expected >= 0 && depth != expected) || 12 + (entries * 12) > node.Length)
                throw Damaged();
            ReadOnlySpan<byte> list = node.Slice(12, entries * 12);
            int at = LastNotAbove(list, entries, logical);
            if (depth == 0)
                return FindInLeaf(list, entries, at, logical, out run);
            if (at < 0)
            {
                run = entries == 0 ? long.MaxValue : First(list, 0) - logical;
                return 0;
            }

            ReadOnlySpan<byte> index = list[(at * 12)..];
            ulong child = BinaryPrimitives.ReadUInt32LittleEndian(index[4..]) | ((ulong)BinaryPrimitives.ReadUInt16LittleEndian(index[8..]) << 32);
            node = files.Block(child);
            expected = depth - 1;
        }
    }

    private static ulong FindInLeaf(ReadOnlySpan<byte> list, int entries, int at, long logical, out long run)
    {
        if (at >= 0)
        {
            ReadOnlySpan<byte> extent = list[(at * 12)..];
            int length = BinaryPrimitives.ReadUInt16LittleEndian(extent[4..]);
            bool initialized = length <= InitializedLimit;
            length = initialized ? length : length - InitializedLimit;
            long within = logical - First(list, at);
            if (within < length)
            {
                run = length - within;
                ulong start = BinaryPrimitives.ReadUInt32LittleEndian(extent[8..]) | ((ulong)BinaryPrimitives.ReadUInt16LittleEndian(extent[6..]) << 32);
                return initialized ? start + (ulong)within : 0;
            }
        }

        // A hole, up to the next extent; there may be more in the next leaf, and then this is not the last that is asked.
        run = at + 1 < entries ? Math.Max(1, First(list, at + 1) - logical) : 1;
        return 0;
    }

    private static long First(ReadOnlySpan<byte> list, int at) => BinaryPrimitives.ReadUInt32LittleEndian(list[(at * 12)..]);

    private static int LastNotAbove(ReadOnlySpan<byte> list, int entries, long logical)
    {
        int low = 0;
        int high = entries;
        while (low < high)
        {
            int middle = (low + high) / 2;
            if (First(list, middle) <= logical)
                low = middle + 1;
            else
                high = middle;
        }

        return low - 1;
    }

    private ulong FindNumber(long logical, out long run)
    {
        run = 1;
        if (logical < 12)
            return BinaryPrimitives.ReadUInt32LittleEndian(inode.Map[((int)logical * 4)..]);
        logical -= 12;
        long each = files.Superblock.BlockSize / 4;
        long covered = each;
        for (int level = 1; level <= 3; level++, covered *= each)
        {
            if (logical >= covered)
            {
                logical -= covered;
                continue;
            }

            ulong block = BinaryPrimitives.ReadUInt32LittleEndian(inode.Map[((11 + level) * 4)..]);
            for (long below = covered / each; block != 0; below /= each)
            {
                block = BinaryPrimitives.ReadUInt32LittleEndian(files.Block(block)[(int)(logical / below % each * 4)..]);
                if (below == 1)
                    break;
            }

            return block;
        }

        throw Damaged();
    }

    private BootException Damaged() => ExtSuperblock.Damaged($"the map of inode {inode.Number}");
}
