// Requests about domains and about the store itself, most of them for privileged clients only.
using System.Globalization;
using System.Text;

namespace XenSharp.Devices.Xenstore;

/// <summary>What requests can ask of the owner of all connections. Called with the store's lock held.</summary>
internal interface IXenstoreDomainControl
{
    /// <summary>Connects to a domain, or restarts the connection of one that is connected.</summary>
    XenstoreError Introduce(ushort domainId, ulong frame, uint port);

    /// <summary>Disconnects and forgets a domain.</summary>
    void Release(XenstoreDomain domain);
}

internal sealed partial class XenstoreRequests
{
    private XenstoreError Introduce(in Request request)
    {
        if (request.Arguments.Count < 3)
            return XenstoreError.EINVAL;
        int domainId = XenstoreArguments.Number(request.Arguments.Text(0));
        _ = long.TryParse(request.Arguments.Text(1), NumberStyles.AllowLeadingSign, CultureInfo.InvariantCulture, out long frame);
        int port = XenstoreArguments.Number(request.Arguments.Text(2));
        if (port <= 0 || domainId is <= 0 or >= DomainIdSelf)
            return XenstoreError.EINVAL;
        XenstoreError error = domains.Introduce((ushort)domainId, (ulong)frame, (uint)port);
        return error == XenstoreError.None ? request.Acknowledge() : error;
    }

    private XenstoreError Release(in Request request)
    {
        XenstoreError error = ConnectedDomain(in request, out XenstoreDomain? domain);
        if (error != XenstoreError.None)
            return error;
        domains.Release(domain!);
        return request.Acknowledge();
    }

    private XenstoreError Resume(in Request request)
    {
        XenstoreError error = ConnectedDomain(in request, out XenstoreDomain? domain);
        if (error != XenstoreError.None)
            return error;
        XenstoreDatabase.Resume(domain!);
        return request.Acknowledge();
    }

    private static XenstoreError GetDomainPath(in Request request)
    {
        if (request.Arguments.Single is not { } text)
            return XenstoreError.EINVAL;
        uint domainId = (uint)XenstoreArguments.Number(text);
        return request.ReplyText(string.Create(CultureInfo.InvariantCulture, $"/local/domain/{domainId}"));
    }

    private XenstoreError IsDomainIntroduced(in Request request)
    {
        if (request.Arguments.Single is not { } text)
            return XenstoreError.EINVAL;
        int domainId = XenstoreArguments.Number(text);
        bool introduced = domainId == DomainIdSelf || FindIntroduced(domainId) is not null;
        return request.ReplyText(introduced ? "T" : "F");
    }

    private XenstoreError SetTarget(in Request request)
    {
        if (request.Arguments.Count < 2)
            return XenstoreError.EINVAL;
        XenstoreDomain? domain = FindIntroduced(XenstoreArguments.Number(request.Arguments.Text(0)));
        XenstoreDomain? target = FindIntroduced(XenstoreArguments.Number(request.Arguments.Text(1)));
        if (domain is null || target is null)
            return XenstoreError.ENOENT;
        if (domain.Connection is null || target.Connection is null)
            return XenstoreError.EINVAL;
        domain.Connection.Session.Target = target.Id;
        return request.Acknowledge();
    }

    /// <summary>
    /// The commands of Xen's xenstore-control that make sense without a daemon of its own: check, log, memreport, print, quota and
    /// help. Others, and those that would have the manager write files, are refused like unknown ones.
    /// </summary>
    private XenstoreError Control(in Request request)
    {
        int count = request.Arguments.Count;
        if (count < 1)
            return XenstoreError.EINVAL;
        switch (request.Arguments.Text(0))
        {
            case "check" when count == 1:
                return database.IsConsistent() ? request.Acknowledge() : XenstoreError.EIO;
            case "help" when count == 1:
                return request.ReplyText(
                    "check\t\nlog\ton|off\nmemreport\t\nprint\t<string>\nquota\t[set <name> <val>|<domid>]\nhelp\t\n");
            case "log" when count == 2 && request.Arguments.Text(1) is ("on" or "off"):
                database.LogsRequests = request.Arguments.Text(1) == "on";
                return request.Acknowledge();
            case "memreport" when count == 1:
                foreach (string line in database.Report())
                    database.Options.Log(line);
                return request.Acknowledge();
            case "print" when count == 2:
                database.Options.Log(XenstoreRequestLog.Printable(request.Arguments.Text(1)));
                return request.Acknowledge();
            case "quota" when count == 1:
                return request.ReplyText(DescribeQuotas(database.Quotas));
            case "quota" when count == 2:
                return DescribeDomain(in request, XenstoreArguments.Number(request.Arguments.Text(1)));
            case "quota" when count == 4 && request.Arguments.Text(1) == "set":
                return SetQuota(in request, request.Arguments.Text(2), XenstoreArguments.Number(request.Arguments.Text(3)));
            default:
                return XenstoreError.EINVAL;
        }
    }

    private XenstoreError SetQuota(in Request request, string name, int value)
    {
        XenstoreQuotas quotas = database.Quotas;
        XenstoreQuotas? changed = value < 1 ? null : name switch
        {
            "nodes" => quotas with { Nodes = value },
            "watches" => quotas with { Watches = value },
            "transactions" => quotas with { Transactions = value },
            "outstanding" => quotas with { Outstanding = value },
            "transaction-nodes" => quotas with { TransactionNodes = value },
            "memory" => quotas with { Memory = value },
            "node-size" => quotas with { NodeSize = value },
            "path-max" => quotas with { PathLength = value },
            "permissions" => quotas with { Permissions = value },
            _ => null,
        };
        if (changed is null)
            return XenstoreError.EINVAL;
        database.Quotas = changed;
        return request.Acknowledge();
    }

    private static string DescribeQuotas(XenstoreQuotas quotas)
    {
        StringBuilder text = new("Quota settings:\n");
        Line("nodes", quotas.Nodes, "nodes owned by a domain");
        Line("watches", quotas.Watches, "watches of a domain");
        Line("transactions", quotas.Transactions, "open transactions of a domain");
        Line("outstanding", quotas.Outstanding, "requests not fully answered");
        Line("transaction-nodes", quotas.TransactionNodes, "nodes accessed in a transaction");
        Line("memory", quotas.Memory, "bytes occupied by a domain");
        Line("node-size", quotas.NodeSize, "bytes of a node");
        Line("path-max", quotas.PathLength, "characters of a path");
        Line("permissions", quotas.Permissions, "permission entries of a node");
        return text.ToString();

        void Line(string name, int value, string meaning) =>
            text.Append(CultureInfo.InvariantCulture, $"{name,-17}: {value,8} {meaning}\n");
    }

    private XenstoreError DescribeDomain(in Request request, int domainId)
    {
        XenstoreDomain? domain = domainId is >= 0 and <= ushort.MaxValue ? database.FindDomain((ushort)domainId) : null;
        if (domain is null)
            return XenstoreError.ENOENT;
        XenstoreSession? session = domain.Connection?.Session;
        StringBuilder text = new();
        text.Append(CultureInfo.InvariantCulture, $"Domain {domainId}:\n");
        Line("nodes", domain.Nodes);
        Line("watches", session?.Watches.Count ?? 0);
        Line("transactions", session?.Transactions.Count ?? 0);
        Line("outstanding", session?.Outstanding ?? 0);
        Line("memory", domain.Memory);
        return request.ReplyText(text.ToString());

        void Line(string name, long value) => text.Append(CultureInfo.InvariantCulture, $"{name,-16}: {value,8}\n");
    }

    private XenstoreDomain? FindIntroduced(int domainId)
    {
        XenstoreDomain? domain = domainId is >= 0 and <= ushort.MaxValue ? database.FindDomain((ushort)domainId) : null;
        return domain is { Introduced: true } ? domain : null;
    }

    private XenstoreError ConnectedDomain(in Request request, out XenstoreDomain? domain)
    {
        domain = null;
        if (request.Arguments.Single is not { } text)
            return XenstoreError.EINVAL;
        int domainId = XenstoreArguments.Number(text);
        if (domainId == 0)
            return XenstoreError.EINVAL;
        domain = FindIntroduced(domainId);
        return domain is null ? XenstoreError.ENOENT : XenstoreError.None;
    }
}
