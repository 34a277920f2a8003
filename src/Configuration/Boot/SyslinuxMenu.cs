// The boot menu of extlinux and its relatives.

namespace XenSharp.Configuration.Boot;

/// <summary>Reads extlinux.conf.</summary>
internal static class SyslinuxMenu
{
    /// <summary>Reads a menu.</summary>
    /// <param name="text">The configuration.</param>
    /// <param name="folder">Its folder, which paths are relative to.</param>
    internal static BootMenu Read(string text, string folder)
    {
        var menu = new BootMenu();
        string? chosen = null;
        string? marked = null;
        string globalArguments = string.Empty;
        BootEntry? entry = null;
        foreach (string line in text.Split('\n').Select(static line => line.Trim()).Where(static line => line.Length > 0 && line[0] != '#'))
        {
            int end = line.AsSpan().IndexOfAny(' ', '\t');
            string command = (end < 0 ? line : line[..end]).ToUpperInvariant();
            string rest = end < 0 ? string.Empty : line[end..].Trim();
            switch (command)
            {
                case "DEFAULT":
                    chosen = rest;
                    break;
                case "LABEL":
                    Finish();
                    entry = new BootEntry { Title = rest, Id = rest, CommandLine = globalArguments };
                    break;
                case "MENU" when entry is not null && rest.StartsWith("LABEL", StringComparison.OrdinalIgnoreCase):
                    entry = entry with { Title = rest[5..].Trim().Replace("^", string.Empty, StringComparison.Ordinal) };
                    break;
                case "MENU" when entry is not null && rest.Equals("DEFAULT", StringComparison.OrdinalIgnoreCase):
                    marked = entry.Id;
                    break;
                case "KERNEL" or "LINUX" when entry is not null && rest.Length > 0:
                    entry = entry with { Kernel = FileOf(rest.Split([' ', '\t'])[0]) };
                    break;
                case "INITRD" when entry is not null:
                    entry = entry with { Ramdisks = [.. rest.Split([',', ' '], StringSplitOptions.RemoveEmptyEntries).Select(FileOf)] };
                    break;
                case "APPEND" when entry is null:
                    globalArguments = rest;
                    break;
                case "APPEND":
                    entry = WithArguments(entry, rest);
                    break;
            }
        }

        Finish();
        menu.Default = menu.Entries.Find(one => one.Id == (marked ?? chosen));
        return menu;

        void Finish()
        {
            if (entry is not null)
                menu.Entries.Add(entry);
        }

        BootFile FileOf(string path) => new(path.StartsWith('/') ? path : $"{folder}/{path}");

        // initrd= among the arguments is for the loader, and "-" is for no arguments at all.
        BootEntry WithArguments(BootEntry to, string arguments)
        {
            var words = arguments.Split([' ', '\t'], StringSplitOptions.RemoveEmptyEntries).ToList();
            if (words is ["-"])
                return to with { CommandLine = string.Empty };
            string? ramdisk = words.Find(static word => word.StartsWith("initrd=", StringComparison.Ordinal));
            words.RemoveAll(static word => word.StartsWith("initrd=", StringComparison.Ordinal));
            to = to with { CommandLine = string.Join(' ', words) };
            return ramdisk is null ? to : to with { Ramdisks = [.. ramdisk[7..].Split(',', StringSplitOptions.RemoveEmptyEntries).Select(FileOf)] };
        }
    }
}
