// What a front end says of itself in its part of the store.
using System.Globalization;
using XenSharp.Core;
using XenSharp.Devices.Xenstore;

namespace XenSharp.Devices.Xenbus;

/// <summary>
/// Reads the nodes of a front end. They are the guest's and may say anything: numbers are decimal, without sign, and each node is to
/// be read once.
/// </summary>
/// <param name="store">The store.</param>
/// <param name="folder">The front end's folder, or one below it ("…/queue-0").</param>
public readonly struct XenbusFrontEnd(XenstoreAccessor store, string folder)
{
    // Longer than any number, and short enough for a sentence.
    private const int LongestShown = 32;

    /// <summary>The folder that names are relative to.</summary>
    public string Folder => folder;

    /// <summary>The nodes of a folder below this one.</summary>
    public XenbusFrontEnd Below(string name) => new(store, $"{folder}/{name}");

    /// <summary>A node's value; null if there is none.</summary>
    public string? Read(string name) => store.Read($"{folder}/{name}");

    /// <summary>A number that has to be there.</summary>
    /// <exception cref="XenbusException">There is none, or it is no number from 0 to <paramref name="most"/>.</exception>
    public uint ReadNumber(string name, uint most = uint.MaxValue)
        => ReadOptional(name, most) ?? throw new XenbusException(Errno.ENOENT, $"reading {folder}/{name}: there is no such node");

    /// <summary>A number that may be missing.</summary>
    /// <exception cref="XenbusException">It is no number from 0 to <paramref name="most"/>.</exception>
    public uint? ReadOptional(string name, uint most = uint.MaxValue)
    {
        if (Read(name) is not { } text)
            return null;
        if (TryParse(text, out uint number) && number <= most)
            return number;
        throw new XenbusException(Errno.EINVAL, $"reading {folder}/{name}: \"{Shown(text)}\" is no number from 0 to {most}");
    }

    /// <summary>Whether a feature is there: its node holds a number that is not 0.</summary>
    /// <exception cref="XenbusException">It holds no number.</exception>
    public bool ReadFeature(string name) => ReadOptional(name) is > 0;

    /// <summary>Parses a number as nodes hold it.</summary>
    internal static bool TryParse(string text, out uint number)
        => uint.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out number);

    /// <summary>What a guest wrote, fit to be put into a sentence for people.</summary>
    internal static string Shown(string text)
    {
        string start = text.Length <= LongestShown ? text : text[..LongestShown] + "…";
        return string.Concat(start.Select(static c => char.IsControl(c) ? '?' : c));
    }
}
