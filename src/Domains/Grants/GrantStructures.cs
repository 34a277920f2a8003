// Numbers and structures of public grant_table.h.
using System.Runtime.InteropServices;
using XenSharp.Mmu;

namespace XenSharp.Domains.Grants;

/// <summary>GNTST_* of public grant_table.h: what becomes of one request.</summary>
public enum GrantStatus : short
{
    Okay = 0,
    GeneralError = -1,
    BadDomain = -2,
    BadReference = -3,
    BadHandle = -4,
    BadVirtualAddress = -5,
    BadDeviceAddress = -6,
    PermissionDenied = -8,
    BadPage = -9,
    BadCopyArgument = -10,
    Again = -12,
    NoSpace = -13,

    /// <summary>Not for the guest: the request is to be made again, when another vCPU has taken note of something (ERESTART).</summary>
    Restart = 1,
}

/// <summary>GTF_*: flags of an entry.</summary>
[Flags]
internal enum GrantFlags : ushort
{
    Invalid = 0,
    PermitAccess = 1,
    AcceptTransfer = 2,
    Transitive = 3,
    TypeMask = 3,

    /// <summary>Of an entry that permits access.</summary>
    ReadOnly = 1 << 2,
    Reading = 1 << 3,
    Writing = 1 << 4,
    SubPage = 1 << 8,

    /// <summary>Of an entry that accepts a transfer.</summary>
    TransferCommitted = 1 << 2,
    TransferCompleted = 1 << 3,
}

/// <summary>The first 32 bits of an entry of either version (struct grant_entry_header), which change together.</summary>
internal readonly record struct GrantHeader(uint Value)
{
    public GrantHeader(GrantFlags flags, ushort domain)
        : this((uint)flags | ((uint)domain << 16))
    {
    }

    public GrantFlags Flags => (GrantFlags)(ushort)Value;

    /// <summary>Who may use the entry.</summary>
    public ushort Domain => (ushort)(Value >> 16);

    public GrantFlags Type => Flags & GrantFlags.TypeMask;

    public GrantHeader With(GrantFlags flags) => new(Value | (uint)flags);
}

/// <summary>struct grant_entry_v1.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct GrantEntry1
{
    public GrantHeader Header;
    public uint Frame;
}

/// <summary>union grant_entry_v2.</summary>
[StructLayout(LayoutKind.Explicit, Size = 16)]
internal struct GrantEntry2
{
    [FieldOffset(0)] public GrantHeader Header;

    /// <summary>Of a part of a page: its first byte and its length.</summary>
    [FieldOffset(4)] public ushort PageOffset;
    [FieldOffset(6)] public ushort Length;

    /// <summary>Of a transitive entry: whose entry is meant, and which.</summary>
    [FieldOffset(4)] public ushort TransitiveDomain;
    [FieldOffset(8)] public uint TransitiveReference;

    [FieldOffset(8)] public ulong Frame;
}

/// <summary>struct gnttab_map_grant_ref.</summary>
[StructLayout(LayoutKind.Explicit, Size = 32)]
internal struct MapGrantRef
{
    [FieldOffset(0)] public ulong HostAddress;
    [FieldOffset(8)] public GrantMapFlags Flags;
    [FieldOffset(12)] public uint Reference;
    [FieldOffset(16)] public ushort Domain;
    [FieldOffset(18)] public GrantStatus Status;
    [FieldOffset(20)] public uint Handle;
    [FieldOffset(24)] public ulong DeviceBusAddress;
}

/// <summary>struct gnttab_unmap_grant_ref; struct gnttab_unmap_and_replace has the new address where the bus address is.</summary>
[StructLayout(LayoutKind.Explicit, Size = 24)]
internal struct UnmapGrantRef
{
    public const ulong StatusOffset = 20;

    [FieldOffset(0)] public ulong HostAddress;
    [FieldOffset(8)] public ulong DeviceBusAddress;
    [FieldOffset(8)] public ulong NewAddress;
    [FieldOffset(16)] public uint Handle;
}

/// <summary>struct gnttab_setup_table.</summary>
[StructLayout(LayoutKind.Explicit, Size = 24)]
internal struct SetupTable
{
    public const ulong StatusOffset = 8;

    [FieldOffset(0)] public ushort Domain;
    [FieldOffset(4)] public uint FrameCount;
    [FieldOffset(16)] public ulong FrameList;
}

/// <summary>struct gnttab_transfer.</summary>
[StructLayout(LayoutKind.Explicit, Size = 24)]
internal struct TransferFrame
{
    public const ulong StatusOffset = 16;

    [FieldOffset(0)] public ulong Frame;
    [FieldOffset(8)] public ushort Domain;
    [FieldOffset(12)] public uint Reference;
}

/// <summary>struct gnttab_copy_ptr: a reference or a frame.</summary>
[StructLayout(LayoutKind.Explicit, Size = 16)]
internal struct CopyPointer
{
    [FieldOffset(0)] public uint Reference;
    [FieldOffset(0)] public ulong Frame;
    [FieldOffset(8)] public ushort Domain;
    [FieldOffset(10)] public ushort Offset;
}

/// <summary>GNTCOPY_*.</summary>
[Flags]
internal enum CopyFlags : ushort
{
    None = 0,
    SourceReference = 1 << 0,
    DestinationReference = 1 << 1,
}

/// <summary>struct gnttab_copy.</summary>
[StructLayout(LayoutKind.Explicit, Size = 40)]
internal struct CopyRequest
{
    public const ulong StatusOffset = 36;

    [FieldOffset(0)] public CopyPointer Source;
    [FieldOffset(16)] public CopyPointer Destination;
    [FieldOffset(32)] public ushort Length;
    [FieldOffset(34)] public CopyFlags Flags;
}

/// <summary>struct gnttab_query_size.</summary>
[StructLayout(LayoutKind.Explicit, Size = 16)]
internal struct QuerySize
{
    [FieldOffset(0)] public ushort Domain;
    [FieldOffset(4)] public uint FrameCount;
    [FieldOffset(8)] public uint MaxFrames;
    [FieldOffset(12)] public GrantStatus Status;
}

/// <summary>struct gnttab_get_status_frames.</summary>
[StructLayout(LayoutKind.Explicit, Size = 16)]
internal struct GetStatusFrames
{
    public const ulong StatusOffset = 6;

    [FieldOffset(0)] public uint FrameCount;
    [FieldOffset(4)] public ushort Domain;
    [FieldOffset(8)] public ulong FrameList;
}

/// <summary>struct gnttab_get_version.</summary>
[StructLayout(LayoutKind.Explicit, Size = 8)]
internal struct GetVersion
{
    public const ulong VersionOffset = 4;

    [FieldOffset(0)] public ushort Domain;
}

/// <summary>struct gnttab_swap_grant_ref.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct SwapGrantRef
{
    public const ulong StatusOffset = 8;

    public uint First;
    public uint Second;
    private GrantStatus _status;
}

/// <summary>struct gnttab_cache_flush.</summary>
[StructLayout(LayoutKind.Explicit, Size = 16)]
internal struct CacheFlush
{
    /// <summary>GNTTAB_CACHE_CLEAN and GNTTAB_CACHE_INVAL.</summary>
    public const uint Clean = 1 << 0;
    public const uint Invalidate = 1 << 1;

    [FieldOffset(0)] public ulong DeviceBusAddress;
    [FieldOffset(8)] public ushort Offset;
    [FieldOffset(10)] public ushort Length;
    [FieldOffset(12)] public uint Operation;
}
