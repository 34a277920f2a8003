// Finds the kernel that a guest's own disk says is to be booted: what pygrub is for.

using System.Globalization;
using System.Text;
using XenSharp.Configuration.Boot.Ext;

namespace XenSharp.Configuration.Boot;

/// <summary>
/// Looks into a disk image for a boot menu and for the kernel and ramdisk of one of its entries. Nothing is mounted, run or written. The
/// menus are those of pygrub: GRUB 2, extlinux, GRUB 0.97; without any, the newest kernel in /boot.
/// </summary>
public static class GuestBootLoader
{
    /// <summary>Largest kernel, in bytes: pygrub's limit.</summary>
    public const int LargestKernel = 128 << 20;

    /// <summary>Largest initial ramdisk, in bytes.</summary>
    public const int LargestRamdisk = 512 << 20;

    private const int LargestMenu = 1 << 20;

    private static readonly string[] s_grubMenus = ["/boot/grub/grub.cfg", "/grub/grub.cfg", "/boot/grub2/grub.cfg", "/grub2/grub.cfg"];

    private static readonly string[] s_syslinuxMenus =
        ["/boot/isolinux/isolinux.cfg", "/boot/extlinux/extlinux.conf", "/boot/extlinux.conf", "/extlinux/extlinux.conf", "/extlinux.conf"];

    private static readonly string[] s_legacyMenus = ["/boot/grub/menu.lst", "/boot/grub/grub.conf", "/grub/menu.lst", "/grub/grub.conf"];

    /// <summary>Reads what is to be booted.</summary>
    /// <param name="disk">The disk; it stays the caller's.</param>
    /// <param name="bootloader">What the configuration asks for.</param>
    /// <param name="commandLine">What the configuration puts behind the entry's command line.</param>
    /// <exception cref="BootException">There is nothing that can be booted; the message is a sentence.</exception>
    public static GuestBoot Load(ImageReader disk, BootloaderConfiguration bootloader, string commandLine)
    {
        ArgumentNullException.ThrowIfNull(disk);
        ArgumentNullException.ThrowIfNull(bootloader);
        ArgumentNullException.ThrowIfNull(commandLine);
        var notes = new List<string>();
        (IReadOnlyList<Volume> volumes, string others) = FindVolumes(disk, bootloader.Offset);
        string behind = string.Join(' ', new[] { bootloader.Arguments, commandLine }.Where(static part => !string.IsNullOrWhiteSpace(part)));
        if (bootloader.Kernel is { } kernel)
        {
            // As with pygrub, the menu's command line is not asked for.
            var entry = new BootEntry
            {
                Title = kernel, Kernel = new BootFile(kernel), Ramdisks = bootloader.Ramdisk is null ? [] : [new BootFile(bootloader.Ramdisk)],
            };
            Volume home = volumes.FirstOrDefault(volume => volume.Files.FileExists(kernel))
                ?? throw new BootException($"There is no file {kernel} in the disk. {Found(volumes, others)}");
            return Read(entry, home, volumes, behind, notes);
        }

        foreach (Volume volume in volumes)
        {
            if (ReadMenu(volume, notes) is { } menu)
                return Read(Choose(menu, bootloader.Entry, notes), volume, volumes, behind, notes);
        }

        if (bootloader.Entry is not null)
            throw new BootException($"The disk has no boot menu to take the entry \"{bootloader.Entry}\" from. {Found(volumes, others)}");
        foreach (Volume volume in volumes)
        {
            if (Newest(volume) is { } entry)
            {
                notes.Add($"There is no boot menu in the disk; its newest kernel, {entry.Title}, is booted. Its root file system is to be named by root=.");
                return Read(entry, volume, volumes, behind, notes);
            }
        }

        throw new BootException($"The disk has neither a boot menu (GRUB's or extlinux's) nor a kernel in /boot. {Found(volumes, others)}{string.Concat(notes.Select(static note => " " + note))}");
    }

    private static (IReadOnlyList<Volume> Volumes, string Others) FindVolumes(ImageReader disk, long? offset)
    {
        IReadOnlyList<Partition> partitions = offset is { } start
            ? [new Partition(0, start, long.MaxValue - start, false)]
            : PartitionTable.Read(disk);
        if (partitions.Count == 0)
            partitions = [new Partition(0, 0, long.MaxValue, false)];
        var volumes = new List<Volume>();
        var others = new List<string>();
        foreach (Partition partition in partitions)
        {
            string name = partition.Number == 0 ? "the disk" : string.Create(CultureInfo.InvariantCulture, $"partition {partition.Number}");
            try
            {
                ImageReader part = disk.Part(partition.Offset, partition.Length);
                if (ExtFileSystem.Open(part) is { } files)
                    volumes.Add(new Volume(partition.Number, name, files));
                else
                    others.Add($"{name}: {OtherFileSystem.Name(part)}");
            }
            catch (BootException failure)
            {
                others.Add($"{name}: {failure.Message.TrimEnd('.')}");
            }
        }

        return volumes.Count > 0
            ? (volumes, string.Join("; ", others))
            : throw new BootException($"The disk has no ext2, ext3 or ext4 file system to boot from ({string.Join("; ", others)}).");
    }

    private static string Found(IReadOnlyList<Volume> volumes, string others)
        => $"It has: {string.Join("; ", volumes.Select(static volume => $"{volume.Name}: {volume.Files.Superblock.Kind}"))}{(others.Length > 0 ? "; " + others : string.Empty)}.";

    /// <summary>The boot menu of a file system; null if it has none with a kernel in it.</summary>
    private static BootMenu? ReadMenu(Volume volume, List<string> notes)
    {
        foreach (string path in s_grubMenus.Concat(s_syslinuxMenus).Concat(s_legacyMenus))
        {
            try
            {
                if (!volume.Files.FileExists(path))
                    continue;
                BootMenu menu = s_grubMenus.Contains(path) ? GrubMenu.Read(volume.Files, path)
                    : s_syslinuxMenus.Contains(path) ? SyslinuxMenu.Read(Text(volume, path), path[..path.LastIndexOf('/')])
                    : LegacyGrubMenu.Read(Text(volume, path));
                if (menu.Entries.Exists(static entry => entry.Kernel is not null))
                    return menu;
                notes.Add($"{path} ({volume.Name}) has no entry with a Linux kernel.");
            }
            catch (BootException failure)
            {
                notes.Add($"{path} ({volume.Name}) cannot be used: {failure.Message}");
            }
        }

        return null;
    }

    private static string Text(Volume volume, string path) => Encoding.UTF8.GetString(volume.Files.ReadFile(path, LargestMenu));

    private static BootEntry Choose(BootMenu menu, string? asked, List<string> notes)
    {
        if (asked is not null)
        {
            // pygrub's rules: a number counts entries from 0, those of submenus too.
            BootEntry? found = int.TryParse(asked, NumberStyles.None, CultureInfo.InvariantCulture, out int number)
                ? number < menu.Entries.Count ? menu.Entries[number] : null
                : menu.Entries.Find(entry => entry.Title == asked || entry.Id == asked);
            if (found is not { Kernel: not null })
            {
                throw new BootException(
                    $"{(found is null ? $"The boot menu has no entry \"{asked}\"" : $"The entry \"{asked}\" of the boot menu has no Linux kernel")}. It has: "
                    + $"{string.Join("; ", menu.Entries.Select(static (entry, at) => string.Create(CultureInfo.InvariantCulture, $"{at} \"{entry.Title}\"")))}.");
            }

            return found;
        }

        if (menu.Default is { Kernel: not null } chosen)
            return chosen;
        BootEntry first = menu.Entries.Find(static entry => entry.Kernel is not null)!;
        if (menu.Default is not null)
            notes.Add($"The menu's default, \"{menu.Default.Title}\", has no Linux kernel; \"{first.Title}\" is booted instead.");
        return first;
    }

    /// <summary>The newest kernel of a file system without a menu, with the ramdisk of its version.</summary>
    private static BootEntry? Newest(Volume volume)
    {
        foreach (string folder in new[] { "/boot", string.Empty })
        {
            IReadOnlyList<string> names = volume.Files.List(folder + "/");
            string? kernel = names.Where(name => name.StartsWith("vmlinu", StringComparison.Ordinal) && volume.Files.FileExists($"{folder}/{name}"))
                .OrderDescending(VersionOrder.Instance).FirstOrDefault();
            if (kernel is null)
                continue;
            int hyphen = kernel.IndexOf('-');
            string version = hyphen < 0 ? string.Empty : kernel[hyphen..];
            string[] ramdisks =
            [
                $"initrd.img{version}", $"initrd{version}.img", $"initramfs{version}.img", $"initrd{version}", $"initramfs{version}", "initramfs-linux.img", "initrd.img",
            ];
            string? ramdisk = ramdisks.FirstOrDefault(name => volume.Files.FileExists($"{folder}/{name}"));
            return new BootEntry
            {
                Title = $"{folder}/{kernel}",
                Kernel = new BootFile($"{folder}/{kernel}"),
                Ramdisks = ramdisk is null ? [] : [new BootFile($"{folder}/{ramdisk}")],
            };
        }

        return null;
    }

    private static GuestBoot Read(BootEntry entry, Volume home, IReadOnlyList<Volume> volumes, string behind, List<string> notes)
    {
        Volume kernelHome = VolumeOf(entry.Kernel!, home, volumes);
        if (kernelHome.Files.Superblock.NeedsRecovery)
            notes.Add($"The file system of {kernelHome.Name} was not unmounted and its journal is not replayed here: if the kernel was changed last, the old one may be read.");
        byte[] kernel = kernelHome.Files.ReadFile(entry.Kernel!.Path, LargestKernel);
        if (kernel.Length == 0)
            throw new BootException($"The kernel {entry.Kernel.Path} in the disk is empty.");
        return new GuestBoot
        {
            Title = entry.Title,
            KernelPath = entry.Kernel.Path,
            Kernel = kernel,
            RamdiskPaths = [.. entry.Ramdisks.Select(static file => file.Path)],
            Ramdisk = ReadRamdisks(entry, home, volumes),
            CommandLine = string.Join(' ', new[] { entry.CommandLine, behind }.Where(static part => part.Length > 0)),
            Notes = notes,
        };
    }

    /// <summary>Several ramdisks are one behind the other, each at a multiple of four bytes, as GRUB loads them.</summary>
    private static byte[] ReadRamdisks(BootEntry entry, Volume home, IReadOnlyList<Volume> volumes)
    {
        if (entry.Ramdisks is [var only])
            return VolumeOf(only, home, volumes).Files.ReadFile(only.Path, LargestRamdisk);
        using var all = new MemoryStream();
        foreach (BootFile file in entry.Ramdisks)
        {
            all.SetLength((all.Length + 3) & ~3L);
            all.Position = all.Length;
            all.Write(VolumeOf(file, home, volumes).Files.ReadFile(file.Path, (int)(LargestRamdisk - all.Length)));
        }

        return all.ToArray();
    }

    /// <summary>The file system that a file is in: the one that the menu names if it is here, or the menu's own.</summary>
    private static Volume VolumeOf(BootFile file, Volume home, IReadOnlyList<Volume> volumes)
    {
        Volume? named = file.Device switch
        {
            "" => home,
            ['u', 'u', 'i', 'd', ':', .. var uuid] => volumes.FirstOrDefault(volume => volume.Files.Superblock.Uuid.ToString("D").Equals(uuid, StringComparison.OrdinalIgnoreCase)),
            ['l', 'a', 'b', 'e', 'l', ':', .. var label] => volumes.FirstOrDefault(volume => volume.Files.Superblock.Label == label),
            _ => PartitionOf(file.Device) is { } number ? volumes.FirstOrDefault(volume => volume.Number == number) : null,
        };

        // The menu may have been written for another place of the disk, or for the disk before it was copied.
        return named?.Files.FileExists(file.Path) == true ? named : home;
    }

    /// <summary>hd0,msdos1, hd0,gpt2, xen/xvda,1 and the like.</summary>
    private static int? PartitionOf(string device)
    {
        int comma = device.LastIndexOf(',');
        return comma >= 0 && int.TryParse(device.AsSpan(comma + 1).TrimStart("abcdefghijklmnopqrstuvwxyz"), NumberStyles.None, CultureInfo.InvariantCulture, out int number)
            ? number
            : null;
    }

    private sealed record Volume(int Number, string Name, ExtFileSystem Files);
}
