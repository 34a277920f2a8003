// The entries of the Boot Loader Specification, which Fedora's GRUB takes for its menu.

using System.Text;
using System.Text.RegularExpressions;
using XenSharp.Configuration.Boot.Ext;

namespace XenSharp.Configuration.Boot;

/// <summary>Reads loader/entries/*.conf.</summary>
internal static partial class LoaderEntries
{
    private const int LargestFile = 64 << 10;
    private const int MostEntries = 256;

    /// <summary>The entries, the newest first.</summary>
    /// <param name="files">The file system.</param>
    /// <param name="variable">GRUB's variables, which entries may refer to.</param>
    internal static IReadOnlyList<BootEntry> Read(ExtFileSystem files, Func<string, string> variable)
    {
        foreach (string folder in new[] { "/loader/entries", "/boot/loader/entries" })
        {
            var names = files.List(folder).Where(static name => name.EndsWith(".conf", StringComparison.Ordinal))
                .OrderDescending(VersionOrder.Instance).Take(MostEntries).ToList();
            if (names.Count > 0)
                return names.ConvertAll(name => Parse(Encoding.UTF8.GetString(files.ReadFile($"{folder}/{name}", LargestFile)), name[..^5], variable));
        }

        return [];
    }

    private static BootEntry Parse(string text, string id, Func<string, string> variable)
    {
        string title = id;
        BootFile? kernel = null;
        var ramdisks = new List<BootFile>();
        var options = new List<string>();
        foreach (string line in text.Split('\n'))
        {
            string[] words = line.Split([' ', '\t', '\r'], StringSplitOptions.RemoveEmptyEntries);
            if (words.Length < 2 || words[0].StartsWith('#'))
                continue;
            string[] values = Expand(string.Join(' ', words.Skip(1)), variable).Split(' ', StringSplitOptions.RemoveEmptyEntries);
            switch (words[0])
            {
                case "title":
                    title = string.Join(' ', values);
                    break;
                case "linux":
                    kernel = values.Length > 0 ? new BootFile(values[0]) : kernel;
                    break;
                case "initrd":
                    ramdisks.AddRange(values.Select(static path => new BootFile(path)));
                    break;
                case "options":
                    options.AddRange(values);
                    break;
            }
        }

        return new BootEntry { Title = title, Id = id, Kernel = kernel, Ramdisks = ramdisks, CommandLine = string.Join(' ', options) };
    }

    private static string Expand(string text, Func<string, string> variable) => Variable().Replace(text, match => variable(match.Groups[1].Value));

    [GeneratedRegex(@"\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?")]
    private static partial Regex Variable();
}
