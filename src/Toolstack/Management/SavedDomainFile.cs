// The file that a domain is saved to: what it is, before its image.

using System.Buffers.Binary;
using System.Text;
using XenSharp.Api;
using XenSharp.Configuration;

namespace XenSharp.Toolstack.Management;

/// <summary>
/// A header, then the image in the format of Xen's tools. The header: 24 bytes of magic; the version, 1; the length of the configuration
/// in bytes, both 32 bits, little endian; the configuration as <see cref="DomainConfigurationJson"/> writes it.
/// </summary>
internal static class SavedDomainFile
{
    private const int Version = 1;
    private const int LongestConfiguration = 1 << 20;

    private static ReadOnlySpan<byte> Magic => "XenSharp saved domain\n\r\0"u8;

    /// <summary>Writes the header.</summary>
    internal static void WriteHeader(Stream stream, DomainConfiguration configuration)
    {
        byte[] text = Encoding.UTF8.GetBytes(DomainConfigurationJson.Write(configuration));
        Span<byte> header = stackalloc byte[Magic.Length + 8];
        Magic.CopyTo(header);
        BinaryPrimitives.WriteInt32LittleEndian(header[Magic.Length..], Version);
        BinaryPrimitives.WriteInt32LittleEndian(header[(Magic.Length + 4)..], text.Length);
        stream.Write(header);
        stream.Write(text);
    }

    /// <summary>Reads the header; the stream is at the image afterwards.</summary>
    /// <param name="stream">The file.</param>
    /// <param name="path">Its name, for sentences.</param>
    /// <exception cref="ToolstackException">It is no such file, or is damaged.</exception>
    internal static DomainConfiguration ReadHeader(Stream stream, string path)
    {
        Span<byte> header = stackalloc byte[Magic.Length + 8];
        if (stream.ReadAtLeast(header, header.Length, throwOnEndOfStream: false) < header.Length || !header.StartsWith(Magic))
            throw new ToolstackException(ProblemKind.BadRequest, $"{path} is no saved domain of XenSharp's.");
        int version = BinaryPrimitives.ReadInt32LittleEndian(header[Magic.Length..]);
        if (version != Version)
            throw new ToolstackException(ProblemKind.BadRequest, $"{path} was saved by another version of XenSharp (format {version}, and this one reads {Version}).");
        int length = BinaryPrimitives.ReadInt32LittleEndian(header[(Magic.Length + 4)..]);
        if (length is < 0 or > LongestConfiguration)
            throw new ToolstackException(ProblemKind.BadRequest, $"{path} is damaged: its configuration cannot have {length} bytes.");
        byte[] text = new byte[length];
        if (stream.ReadAtLeast(text, length, throwOnEndOfStream: false) < length)
            throw new ToolstackException(ProblemKind.BadRequest, $"{path} is cut off: it ends in its configuration.");
        try
        {
            return DomainConfigurationJson.Read(Encoding.UTF8.GetString(text), path);
        }
        catch (ConfigurationException failure)
        {
            throw new ToolstackException(ProblemKind.BadRequest, $"{path} is damaged: {failure.Message}", failure);
        }
    }
}
