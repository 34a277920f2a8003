// Numbers of the network block device protocol (the NBD project's doc/proto.md), and its negotiation.
using System.Buffers.Binary;
using System.Text;

namespace XenSharp.Devices.Block.Images;

/// <summary>What a server says of the disk that it exports.</summary>
/// <param name="Size">Bytes.</param>
/// <param name="Flags">Transmission flags.</param>
/// <param name="MinimumBlock">The smallest unit of requests, in bytes.</param>
/// <param name="MaximumPayload">The most bytes of a read or write.</param>
internal readonly record struct NbdExport(ulong Size, NbdFlags Flags, uint MinimumBlock, uint MaximumPayload);

/// <summary>What an export can do.</summary>
[Flags]
internal enum NbdFlags : ushort
{
    HasFlags = 1,
    ReadOnly = 2,
    SendFlush = 4,
    SendTrim = 32,
}

/// <summary>Requests of the transmission phase.</summary>
internal enum NbdCommand : ushort
{
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
    Trim = 4,
}

/// <summary>The fixed newstyle negotiation, as a client makes it.</summary>
internal static class NbdProtocol
{
    internal const int RequestSize = 28;
    internal const int SimpleReplySize = 16;
    internal const uint RequestMagic = 0x25609513;
    internal const uint SimpleReplyMagic = 0x67446698;

    private const ulong ServerMagic = 0x4e42444d41474943;
    private const ulong OptionMagic = 0x49484156454f5054;
    private const ulong OptionReplyMagic = 0x0003e889045565a9;
    private const ushort FixedNewstyle = 1;
    private const ushort NoZeroes = 2;
    private const uint OptionGo = 7;
    private const uint ReplyAck = 1;
    private const uint ReplyInfo = 3;
    private const uint ReplyErrorBit = 1u << 31;
    private const ushort InfoExport = 0;
    private const ushort InfoBlockSize = 3;
    private const uint DefaultMaximumPayload = 32 << 20;
    private const int LongestReply = 4096;

    /// <summary>Chooses the export without a name and enters transmission, with simple replies.</summary>
    /// <exception cref="IOException">The server does not speak the protocol, or refuses.</exception>
    internal static NbdExport Negotiate(Stream stream)
    {
        Span<byte> hello = stackalloc byte[18];
        stream.ReadExactly(hello);
        ushort offered = BinaryPrimitives.ReadUInt16BigEndian(hello[16..]);
        if (BinaryPrimitives.ReadUInt64BigEndian(hello) != ServerMagic || BinaryPrimitives.ReadUInt64BigEndian(hello[8..]) != OptionMagic
            || (offered & FixedNewstyle) == 0)
        {
            throw new IOException("the server does not speak NBD's fixed newstyle protocol");
        }

        // Our flags, and NBD_OPT_GO: the empty name, and a wish for the block sizes.
        Span<byte> request = stackalloc byte[4 + 16 + 8];
        BinaryPrimitives.WriteUInt32BigEndian(request, (uint)(FixedNewstyle | (offered & NoZeroes)));
        BinaryPrimitives.WriteUInt64BigEndian(request[4..], OptionMagic);
        BinaryPrimitives.WriteUInt32BigEndian(request[12..], OptionGo);
        BinaryPrimitives.WriteUInt32BigEndian(request[16..], 8);
        BinaryPrimitives.WriteUInt32BigEndian(request[20..], 0);
        BinaryPrimitives.WriteUInt16BigEndian(request[24..], 1);
        BinaryPrimitives.WriteUInt16BigEndian(request[26..], InfoBlockSize);
        stream.Write(request);
        return ReadExport(stream);
    }

    /// <summary>Writes a request's header.</summary>
    internal static void WriteRequest(Span<byte> header, NbdCommand command, ulong cookie, ulong offset, uint length)
    {
        BinaryPrimitives.WriteUInt32BigEndian(header, RequestMagic);
        BinaryPrimitives.WriteUInt16BigEndian(header[4..], 0);
        BinaryPrimitives.WriteUInt16BigEndian(header[6..], (ushort)command);
        BinaryPrimitives.WriteUInt64BigEndian(header[8..], cookie);
        BinaryPrimitives.WriteUInt64BigEndian(header[16..], offset);
        BinaryPrimitives.WriteUInt32BigEndian(header[24..], length);
    }

    private static NbdExport ReadExport(Stream stream)
    {
        NbdExport export = new(0, 0, 1, DefaultMaximumPayload);
        bool described = false;
        byte[] payload = new byte[LongestReply];
        Span<byte> header = stackalloc byte[20];
        while (true)
        {
            stream.ReadExactly(header);
            uint type = BinaryPrimitives.ReadUInt32BigEndian(header[12..]);
            uint length = BinaryPrimitives.ReadUInt32BigEndian(header[16..]);
            if (BinaryPrimitives.ReadUInt64BigEndian(header) != OptionReplyMagic || length > LongestReply)
                throw new IOException("the server's answer is no NBD option reply");
            Span<byte> reply = payload.AsSpan(0, (int)length);
            stream.ReadExactly(reply);
            if ((type & ReplyErrorBit) != 0)
                throw new IOException($"the server refuses: {Encoding.UTF8.GetString(reply)} (reply {type:x})");
            if (type == ReplyAck && described)
                return export;
            if (type != ReplyInfo || length < 2)
                continue;
            ushort info = BinaryPrimitives.ReadUInt16BigEndian(reply);
            if (info == InfoExport && length == 12)
            {
                described = true;
                export = export with
                {
                    Size = BinaryPrimitives.ReadUInt64BigEndian(reply[2..]), Flags = (NbdFlags)BinaryPrimitives.ReadUInt16BigEndian(reply[10..]),
                };
            }
            else if (info == InfoBlockSize && length == 14)
            {
                export = export with
                {
                    MinimumBlock = BinaryPrimitives.ReadUInt32BigEndian(reply[2..]), MaximumPayload = BinaryPrimitives.ReadUInt32BigEndian(reply[10..]),
                };
            }
        }
    }
}
