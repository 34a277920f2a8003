// Names of what is on a disk and cannot be read here.

namespace XenSharp.Configuration.Boot;

/// <summary>Tells file systems by their marks, for sentences.</summary>
internal static class OtherFileSystem
{
    /// <summary>What a volume has.</summary>
    internal static string Name(ImageReader volume)
    {
        (int Offset, byte[] Mark, string Name)[] known =
        [
            (0, "XFSB"u8.ToArray(), "XFS, which cannot be read here: keep /boot on ext4"),
            (0x10040, "_BHRfS_M"u8.ToArray(), "Btrfs, which cannot be read here: keep /boot on ext4"),
            (0, "LUKS"u8.ToArray(), "an encrypted volume (LUKS)"),
            (0, "QFI"u8.ToArray(), "a QEMU image: say format=qcow2"),
            (512, "LABELONE"u8.ToArray(), "an LVM volume"),
            (4086, "SWAPSPACE2"u8.ToArray(), "swap space"),
            (0x8001, "CD001"u8.ToArray(), "an ISO 9660 file system"),
            (54, "FAT1"u8.ToArray(), "FAT"),
            (82, "FAT32"u8.ToArray(), "FAT"),
            (3, "NTFS"u8.ToArray(), "NTFS"),
        ];
        foreach ((int offset, byte[] mark, string name) in known)
        {
            byte[] found = new byte[mark.Length];
            try
            {
                volume.Read(offset, found);
            }
            catch (BootException)
            {
                continue;
            }

            if (found.AsSpan().SequenceEqual(mark))
                return name;
        }

        return "no file system that is known here";
    }
}
