// The manager's log, as xl dmesg shows Xen's: what it did, and what guests say by console_io.

using System.Globalization;
using System.Text;

namespace XenSharp.Toolstack.Management;

/// <summary>Keeps the newest lines. May be used by any thread; never blocks on anything but itself.</summary>
/// <param name="mirror">Is given each of the manager's own lines as well; null for nobody. Guests' lines are kept here only.</param>
public sealed class ManagerLog(Action<string>? mirror = null)
{
    /// <summary>Characters that are kept.</summary>
    public const int Capacity = 256 * 1024;

    /// <summary>A longer line is cut.</summary>
    public const int LongestLine = 4096;

    private readonly Lock _lock = new();
    private readonly Queue<string> _lines = new();
    private int _length;

    /// <summary>All lines that are kept, the oldest first, each with its newline.</summary>
    public string Text
    {
        get
        {
            lock (_lock)
            {
                var text = new StringBuilder(_length);
                foreach (string line in _lines)
                    _ = text.Append(line);
                return text.ToString();
            }
        }
    }

    /// <summary>Adds a sentence of the manager's own.</summary>
    public void Write(string sentence)
    {
        ArgumentNullException.ThrowIfNull(sentence);
        Add(sentence);
        mirror?.Invoke(sentence);
    }

    /// <summary>Forgets all lines.</summary>
    public void Clear()
    {
        lock (_lock)
        {
            _lines.Clear();
            _length = 0;
        }
    }

    /// <summary>Adds a line that a guest is behind.</summary>
    internal void Add(string text)
    {
        string time = DateTimeOffset.Now.ToString("yyyy-MM-dd HH:mm:ss.fff", CultureInfo.InvariantCulture);
        string line = $"{time} {(text.Length <= LongestLine ? text : text[..LongestLine])}\n";
        lock (_lock)
        {
            _lines.Enqueue(line);
            _length += line.Length;
            while (_length > Capacity)
                _length -= _lines.Dequeue().Length;
        }
    }
}
