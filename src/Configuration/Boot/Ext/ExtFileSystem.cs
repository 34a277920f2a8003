// Files by path, out of an ext2, ext3 or ext4 file system that is not mounted.

using System.Buffers.Binary;
using System.Text;

namespace XenSharp.Configuration.Boot.Ext;

/// <summary>
/// Reads files, folders and links. The image may be anybody's work: what it says is checked before it is used, the depth of trees, the
/// length of chains and the number of blocks read are bounded, and nothing is written. The journal is not replayed, as pygrub does not:
/// of a file system that was not unmounted, a file may be read as it was before.
/// </summary>
internal sealed class ExtFileSystem
{
    private const uint RootInode = 2;
    private const int MostLinks = 40;
    private const int LongestPath = 4096;
    private const int LargestFolder = 16 << 20;

    /// <summary>Blocks of trees, tables and folders that are kept.</summary>
    private const int KeptBlocks = 64;

    /// <summary>Blocks of trees, tables and folders that are read in all; a kernel and its ramdisk need hundreds.</summary>
    private const int MostBlocks = 500_000;

    private readonly ImageReader _volume;
    private readonly Dictionary<ulong, byte[]> _blocks = [];
    private readonly Queue<ulong> _order = new();
    private int _read;

    private ExtFileSystem(ImageReader volume, ExtSuperblock superblock)
    {
        _volume = volume;
        Superblock = superblock;
    }

    internal ExtSuperblock Superblock { get; }

    /// <summary>Opens the file system of a volume.</summary>
    /// <returns>Null if it has none of this kind.</returns>
    /// <exception cref="BootException">It has one that cannot be read.</exception>
    internal static ExtFileSystem? Open(ImageReader volume) => ExtSuperblock.Read(volume) is { } superblock ? new ExtFileSystem(volume, superblock) : null;

    /// <summary>Whether there is a file of that path, links followed.</summary>
    internal bool FileExists(string path) => Find(path) is { IsFile: true };

    /// <summary>Whether there is anything of that path, links followed.</summary>
    internal bool Exists(string path) => Find(path) is not null;

    /// <summary>Bytes of a file; null if there is none of that path.</summary>
    internal long? FileSize(string path) => Find(path) is { IsFile: true } inode ? inode.Size : null;

    /// <summary>Reads a file.</summary>
    /// <param name="path">Its path from the root, links followed.</param>
    /// <param name="limit">The most bytes that it may have.</param>
    /// <exception cref="BootException">There is none, it is larger, or the file system is damaged.</exception>
    internal byte[] ReadFile(string path, int limit)
    {
        ExtInode inode = Find(path) ?? throw new BootException($"There is no file {path} in the disk's {Superblock.Kind} file system.");
        if (!inode.IsFile)
            throw new BootException($"{path}, in the disk's {Superblock.Kind} file system, is no file.");
        if (inode.Size > limit)
            throw new BootException($"{path}, in the disk's {Superblock.Kind} file system, is larger than the {limit >> 20} MiB that it may have.");
        return ReadContent(inode);
    }

    /// <summary>The names in a folder; none if there is no folder of that path.</summary>
    internal IReadOnlyList<string> List(string path)
    {
        if (Find(path) is not { IsFolder: true } folder)
            return [];
        var names = new List<string>();
        foreach ((string name, _) in Entries(folder))
            names.Add(name);
        return names;
    }

    /// <summary>A block of a tree, a table or a folder.</summary>
    internal ReadOnlySpan<byte> Block(ulong number)
    {
        if (_blocks.TryGetValue(number, out byte[]? block))
            return block;
        if (number >= Superblock.BlockCount)
            throw ExtSuperblock.Damaged($"a block number, {number}");
        Count(1);
        block = new byte[Superblock.BlockSize];
        _volume.Read((long)number * Superblock.BlockSize, block);
        if (_order.Count >= KeptBlocks)
            _blocks.Remove(_order.Dequeue());
        _blocks.Add(number, block);
        _order.Enqueue(number);
        return block;
    }

    private void Count(int blocks)
    {
        _read += blocks;
        if (_read > MostBlocks)
            throw ExtSuperblock.Damaged("trees or folders without end");
    }

    private ExtInode? Find(string path)
    {
        ExtInode current = Inode(RootInode);
        var folders = new Stack<ExtInode>();
        var rest = new Stack<string>();
        Push(rest, path);
        int links = 0;
        while (rest.TryPop(out string? name))
        {
            if (!current.IsFolder)
                return null;
            if (name == "..")
            {
                current = folders.Count > 0 ? folders.Pop() : current;
                continue;
            }

            if (Lookup(current, name) is not { } number)
                return null;
            ExtInode next = Inode(number);
            if (!next.IsLink)
            {
                folders.Push(current);
                current = next;
                continue;
            }

            if (++links > MostLinks)
                throw new BootException($"{path}, in the disk's {Superblock.Kind} file system, is a link that leads round in a circle.");
            string target = LinkTarget(next);
            if (target.StartsWith('/'))
            {
                folders.Clear();
                current = Inode(RootInode);
            }

            Push(rest, target);
            if (rest.Count > LongestPath)
                throw new BootException($"{path}, in the disk's {Superblock.Kind} file system, is a link to a path that is too long.");
        }

        return current;
    }

    private static void Push(Stack<string> rest, string path)
    {
        foreach (string name in path.Split('/').Reverse())
        {
            if (name is not ("" or "."))
                rest.Push(name);
        }
    }

    private string LinkTarget(ExtInode link)
    {
        if (link.Size is 0 or >= LongestPath)
            throw ExtSuperblock.Damaged($"the link of inode {link.Number}");
        return Encoding.UTF8.GetString(link.IsFastLink ? link.Map[..(int)link.Size] : ReadContent(link));
    }

    private uint? Lookup(ExtInode folder, string name)
    {
        foreach ((string found, uint inode) in Entries(folder))
        {
            if (found == name)
                return inode;
        }

        return null;
    }

    /// <summary>
    /// The entries of a folder, without . and .., in the order in which they lie in its blocks. A folder with an index of hashes is read
    /// the same way: its index lies in entries that are not used.
    /// </summary>
    private IEnumerable<(string Name, uint Inode)> Entries(ExtInode folder)
    {
        if (folder.Size > LargestFolder)
            throw ExtSuperblock.Damaged($"the size of the folder of inode {folder.Number}");
        Count((int)(folder.Size / Superblock.BlockSize));
        byte[] content = ReadContent(folder);

        // Inline: the parent's number first, then entries in both places that content has; elsewhere none crosses a block.
        if (folder.IsInline)
        {
            foreach ((string, uint) entry in EntriesOf(content, 4, Math.Min(60, content.Length)))
                yield return entry;
            foreach ((string, uint) entry in EntriesOf(content, 60, content.Length))
                yield return entry;
            yield break;
        }

        for (int block = 0; block + Superblock.BlockSize <= content.Length; block += Superblock.BlockSize)
        {
            foreach ((string, uint) entry in EntriesOf(content, block, block + Superblock.BlockSize))
                yield return entry;
        }
    }

    private IEnumerable<(string Name, uint Inode)> EntriesOf(byte[] content, int start, int end)
    {
        for (int at = start; at + 8 <= end;)
        {
            uint inode = BinaryPrimitives.ReadUInt32LittleEndian(content.AsSpan(at));
            int length = BinaryPrimitives.ReadUInt16LittleEndian(content.AsSpan(at + 4));

            // 65536 does not fit into the field.
            length = length is 0 or 0xffff && Superblock.BlockSize == 65536 ? 65536 : length & ~3;
            int nameLength = content[at + 6];
            if (length < 8 || length > end - at || nameLength > length - 8)
                yield break;
            if (inode != 0 && nameLength > 0)
            {
                string name = Encoding.UTF8.GetString(content, at + 8, nameLength);
                if (name is not ("." or ".."))
                    yield return (name, inode);
            }

            at += length;
        }
    }

    private ExtInode Inode(uint number)
    {
        if (number == 0 || number > Superblock.InodeCount)
            throw ExtSuperblock.Damaged($"an inode number, {number}");
        uint group = (number - 1) / Superblock.InodesPerGroup;
        uint index = (number - 1) % Superblock.InodesPerGroup;
        ReadOnlySpan<byte> descriptor = Descriptor(group);
        ulong table = BinaryPrimitives.ReadUInt32LittleEndian(descriptor[8..]);
        if (Superblock.DescriptorSize >= 64)
            table |= (ulong)BinaryPrimitives.ReadUInt32LittleEndian(descriptor[0x28..]) << 32;
        ulong offset = (ulong)index * (uint)Superblock.InodeSize;
        byte[] raw = Block(table + (offset / (uint)Superblock.BlockSize))
            .Slice((int)(offset % (uint)Superblock.BlockSize), Superblock.InodeSize).ToArray();
        return new ExtInode(number, raw);
    }

    private ReadOnlySpan<byte> Descriptor(uint group)
    {
        uint perBlock = (uint)(Superblock.BlockSize / Superblock.DescriptorSize);
        uint metaGroup = group / perBlock;
        ulong block;
        if (!Superblock.MetaBlockGroups || metaGroup < Superblock.FirstMetaBlockGroup)
        {
            block = Superblock.FirstDataBlock + 1UL + metaGroup;
        }
        else
        {
            // In the first group of those that the block describes, behind a superblock if that has one.
            uint first = metaGroup * perBlock;
            block = Superblock.FirstDataBlock + ((ulong)first * Superblock.BlocksPerGroup) + (HasSuperblock(first) ? 1u : 0u);
        }

        return Block(block).Slice((int)(group % perBlock) * Superblock.DescriptorSize, Superblock.DescriptorSize);
    }

    private bool HasSuperblock(uint group)
    {
        if (group == 0)
            return true;
        if (Superblock.SparseSuper2)
            return group == Superblock.BackupGroups.First || group == Superblock.BackupGroups.Second;
        return !Superblock.SparseSuper || group == 1 || IsPower(group, 3) || IsPower(group, 5) || IsPower(group, 7);

        static bool IsPower(uint number, uint root)
        {
            while (number % root == 0)
                number /= root;
            return number == 1;
        }
    }

    private byte[] ReadContent(ExtInode inode)
    {
        if (inode.IsInline)
            return inode.InlineContent();
        byte[] content = new byte[inode.Size];
        var map = new ExtBlockMap(this, inode);
        int size = Superblock.BlockSize;
        for (long at = 0; at < content.Length;)
        {
            ulong block = map.Find(at / size, out long run);
            int length = (int)Math.Min(content.Length - at, run > int.MaxValue / size ? int.MaxValue : run * size);

            // Holes stay zero.
            if (block != 0)
            {
                ulong blocks = (ulong)(length + size - 1) / (uint)size;
                if (block >= Superblock.BlockCount || blocks > Superblock.BlockCount - block)
                    throw ExtSuperblock.Damaged($"the blocks of inode {inode.Number}");
                _volume.Read((long)block * size, content.AsSpan((int)at, length));
            }

            at += length;
        }

        return content;
    }
}
