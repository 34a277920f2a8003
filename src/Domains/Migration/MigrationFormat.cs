// The numbers of Xen's domain image format, version 3 (docs/specs/libxc-migration-stream.pandoc of Xen's sources).
namespace XenSharp.Domains.Migration;

/// <summary>Record types (REC_TYPE_*). Those with bit 31 may be passed over by who does not know them.</summary>
internal enum RecordType : uint
{
    End = 0x00,
    PageData = 0x01,
    PvInfo = 0x02,
    PvP2MFrames = 0x03,
    VcpuBasic = 0x04,
    VcpuExtended = 0x05,
    VcpuXsave = 0x06,
    SharedInfo = 0x07,
    TscInfo = 0x08,
    HvmContext = 0x09,
    HvmParams = 0x0a,
    Toolstack = 0x0b,
    VcpuMsrs = 0x0c,
    Verify = 0x0d,
    Checkpoint = 0x0e,
    CheckpointDirtyPfnList = 0x0f,
    StaticDataEnd = 0x10,
    CpuidPolicy = 0x11,
    MsrPolicy = 0x12,
}

/// <summary>What a page of an image is (XEN_DOMCTL_PFINFO_*, in the low four bits). Tables are 1 to 4, and 8 more where pinned.</summary>
internal enum PageInfoType : byte
{
    /// <summary>An ordinary page, with its contents.</summary>
    Normal = 0x0,

    /// <summary>To be added to the level of a pinned table (LPINTAB).</summary>
    Pinned = 0x8,

    /// <summary>A page that the hardware has lost; there is none.</summary>
    Broken = 0xd,

    /// <summary>A page without contents, to be allocated: all zeroes.</summary>
    AllocateOnly = 0xe,

    /// <summary>No page.</summary>
    None = 0xf,
}

/// <summary>Sizes, limits and constants.</summary>
internal static class MigrationFormat
{
    public const ulong Marker = ulong.MaxValue;

    /// <summary>"XENF".</summary>
    public const uint Id = 0x58454E46;
    public const uint Version = 3;

    /// <summary>The oldest version that is read: it lacks STATIC_DATA_END.</summary>
    public const uint OldestVersion = 2;
    public const ushort BigEndianOption = 1;
    public const int ImageHeaderSize = 24;

    public const uint PvDomain = 1;
    public const uint HvmDomain = 2;
    public const int DomainHeaderSize = 16;

    public const int RecordHeaderSize = 8;
    public const uint OptionalRecord = 0x8000_0000;
    public const int RecordAlignment = 8;

    /// <summary>Longest body that Xen's tools read (REC_LENGTH_MAX).</summary>
    public const uint MaxRecordLength = 128 << 20;

    /// <summary>Pages of one PAGE_DATA record that is written (MAX_BATCH_SIZE).</summary>
    public const int BatchPages = 1024;

    /// <summary>Pages of one PAGE_DATA record that is read.</summary>
    public const int MaxBatchPages = 65536;

    public const int PageTypeShift = 60;
    public const ulong PfnMask = (1UL << 52) - 1;

    /// <summary>Guest width in bytes and levels of its page tables, as X86_PV_INFO tells them.</summary>
    public const byte GuestWidth = 8;
    public const byte PageTableLevels = 4;

    /// <summary>Entries of a page of the p2m list.</summary>
    public const int P2MEntriesPerPage = 512;

    /// <summary>Pages of a p2m list at most: those of 2 TiB.</summary>
    public const ulong MaxP2MPages = 1 << 20;

    /// <summary>An entry of the p2m list that names no frame (INVALID_MFN).</summary>
    public const ulong InvalidMfn = ulong.MaxValue;

    /// <summary>Subleaf of a CPUID leaf that has none (XEN_CPUID_NO_SUBLEAF).</summary>
    public const uint NoSubleaf = uint.MaxValue;

    /// <summary>Bytes of struct xen_cpuid_leaf, xen_msr_entry and xen_domctl_vcpu_msr.</summary>
    public const int CpuidLeafSize = 24;
    public const int MsrSize = 16;

    /// <summary>The vCPU's number in front of what a vCPU record is about, with padding.</summary>
    public const int VcpuHeaderSize = 8;

    /// <summary>The level of a page table, 1 to 4; 0 for anything else.</summary>
    public static int LevelOf(PageInfoType type)
        => (int)type is (>= 1 and <= PageTableLevels) or (>= 9 and <= 8 + PageTableLevels) ? (int)type & 7 : 0;

    /// <summary>Whether contents come with a page of this type.</summary>
    public static bool HasData(PageInfoType type) => type < PageInfoType.Broken;

    /// <summary>Whether the format knows the type.</summary>
    public static bool IsKnown(PageInfoType type) => type is PageInfoType.Normal or >= PageInfoType.Broken || LevelOf(type) != 0;
}
