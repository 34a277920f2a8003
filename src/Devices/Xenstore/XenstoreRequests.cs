// The requests of the wire protocol: who may make them, how their payload is read, and what is answered. What they do is the
// database's part.
using System.Globalization;
using System.Text;

namespace XenSharp.Devices.Xenstore;

/// <summary>Serves one request of one client. Formats: Xen's docs/misc/xenstore.txt; error codes: Xen 4.17's xenstored.</summary>
internal sealed partial class XenstoreRequests(XenstoreDatabase database, IXenstoreDomainControl domains)
{
    // DOMID_SELF of xen.h.
    private const int DomainIdSelf = 0x7ff0;

    /// <summary>
    /// Serves a request: queues the reply and the events it causes. Never throws for what the payload holds.
    /// </summary>
    public void Serve(XenstoreSession session, XenstoreHeader header, ReadOnlySpan<byte> payload)
    {
        lock (database.Gate)
        {
            if (session.Closed)
                return;
            XenstoreTicket? ticket = session.Privileged ? null : new XenstoreTicket(session);
            Request request = new(session, header, new XenstoreArguments(payload), ticket);
            XenstoreError error = Dispatch(ref request);
            if (database.LogsRequests)
                database.Options.Log(XenstoreRequestLog.Describe(session, header, payload, error));
            if (error != XenstoreError.None)
                session.Enqueue(XenstoreMessage.Reply(
                    header with { Type = XenstoreMessageType.Error }, XenstoreErrors.WireName(error).ToArray(), ticket));
            ticket?.Drop();
        }
    }

    private XenstoreError Dispatch(ref Request request)
    {
        XenstoreMessageType type = request.Header.Type;
        bool known = type <= XenstoreMessageType.DirectoryPart &&
            type is not (XenstoreMessageType.WatchEvent or XenstoreMessageType.Error or (XenstoreMessageType)20);
        if (!known)
            return XenstoreError.ENOSYS;

        bool privilegedOnly = type is XenstoreMessageType.Control or XenstoreMessageType.Introduce or XenstoreMessageType.Release
            or XenstoreMessageType.IsDomainIntroduced or XenstoreMessageType.Resume or XenstoreMessageType.SetTarget;
        if (privilegedOnly && !request.Session.Privileged)
            return XenstoreError.EACCES;

        // Watches have nothing to do with transactions; everything else must name one that exists, or none.
        uint transactionId = request.Header.TransactionId;
        if (transactionId != 0 && type is not (XenstoreMessageType.Watch or XenstoreMessageType.Unwatch))
        {
            if (!request.Session.Transactions.TryGetValue(transactionId, out request.Transaction))
                return XenstoreError.ENOENT;
        }

        return type switch
        {
            XenstoreMessageType.Control => Control(in request),
            XenstoreMessageType.Directory => Directory(in request),
            XenstoreMessageType.Read => Read(in request),
            XenstoreMessageType.GetPermissions => GetPermissions(in request),
            XenstoreMessageType.Watch => Watch(in request),
            XenstoreMessageType.Unwatch => Unwatch(in request),
            XenstoreMessageType.TransactionStart => TransactionStart(in request),
            XenstoreMessageType.TransactionEnd => TransactionEnd(in request),
            XenstoreMessageType.Introduce => Introduce(in request),
            XenstoreMessageType.Release => Release(in request),
            XenstoreMessageType.GetDomainPath => GetDomainPath(in request),
            XenstoreMessageType.Write => Write(in request),
            XenstoreMessageType.MakeDirectory => MakeDirectory(in request),
            XenstoreMessageType.Remove => Remove(in request),
            XenstoreMessageType.SetPermissions => SetPermissions(in request),
            XenstoreMessageType.IsDomainIntroduced => IsDomainIntroduced(in request),
            XenstoreMessageType.Resume => Resume(in request),
            XenstoreMessageType.SetTarget => SetTarget(in request),
            XenstoreMessageType.ResetWatches => ResetWatches(in request),
            _ => DirectoryPart(in request),
        };
    }

    private XenstoreError Directory(in Request request)
    {
        XenstoreError error = ReadNode(in request, request.Arguments.Single, out XenstoreNode? node);
        return error == XenstoreError.None ? request.Reply(node!.ChildList()) : error;
    }

    private XenstoreError DirectoryPart(in Request request)
    {
        if (request.Arguments.Count != 2)
            return XenstoreError.EINVAL;
        XenstoreError error = ReadNode(in request, request.Arguments.Text(0), out XenstoreNode? node);
        if (error != XenstoreError.None)
            return error;

        // The generation, then as many whole names from the offset on as fit; an empty name marks the end of the list.
        byte[] list = node!.ChildList();
        uint offset = (uint)XenstoreArguments.Number(request.Arguments.Text(1));
        byte[] generation = Encoding.Latin1.GetBytes(node.Generation.ToString(CultureInfo.InvariantCulture) + "\0");
        if (offset >= list.Length)
            return request.Reply([.. generation, 0]);
        ReadOnlySpan<byte> rest = list.AsSpan((int)offset);
        int room = XenstoreWire.PayloadMaximum - generation.Length - 1;
        int length = 0;
        while (length < rest.Length)
        {
            int name = rest[length..].IndexOf((byte)0);
            if (length + name >= room)
                break;
            length += name + 1;
        }
        return length == rest.Length
            ? request.Reply([.. generation, .. rest, 0])
            : request.Reply([.. generation, .. rest[..length]]);
    }

    private XenstoreError Read(in Request request)
    {
        XenstoreError error = ReadNode(in request, request.Arguments.Single, out XenstoreNode? node);
        return error == XenstoreError.None ? request.Reply(node!.Value) : error;
    }

    private XenstoreError Write(in Request request)
    {
        // The value is binary: NULs in it are its own.
        if (request.Arguments.Count < 1)
            return XenstoreError.EINVAL;
        XenstoreError error = database.Write(request.Session, request.Transaction, request.Path(request.Arguments.Text(0)),
            request.Arguments.After(1).ToArray(), request.Ticket);
        return error == XenstoreError.None ? request.Acknowledge() : error;
    }

    private XenstoreError MakeDirectory(in Request request)
    {
        if (request.Arguments.Single is not { } path)
            return XenstoreError.EINVAL;
        XenstoreError error = database.MakeDirectory(request.Session, request.Transaction, request.Path(path), request.Ticket);
        return error == XenstoreError.None ? request.Acknowledge() : error;
    }

    private XenstoreError Remove(in Request request)
    {
        if (request.Arguments.Single is not { } path)
            return XenstoreError.EINVAL;
        XenstoreError error = database.Remove(request.Session, request.Transaction, request.Path(path), request.Ticket);
        return error == XenstoreError.None ? request.Acknowledge() : error;
    }

    private XenstoreError GetPermissions(in Request request)
    {
        XenstoreError error = ReadNode(in request, request.Arguments.Single, out XenstoreNode? node);
        if (error != XenstoreError.None)
            return error;
        StringBuilder text = new();
        foreach (XenstorePermission entry in node!.Permissions.Entries)
            text.Append(entry.ToString()).Append('\0');
        return request.Reply(Encoding.Latin1.GetBytes(text.ToString()));
    }

    private XenstoreError SetPermissions(in Request request)
    {
        int count = request.Arguments.Count;
        if (count < 2)
            return XenstoreError.EINVAL;
        if (!request.Session.Privileged && count - 1 > database.Quotas.Permissions)
            return XenstoreError.ENOSPC;
        XenstorePermission[] entries = new XenstorePermission[count - 1];
        for (int index = 0; index < entries.Length; index++)
        {
            if (!XenstorePermission.TryParse(request.Arguments.Text(index + 1), out entries[index]))
                return XenstoreError.EINVAL;
        }
        XenstoreError error = database.SetPermissions(request.Session, request.Transaction,
            request.Path(request.Arguments.Text(0)), new XenstorePermissions(entries), request.Ticket);
        return error == XenstoreError.None ? request.Acknowledge() : error;
    }

    private XenstoreError Watch(in Request request)
    {
        int count = request.Arguments.Count;
        if (count is not (2 or 3))
            return XenstoreError.EINVAL;
        int? depth = null;
        if (count == 3)
        {
            if (!int.TryParse(request.Arguments.Text(2), NumberStyles.None, CultureInfo.InvariantCulture, out int levels))
                return XenstoreError.EINVAL;
            depth = levels;
        }
        XenstoreError error = database.AddWatch(
            request.Session, request.Arguments.Text(0), request.Arguments.Text(1), depth, out XenstoreWatch? watch);
        if (error != XenstoreError.None)
            return error;
        request.Acknowledge();
        XenstoreDatabase.FireFirst(watch!);
        return XenstoreError.None;
    }

    private XenstoreError Unwatch(in Request request)
    {
        if (request.Arguments.Count != 2)
            return XenstoreError.EINVAL;
        XenstoreError error = database.RemoveWatch(request.Session, request.Arguments.Text(0), request.Arguments.Text(1));
        return error == XenstoreError.None ? request.Acknowledge() : error;
    }

    private XenstoreError ResetWatches(in Request request)
    {
        database.ResetWatches(request.Session);
        return request.Acknowledge();
    }

    private XenstoreError TransactionStart(in Request request)
    {
        if (request.Transaction is not null)
            return XenstoreError.EBUSY;
        XenstoreError error = database.StartTransaction(request.Session, out XenstoreTransactionState? transaction);
        return error == XenstoreError.None ? request.ReplyText(transaction!.Id.ToString(CultureInfo.InvariantCulture)) : error;
    }

    private XenstoreError TransactionEnd(in Request request)
    {
        if (request.Arguments.Single is not ("T" or "F"))
            return XenstoreError.EINVAL;
        if (request.Transaction is null)
            return XenstoreError.ENOENT;
        XenstoreError error = database.EndTransaction(
            request.Session, request.Transaction, request.Arguments.Single == "T", request.Ticket);
        return error == XenstoreError.None ? request.Acknowledge() : error;
    }

    private XenstoreError ReadNode(in Request request, string? path, out XenstoreNode? node)
    {
        node = null;
        return path is null
            ? XenstoreError.EINVAL
            : database.Read(request.Session, request.Transaction, request.Path(path), out node);
    }

    /// <summary>One request while it is served.</summary>
    private ref struct Request(XenstoreSession session, XenstoreHeader header, XenstoreArguments arguments, XenstoreTicket? ticket)
    {
        public readonly XenstoreSession Session = session;
        public readonly XenstoreHeader Header = header;
        public readonly XenstoreArguments Arguments = arguments;
        public readonly XenstoreTicket? Ticket = ticket;
        public XenstoreTransactionState? Transaction;

        public readonly string Path(string path) => XenstorePath.Canonicalize(path, Session.Folder);

        public readonly XenstoreError Reply(byte[] payload)
        {
            if (payload.Length > XenstoreWire.PayloadMaximum)
                return XenstoreError.E2BIG;
            Session.Enqueue(XenstoreMessage.Reply(Header, payload, Ticket));
            return XenstoreError.None;
        }

        public readonly XenstoreError ReplyText(string text) => Reply(Encoding.Latin1.GetBytes(text + "\0"));

        public readonly XenstoreError Acknowledge() => Reply("OK\0"u8.ToArray());
    }
}
