// Ethernet addresses as xl takes, makes and shows them.
using System.Buffers.Binary;
using System.Globalization;
using System.Security.Cryptography;

namespace XenSharp.Devices.Network;

/// <summary>An Ethernet address of 48 bits.</summary>
/// <param name="Value">The six bytes as a number, the first one on the wire being the highest: 0..0xffff_ffff_ffff.</param>
public readonly record struct MacAddress(ulong Value)
{
    /// <summary>Bytes of an address.</summary>
    public const int Size = 6;

    /// <summary>Xen's own prefix (OUI), 00:16:3e.</summary>
    private const ulong XenPrefix = 0x00163e;

    /// <summary>To everyone.</summary>
    public static MacAddress Broadcast { get; } = new(0xffff_ffff_ffff);

    /// <summary>Whether it stands for a group of stations, <see cref="Broadcast"/> included; no station's own address is such.</summary>
    public bool IsMulticast => (Value & 0x0100_0000_0000) != 0;

    /// <summary>Whether it is one of those that no bridge passes on (01:80:c2:00:00:00 to 0f, IEEE 802.1D).</summary>
    public bool IsLinkLocal => (Value & ~0xfUL) == 0x0180_c200_0000;

    /// <summary>An address that a station can have: no group's, and not zero.</summary>
    public bool IsStation => !IsMulticast && Value != 0;

    /// <summary>A random address with Xen's prefix, as libxl gives to an interface without one; the fourth byte is below 0x80.</summary>
    public static MacAddress Random()
        => new((XenPrefix << 24) | ((ulong)RandomNumberGenerator.GetInt32(0x80) << 16) | (uint)RandomNumberGenerator.GetInt32(0x1_0000));

    /// <summary>Reads six bytes off the wire.</summary>
    /// <param name="bytes">At least six.</param>
    public static MacAddress Read(ReadOnlySpan<byte> bytes)
        => new(((ulong)BinaryPrimitives.ReadUInt16BigEndian(bytes) << 32) | BinaryPrimitives.ReadUInt32BigEndian(bytes[2..]));

    /// <summary>Parses six pairs of hexadecimal digits with colons between, as xl's <c>mac=</c> takes them.</summary>
    /// <returns>False for anything else.</returns>
    public static bool TryParse(string? text, out MacAddress address)
    {
        address = default;
        if (text is not { Length: (Size * 3) - 1 })
            return false;
        ulong value = 0;
        for (int i = 0; i < Size; i++)
        {
            if ((i > 0 && text[(i * 3) - 1] != ':')
                || !byte.TryParse(text.AsSpan(i * 3, 2), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out byte part))
                return false;
            value = (value << 8) | part;
        }

        address = new MacAddress(value);
        return true;
    }

    /// <summary>Puts the six bytes as they go over the wire.</summary>
    /// <param name="destination">At least six.</param>
    public void Write(Span<byte> destination)
    {
        BinaryPrimitives.WriteUInt16BigEndian(destination, (ushort)(Value >> 32));
        BinaryPrimitives.WriteUInt32BigEndian(destination[2..], (uint)Value);
    }

    /// <summary>Six pairs of lower-case hexadecimal digits with colons between.</summary>
    public override string ToString() => string.Create((Size * 3) - 1, Value, static (text, value) =>
    {
        for (int i = 0; i < Size; i++)
        {
            _ = ((byte)(value >> (40 - (i * 8)))).TryFormat(text[(i * 3)..], out _, "x2", CultureInfo.InvariantCulture);
            if (i > 0)
                text[(i * 3) - 1] = ':';
        }
    });
}
