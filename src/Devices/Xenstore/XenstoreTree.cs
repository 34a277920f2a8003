// Operations on a whole tree of immutable nodes: find, replace, and merge what a transaction did into what happened meanwhile.
using System.Collections.Immutable;

namespace XenSharp.Devices.Xenstore;

/// <summary>
/// Functions from a root to a root. Paths are absolute and valid (<see cref="XenstorePath.IsValid"/>). Recursion is as deep as
/// a path, at most <see cref="XenstoreWire.AbsolutePathMaximum"/>/2 levels.
/// </summary>
internal static class XenstoreTree
{
    /// <summary>The generation of a node that does not exist.</summary>
    public const ulong NoGeneration = ulong.MaxValue;

    public static XenstoreNode? Find(XenstoreNode root, string path)
    {
        XenstoreNode? node = root;
        ReadOnlySpan<char> rest = path.AsSpan(1);
        while (node is not null && !rest.IsEmpty)
            node = node.Child(TakeName(ref rest));
        return node;
    }

    /// <summary>The generation of the node at the path, or <see cref="NoGeneration"/>.</summary>
    public static ulong GenerationOf(XenstoreNode root, string path) => Find(root, path)?.Generation ?? NoGeneration;

    /// <summary>Puts another version of an existing node in its place.</summary>
    public static XenstoreNode Replace(XenstoreNode root, string path, XenstoreNode node) => Replace(root, path.AsSpan(1), node);

    /// <summary>
    /// Brings a transaction's changes into the live tree. The caller has made sure that every node the transaction looked at or
    /// changed has the same generation in <paramref name="live"/> as in <paramref name="snapshot"/>.
    /// </summary>
    /// <param name="snapshot">The tree when the transaction started.</param>
    /// <param name="changed">The transaction's own tree.</param>
    /// <param name="live">The tree now.</param>
    public static XenstoreNode Merge(XenstoreNode? snapshot, XenstoreNode changed, XenstoreNode? live)
    {
        if (live is null || ReferenceEquals(snapshot, live))
            return changed;
        if (ReferenceEquals(snapshot, changed))
            return live;

        // A node that the transaction changed is, by generation, still the one of the snapshot: its children's names are the
        // transaction's to say. Any other keeps what it has; the transaction can only have changed something below it.
        bool own = snapshot is null || changed.Generation != snapshot.Generation;
        XenstoreNode names = own ? changed : live;
        ImmutableArray<XenstoreNode>.Builder children = ImmutableArray.CreateBuilder<XenstoreNode>(names.Children.Length);
        for (int index = 0; index < names.Children.Length; index++)
        {
            XenstoreNode child = names.Children[index];
            XenstoreNode? mine = own ? child : changed.Child(child.Name, index);
            XenstoreNode? theirs = own ? live.Child(child.Name, index) : child;
            children.Add(mine is null ? theirs! : Merge(snapshot?.Child(child.Name, index), mine, theirs));
        }
        return names.WithChildren(children.MoveToImmutable(), names.ChildListLength);
    }

    private static XenstoreNode Replace(XenstoreNode at, ReadOnlySpan<char> rest, XenstoreNode node)
    {
        if (rest.IsEmpty)
            return node;
        ReadOnlySpan<char> name = TakeName(ref rest);
        return at.WithChildReplaced(Replace(at.Child(name)!, rest, node));
    }

    private static ReadOnlySpan<char> TakeName(ref ReadOnlySpan<char> rest)
    {
        int slash = rest.IndexOf('/');
        ReadOnlySpan<char> name = slash < 0 ? rest : rest[..slash];
        rest = slash < 0 ? default : rest[(slash + 1)..];
        return name;
    }
}
