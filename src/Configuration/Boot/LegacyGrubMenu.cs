// menu.lst of GRUB before version 2, and of pv-grub: the boot menu of old EC2 and Xen images.

using System.Globalization;

namespace XenSharp.Configuration.Boot;

/// <summary>Reads the menu of GRUB 0.97.</summary>
internal static class LegacyGrubMenu
{
    /// <summary>Reads a menu.</summary>
    internal static BootMenu Read(string text)
    {
        var menu = new BootMenu();
        int number = 0;
        BootEntry? entry = null;
        string root = string.Empty;
        foreach (string line in text.Split('\n').Select(static line => line.Trim()).Where(static line => line.Length > 0 && line[0] != '#'))
        {
            int end = line.AsSpan().IndexOfAny(' ', '\t', '=');
            string command = end < 0 ? line : line[..end];
            string rest = end < 0 ? string.Empty : line[(end + 1)..].Trim(' ', '\t', '=');
            switch (command)
            {
                case "default":
                    // "saved" is the number in a file that GRUB writes; the first entry stands for it, as with pygrub.
                    _ = int.TryParse(rest, NumberStyles.None, CultureInfo.InvariantCulture, out number);
                    break;
                case "title":
                    Finish();
                    entry = new BootEntry { Title = rest };
                    root = string.Empty;
                    break;
                case "root" or "rootnoverify":
                    root = Device(rest.Trim('(', ')'));
                    break;
                case "kernel" when entry is not null:
                    string[] words = [.. rest.Split([' ', '\t'], StringSplitOptions.RemoveEmptyEntries).SkipWhile(static word => word.StartsWith("--", StringComparison.Ordinal))];
                    if (words.Length > 0)
                        entry = entry with { Kernel = FileOf(words[0]), CommandLine = string.Join(' ', words.Skip(1)) };
                    break;
                case "initrd" when entry is not null && rest.Length > 0:
                    entry = entry with { Ramdisks = [FileOf(rest.Split([' ', '\t'])[0])] };
                    break;
            }
        }

        Finish();
        menu.Default = number < menu.Entries.Count ? menu.Entries[number] : null;
        return menu;

        void Finish()
        {
            if (entry is null)
                return;

            // Xen itself with a kernel as a module: an entry for a dom0, which is none for a guest.
            if (entry.Kernel is { } kernel && kernel.Path[(kernel.Path.LastIndexOf('/') + 1)..].StartsWith("xen", StringComparison.Ordinal))
                entry = entry with { Kernel = null };
            menu.Entries.Add(entry);
        }

        BootFile FileOf(string path) => path.StartsWith('(') && path.IndexOf(')') is > 0 and var end
            ? new BootFile(path[(end + 1)..], Device(path[1..end]))
            : new BootFile(path, root);
    }

    /// <summary>hd0,0 is the first partition here, and hd0,1 with GRUB 2; hd0 is the whole disk.</summary>
    private static string Device(string device)
    {
        int comma = device.IndexOf(',');
        return comma >= 0 && int.TryParse(device.AsSpan(comma + 1), NumberStyles.None, CultureInfo.InvariantCulture, out int number)
            ? string.Create(CultureInfo.InvariantCulture, $"{device[..comma]},{number + 1}")
            : string.Empty;
    }
}
