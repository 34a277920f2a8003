// Layouts and numbers of xen/include/public/io/blkif.h, for 64-bit and 32-bit x86 guests.
using System.Buffers.Binary;

namespace XenSharp.Devices.Block;

/// <summary>BLKIF_OP_*.</summary>
internal enum BlkifOperation : byte
{
    Read = 0,
    Write = 1,
    WriteBarrier = 2,
    FlushDiskCache = 3,
    Discard = 5,
    Indirect = 6,
}

/// <summary>BLKIF_RSP_*.</summary>
internal enum BlkifStatus : short
{
    Okay = 0,
    Error = -1,
    OperationNotSupported = -2,
}

/// <summary>struct blkif_request_segment: a piece of a granted page.</summary>
/// <param name="Reference">The page's grant reference.</param>
/// <param name="FirstSector">First sector of 512 bytes in the page.</param>
/// <param name="LastSector">Last one, inclusive.</param>
internal readonly record struct BlkifSegment(uint Reference, byte FirstSector, byte LastSector)
{
    internal const int Size = 8;
    internal const int SectorsPerPage = 8;

    /// <summary>Whether the sectors are in a page and in order.</summary>
    internal bool IsValid => FirstSector <= LastSector && LastSector < SectorsPerPage;

    internal int Sectors => LastSector - FirstSector + 1;

    internal static BlkifSegment Read(ReadOnlySpan<byte> bytes) => new(BinaryPrimitives.ReadUInt32LittleEndian(bytes), bytes[4], bytes[5]);
}

/// <summary>
/// Where the fields of requests and responses are: the native layout, whose 64-bit fields are aligned to 8 bytes, and that of 32-bit x86,
/// where they are aligned to 4.
/// </summary>
internal sealed class BlkifAbi
{
    internal const int SectorShift = 9;

    /// <summary>BLKIF_MAX_SEGMENTS_PER_REQUEST.</summary>
    internal const int MaxDirectSegments = 11;

    /// <summary>BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST.</summary>
    internal const int MaxIndirectPages = 8;

    /// <summary>Segments that a page of indirect ones holds.</summary>
    internal const int SegmentsPerIndirectPage = 4096 / BlkifSegment.Size;

    /// <summary>BLKIF_DISCARD_SECURE.</summary>
    internal const byte DiscardSecure = 1;

    /// <summary>The ring's indexes take so many bytes before the first entry.</summary>
    internal const int RingHeaderSize = 64;

    internal const int LongestRequest = 112;
    internal const int LongestResponse = 16;

    private const int FirstNumberOffset64 = 8;
    private const int FirstNumberOffset32 = 4;

    private readonly int _id;
    private readonly int _responseSize;

    private BlkifAbi(string name, int requestSize, int responseSize, int id)
    {
        (Name, RequestSize, _responseSize, _id) = (name, requestSize, responseSize, id);
    }

    /// <summary>XEN_IO_PROTO_ABI_X86_64.</summary>
    internal static BlkifAbi X64 { get; } = new("x86_64-abi", LongestRequest, LongestResponse, FirstNumberOffset64);

    /// <summary>XEN_IO_PROTO_ABI_X86_32.</summary>
    internal static BlkifAbi X32 { get; } = new("x86_32-abi", 108, 12, FirstNumberOffset32);

    /// <summary>The value of the front end's node "protocol".</summary>
    internal string Name { get; }

    /// <summary>Bytes of a ring entry.</summary>
    internal int RequestSize { get; }

    /// <summary>Bytes of a response, at the start of its entry.</summary>
    internal int ResponseSize => _responseSize;

    /// <summary>Entries of a ring of so many pages: a power of two (__RING_SIZE).</summary>
    internal uint RingSize(int pages)
        => (uint)System.Numerics.BitOperations.RoundUpToPowerOf2((uint)(((pages * 4096) - RingHeaderSize) / RequestSize) + 1) >> 1;

    internal static BlkifOperation Operation(ReadOnlySpan<byte> request) => (BlkifOperation)request[0];

    /// <summary>Segments of a direct request.</summary>
    internal static int Segments(ReadOnlySpan<byte> request) => request[1];

    internal static byte DiscardFlags(ReadOnlySpan<byte> request) => request[1];

    internal static BlkifOperation IndirectOperation(ReadOnlySpan<byte> request) => (BlkifOperation)request[1];

    internal static int IndirectSegments(ReadOnlySpan<byte> request) => BinaryPrimitives.ReadUInt16LittleEndian(request[2..]);

    internal ulong Id(ReadOnlySpan<byte> request) => BinaryPrimitives.ReadUInt64LittleEndian(request[_id..]);

    internal ulong Sector(ReadOnlySpan<byte> request) => BinaryPrimitives.ReadUInt64LittleEndian(request[(_id + 8)..]);

    internal BlkifSegment Segment(ReadOnlySpan<byte> request, int index)
        => BlkifSegment.Read(request.Slice(_id + 16 + (index * BlkifSegment.Size), BlkifSegment.Size));

    internal ulong DiscardSectors(ReadOnlySpan<byte> request) => BinaryPrimitives.ReadUInt64LittleEndian(request[(_id + 16)..]);

    /// <summary>The grant reference of a page of indirect segments; they follow the device's handle, two bytes and two of padding.</summary>
    internal uint IndirectReference(ReadOnlySpan<byte> request, int index)
        => BinaryPrimitives.ReadUInt32LittleEndian(request[(_id + 20 + (index * sizeof(uint)))..]);

    /// <summary>Writes struct blkif_response.</summary>
    /// <param name="response">At least <see cref="LongestResponse"/> bytes.</param>
    /// <param name="id">The request's.</param>
    /// <param name="operation">The request's; of an indirect one that which it does.</param>
    /// <param name="status">What came of it.</param>
    internal static void WriteResponse(Span<byte> response, ulong id, BlkifOperation operation, BlkifStatus status)
    {
        response.Clear();
        BinaryPrimitives.WriteUInt64LittleEndian(response, id);
        response[8] = (byte)operation;
        BinaryPrimitives.WriteInt16LittleEndian(response[10..], (short)status);
    }
}
