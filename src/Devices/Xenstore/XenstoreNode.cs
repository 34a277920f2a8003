// A node of the store, immutable: a change makes a new node and new ancestors, so that a transaction's snapshot is one
// reference and costs nothing to take.
using System.Collections.Immutable;

namespace XenSharp.Devices.Xenstore;

/// <summary>
/// One node. <see cref="Generation"/> changes with the value, the permissions or the list of children's names, and is unique in
/// the store: two nodes of one path with the same generation are the same in all three. A change further below replaces the
/// node but keeps its generation.
/// </summary>
internal sealed class XenstoreNode
{
    // What xenstored keeps in front of a node, and for one permission entry; its quota on node sizes counts them.
    private const int RecordHeader = 24;
    private const int RecordPermission = 8;

    private XenstoreNode(string name, ulong generation, byte[] value, XenstorePermissions permissions,
        ImmutableArray<XenstoreNode> children, int childListLength)
    {
        Name = name;
        Generation = generation;
        Value = value;
        Permissions = permissions;
        Children = children;
        ChildListLength = childListLength;
    }

    /// <summary>The last component of the path; empty for the root.</summary>
    public string Name { get; }

    public ulong Generation { get; }

    /// <summary>The value, any bytes; never changed in place.</summary>
    public byte[] Value { get; }

    public XenstorePermissions Permissions { get; }

    /// <summary>Children in the order of their creation, which is the order of a DIRECTORY reply.</summary>
    public ImmutableArray<XenstoreNode> Children { get; }

    /// <summary>Bytes of the children's names, each with a NUL: the length of a DIRECTORY reply.</summary>
    public int ChildListLength { get; }

    /// <summary>The size in bytes that quotas go by.</summary>
    public int Size => RecordHeader + (RecordPermission * Permissions.Entries.Length) + Value.Length + ChildListLength;

    public static XenstoreNode Create(string name, ulong generation, byte[] value, XenstorePermissions permissions) =>
        new(name, generation, value, permissions, [], 0);

    /// <summary>The child of that name, or <see langword="null"/>.</summary>
    public XenstoreNode? Child(ReadOnlySpan<char> name)
    {
        int index = IndexOf(name);
        return index < 0 ? null : Children[index];
    }

    /// <summary>As <see cref="Child(ReadOnlySpan{char})"/>, looking at one position first: versions of a node agree mostly.</summary>
    public XenstoreNode? Child(string name, int likelyIndex) =>
        likelyIndex < Children.Length && Children[likelyIndex].Name == name ? Children[likelyIndex] : Child(name);

    public XenstoreNode WithContent(ulong generation, byte[] value, XenstorePermissions permissions) =>
        new(Name, generation, value, permissions, Children, ChildListLength);

    /// <summary>Adds a child that was not there.</summary>
    public XenstoreNode WithNewChild(ulong generation, XenstorePermissions permissions, XenstoreNode child) =>
        new(Name, generation, Value, permissions, Children.Add(child), ChildListLength + child.Name.Length + 1);

    /// <summary>Takes away a child that is there.</summary>
    public XenstoreNode WithoutChild(ulong generation, XenstorePermissions permissions, string name) =>
        new(Name, generation, Value, permissions, Children.RemoveAt(IndexOf(name)), ChildListLength - name.Length - 1);

    /// <summary>Puts a new version of an existing child in its place.</summary>
    public XenstoreNode WithChildReplaced(XenstoreNode child) =>
        new(Name, Generation, Value, Permissions, Children.SetItem(IndexOf(child.Name), child), ChildListLength);

    /// <summary>The same node over the same children's names, with other versions of the children.</summary>
    public XenstoreNode WithChildren(ImmutableArray<XenstoreNode> children, int childListLength) =>
        new(Name, Generation, Value, Permissions, children, childListLength);

    /// <summary>The names of the children, each closed by NUL.</summary>
    public byte[] ChildList()
    {
        byte[] list = new byte[ChildListLength];
        int offset = 0;
        foreach (XenstoreNode child in Children)
        {
            offset += System.Text.Encoding.Latin1.GetBytes(child.Name, list.AsSpan(offset));
            offset++;
        }
        return list;
    }

    private int IndexOf(ReadOnlySpan<char> name)
    {
        ReadOnlySpan<XenstoreNode> children = Children.AsSpan();
        for (int index = 0; index < children.Length; index++)
        {
            if (name.SequenceEqual(children[index].Name))
                return index;
        }
        return -1;
    }
}
