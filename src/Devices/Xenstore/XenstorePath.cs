// Rules for paths of the store: which are valid, how a relative one is completed, who is whose parent.
using System.Buffers;
using System.Globalization;

namespace XenSharp.Devices.Xenstore;

/// <summary>
/// Paths as xenstore defines them (docs/misc/xenstore.txt): '/'-separated, made of ASCII letters, digits and "-/_@", without
/// double or trailing slashes.
/// </summary>
public static class XenstorePath
{
    private static readonly SearchValues<char> Permitted =
        SearchValues.Create("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-/_@");

    private const string DomainsPrefix = "/local/domain/";

    /// <summary>The folder of a domain, which its relative paths start from: /local/domain/N.</summary>
    public static string OfDomain(ushort domainId) => string.Create(CultureInfo.InvariantCulture, $"/local/domain/{domainId}");

    /// <summary>Whether the path names an event invented by the store (@introduceDomain, @releaseDomain), not a node.</summary>
    public static bool IsSpecial(string path) => path.StartsWith('@');

    /// <summary>
    /// Whether <paramref name="path"/> can name a node. The limit on its length applies to what follows "/local/domain/N/", so
    /// that a path that is valid when relative is valid when absolute.
    /// </summary>
    public static bool IsValid(string path, int maximumLength)
    {
        if (!path.StartsWith('/') || (path.EndsWith('/') && path.Length > 1) || path.Contains("//", StringComparison.Ordinal))
            return false;
        if (path.Length > XenstoreWire.AbsolutePathMaximum || path.Length - DomainPrefixLength(path) > maximumLength)
            return false;
        return !path.AsSpan().ContainsAnyExcept(Permitted);
    }

    /// <summary>Completes a relative path with the caller's folder; absolute and special ones stay.</summary>
    internal static string Canonicalize(string path, string folder) =>
        path.StartsWith('/') || IsSpecial(path) ? path : folder + "/" + path;

    /// <summary>The path of the node above; "/" is its own parent.</summary>
    internal static string ParentOf(string path)
    {
        int slash = path.LastIndexOf('/');
        return slash <= 0 ? "/" : path[..slash];
    }

    /// <summary>The last component; empty for "/".</summary>
    internal static string NameOf(string path) => path[(path.LastIndexOf('/') + 1)..];

    /// <summary>The path of the child <paramref name="name"/> of <paramref name="parent"/>.</summary>
    internal static string Join(string parent, string name) => parent.Length == 1 ? "/" + name : parent + "/" + name;

    private static int DomainPrefixLength(string path)
    {
        if (!path.StartsWith(DomainsPrefix, StringComparison.Ordinal))
            return 0;
        int end = DomainsPrefix.Length;
        while (end < path.Length && end < DomainsPrefix.Length + 5 && char.IsAsciiDigit(path[end]))
            end++;
        return end > DomainsPrefix.Length && end < path.Length && path[end] == '/' ? end + 1 : 0;
    }
}
