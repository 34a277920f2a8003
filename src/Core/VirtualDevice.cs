// Names and numbers of virtual disks (docs/man/xen-vbd-interface.7): xvda, hda, sda, d0p1, 51712.
using System.Globalization;

namespace XenSharp.Core;

/// <summary>Which disk or partition a guest sees an image as.</summary>
/// <param name="Number">The number in the device's paths, as encoded by xen-vbd-interface.</param>
/// <param name="Name">The name as it was given.</param>
public readonly record struct VirtualDevice(uint Number, string Name)
{
    private const int XvdMajor = 202;
    private const int FirstIdeMajor = 3;
    private const int SecondIdeMajor = 22;
    private const int ScsiMajor = 8;
    private const uint Extended = 1u << 28;
    private const int MostDisks = 1 << 20;
    private const int MostPartitions = 256;

    /// <summary>
    /// Reads a name: xvdX or dN for disks of a PV guest's own, with up to 1,048,576 disks and 255 partitions ("xvda1", "d0p1"); hdX and
    /// sdX, as which old guests show theirs; or the encoded number itself, decimal, octal or hexadecimal as in C.
    /// </summary>
    /// <returns>False for any other name.</returns>
    public static bool TryParse(string name, out VirtualDevice device)
    {
        device = default;
        if (string.IsNullOrEmpty(name))
            return false;
        uint? number = null;
        if (TryMatch(name, "xvd", MostDisks, MostPartitions, out int disk, out int partition) || TryMatchNumbered(name, out disk, out partition))
        {
            number = disk < 16 && partition < 16
                ? (uint)((XvdMajor << 8) | (disk << 4) | partition)
                : Extended | ((uint)disk << 8) | (uint)partition;
        }
        else if (TryMatch(name, "hd", 4, 64, out disk, out partition))
        {
            number = (uint)(((disk < 2 ? FirstIdeMajor : SecondIdeMajor) << 8) | ((disk & 1) << 6) | partition);
        }
        else if (TryMatch(name, "sd", 16, 16, out disk, out partition))
        {
            number = (uint)((ScsiMajor << 8) | (disk << 4) | partition);
        }
        else if (TryParseNumber(name, out uint encoded))
        {
            number = encoded;
        }

        if (number is { } found)
            device = new VirtualDevice(found, name);
        return number is not null;
    }

    /// <summary>As <see cref="TryParse"/>.</summary>
    /// <exception cref="FormatException">It is no name of a virtual disk; the message says which there are.</exception>
    public static VirtualDevice Parse(string name)
        => TryParse(name, out VirtualDevice device)
            ? device
            : throw new FormatException($"\"{name}\" is no device of a guest: write xvda, xvdb1, sda, hda, d0p1 or the number of one.");

    // Letters count as digits that begin at 1 in all places but the last: a to z, aa to zz, and so on.
    private static bool TryMatch(string name, string prefix, int disks, int partitions, out int disk, out int partition)
    {
        (disk, partition) = (0, 0);
        if (!name.StartsWith(prefix, StringComparison.Ordinal))
            return false;
        int at = prefix.Length;
        long index = -1;
        for (; at < name.Length && char.IsAsciiLetterLower(name[at]); at++)
        {
            index = ((index + 1) * 26) + (name[at] - 'a');
            if (index >= disks)
                return false;
        }

        disk = (int)index;
        return index >= 0 && (at == name.Length || TryParsePartition(name[at..], partitions, out partition));
    }

    private static bool TryMatchNumbered(string name, out int disk, out int partition)
    {
        (disk, partition) = (0, 0);
        int p = name.IndexOf('p', StringComparison.Ordinal);
        return name[0] == 'd' && p > 1
            && int.TryParse(name.AsSpan(1, p - 1), NumberStyles.None, CultureInfo.InvariantCulture, out disk) && disk < MostDisks
            && int.TryParse(name.AsSpan(p + 1), NumberStyles.None, CultureInfo.InvariantCulture, out partition) && partition < MostPartitions;
    }

    private static bool TryParsePartition(string text, int partitions, out int partition)
        => int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out partition) && text[0] != '0' && partition < partitions;

    private static bool TryParseNumber(string text, out uint number)
    {
        bool parsed = CNumber.TryParse(text, out long value) && char.IsAsciiDigit(text[0]) && value <= int.MaxValue;
        number = parsed ? (uint)value : 0;
        return parsed;
    }
}
