using System.Buffers.Binary;
using XenSharp.Core;
using XenSharp.Domains.Hypercalls;

namespace XenSharp.Domains.Migration;

/// <summary>Writes an image: its headers and one record after the other, none of which is kept in memory.</summary>
/// <param name="stream">Where to. Errors of it become <see cref="MigrationException"/>s.</param>
internal sealed class MigrationWriter(Stream stream)
{
    private uint _length;
    private uint _written;

    /// <summary>The image header and the domain header, of an x86 PV domain.</summary>
    public void WriteHeaders()
    {
        Span<byte> header = stackalloc byte[MigrationFormat.ImageHeaderSize + MigrationFormat.DomainHeaderSize];
        header.Clear();

        // The image header is big-endian, all that follows little-endian.
        BinaryPrimitives.WriteUInt64BigEndian(header, MigrationFormat.Marker);
        BinaryPrimitives.WriteUInt32BigEndian(header[8..], MigrationFormat.Id);
        BinaryPrimitives.WriteUInt32BigEndian(header[12..], MigrationFormat.Version);
        Span<byte> domain = header[MigrationFormat.ImageHeaderSize..];
        BinaryPrimitives.WriteUInt32LittleEndian(domain, MigrationFormat.PvDomain);
        BinaryPrimitives.WriteUInt16LittleEndian(domain[4..], Paging.PageShift);
        BinaryPrimitives.WriteUInt32LittleEndian(domain[8..], XenVersion.Version >> 16);
        BinaryPrimitives.WriteUInt32LittleEndian(domain[12..], XenVersion.Version & 0xffff);
        WriteBytes(header);
    }

    /// <summary>Writes a whole record.</summary>
    /// <param name="type">Its type.</param>
    /// <param name="head">The first part of its body.</param>
    /// <param name="rest">The second.</param>
    public void WriteRecord(RecordType type, ReadOnlySpan<byte> head = default, ReadOnlySpan<byte> rest = default)
    {
        Begin(type, (uint)(head.Length + rest.Length));
        Write(head);
        Write(rest);
        End();
    }

    /// <summary>Begins a record whose body comes in pieces.</summary>
    public void Begin(RecordType type, uint length)
    {
        Span<byte> header = stackalloc byte[MigrationFormat.RecordHeaderSize];
        BinaryPrimitives.WriteUInt32LittleEndian(header, (uint)type);
        BinaryPrimitives.WriteUInt32LittleEndian(header[4..], length);
        WriteBytes(header);
        (_length, _written) = (length, 0);
    }

    /// <summary>Writes a piece of the record's body.</summary>
    public void Write(ReadOnlySpan<byte> bytes)
    {
        _written += (uint)bytes.Length;
        WriteBytes(bytes);
    }

    /// <summary>Ends a record: its body has come, and is padded.</summary>
    public void End()
    {
        if (_written != _length)
            throw new InvalidOperationException($"A record of {_length} bytes was given {_written}.");
        WriteBytes(stackalloc byte[(int)(-_length & (MigrationFormat.RecordAlignment - 1))]);
    }

    /// <summary>Hands all that was written to the host.</summary>
    public void Flush()
    {
        try
        {
            stream.Flush();
        }
        catch (IOException failure)
        {
            throw Failed(failure);
        }
    }

    private static MigrationException Failed(IOException failure)
        => new($"The image cannot be written: {failure.Message.TrimEnd('.')}.", failure);

    private void WriteBytes(ReadOnlySpan<byte> bytes)
    {
        if (bytes.IsEmpty)
            return;
        try
        {
            stream.Write(bytes);
        }
        catch (IOException failure)
        {
            throw Failed(failure);
        }
    }
}
