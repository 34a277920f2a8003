// Who may do what with a node: an owner, what everybody else may do, and exceptions domain by domain.
using System.Collections.Immutable;
using System.Globalization;

namespace XenSharp.Devices.Xenstore;

/// <summary>What a permission entry grants; the letters on the wire are n, r, w and b.</summary>
[Flags]
public enum XenstoreAccess : byte
{
    None = 0,
    Read = 1,
    Write = 2,
    Both = Read | Write,

    /// <summary>Not grantable: what only the owner of a node and privileged callers have.</summary>
    Owner = 4,
}

/// <summary>One entry of a permission list.</summary>
/// <param name="DomainId">The domain the entry is about.</param>
/// <param name="Access">None, Read, Write or Both.</param>
public readonly record struct XenstorePermission(ushort DomainId, XenstoreAccess Access)
{
    /// <summary>The entry in the form of the wire, such as "n0" or "b5".</summary>
    public override string ToString()
    {
        char letter = Access switch
        {
            XenstoreAccess.Read => 'r',
            XenstoreAccess.Write => 'w',
            XenstoreAccess.Both => 'b',
            _ => 'n',
        };
        return string.Create(CultureInfo.InvariantCulture, $"{letter}{DomainId}");
    }

    /// <summary>Reads the form of the wire: one of n, r, w, b, then the domain id in decimal (0 to 65535).</summary>
    /// <returns><see langword="false"/> for any other form.</returns>
    public static bool TryParse(ReadOnlySpan<char> text, out XenstorePermission permission)
    {
        permission = default;
        if (text.Length < 2 || !ushort.TryParse(text[1..], NumberStyles.None, CultureInfo.InvariantCulture, out ushort domainId))
            return false;
        switch (text[0])
        {
            case 'n': permission = new(domainId, XenstoreAccess.None); return true;
            case 'r': permission = new(domainId, XenstoreAccess.Read); return true;
            case 'w': permission = new(domainId, XenstoreAccess.Write); return true;
            case 'b': permission = new(domainId, XenstoreAccess.Both); return true;
            default: return false;
        }
    }
}

/// <summary>
/// The permission list of a node, immutable. The first entry names the owner, who may do everything; its access is what
/// domains without an entry of their own may do. The others are exceptions for one domain each; the first that fits counts.
/// </summary>
public sealed class XenstorePermissions : IEquatable<XenstorePermissions>
{
    private readonly ImmutableArray<XenstorePermission> _entries;

    /// <param name="entries">The list, owner first; at least one entry.</param>
    /// <exception cref="ArgumentException">The list is empty.</exception>
    public XenstorePermissions(params ReadOnlySpan<XenstorePermission> entries)
    {
        if (entries.IsEmpty)
            throw new ArgumentException("A permission list needs at least one entry: the first one names the owner.", nameof(entries));
        _entries = [.. entries];
    }

    /// <summary>Owned by domain 0 and closed to everyone unprivileged ("n0").</summary>
    public static XenstorePermissions Domain0Only { get; } = new(new XenstorePermission(0, XenstoreAccess.None));

    /// <summary>The domain of the first entry.</summary>
    public ushort Owner => _entries[0].DomainId;

    /// <summary>What a domain may do for which no entry speaks.</summary>
    public XenstoreAccess Default => _entries[0].Access;

    /// <summary>All entries, owner first.</summary>
    public ImmutableArray<XenstorePermission> Entries => _entries;

    /// <summary>The same list with another owner; what others may do stays.</summary>
    internal XenstorePermissions WithOwner(ushort domainId) =>
        domainId == Owner ? this : new(_entries.SetItem(0, new(domainId, Default)).AsSpan());

    public bool Equals(XenstorePermissions? other) => other is not null && _entries.AsSpan().SequenceEqual(other._entries.AsSpan());

    public override bool Equals(object? obj) => Equals(obj as XenstorePermissions);

    public override int GetHashCode()
    {
        HashCode hash = default;
        foreach (XenstorePermission entry in _entries)
            hash.Add(entry);
        return hash.ToHashCode();
    }

    /// <summary>The entries in wire form, separated by blanks.</summary>
    public override string ToString() => string.Join(' ', _entries);
}
