// An open transaction: the tree as it was, the tree as the transaction has made it, and what must not have changed meanwhile.
namespace XenSharp.Devices.Xenstore;

/// <summary>
/// A transaction sees the store as it was at its start plus its own changes. It can be committed if every node it looked at,
/// present or absent, still has the generation it had then; everything else may have changed and is kept.
/// </summary>
internal sealed class XenstoreTransactionState(uint id, XenstoreNode root, ulong startGeneration)
{
    private readonly Dictionary<string, int> _eventIndex = new(StringComparer.Ordinal);

    public uint Id { get; } = id;

    /// <summary>The store when the transaction started.</summary>
    public XenstoreNode Snapshot { get; } = root;

    /// <summary>The store as the transaction sees it.</summary>
    public XenstoreNode Root { get; set; } = root;

    /// <summary>Nodes with a later generation are the transaction's own.</summary>
    public ulong StartGeneration { get; } = startGeneration;

    /// <summary>Every path looked at or changed, with its generation in <see cref="Snapshot"/>.</summary>
    public Dictionary<string, ulong> Accessed { get; } = new(StringComparer.Ordinal);

    /// <summary>Set when a quota stopped an operation half way through the client's plan: it cannot be committed.</summary>
    public bool Failed { get; set; }

    public bool CreatedNodes { get; set; }

    /// <summary>What a commit changes in the accounts of the owners of nodes: number of nodes and bytes.</summary>
    public Dictionary<ushort, (int Nodes, long Memory)> Deltas { get; } = [];

    /// <summary>Bytes of the transaction's own nodes, which its client pays for until the end.</summary>
    public long Charged { get; set; }

    /// <summary>Events to fire on commit, in the order of the changes.</summary>
    public List<(string Path, bool Exact)> Events { get; } = [];

    /// <summary>Remembers an event; one for the node and everything below outweighs one for the node alone.</summary>
    public void QueueEvent(string path, bool exact)
    {
        if (!_eventIndex.TryGetValue(path, out int index))
        {
            _eventIndex.Add(path, Events.Count);
            Events.Add((path, exact));
        }
        else if (!exact)
        {
            Events[index] = (path, false);
        }
    }
}
