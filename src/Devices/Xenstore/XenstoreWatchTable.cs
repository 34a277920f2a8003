// All watches of all clients by the path they watch, so that an event costs what its path is deep and not what there are watches.
namespace XenSharp.Devices.Xenstore;

/// <summary>One registered watch.</summary>
internal class XenstoreWatch(XenstoreSession session, string path, string token, bool relative, int depth, ulong sequence)
{
    /// <summary>The depth of a watch that has none.</summary>
    public const int AnyDepth = int.MaxValue;

    public XenstoreSession Session { get; } = session;

    /// <summary>The absolute path, or a special one.</summary>
    public string Path { get; } = path;

    /// <summary>What the client wants to be told with each event, one character for each byte.</summary>
    public string Token { get; } = token;

    /// <summary>How many levels below the path are watched. Of a special event: 1 if it is to name the domain.</summary>
    public int Depth { get; } = depth;

    public ulong Sequence { get; } = sequence;

    /// <summary>What the watch costs its domain's memory account.</summary>
    public int Size => Path.Length + Token.Length;

    /// <summary>A path of an event in the form in which the client named the watched one: relative if that was.</summary>
    public string Report(string eventPath) =>
        !relative ? eventPath : eventPath.Length <= Session.Folder.Length ? "" : eventPath[(Session.Folder.Length + 1)..];
}

/// <summary>The watches of the store.</summary>
internal sealed class XenstoreWatchTable
{
    private readonly Dictionary<string, List<XenstoreWatch>> _watches = new(StringComparer.Ordinal);

    public int Count { get; private set; }

    public void Add(XenstoreWatch watch)
    {
        if (!_watches.TryGetValue(watch.Path, out List<XenstoreWatch>? list))
            _watches.Add(watch.Path, list = []);
        list.Add(watch);
        Count++;
    }

    public void Remove(XenstoreWatch watch)
    {
        List<XenstoreWatch> list = _watches[watch.Path];
        list.Remove(watch);
        if (list.Count == 0)
            _watches.Remove(watch.Path);
        Count--;
    }

    /// <summary>
    /// The watches that an event concerns, oldest client and oldest watch first.
    /// </summary>
    /// <param name="path">The path of the event.</param>
    /// <param name="exact">Only watches of this very path; else also those of the paths above.</param>
    /// <param name="matches">Receives the watches.</param>
    public void Match(string path, bool exact, List<XenstoreWatch> matches)
    {
        matches.Clear();
        if (Count == 0)
            return;
        Collect(path, 0, matches);
        if (!exact)
        {
            int levels = 0;
            for (string at = path; at.Length > 1;)
            {
                at = XenstorePath.ParentOf(at);
                Collect(at, ++levels, matches);
            }
        }
        if (matches.Count > 1)
        {
            matches.Sort(static (left, right) =>
            {
                int order = left.Session.Sequence.CompareTo(right.Session.Sequence);
                return order != 0 ? order : left.Sequence.CompareTo(right.Sequence);
            });
        }
    }

    private void Collect(string path, int levels, List<XenstoreWatch> matches)
    {
        if (!_watches.TryGetValue(path, out List<XenstoreWatch>? list))
            return;
        foreach (XenstoreWatch watch in list)
        {
            if (watch.Depth >= levels)
                matches.Add(watch);
        }
    }
}
