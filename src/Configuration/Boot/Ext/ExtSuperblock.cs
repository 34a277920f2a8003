// What an ext2, ext3 or ext4 file system says of itself.

using System.Buffers.Binary;
using System.Text;

namespace XenSharp.Configuration.Boot.Ext;

/// <summary>The fields of the superblock that reading needs (Linux: Documentation/filesystems/ext4), checked.</summary>
internal sealed class ExtSuperblock
{
    private const int Offset = 1024;
    private const ushort Magic = 0xef53;

    private const uint HasFileTypes = 0x2;
    private const uint NeedsRecoveryFlag = 0x4;
    private const uint MetaBlockGroupsFlag = 0x10;
    private const uint Has64BitFlag = 0x80;

    /// <summary>
    /// What can be read: file types, recovery, meta block groups, extents, 64 bits, multiple mount protection, flexible groups, values in
    /// inodes, data in entries, checksum seeds, large directories, inline data, encryption of what is not asked for, and case folding.
    /// </summary>
    private const uint Readable = 0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x1000 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0x20000;

    private const uint SparseSuperFlag = 0x1;
    private const uint SparseSuper2Flag = 0x200;

    private ExtSuperblock(ReadOnlySpan<byte> block)
    {
        uint revision = U32(block, 0x4c);
        uint compatible = U32(block, 0x5c);
        uint incompatible = revision == 0 ? 0 : U32(block, 0x60);
        uint readOnlyCompatible = revision == 0 ? 0 : U32(block, 0x64);
        if ((incompatible & ~Readable) is not 0 and var unknown)
            throw new BootException($"The ext file system has features that cannot be read here (incompatible 0x{unknown:x}).");
        uint shift = U32(block, 0x18);
        if (shift > 6)
            throw Damaged("its block size");
        BlockSize = 1024 << (int)shift;
        InodeSize = revision == 0 ? 128 : U16(block, 0x58);
        if (InodeSize < 128 || InodeSize > BlockSize || !System.Numerics.BitOperations.IsPow2(InodeSize))
            throw Damaged("its inode size");
        InodeCount = U32(block, 0x0);
        InodesPerGroup = U32(block, 0x28);
        uint blocksPerGroup = U32(block, 0x20);
        FirstDataBlock = U32(block, 0x14);
        bool has64Bit = (incompatible & Has64BitFlag) != 0;
        BlockCount = U32(block, 0x4) | (has64Bit ? (ulong)U32(block, 0x150) << 32 : 0);
        if (InodesPerGroup == 0 || blocksPerGroup == 0 || BlockCount <= FirstDataBlock || FirstDataBlock > 1)
            throw Damaged("its sizes");
        BlocksPerGroup = blocksPerGroup;
        DescriptorSize = has64Bit ? U16(block, 0xfe) : 32;
        if (DescriptorSize < (has64Bit ? 64 : 32) || DescriptorSize > BlockSize || !System.Numerics.BitOperations.IsPow2(DescriptorSize))
            throw Damaged("its descriptor size");
        MetaBlockGroups = (incompatible & MetaBlockGroupsFlag) != 0;
        FirstMetaBlockGroup = U32(block, 0x104);
        NeedsRecovery = (incompatible & NeedsRecoveryFlag) != 0;
        FileTypes = (incompatible & HasFileTypes) != 0;
        SparseSuper = (readOnlyCompatible & SparseSuperFlag) != 0;
        SparseSuper2 = (compatible & SparseSuper2Flag) != 0;
        BackupGroups = (U32(block, 0x24c), U32(block, 0x250));
        Uuid = new Guid(block.Slice(0x68, 16), bigEndian: true);
        ReadOnlySpan<byte> label = block.Slice(0x78, 16);
        int end = label.IndexOf((byte)0);
        Label = Encoding.UTF8.GetString(end < 0 ? label : label[..end]);
        Kind = (incompatible & (0x40 | 0x80 | 0x200)) != 0 ? "ext4" : (compatible & 0x4) != 0 ? "ext3" : "ext2";
    }

    /// <summary>ext2, ext3 or ext4, for people.</summary>
    internal string Kind { get; }

    /// <summary>Bytes a block: 1024 to 65536.</summary>
    internal int BlockSize { get; }

    internal int InodeSize { get; }

    internal uint InodeCount { get; }

    internal uint InodesPerGroup { get; }

    internal ulong BlockCount { get; }

    internal uint BlocksPerGroup { get; }

    internal uint FirstDataBlock { get; }

    /// <summary>Bytes a group descriptor: 32, or 64 and more.</summary>
    internal int DescriptorSize { get; }

    /// <summary>Group descriptors are in the groups that they describe, from <see cref="FirstMetaBlockGroup"/> on.</summary>
    internal bool MetaBlockGroups { get; }

    internal uint FirstMetaBlockGroup { get; }

    /// <summary>It was not unmounted: the journal has what is not in its place yet.</summary>
    internal bool NeedsRecovery { get; }

    internal bool FileTypes { get; }

    internal bool SparseSuper { get; }

    internal bool SparseSuper2 { get; }

    internal (uint First, uint Second) BackupGroups { get; }

    internal Guid Uuid { get; }

    internal string Label { get; }

    /// <summary>Reads the superblock of a volume.</summary>
    /// <returns>Null if there is none.</returns>
    /// <exception cref="BootException">It cannot be used.</exception>
    internal static ExtSuperblock? Read(ImageReader volume)
    {
        Span<byte> block = stackalloc byte[1024];
        volume.Read(Offset, block);
        if (U16(block, 0x38) != Magic)
            return null;
        if ((U32(block, 0x60) & 0x8) != 0 && U32(block, 0x4c) != 0)
            throw new BootException("This is the journal of an ext file system that is elsewhere.");
        return new ExtSuperblock(block);
    }

    internal static BootException Damaged(string what) => new($"The ext file system is damaged ({what}): repair it with e2fsck.");

    private static ushort U16(ReadOnlySpan<byte> block, int offset) => BinaryPrimitives.ReadUInt16LittleEndian(block[offset..]);

    private static uint U32(ReadOnlySpan<byte> block, int offset) => BinaryPrimitives.ReadUInt32LittleEndian(block[offset..]);
}
