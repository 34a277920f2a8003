// The shared structures of a PV network interface: xen/include/public/io/netif.h and ring.h.
using System.Runtime.InteropServices;

namespace XenSharp.Devices.Network;

/// <summary>struct netif_tx_request: a part of a frame that the guest sends.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct NetifTxRequest
{
    public uint Reference;

    /// <summary>Where it begins in the page.</summary>
    public ushort Offset;
    public NetifTxFlags Flags;
    public ushort Id;

    /// <summary>Bytes of the part; of the first one, the bytes of the whole frame.</summary>
    public ushort Size;
}

/// <summary>NETTXF_*.</summary>
[Flags]
internal enum NetifTxFlags : ushort
{
    ChecksumBlank = 1 << 0,
    DataValidated = 1 << 1,
    MoreData = 1 << 2,
    ExtraInfo = 1 << 3,
}

/// <summary>struct netif_rx_request: a page that the guest gives for a part of a frame.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct NetifRxRequest
{
    public ushort Id;
    public ushort Pad;
    public uint Reference;
}

/// <summary>struct netif_rx_response.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct NetifRxResponse
{
    public ushort Id;
    public ushort Offset;
    public NetifRxFlags Flags;

    /// <summary>Bytes of the part, or a <see cref="NetifStatus"/>.</summary>
    public short Status;
}

/// <summary>NETRXF_*.</summary>
[Flags]
internal enum NetifRxFlags : ushort
{
    DataValidated = 1 << 0,
    ChecksumBlank = 1 << 1,
    MoreData = 1 << 2,
    ExtraInfo = 1 << 3,
}

/// <summary>NETIF_RSP_*.</summary>
internal enum NetifStatus : short
{
    Dropped = -2,
    Error = -1,
    Okay = 0,

    /// <summary>No answer: the slot held an extra info.</summary>
    Null = 1,
}

/// <summary>struct netif_extra_info, the first eight bytes of a slot, as one number: type, flags, and six bytes by type.</summary>
internal readonly record struct NetifExtraInfo(ulong Value)
{
    /// <summary>Another one follows (XEN_NETIF_EXTRA_FLAG_MORE).</summary>
    private const byte More = 1;

    public NetifExtraType Type => (NetifExtraType)(byte)Value;

    public bool HasMore => ((byte)(Value >> 8) & More) != 0;

    /// <summary>Of a GSO info: payload of a segment in bytes.</summary>
    public ushort SegmentSize => (ushort)(Value >> 16);

    /// <summary>Of a GSO info: XEN_NETIF_GSO_TYPE_*, whose numbers are those of <see cref="SegmentationKind"/>.</summary>
    public byte SegmentationType => (byte)(Value >> 32);

    /// <summary>Of an MCAST info: the address.</summary>
    public MacAddress Address
    {
        get
        {
            Span<byte> bytes = stackalloc byte[sizeof(ulong)];
            System.Buffers.Binary.BinaryPrimitives.WriteUInt64LittleEndian(bytes, Value);
            return MacAddress.Read(bytes[2..]);
        }
    }

    public static NetifExtraInfo Segmentation(SegmentationKind kind, ushort segmentSize)
        => new((byte)NetifExtraType.Segmentation | ((ulong)segmentSize << 16) | ((ulong)kind << 32));
}

/// <summary>XEN_NETIF_EXTRA_TYPE_*.</summary>
internal enum NetifExtraType : byte
{
    None = 0,
    Segmentation = 1,
    MulticastAdd = 2,
    MulticastDelete = 3,
    Hash = 4,

    /// <summary>The first number that means nothing to this back end.</summary>
    End = 5,
}

/// <summary>The indexes at the start of a ring's page (struct *_sring): four uint32, and 48 bytes that are the front end's.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct RingIndexes
{
    /// <summary>Bytes before the first slot.</summary>
    public const int Size = 64;

    public uint RequestProducer;
    public uint RequestEvent;
    public uint ResponseProducer;
    public uint ResponseEvent;
}
