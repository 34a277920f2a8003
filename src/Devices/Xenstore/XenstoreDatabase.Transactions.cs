// Transactions, watches and domains of the store: what happens on commit, who is told of a change, what a domain leaves behind.
namespace XenSharp.Devices.Xenstore;

internal sealed partial class XenstoreDatabase
{
    private const string IntroduceEvent = "@introduceDomain";
    private const string ReleaseEvent = "@releaseDomain";

    private readonly XenstoreWatchTable _watches = new();
    private readonly List<XenstoreWatch> _matches = [];

    // Who is told of special events: domain 0 alone, until it allows others.
    private XenstorePermissions _introducePermissions = XenstorePermissions.Domain0Only;
    private XenstorePermissions _releasePermissions = XenstorePermissions.Domain0Only;
    private ulong _introduceGeneration;
    private ulong _releaseGeneration;

    public XenstoreError StartTransaction(XenstoreSession session, out XenstoreTransactionState? transaction)
    {
        transaction = null;
        if (!session.Privileged && session.Transactions.Count > Quotas.Transactions)
            return XenstoreError.ENOSPC;
        while (session.NextTransactionId == 0 || session.Transactions.ContainsKey(session.NextTransactionId))
            session.NextTransactionId++;
        transaction = new XenstoreTransactionState(session.NextTransactionId++, _root, ++_generation);
        session.Transactions.Add(transaction.Id, transaction);
        return XenstoreError.None;
    }

    /// <summary>Ends a transaction for good, whatever the answer.</summary>
    public XenstoreError EndTransaction(XenstoreSession session, XenstoreTransactionState transaction, bool commit, XenstoreTicket? ticket)
    {
        session.Transactions.Remove(transaction.Id);
        session.Domain.Memory -= transaction.Charged;
        if (!commit)
            return XenstoreError.None;
        if (transaction.Failed)
            return XenstoreError.ENOMEM;

        foreach ((ushort domainId, (int nodes, long _)) in transaction.Deltas)
        {
            if (FindDomain(domainId) is not { } domain)
            {
                if (nodes > 0)
                    return XenstoreError.ENOMEM;
                continue;
            }
            // xenstored's edge: one node less than outside a transaction.
            bool limited = transaction.CreatedNodes && !session.Privileged && domainId != 0;
            if (limited && nodes != 0 && domain.Nodes + nodes >= Quotas.Nodes)
                return XenstoreError.ENOSPC;
        }

        if (!ReferenceEquals(_root, transaction.Snapshot))
        {
            foreach ((string path, ulong generation) in transaction.Accessed)
            {
                if (XenstoreTree.GenerationOf(_root, path) != generation)
                    return XenstoreError.EAGAIN;
            }
        }
        _root = XenstoreTree.Merge(transaction.Snapshot, transaction.Root, _root);
        foreach ((ushort domainId, (int nodes, long memory)) in transaction.Deltas)
        {
            if (FindDomain(domainId) is { } domain)
            {
                domain.Nodes += nodes;
                domain.Memory += memory;
            }
        }
        foreach ((string path, bool exact) in transaction.Events)
        {
            XenstoreNode? node = XenstoreTree.Find(_root, path);
            XenstoreNode? parent = XenstoreTree.Find(_root, XenstorePath.ParentOf(path));
            FireLive(ticket, path, exact, node, parent, XenstoreTree.Find(transaction.Snapshot, path));
        }
        return XenstoreError.None;
    }

    /// <summary>Registers a watch. The caller queues its reply and then fires the watch once with <see cref="FireFirst"/>.</summary>
    /// <param name="session">Whose it is.</param>
    /// <param name="path">As the client gave it.</param>
    /// <param name="token">What its events carry.</param>
    /// <param name="depth">Levels below the path to watch, which docs/misc/xenstore.txt of Xen 4.17 defines and its xenstored does
    /// not know yet; <see langword="null"/> for all. For special events only 1 is defined: the domain's id is told.</param>
    /// <param name="watch">The watch.</param>
    /// <param name="callback">Whom to call; <see langword="null"/> for a client that takes messages.</param>
    public XenstoreError AddWatch(
        XenstoreSession session, string path, string token, int? depth, out XenstoreWatch? watch, Action<string>? callback = null)
    {
        watch = null;
        bool special = XenstorePath.IsSpecial(path);
        bool relative = !special && !path.StartsWith('/');
        string absolute = XenstorePath.Canonicalize(path, session.Folder);
        if (special ? absolute.Length > XenstoreWire.RelativePathMaximum : !XenstorePath.IsValid(absolute, Quotas.PathLength))
            return XenstoreError.EINVAL;
        if (depth < 0 || (special && depth is not (null or 1)))
            return XenstoreError.EINVAL;
        int levels = depth ?? (special ? 0 : XenstoreWatch.AnyDepth);
        if (FindWatch(session, absolute, token) is not null)
            return XenstoreError.EEXIST;
        if (!session.Privileged && session.Watches.Count > Quotas.Watches)
            return XenstoreError.E2BIG;
        watch = callback is null
            ? new XenstoreWatch(session, absolute, token, relative, levels, NextSequence())
            : new XenstoreCallbackWatch(session, absolute, token, relative, levels, NextSequence(), callback);
        if (!session.Privileged && session.Domain.Memory + watch.Size > Quotas.Memory)
        {
            watch = null;
            return XenstoreError.ENOMEM;
        }
        session.Domain.Memory += watch.Size;
        session.Watches.Add(watch);
        _watches.Add(watch);
        return XenstoreError.None;
    }

    /// <summary>Every watch fires once when it is set, so that its owner need not look before.</summary>
    public static void FireFirst(XenstoreWatch watch) => Send(watch, watch.Path, null);

    public XenstoreError RemoveWatch(XenstoreSession session, string path, string token)
    {
        if (FindWatch(session, XenstorePath.Canonicalize(path, session.Folder), token) is not { } watch)
            return XenstoreError.ENOENT;
        RemoveWatch(watch);
        return XenstoreError.None;
    }

    public void RemoveWatch(XenstoreWatch watch)
    {
        if (!watch.Session.Watches.Remove(watch))
            return;
        watch.Session.Domain.Memory -= watch.Size;
        _watches.Remove(watch);
    }

    /// <summary>XS_RESET_WATCHES: all watches and transactions of a client go, messages under way stay.</summary>
    public void ResetWatches(XenstoreSession session)
    {
        foreach (XenstoreWatch watch in session.Watches.ToArray())
            RemoveWatch(watch);
        foreach (XenstoreTransactionState transaction in session.Transactions.Values.ToArray())
            EndTransaction(session, transaction, commit: false, null);
    }

    /// <summary>Starts a client over: watches, transactions and undelivered messages go.</summary>
    public void Reset(XenstoreSession session)
    {
        ResetWatches(session);
        session.DropMessages();
    }

    /// <summary>The client is gone.</summary>
    public void Close(XenstoreSession session)
    {
        ResetWatches(session);
        session.Close();
    }

    /// <summary>The domain's connection exists now.</summary>
    public void Introduced(XenstoreDomain domain)
    {
        bool first = !domain.Introduced;
        domain.Introduced = true;
        domain.Shutdown = false;
        if (first)
            FireSpecial(IntroduceEvent, domain.Id);
    }

    /// <summary>The domain has shut down or crashed; announced once until <see cref="Resume"/> or a new introduction.</summary>
    public void AnnounceShutdown(XenstoreDomain domain)
    {
        if (domain.Shutdown)
            return;
        domain.Shutdown = true;
        FireSpecial(ReleaseEvent, domain.Id);
    }

    public static void Resume(XenstoreDomain domain) => domain.Shutdown = false;

    /// <summary>Forgets a domain: its connection, the nodes it owns with all below, its name in permissions.</summary>
    /// <returns>The connection that is to be stopped, if there is one.</returns>
    public XenstoreConnection? Release(XenstoreDomain domain)
    {
        XenstoreConnection? connection = domain.Connection;
        domain.Connection = null;
        if (connection is not null)
            Close(connection.Session);
        if (domain.Nodes > 0)
            RemoveOwned("/", domain.Id);
        _introducePermissions = Without(_introducePermissions, domain.Id);
        _releasePermissions = Without(_releasePermissions, domain.Id);
        _domains.Remove(domain.Id);
        foreach (XenstoreDomain other in _domains.Values)
        {
            if (other.Connection is { } theirs && theirs.Session.Target == domain.Id)
                theirs.Session.Target = null;
        }
        if (domain.Introduced)
        {
            domain.Introduced = false;
            FireSpecial(ReleaseEvent, domain.Id);
        }
        return connection;
    }

    private static XenstoreWatch? FindWatch(XenstoreSession session, string path, string token)
    {
        foreach (XenstoreWatch watch in session.Watches)
        {
            if (watch.Path == path && watch.Token == token)
                return watch;
        }
        return null;
    }

    private static XenstorePermissions Without(XenstorePermissions permissions, ushort domainId)
    {
        List<XenstorePermission> kept = [];
        foreach (XenstorePermission entry in permissions.Entries)
        {
            if (kept.Count == 0)
                kept.Add(entry.DomainId == domainId ? entry with { DomainId = 0 } : entry);
            else if (entry.DomainId != domainId)
                kept.Add(entry);
        }
        return new XenstorePermissions([.. kept]);
    }

    private void RemoveOwned(string path, ushort domainId)
    {
        // Children are looked up by name each time: removing one replaces the node.
        XenstoreNode node = XenstoreTree.Find(_root, path)!;
        foreach (XenstoreNode child in node.Children)
        {
            string childPath = XenstorePath.Join(path, child.Name);
            if (child.Permissions.Owner != domainId)
            {
                RemoveOwned(childPath, domainId);
                continue;
            }
            XenstoreNode parent = XenstoreTree.Find(_root, path)!;
            List<(string Path, XenstoreNode Node, XenstoreNode Parent)> doomed = [];
            Collect(childPath, child, parent, doomed);
            RemoveSubtree(null, null, path, parent, doomed, null);
        }
    }

    private XenstoreError SetSpecialPermissions(XenstoreSession session, string path, XenstorePermissions permissions)
    {
        const XenstoreAccess Need = XenstoreAccess.Write | XenstoreAccess.Owner;
        if (path is not (IntroduceEvent or ReleaseEvent))
            return XenstoreError.EINVAL;
        if ((SpecialAccess(session, path) & Need) != Need)
            return XenstoreError.EACCES;
        if (path == IntroduceEvent)
            (_introducePermissions, _introduceGeneration) = (permissions, ++_generation);
        else
            (_releasePermissions, _releaseGeneration) = (permissions, ++_generation);
        return XenstoreError.None;
    }

    private XenstoreAccess SpecialAccess(XenstoreSession session, string path) => path == IntroduceEvent
        ? AccessOf(session, _introducePermissions, _introduceGeneration)
        : AccessOf(session, _releasePermissions, _releaseGeneration);

    // A change of a node: now, or when the transaction is committed.
    private void Fire(
        XenstoreTransactionState? transaction, XenstoreTicket? ticket, string path, bool exact, XenstoreNode? node, XenstoreNode? old)
    {
        if (transaction is not null)
            transaction.QueueEvent(path, exact);
        else
            FireLive(ticket, path, exact, node, XenstoreTree.Find(_root, XenstorePath.ParentOf(path)), old);
    }

    // Tells those watches whose owners may read the node, could read it before, or may read its parent.
    private void FireLive(
        XenstoreTicket? ticket, string path, bool exact, XenstoreNode? node, XenstoreNode? parent, XenstoreNode? old)
    {
        if (node is null && old is null)
            return;
        _watches.Match(path, exact, _matches);
        foreach (XenstoreWatch watch in _matches)
        {
            if (CanRead(watch.Session, old) || (node is not null && (CanRead(watch.Session, node) || CanRead(watch.Session, parent))))
                Send(watch, path, ticket);
        }
    }

    // Those who watch the event, and those who watch it for this domain alone (@releaseDomain only).
    private void FireSpecial(string name, ushort domainId)
    {
        string detailed = string.Create(System.Globalization.CultureInfo.InvariantCulture, $"{name}/{domainId}");
        FireSpecialOn(name, name, detailed);
        if (name == ReleaseEvent)
            FireSpecialOn(detailed, name, detailed);
    }

    private void FireSpecialOn(string watched, string name, string detailed)
    {
        _watches.Match(watched, exact: true, _matches);
        foreach (XenstoreWatch watch in _matches)
        {
            if ((SpecialAccess(watch.Session, name) & XenstoreAccess.Read) != 0)
                Send(watch, watch.Depth == 0 ? watched : detailed, null);
        }
    }

    private bool CanRead(XenstoreSession session, XenstoreNode? node) =>
        node is not null && (AccessOf(session, node.Permissions, node.Generation) & XenstoreAccess.Read) != 0;

    private static void Send(XenstoreWatch watch, string path, XenstoreTicket? ticket)
    {
        XenstoreMessage message = XenstoreMessage.OfEvent(new XenstoreWatchEvent(watch, watch.Report(path)), ticket);

        // An event too long for a message cannot be told; xenstored drops it, too.
        if (message.Header.Length <= XenstoreWire.PayloadMaximum)
            watch.Session.Enqueue(message);
    }
}
