// The xenstore wire protocol as data: message types, the message header, the limits. Numbers: Xen's public header
// io/xs_wire.h; meaning: Xen's docs/misc/xenstore.txt.
using System.Buffers.Binary;

namespace XenSharp.Devices.Xenstore;

/// <summary>The type word of a message (enum xsd_sockmsg_type of io/xs_wire.h).</summary>
public enum XenstoreMessageType : uint
{
    Control = 0,
    Directory = 1,
    Read = 2,
    GetPermissions = 3,
    Watch = 4,
    Unwatch = 5,
    TransactionStart = 6,
    TransactionEnd = 7,
    Introduce = 8,
    Release = 9,
    GetDomainPath = 10,
    Write = 11,
    MakeDirectory = 12,
    Remove = 13,
    SetPermissions = 14,
    WatchEvent = 15,
    Error = 16,
    IsDomainIntroduced = 17,
    Resume = 18,
    SetTarget = 19,

    // 20 was XS_RESTRICT, removed from the protocol.
    ResetWatches = 21,
    DirectoryPart = 22,
}

/// <summary>Sizes that the protocol fixes, in bytes.</summary>
public static class XenstoreWire
{
    /// <summary>Size of struct xsd_sockmsg.</summary>
    public const int HeaderSize = 16;

    /// <summary>XENSTORE_PAYLOAD_MAX: the longest payload in either direction.</summary>
    public const int PayloadMaximum = 4096;

    /// <summary>XENSTORE_ABS_PATH_MAX: the longest absolute path.</summary>
    public const int AbsolutePathMaximum = 3072;

    /// <summary>XENSTORE_REL_PATH_MAX: the longest path relative to a domain's own folder.</summary>
    public const int RelativePathMaximum = 2048;
}

/// <summary>The 16 bytes in front of every message (struct xsd_sockmsg, little endian).</summary>
/// <param name="Type">What the message is.</param>
/// <param name="RequestId">Chosen by the client and echoed in the reply; 0 in a watch event.</param>
/// <param name="TransactionId">The transaction the request belongs to, 0 for none.</param>
/// <param name="Length">Bytes of payload that follow, at most <see cref="XenstoreWire.PayloadMaximum"/>.</param>
public readonly record struct XenstoreHeader(XenstoreMessageType Type, uint RequestId, uint TransactionId, uint Length)
{
    /// <summary>Decodes the first 16 bytes of <paramref name="source"/>; the length is not judged here.</summary>
    public static XenstoreHeader Decode(ReadOnlySpan<byte> source) => new(
        (XenstoreMessageType)BinaryPrimitives.ReadUInt32LittleEndian(source),
        BinaryPrimitives.ReadUInt32LittleEndian(source[4..]),
        BinaryPrimitives.ReadUInt32LittleEndian(source[8..]),
        BinaryPrimitives.ReadUInt32LittleEndian(source[12..]));

    /// <summary>Encodes into the first 16 bytes of <paramref name="destination"/>.</summary>
    public void Encode(Span<byte> destination)
    {
        BinaryPrimitives.WriteUInt32LittleEndian(destination, (uint)Type);
        BinaryPrimitives.WriteUInt32LittleEndian(destination[4..], RequestId);
        BinaryPrimitives.WriteUInt32LittleEndian(destination[8..], TransactionId);
        BinaryPrimitives.WriteUInt32LittleEndian(destination[12..], Length);
    }
}
