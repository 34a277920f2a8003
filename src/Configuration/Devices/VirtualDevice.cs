// The names of a guest's block devices, and the numbers that stand for them in xenstore.

using System.Diagnostics.CodeAnalysis;
using System.Globalization;

namespace XenSharp.Configuration.Devices;

/// <summary>A block device of a guest's, as xen-vbd-interface(7) numbers them.</summary>
/// <param name="Number">The number in xenstore: the device's directory under device/vbd, and its virtual-device.</param>
/// <param name="Disk">The disk's number, from 0 on; -1 for a device that was given as a number.</param>
/// <param name="Partition">The partition's number; 0 for the whole disk.</param>
public readonly record struct VirtualDevice(int Number, int Disk, int Partition)
{
    private const int ExtendedXvd = 1 << 28;
    private const int XvdMajor = 202;
    private const int ScsiMajor = 8;
    private const int FirstIdeMajor = 3;
    private const int SecondIdeMajor = 22;
    private const int MostDisks = 1 << 20;

    /// <summary>Parses a name: xvdXN, sdXN, hdXN, dNpM or a number (decimal, 0x, or octal with 0).</summary>
    /// <exception cref="FormatException">It is none; the message is a sentence.</exception>
    public static VirtualDevice Parse(string name) => TryParse(name, out VirtualDevice device)
        ? device
        : throw new FormatException($"\"{name}\" is no device of a guest: write xvda, xvdb1, sda, hda, d0p1 or the number of one.");

    /// <summary>Parses a name as <see cref="Parse"/> does.</summary>
    /// <returns>Whether it is a device's.</returns>
    public static bool TryParse([NotNullWhen(true)] string? name, out VirtualDevice device)
    {
        device = default;
        if (string.IsNullOrEmpty(name))
            return false;
        if (char.IsAsciiDigit(name[0]))
            return TryParseNumber(name, out device);
        if (name[0] == 'd' && name.Length > 1 && char.IsAsciiDigit(name[1]))
            return TryParseDiskAndPartition(name.AsSpan(1), out device);
        if (name.StartsWith("xvd", StringComparison.Ordinal))
            return TrySplit(name.AsSpan(3), MostDisks - 1, 255, out int disk, out int partition) && Take(Xvd(disk, partition), out device);
        if (name.StartsWith("sd", StringComparison.Ordinal))
        {
            return TrySplit(name.AsSpan(2), 15, 15, out int disk2, out int partition2)
                && Take(new VirtualDevice((ScsiMajor << 8) | (disk2 << 4) | partition2, disk2, partition2), out device);
        }

        return name.StartsWith("hd", StringComparison.Ordinal) && TrySplit(name.AsSpan(2), 3, 63, out int disk3, out int partition3)
            && Take(new VirtualDevice(((disk3 < 2 ? FirstIdeMajor : SecondIdeMajor) << 8) | ((disk3 & 1) << 6) | partition3, disk3, partition3), out device);
    }

    private static bool Take(VirtualDevice found, out VirtualDevice device)
    {
        device = found;
        return true;
    }

    private static VirtualDevice Xvd(int disk, int partition) => disk <= 15 && partition <= 15
        ? new VirtualDevice((XvdMajor << 8) | (disk << 4) | partition, disk, partition)
        : new VirtualDevice(ExtendedXvd | (disk << 8) | partition, disk, partition);

    private static bool TryParseNumber(string text, out VirtualDevice device)
    {
        device = default;
        if (!Language.Numbers.TryParse(text, out long number) || number is <= 0 or >= 2L << 28)
            return false;
        device = new VirtualDevice((int)number, -1, 0);
        return true;
    }

    private static bool TryParseDiskAndPartition(ReadOnlySpan<char> text, out VirtualDevice device)
    {
        device = default;
        int p = text.IndexOf('p');
        ReadOnlySpan<char> first = p < 0 ? text : text[..p];
        int partition = 0;
        if (!int.TryParse(first, NumberStyles.None, CultureInfo.InvariantCulture, out int disk) || disk >= MostDisks
            || (p >= 0 && (!int.TryParse(text[(p + 1)..], NumberStyles.None, CultureInfo.InvariantCulture, out partition) || partition > 255)))
        {
            return false;
        }

        device = Xvd(disk, partition);
        return true;
    }

    /// <summary>Letters that count in base 26 without a zero (a, z, aa), then a partition without leading zeroes.</summary>
    private static bool TrySplit(ReadOnlySpan<char> text, int mostDisk, int mostPartition, out int disk, out int partition)
    {
        disk = 0;
        partition = 0;
        int letters = text.IndexOfAnyExceptInRange('a', 'z');
        letters = letters < 0 ? text.Length : letters;
        if (letters is 0 or > 5)
            return false;
        foreach (char letter in text[..letters])
            disk = (disk * 26) + (letter - 'a' + 1);
        disk--;
        ReadOnlySpan<char> rest = text[letters..];
        if (!rest.IsEmpty && (rest[0] == '0' || !int.TryParse(rest, NumberStyles.None, CultureInfo.InvariantCulture, out partition)))
            return false;
        return disk <= mostDisk && partition <= mostPartition;
    }
}
