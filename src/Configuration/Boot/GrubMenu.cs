// Runs GRUB's configuration far enough to know its menu.

using System.Globalization;
using System.Text;
using XenSharp.Configuration.Boot.Ext;

namespace XenSharp.Configuration.Boot;

/// <summary>
/// Runs a grub.cfg as GRUB does on x86-64 under Xen: variables, conditions, functions, the environment block, menu entries and submenus,
/// sourced files, and boot loader specification entries (blscfg). Commands that draw, load modules or wait are passed over.
/// </summary>
internal sealed class GrubMenu
{
    private const int MostSteps = 200_000;
    private const int DeepestCalls = 16;
    private const int MostEntries = 1024;
    private const int LargestFile = 1 << 20;
    private const int LongestValue = 64 << 10;

    private static readonly System.Buffers.SearchValues<char> s_nameCharacters =
        System.Buffers.SearchValues.Create("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_");

    private readonly ExtFileSystem _files;
    private readonly Dictionary<string, string> _variables = new(StringComparer.Ordinal);
    private readonly Dictionary<string, IReadOnlyList<GrubCommand>> _functions = new(StringComparer.Ordinal);
    private readonly List<Item> _top = [];
    private List<Item> _items;
    private BootEntry? _entry;
    private int _steps;
    private int _depth;
    private int _count;

    private GrubMenu(ExtFileSystem files, string folder)
    {
        _files = files;
        _items = _top;
        foreach (string feature in new[]
        {
            "feature_menuentry_id", "feature_chainloader_bpb", "feature_ntldr", "feature_platform_search_hint", "feature_default_font_path",
            "feature_all_video_module", "feature_menuentry_options", "feature_200_final", "feature_timeout_style",
        })
        {
            _variables[feature] = "y";
        }

        _variables["menuentry_id_option"] = "--id";
        _variables["grub_platform"] = "xen";
        _variables["grub_cpu"] = "x86_64";
        _variables["prefix"] = folder;
        _variables["config_directory"] = folder;
        _variables["root"] = string.Empty;
    }

    /// <summary>Reads a menu.</summary>
    /// <param name="files">The file system that it is in.</param>
    /// <param name="path">The configuration's path.</param>
    /// <exception cref="BootException">It is not to be understood.</exception>
    internal static BootMenu Read(ExtFileSystem files, string path)
    {
        var grub = new GrubMenu(files, path[..path.LastIndexOf('/')]);
        grub.Run(GrubParser.Parse(Encoding.UTF8.GetString(files.ReadFile(path, LargestFile))));
        var menu = new BootMenu();
        Flatten(grub._top, menu.Entries);
        menu.Default = grub.FindDefault();
        return menu;
    }

    private static void Flatten(List<Item> items, List<BootEntry> entries)
    {
        foreach (Item item in items)
        {
            if (item.Entry is not null)
                entries.Add(item.Entry);
            else
                Flatten(item.Children, entries);
        }
    }

    /// <summary>The entry that $default names: a number, a title or an id, with &gt; between those of submenus.</summary>
    private BootEntry? FindDefault()
    {
        List<Item> items = _top;
        string rest = _variables.GetValueOrDefault("default", "0");
        while (items.Count > 0)
        {
            // A title may have the sign in it, doubled.
            int sign = rest.IndexOf('>');
            while (sign >= 0 && sign + 1 < rest.Length && rest[sign + 1] == '>')
                sign = rest.IndexOf('>', sign + 2);
            string name = (sign < 0 ? rest : rest[..sign]).Replace(">>", ">", StringComparison.Ordinal);
            rest = sign < 0 ? string.Empty : rest[(sign + 1)..];
            Item? item = int.TryParse(name, NumberStyles.None, CultureInfo.InvariantCulture, out int number)
                ? number < items.Count ? items[number] : null
                : items.Find(one => one.Title == name || one.Id == name);
            item ??= items[0];
            if (item.Entry is not null)
                return item.Entry;
            items = item.Children;
        }

        return null;
    }

    private bool Run(IReadOnlyList<GrubCommand> commands)
    {
        bool good = true;
        foreach (GrubCommand command in commands)
        {
            if (++_steps > MostSteps)
                throw new BootException("It does not come to an end.");
            good = command switch
            {
                GrubIf choice => Run(choice),
                GrubSimple simple => Run(simple),
                _ => true,
            };
        }

        return good;
    }

    private bool Run(GrubIf choice)
    {
        foreach ((IReadOnlyList<GrubCommand> condition, IReadOnlyList<GrubCommand> then) in choice.Branches)
        {
            if (Run(condition))
                return Run(then);
        }

        return Run(choice.Else);
    }

    private bool Nested(Func<bool> run)
    {
        if (++_depth > DeepestCalls)
            throw new BootException("Its functions call each other without an end.");
        bool good = run();
        _depth--;
        return good;
    }

    private bool Run(GrubSimple command)
    {
        if (command.Words.Count == 0)
            return true;
        List<string> words = Expand(command.Words);
        if (words.Count == 0)
            return true;
        string[] arguments = [.. words.Skip(1)];
        if (arguments.Length == 0 && IsAssignment(words[0], out int sign))
        {
            Set(words[0][..sign], words[0][(sign + 1)..]);
            return true;
        }

        switch (words[0])
        {
            case "menuentry" or "submenu" when command.Block is not null:
                AddItem(words[0] == "submenu", arguments, command.Block);
                return true;
            case "function" when command.Block is not null && arguments.Length > 0:
                _functions[arguments[0]] = command.Block;
                return true;
            case "set":
                foreach (string assignment in arguments)
                {
                    int equals = assignment.IndexOf('=');
                    if (equals > 0)
                        Set(assignment[..equals], assignment[(equals + 1)..]);
                }

                return true;
            case "unset":
                foreach (string name in arguments)
                    _variables.Remove(name);
                return true;
            case "[" or "test":
                return GrubTest.Evaluate(arguments is [.. var inside, "]"] ? inside : arguments, _files);
            case "false":
                return false;
            case "load_env":
                LoadEnvironment(arguments);
                return true;
            case "search" or "search.fs_uuid" or "search.fs_label" or "search.file":
                Search(words[0], arguments);
                return true;
            case "source" or "configfile" or "." when arguments.Length > 0:
                return RunFile(arguments[0]);
            case "blscfg":
                AddSpecificationEntries();
                return true;
            case "linux" or "linux16" or "linuxefi" or "kernel":
                SetKernel(arguments);
                return true;
            case "initrd" or "initrd16" or "initrdefi":
                if (_entry is not null)
                    _entry = _entry with { Ramdisks = [.. arguments.Select(FileOf)] };
                return true;
            default:
                return !_functions.TryGetValue(words[0], out IReadOnlyList<GrubCommand>? body) || Nested(() => Run(body));
        }
    }

    private static bool IsAssignment(string word, out int sign)
    {
        sign = word.IndexOf('=');
        return sign > 0 && !word.AsSpan(0, sign).ContainsAnyExcept(s_nameCharacters);
    }

    private void Set(string name, string value)
    {
        if (value.Length > LongestValue)
            throw new BootException("One of its variables grows without end.");
        _variables[name] = value;
    }

    /// <summary>Words with variables in their places; blanks in those that are not quoted separate words.</summary>
    private List<string> Expand(IReadOnlyList<GrubWord> words)
    {
        var expanded = new List<string>();
        foreach (GrubWord word in words)
        {
            var text = new StringBuilder();
            bool some = word.Pieces.Any(static piece => piece.Quoted);
            foreach (GrubPiece piece in word.Pieces)
            {
                string value = piece.IsVariable ? _variables.GetValueOrDefault(piece.Text, string.Empty) : piece.Text;
                if (!piece.IsVariable || piece.Quoted)
                {
                    text.Append(value);
                    continue;
                }

                string[] parts = value.Split((char[]?)[' ', '\t', '\n'], StringSplitOptions.RemoveEmptyEntries);
                for (int at = 0; at < parts.Length; at++)
                {
                    if (at > 0)
                    {
                        expanded.Add(text.ToString());
                        text.Clear();
                    }

                    text.Append(parts[at]);
                }
            }

            if (text.Length > 0 || some)
                expanded.Add(text.ToString());
            if (text.Length > LongestValue || expanded.Count > LongestValue)
                throw new BootException("One of its commands is too long.");
        }

        return expanded;
    }

    private void AddItem(bool submenu, string[] arguments, IReadOnlyList<GrubCommand> block)
    {
        if (++_count > MostEntries)
            throw new BootException("Its menu is too long.");
        string? title = null;
        string? id = null;
        for (int at = 0; at < arguments.Length; at++)
        {
            if (arguments[at] is "--class" or "--users" or "--hotkey" or "--source" && at + 1 < arguments.Length)
                at++;
            else if (arguments[at] == "--id" && at + 1 < arguments.Length)
                id = arguments[++at];
            else if (arguments[at].StartsWith("--id=", StringComparison.Ordinal))
                id = arguments[at][5..];
            else if (!arguments[at].StartsWith("--", StringComparison.Ordinal))
                title ??= arguments[at];
        }

        var item = new Item(title ?? string.Empty, id);
        _items.Add(item);
        List<Item> around = _items;
        BootEntry? outer = _entry;
        var variables = new Dictionary<string, string>(_variables, StringComparer.Ordinal);
        try
        {
            _items = submenu ? item.Children : [];
            _entry = submenu ? null : new BootEntry { Title = item.Title, Id = id };
            Nested(() => Run(block));
            item.Entry = submenu ? null : _entry;
        }
        finally
        {
            // GRUB runs the one that is chosen, and no other before it.
            _items = around;
            _entry = outer;
            _variables.Clear();
            foreach ((string name, string value) in variables)
                _variables[name] = value;
        }
    }

    private void SetKernel(string[] arguments)
    {
        if (_entry is not null && arguments.Length > 0)
            _entry = _entry with { Kernel = FileOf(arguments[0]), CommandLine = string.Join(' ', arguments.Skip(1)), Ramdisks = [] };
    }

    /// <summary>A file: (DEVICE)/PATH, or a path on $root.</summary>
    private BootFile FileOf(string path)
    {
        if (path.StartsWith('(') && path.IndexOf(')') is > 0 and var end)
            return new BootFile(path[(end + 1)..], path[1..end] == "$root" ? _variables.GetValueOrDefault("root", string.Empty) : path[1..end]);
        return new BootFile(path, _variables.GetValueOrDefault("root", string.Empty));
    }

    private void LoadEnvironment(string[] arguments)
    {
        string path = _variables.GetValueOrDefault("prefix", string.Empty) + "/grubenv";
        var only = new List<string>();
        for (int at = 0; at < arguments.Length; at++)
        {
            if (arguments[at] is "-f" or "--file" && at + 1 < arguments.Length)
                path = arguments[++at];
            else if (arguments[at].StartsWith("--file=", StringComparison.Ordinal))
                path = arguments[at][7..];
            else if (!arguments[at].StartsWith('-'))
                only.Add(arguments[at]);
        }

        path = FileOf(path).Path;
        if (!_files.FileExists(path))
            return;
        foreach (string line in Encoding.UTF8.GetString(_files.ReadFile(path, LargestFile)).Split('\n'))
        {
            int equals = line.IndexOf('=');
            if (equals > 0 && line[0] != '#' && (only.Count == 0 || only.Contains(line[..equals])))
                Set(line[..equals], Unescape(line[(equals + 1)..]));
        }

        static string Unescape(string value) => value.Replace("\\\\", "\\", StringComparison.Ordinal);
    }

    /// <summary>search: the variable gets a name by which the file system is found later.</summary>
    private void Search(string command, string[] arguments)
    {
        string kind = command switch { "search.fs_uuid" => "uuid", "search.fs_label" => "label", _ => "file" };
        string? variable = command == "search" ? null : "root";
        string? name = null;
        for (int at = 0; at < arguments.Length; at++)
        {
            switch (arguments[at])
            {
                case "-u" or "--fs-uuid":
                    kind = "uuid";
                    break;
                case "-l" or "--label" or "--fs-label":
                    kind = "label";
                    break;
                case "-f" or "--file":
                    kind = "file";
                    break;
                case "--set":
                    variable = "root";
                    break;
                case "-s" when at + 1 < arguments.Length:
                    variable = arguments[++at];
                    break;
                case "--hint" or "--hint-bios" or "--hint-efi" or "--hint-baremetal" or "--hint-ieee1275" or "--hint-arc" when at + 1 < arguments.Length:
                    at++;
                    break;
                case string argument when argument.StartsWith("--set=", StringComparison.Ordinal):
                    variable = argument[6..];
                    break;
                case string argument when !argument.StartsWith('-'):
                    // search.fs_uuid UUID VARIABLE [HINT…]
                    if (name is null)
                        name = argument;
                    else if (command != "search" && at == 1)
                        variable = argument;
                    break;
            }
        }

        if (variable is not null && name is not null && kind != "file")
            Set(variable, $"{kind}:{name}");
    }

    private bool RunFile(string path)
    {
        path = FileOf(path).Path;
        if (!_files.FileExists(path))
            return false;
        return Nested(() => Run(GrubParser.Parse(Encoding.UTF8.GetString(_files.ReadFile(path, LargestFile)))));
    }

    private void AddSpecificationEntries()
    {
        foreach (BootEntry entry in LoaderEntries.Read(_files, name => _variables.GetValueOrDefault(name, string.Empty)))
        {
            if (++_count > MostEntries)
                throw new BootException("Its menu is too long.");
            string root = _variables.GetValueOrDefault("root", string.Empty);
            _items.Add(new Item(entry.Title, entry.Id)
            {
                Entry = entry with
                {
                    Kernel = entry.Kernel is null ? null : entry.Kernel with { Device = root },
                    Ramdisks = [.. entry.Ramdisks.Select(file => file with { Device = root })],
                },
            });
        }
    }

    /// <summary>An entry, or a submenu.</summary>
    private sealed class Item(string title, string? id)
    {
        internal string Title { get; } = title;

        internal string? Id { get; } = id;

        internal BootEntry? Entry { get; set; }

        internal List<Item> Children { get; } = [];
    }
}
