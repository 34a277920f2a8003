using System.Buffers.Binary;
using XenSharp.Core;

namespace XenSharp.Domains.Migration;

/// <summary>The head of a record.</summary>
/// <param name="Type">Its type, which may be an unknown one.</param>
/// <param name="Length">Bytes of its body, at most <see cref="MigrationFormat.MaxRecordLength"/>.</param>
internal readonly record struct RecordHeader(RecordType Type, uint Length)
{
    public bool IsOptional => ((uint)Type & MigrationFormat.OptionalRecord) != 0;
}

/// <summary>
/// Reads an image: its headers and one record after the other, and not a byte more than it is asked for. Whatever is wrong becomes a
/// <see cref="MigrationException"/>.
/// </summary>
/// <param name="stream">Where from.</param>
internal sealed class MigrationReader(Stream stream)
{
    private RecordHeader _record;
    private uint _left;

    /// <summary>Reads both headers.</summary>
    /// <exception cref="MigrationException">It is no image of an x86 PV domain.</exception>
    public void ReadHeaders()
    {
        Span<byte> header = stackalloc byte[MigrationFormat.ImageHeaderSize];
        ReadBytes(header, "its header");
        if (BinaryPrimitives.ReadUInt64BigEndian(header) != MigrationFormat.Marker
            || BinaryPrimitives.ReadUInt32BigEndian(header[8..]) != MigrationFormat.Id)
        {
            throw new MigrationException("This is no image of a domain: it does not begin as one. Give a file that a domain was saved to.");
        }

        uint version = BinaryPrimitives.ReadUInt32BigEndian(header[12..]);
        if (version is < MigrationFormat.OldestVersion or > MigrationFormat.Version)
        {
            throw new MigrationException(
                $"The image is of version {version} of the format; {MigrationFormat.OldestVersion} and {MigrationFormat.Version} can be restored.");
        }

        if ((BinaryPrimitives.ReadUInt16BigEndian(header[16..]) & MigrationFormat.BigEndianOption) != 0)
            throw new MigrationException("The image is of a big-endian machine, whose domains do not run here.");

        header = header[..MigrationFormat.DomainHeaderSize];
        ReadBytes(header, "its header");
        uint type = BinaryPrimitives.ReadUInt32LittleEndian(header);
        if (type == MigrationFormat.HvmDomain)
            throw new MigrationException("The image is of an HVM domain; only PV domains run here.");
        if (type != MigrationFormat.PvDomain)
            throw new MigrationException($"The image is of a domain of an unknown type, {type}.");
        int pageShift = BinaryPrimitives.ReadUInt16LittleEndian(header[4..]);
        if (pageShift != Paging.PageShift)
            throw new MigrationException($"The image has pages of 2^{pageShift} bytes; those of an x86 domain are 2^{Paging.PageShift}.");
    }

    /// <summary>Goes to the next record, past what is left of this one.</summary>
    public RecordHeader Next()
    {
        Skip();
        Span<byte> header = stackalloc byte[MigrationFormat.RecordHeaderSize];
        ReadBytes(header, "the head of a record");
        _record = new RecordHeader((RecordType)BinaryPrimitives.ReadUInt32LittleEndian(header), BinaryPrimitives.ReadUInt32LittleEndian(header[4..]));
        if (_record.Length > MigrationFormat.MaxRecordLength)
            throw new MigrationException($"The image is damaged: its record {_record.Type} claims {_record.Length} bytes, which no record has.");
        _left = _record.Length;
        return _record;
    }

    /// <summary>Reads the next bytes of the record's body.</summary>
    public void Read(Span<byte> bytes)
    {
        if ((uint)bytes.Length > _left)
            throw Malformed("it is too short");
        ReadBytes(bytes, $"its record {_record.Type}");
        _left -= (uint)bytes.Length;
    }

    /// <summary>Reads the whole body of a record that must have between so many bytes.</summary>
    public byte[] ReadBody(uint least, uint most)
    {
        if (_record.Length < least || _record.Length > most)
            throw Malformed($"it has {_record.Length} bytes and should have {(least == most ? $"{least}" : $"{least} to {most}")}");
        byte[] body = new byte[_record.Length];
        Read(body);
        return body;
    }

    /// <summary>Passes over what is left of the record.</summary>
    public void Skip()
    {
        Span<byte> buffer = stackalloc byte[4096];
        long padding = -_record.Length & (MigrationFormat.RecordAlignment - 1);
        for (ulong left = _left + (ulong)padding; left != 0;)
        {
            Span<byte> piece = buffer[..(int)Math.Min(left, (ulong)buffer.Length)];
            ReadBytes(piece, $"its record {_record.Type}");
            left -= (ulong)piece.Length;
        }

        _left = 0;
        _record = default;
    }

    /// <summary>What is wrong with the record that is being read.</summary>
    public MigrationException Malformed(string how) => new($"The image is damaged: of its record {_record.Type}, {how}.");

    private void ReadBytes(Span<byte> bytes, string what)
    {
        try
        {
            stream.ReadExactly(bytes);
        }
        catch (EndOfStreamException)
        {
            throw new MigrationException($"The image is not complete: it ends in the middle of {what}.");
        }
        catch (IOException failure)
        {
            throw new MigrationException($"The image cannot be read: {failure.Message.TrimEnd('.')}.", failure);
        }
    }
}
