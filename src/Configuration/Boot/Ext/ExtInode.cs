// One file, folder or link of an ext file system.

using System.Buffers.Binary;

namespace XenSharp.Configuration.Boot.Ext;

/// <summary>An inode as it is on the disk.</summary>
internal sealed class ExtInode
{
    private const uint ExtentsFlag = 0x80000;
    private const uint InlineDataFlag = 0x1000_0000;
    private const uint EncryptedFlag = 0x800;
    private const uint CompressedFlag = 0x4;
    private const uint XattrMagic = 0xea02_0000;

    /// <summary>The index of "system." among the prefixes of extended attributes.</summary>
    private const byte SystemPrefix = 7;

    private readonly byte[] _raw;

    internal ExtInode(uint number, byte[] raw)
    {
        Number = number;
        _raw = raw;
        ushort mode = BinaryPrimitives.ReadUInt16LittleEndian(raw);
        Type = mode & 0xf000;
        Flags = BinaryPrimitives.ReadUInt32LittleEndian(raw.AsSpan(0x20));

        // The upper half of the size is another field in folders of old file systems; none has 4 GiB.
        Size = BinaryPrimitives.ReadUInt32LittleEndian(raw.AsSpan(4));
        if (IsFile)
            Size |= (long)BinaryPrimitives.ReadUInt32LittleEndian(raw.AsSpan(0x6c)) << 32;
        if (Size < 0)
            throw ExtSuperblock.Damaged($"the size of inode {number}");
        if ((Flags & EncryptedFlag) != 0)
            throw new BootException("What the kernel is read from is encrypted (fscrypt); put it into a folder that is not.");
        if ((Flags & CompressedFlag) != 0 && !HasExtents)
            throw new BootException("What the kernel is read from is compressed, which Linux cannot read either.");
    }

    internal uint Number { get; }

    internal int Type { get; }

    internal uint Flags { get; }

    /// <summary>Bytes of content.</summary>
    internal long Size { get; }

    internal bool IsFile => Type == 0x8000;

    internal bool IsFolder => Type == 0x4000;

    internal bool IsLink => Type == 0xa000;

    /// <summary>The map of blocks is a tree of extents, not of block numbers.</summary>
    internal bool HasExtents => (Flags & ExtentsFlag) != 0;

    /// <summary>The content is in the inode.</summary>
    internal bool IsInline => (Flags & InlineDataFlag) != 0;

    /// <summary>A link whose target is where others have their map of blocks.</summary>
    internal bool IsFastLink => IsLink && !HasExtents && !IsInline && Size < 60;

    /// <summary>The map of blocks: 60 bytes.</summary>
    internal ReadOnlySpan<byte> Map => _raw.AsSpan(0x28, 60);

    /// <summary>The content of an <see cref="IsInline"/> inode: the map's 60 bytes, and what is in the attribute system.data.</summary>
    internal byte[] InlineContent()
    {
        byte[] content = new byte[Math.Min(Size, _raw.Length)];
        int first = Math.Min(content.Length, 60);
        Map[..first].CopyTo(content);
        if (content.Length > 60)
            DataAttribute()[..Math.Min(DataAttribute().Length, content.Length - 60)].CopyTo(content.AsSpan(60));
        return content;
    }

    private ReadOnlySpan<byte> DataAttribute()
    {
        if (_raw.Length <= 128 + 4)
            return [];
        int start = 128 + BinaryPrimitives.ReadUInt16LittleEndian(_raw.AsSpan(128));
        if (start + 4 > _raw.Length || BinaryPrimitives.ReadUInt32LittleEndian(_raw.AsSpan(start)) != XattrMagic)
            return [];
        ReadOnlySpan<byte> entries = _raw.AsSpan(start + 4);
        for (int at = 0; at + 16 <= entries.Length && entries[at] != 0;)
        {
            int nameLength = entries[at];
            int valueOffset = BinaryPrimitives.ReadUInt16LittleEndian(entries[(at + 2)..]);
            uint valueSize = BinaryPrimitives.ReadUInt32LittleEndian(entries[(at + 8)..]);
            if (at + 16 + nameLength > entries.Length)
                break;
            if (entries[at + 1] == SystemPrefix && entries.Slice(at + 16, nameLength).SequenceEqual("data"u8))
            {
                return valueSize <= entries.Length && valueOffset <= entries.Length - (int)valueSize
                    ? entries.Slice(valueOffset, (int)valueSize)
                    : throw ExtSuperblock.Damaged($"the attributes of inode {Number}");
            }

            at += 16 + ((nameLength + 3) & ~3);
        }

        return [];
    }
}
