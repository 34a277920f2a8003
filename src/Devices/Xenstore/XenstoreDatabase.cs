// The store itself: nodes with their permissions, domains with their accounts, transactions. What a request means is decided
// here, by the rules of Xen's docs/misc/xenstore.txt and, where that is silent, of Xen 4.17's xenstored.
using System.Collections.Immutable;
using System.Globalization;
using System.Runtime.CompilerServices;

// The tests look at the accounts and put the tree beside a model.
[assembly: InternalsVisibleTo("XenSharp.Devices.Tests")]

namespace XenSharp.Devices.Xenstore;

/// <summary>A domain as the store knows it, and what it occupies.</summary>
internal sealed class XenstoreDomain(ushort id, ulong generation)
{
    public ushort Id { get; } = id;

    /// <summary>The store's generation when the domain appeared; older nodes' permissions are not about this domain.</summary>
    public ulong Generation { get; } = generation;

    /// <summary>Whether the store is connected to the domain (XS_INTRODUCE without XS_RELEASE since).</summary>
    public bool Introduced { get; set; }

    /// <summary>Whether its shutdown has been announced.</summary>
    public bool Shutdown { get; set; }

    /// <summary>Nodes it owns.</summary>
    public int Nodes { get; set; }

    /// <summary>Bytes of nodes it owns, of its transactions and watches, and of messages it has not taken.</summary>
    public long Memory { get; set; }

    /// <summary>The connection through its ring.</summary>
    public XenstoreConnection? Connection { get; set; }
}

/// <summary>
/// The state of the store and all operations on it. Every member is used with <see cref="Gate"/> held. Operations answer a
/// guest's mistakes with an error and never throw for them.
/// </summary>
internal sealed partial class XenstoreDatabase
{
    private readonly Dictionary<ushort, XenstoreDomain> _domains = [];
    private XenstoreNode _root;
    private ulong _generation;
    private ulong _sequence;

    public XenstoreDatabase(XenstoreOptions options)
    {
        Options = options;
        Quotas = options.Quotas;
        Domain0 = AddDomain(0);
        Domain0.Introduced = true;

        // The nodes xenstored starts with.
        XenstorePermissions permissions = XenstorePermissions.Domain0Only;
        XenstoreNode daemon = XenstoreNode.Create("xenstored", ++_generation, [], permissions);
        XenstoreNode tool = XenstoreNode.Create("tool", ++_generation, [], permissions)
            .WithNewChild(++_generation, permissions, daemon);
        _root = XenstoreNode.Create("", ++_generation, [], permissions).WithNewChild(++_generation, permissions, tool);
        Account(null, null, "/", null, _root);
        Account(null, null, "/tool", null, tool);
        Account(null, null, "/tool/xenstored", null, daemon);
    }

    /// <summary>Held during every use of the database and of what belongs to it.</summary>
    public Lock Gate { get; } = new();

    public XenstoreOptions Options { get; }

    /// <summary>The quotas now; XS_CONTROL can change them.</summary>
    public XenstoreQuotas Quotas { get; set; }

    /// <summary>Whether each request is told to <see cref="XenstoreOptions.Log"/>.</summary>
    public bool LogsRequests { get; set; }

    public XenstoreDomain Domain0 { get; }

    /// <summary>The tree as everyone outside transactions sees it.</summary>
    public XenstoreNode Root => _root;

    /// <summary>How many watches there are, whoever has them.</summary>
    public int WatchCount => _watches.Count;

    public ulong NextSequence() => ++_sequence;

    /// <summary>The domain, if the store knows of it.</summary>
    public XenstoreDomain? FindDomain(ushort domainId) => _domains.GetValueOrDefault(domainId);

    /// <summary>Makes the store know of a domain: from now on permissions can be given to it.</summary>
    public XenstoreDomain AddDomain(ushort domainId)
    {
        if (!_domains.TryGetValue(domainId, out XenstoreDomain? domain))
            _domains.Add(domainId, domain = new XenstoreDomain(domainId, ++_generation));
        return domain;
    }

    public XenstoreError Read(XenstoreSession session, XenstoreTransactionState? transaction, string path, out XenstoreNode? node) =>
        Lookup(session, transaction, path, XenstoreAccess.Read, out node);

    public XenstoreError Write(
        XenstoreSession session, XenstoreTransactionState? transaction, string path, byte[] value, XenstoreTicket? ticket)
    {
        XenstoreError error = Lookup(session, transaction, path, XenstoreAccess.Write, out XenstoreNode? node);
        if (error == XenstoreError.ENOENT)
            return Create(session, transaction, path, value, ticket);
        if (error != XenstoreError.None)
            return error;

        XenstoreNode changed = node!.WithContent(_generation + 1, value, CurrentPermissions(node));
        error = Store(session, transaction, path, node, changed);
        if (error != XenstoreError.None)
            return error;
        Fire(transaction, ticket, path, exact: false, changed, null);
        return XenstoreError.None;
    }

    public XenstoreError MakeDirectory(
        XenstoreSession session, XenstoreTransactionState? transaction, string path, XenstoreTicket? ticket)
    {
        XenstoreError error = Lookup(session, transaction, path, XenstoreAccess.Write, out _);
        return error == XenstoreError.ENOENT ? Create(session, transaction, path, [], ticket) : error;
    }

    public XenstoreError Remove(
        XenstoreSession session, XenstoreTransactionState? transaction, string path, XenstoreTicket? ticket)
    {
        XenstoreError error = Lookup(session, transaction, path, XenstoreAccess.Write, out XenstoreNode? node);
        string parentPath = XenstorePath.ParentOf(path);
        if (error == XenstoreError.ENOENT)
        {
            // What is not there need not be removed, but its parent must be there.
            if (!TryAccess(session, transaction, parentPath, out XenstoreNode? above))
                return XenstoreError.ENOSPC;
            return above is null ? XenstoreError.ENOENT : XenstoreError.None;
        }
        if (error != XenstoreError.None)
            return error;
        if (path == "/")
            return XenstoreError.EINVAL;

        if (!TryAccess(session, transaction, parentPath, out XenstoreNode? parent))
            return XenstoreError.ENOSPC;
        List<(string Path, XenstoreNode Node, XenstoreNode Parent)> doomed = [];
        Collect(path, node!, parent!, doomed);
        if (transaction is not null)
        {
            foreach ((string below, _, _) in doomed)
            {
                if (!TryAccess(session, transaction, below, out _))
                    return XenstoreError.ENOSPC;
            }
        }
        RemoveSubtree(session, transaction, parentPath, parent!, doomed, ticket);
        return XenstoreError.None;
    }

    public XenstoreError SetPermissions(
        XenstoreSession session, XenstoreTransactionState? transaction, string path, XenstorePermissions permissions,
        XenstoreTicket? ticket)
    {
        if (!session.Privileged && permissions.Entries.Length > Quotas.Permissions)
            return XenstoreError.ENOSPC;

        // Whom the host names exists. A guest can only name those that exist: entries about others count for nobody, so that a
        // domain created later does not inherit them.
        if (session.Privileged)
        {
            foreach (XenstorePermission entry in permissions.Entries)
                AddDomain(entry.DomainId);
        }
        if (FindDomain(permissions.Owner) is null)
            return XenstoreError.ENOENT;
        if (XenstorePath.IsSpecial(path))
            return SetSpecialPermissions(session, path, permissions);

        XenstoreError error = Lookup(session, transaction, path, XenstoreAccess.Write | XenstoreAccess.Owner, out XenstoreNode? node);
        if (error != XenstoreError.None)
            return error;
        if (!session.Privileged && permissions.Owner != node!.Permissions.Owner)
            return XenstoreError.EPERM;
        XenstoreNode changed = node!.WithContent(_generation + 1, node.Value, permissions);
        error = Store(session, transaction, path, node, changed);
        if (error != XenstoreError.None)
            return error;
        Fire(transaction, ticket, path, exact: false, changed, node);
        return XenstoreError.None;
    }

    /// <summary>What a client may do with a node.</summary>
    public XenstoreAccess AccessOf(XenstoreSession session, XenstorePermissions permissions, ulong generation)
    {
        const XenstoreAccess Everything = XenstoreAccess.Both | XenstoreAccess.Owner;
        ushort self = session.Domain.Id;
        if (session.Privileged || permissions.Owner == self || permissions.Owner == session.Target)
            return Everything;
        ImmutableArray<XenstorePermission> entries = permissions.Entries;
        for (int index = 1; index < entries.Length; index++)
        {
            ushort domainId = entries[index].DomainId;
            if ((domainId == self || domainId == session.Target) && IsCurrent(entries[index], generation))
                return entries[index].Access;
        }
        return permissions.Default;
    }

    /// <summary>Counts nodes and bytes of every domain anew and compares: the store's own health check.</summary>
    public bool IsConsistent()
    {
        Dictionary<ushort, int> nodes = [];
        Count(_root);
        foreach (XenstoreDomain domain in _domains.Values)
        {
            if (nodes.GetValueOrDefault(domain.Id) != domain.Nodes || domain.Memory < 0)
                return false;
            nodes.Remove(domain.Id);
        }
        return nodes.Count == 0;

        void Count(XenstoreNode node)
        {
            nodes[node.Permissions.Owner] = nodes.GetValueOrDefault(node.Permissions.Owner) + 1;
            foreach (XenstoreNode child in node.Children)
                Count(child);
        }
    }

    /// <summary>What the domains occupy, a line each.</summary>
    public IEnumerable<string> Report()
    {
        yield return string.Create(CultureInfo.InvariantCulture, $"{_domains.Count} domains, {_watches.Count} watches");
        foreach (XenstoreDomain domain in _domains.Values.OrderBy(static domain => domain.Id))
        {
            yield return string.Create(CultureInfo.InvariantCulture,
                $"domain {domain.Id}: {domain.Nodes} nodes, {domain.Memory} bytes, " +
                $"{domain.Connection?.QueuedMessages ?? 0} messages waiting{(domain.Introduced ? "" : ", not introduced")}");
        }
    }

    // A permission counts only for the domain that existed when it was given, not for a later one of the same number.
    private bool IsCurrent(XenstorePermission entry, ulong generation) =>
        _domains.TryGetValue(entry.DomainId, out XenstoreDomain? domain) && domain.Generation <= generation;

    // The list without entries that count for nobody: a rewritten node has a new generation, which must not revive them.
    private XenstorePermissions CurrentPermissions(XenstoreNode node)
    {
        ReadOnlySpan<XenstorePermission> entries = node.Permissions.Entries.AsSpan();
        bool stale = false;
        foreach (XenstorePermission entry in entries[1..])
            stale |= !IsCurrent(entry, node.Generation);
        if (!stale)
            return node.Permissions;
        List<XenstorePermission> current = [entries[0]];
        foreach (XenstorePermission entry in entries[1..])
        {
            if (IsCurrent(entry, node.Generation))
                current.Add(entry);
        }
        return new XenstorePermissions([.. current]);
    }

    // Finds a node and notes in the transaction that it was looked at. False: the transaction has looked at too many.
    private bool TryAccess(XenstoreSession session, XenstoreTransactionState? transaction, string path, out XenstoreNode? node)
    {
        node = null;
        if (transaction is null)
        {
            node = XenstoreTree.Find(_root, path);
            return true;
        }
        if (!transaction.Accessed.ContainsKey(path))
        {
            if (!session.Privileged && transaction.Accessed.Count >= Quotas.TransactionNodes)
            {
                transaction.Failed = true;
                return false;
            }
            transaction.Accessed.Add(path, XenstoreTree.GenerationOf(transaction.Snapshot, path));
        }
        node = XenstoreTree.Find(transaction.Root, path);
        return true;
    }

    private XenstoreError Lookup(
        XenstoreSession session, XenstoreTransactionState? transaction, string path, XenstoreAccess need, out XenstoreNode? node)
    {
        node = null;
        if (!XenstorePath.IsValid(path, Quotas.PathLength))
            return XenstoreError.EINVAL;
        if (!TryAccess(session, transaction, path, out XenstoreNode? found))
            return XenstoreError.ENOSPC;
        if (found is not null && (AccessOf(session, found.Permissions, found.Generation) & need) == need)
        {
            node = found;
            return XenstoreError.None;
        }

        // Whether a node exists is told only to those who could do the same with the nearest node above that does.
        XenstoreNode? above;
        string at = path;
        do
        {
            at = XenstorePath.ParentOf(at);
            if (!TryAccess(session, transaction, at, out above))
                return XenstoreError.ENOSPC;
        }
        while (above is null);
        if ((AccessOf(session, above.Permissions, above.Generation) & need) == 0)
            return XenstoreError.EACCES;
        return found is null ? XenstoreError.ENOENT : XenstoreError.EACCES;
    }

    // Creates a node and the missing ones above. Permissions are inherited; what a guest creates it owns.
    private XenstoreError Create(
        XenstoreSession session, XenstoreTransactionState? transaction, string path, byte[] value, XenstoreTicket? ticket)
    {
        List<string> missing = [path];
        string ancestorPath = XenstorePath.ParentOf(path);
        XenstoreNode? ancestor;
        while (true)
        {
            if (!TryAccess(session, transaction, ancestorPath, out ancestor))
                return XenstoreError.ENOSPC;
            if (ancestor is not null)
                break;
            missing.Add(ancestorPath);
            ancestorPath = XenstorePath.ParentOf(ancestorPath);
        }

        XenstorePermissions permissions = CurrentPermissions(ancestor);
        XenstorePermissions inherited = session.Privileged ? permissions : permissions.WithOwner(session.Domain.Id);
        if (!session.Privileged && NodesOf(session.Domain, transaction) + missing.Count > Quotas.Nodes)
            return XenstoreError.ENOSPC;

        XenstoreNode? created = null;
        long growth = 0;
        foreach (string at in missing)
        {
            XenstoreNode node = XenstoreNode.Create(XenstorePath.NameOf(at), ++_generation, created is null ? value : [], inherited);
            created = created is null ? node : node.WithNewChild(_generation, inherited, created);
            if (TooBig(session, created))
                return Refuse(transaction, XenstoreError.ENOSPC);
            growth += created.Size + at.Length;
        }
        XenstoreNode changed = ancestor.WithNewChild(++_generation, permissions, created!);
        if (TooBig(session, changed))
            return Refuse(transaction, XenstoreError.ENOSPC);
        if (!session.Privileged && session.Domain.Memory + growth > Quotas.Memory)
            return Refuse(transaction, XenstoreError.EIO);

        SetRoot(transaction, XenstoreTree.Replace(RootOf(transaction), ancestorPath, changed));
        Account(session, transaction, ancestorPath, ancestor, changed);
        for (int index = missing.Count - 1; index >= 0; index--)
        {
            Account(session, transaction, missing[index], null, created);
            created = index > 0 ? created!.Children[0] : created;
        }
        if (transaction is not null)
            transaction.CreatedNodes = true;
        Fire(transaction, ticket, path, exact: false, created, null);
        return XenstoreError.None;
    }

    // Puts a changed node, made with the next generation, in its place if quotas allow.
    private XenstoreError Store(
        XenstoreSession session, XenstoreTransactionState? transaction, string path, XenstoreNode old, XenstoreNode changed)
    {
        if (TooBig(session, changed))
            return Refuse(transaction, XenstoreError.ENOSPC);
        if (!session.Privileged)
        {
            XenstoreDomain? payer = transaction is null ? FindDomain(changed.Permissions.Owner) : session.Domain;
            bool charged = transaction is null || old.Generation > transaction.StartGeneration;
            long growth = changed.Size - (charged ? old.Size : 0);
            if (payer is not null && payer.Id != 0 && growth > 0 && payer.Memory + growth > Quotas.Memory)
                return Refuse(transaction, XenstoreError.EIO);
        }
        _generation = changed.Generation;
        SetRoot(transaction, XenstoreTree.Replace(RootOf(transaction), path, changed));
        Account(session, transaction, path, old, changed);
        return XenstoreError.None;
    }

    private static void Collect(
        string path, XenstoreNode node, XenstoreNode parent, List<(string Path, XenstoreNode Node, XenstoreNode Parent)> nodes)
    {
        foreach (XenstoreNode child in node.Children)
            Collect(XenstorePath.Join(path, child.Name), child, node, nodes);
        nodes.Add((path, node, parent));
    }

    // Takes a node and everything below away. "doomed" lists it all, children before parents, the node itself last.
    private void RemoveSubtree(
        XenstoreSession? session, XenstoreTransactionState? transaction, string parentPath, XenstoreNode parent,
        List<(string Path, XenstoreNode Node, XenstoreNode Parent)> doomed, XenstoreTicket? ticket)
    {
        XenstoreNode changed = parent.WithoutChild(++_generation, CurrentPermissions(parent), doomed[^1].Node.Name);
        SetRoot(transaction, XenstoreTree.Replace(RootOf(transaction), parentPath, changed));
        Account(session, transaction, parentPath, parent, changed);
        for (int index = 0; index < doomed.Count; index++)
        {
            (string path, XenstoreNode node, XenstoreNode above) = doomed[index];
            Account(session, transaction, path, node, null);
            bool exact = index < doomed.Count - 1;
            if (transaction is not null)
                transaction.QueueEvent(path, exact);
            else
                FireLive(ticket, path, exact, node, above, null);
        }
    }

    private bool TooBig(XenstoreSession session, XenstoreNode node) => !session.Privileged && node.Size >= Quotas.NodeSize;

    private static XenstoreError Refuse(XenstoreTransactionState? transaction, XenstoreError error)
    {
        // As in xenstored, a change that was refused for its size spoils the transaction.
        if (transaction is not null)
            transaction.Failed = true;
        return error;
    }

    private XenstoreNode RootOf(XenstoreTransactionState? transaction) => transaction is null ? _root : transaction.Root;

    private void SetRoot(XenstoreTransactionState? transaction, XenstoreNode root)
    {
        if (transaction is null)
            _root = root;
        else
            transaction.Root = root;
    }

    private static int NodesOf(XenstoreDomain domain, XenstoreTransactionState? transaction) =>
        domain.Nodes + (transaction is null ? 0 : transaction.Deltas.GetValueOrDefault(domain.Id).Nodes);

    // Books a change of one node: to its owner now, or to the transaction, whose client pays until the end.
    private void Account(
        XenstoreSession? session, XenstoreTransactionState? transaction, string path, XenstoreNode? old, XenstoreNode? changed)
    {
        if (old is not null)
            Book(old.Permissions.Owner, -1, -(old.Size + path.Length));
        if (changed is not null)
            Book(changed.Permissions.Owner, 1, changed.Size + path.Length);
        if (transaction is null || session is null)
            return;
        long charge = changed is null ? 0 : changed.Size + path.Length;
        if (old is not null && old.Generation > transaction.StartGeneration)
            charge -= old.Size + path.Length;
        transaction.Charged += charge;
        session.Domain.Memory += charge;

        void Book(ushort owner, int nodes, long bytes)
        {
            if (transaction is not null)
            {
                (int Nodes, long Memory) delta = transaction.Deltas.GetValueOrDefault(owner);
                transaction.Deltas[owner] = (delta.Nodes + nodes, delta.Memory + bytes);
            }
            else if (FindDomain(owner) is { } domain)
            {
                domain.Nodes += nodes;
                domain.Memory += bytes;
            }
        }
    }
}
