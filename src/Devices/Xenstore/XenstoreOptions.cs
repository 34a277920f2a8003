// What can be set about the store: quotas of unprivileged domains, and hooks of the host.
namespace XenSharp.Devices.Xenstore;

/// <summary>
/// Limits on one unprivileged domain. Defaults and their exact edges are those of Xen 4.17's xenstored, which bounds what a
/// guest can cost the manager; privileged connections are not limited.
/// </summary>
public sealed record XenstoreQuotas
{
    /// <summary>Nodes a domain may own.</summary>
    public int Nodes { get; init; } = 1000;

    /// <summary>Watches of a domain; one more than this is accepted, as by xenstored.</summary>
    public int Watches { get; init; } = 128;

    /// <summary>Transactions open at the same time; one more than this is accepted, as by xenstored.</summary>
    public int Transactions { get; init; } = 10;

    /// <summary>Requests whose reply, or whose watch events to others, have not been taken yet; then no more are read.</summary>
    public int Outstanding { get; init; } = 20;

    /// <summary>Nodes looked at or changed in one transaction.</summary>
    public int TransactionNodes { get; init; } = 1024;

    /// <summary>Bytes of nodes, open transactions, watches and undelivered messages.</summary>
    public int Memory { get; init; } = 2 * 1024 * 1024 + 512 * 1024;

    /// <summary>Bytes of one node: 24, 8 for each permission, the value, and the names of the children.</summary>
    public int NodeSize { get; init; } = 2048;

    /// <summary>Characters of a path, not counting a leading "/local/domain/N/".</summary>
    public int PathLength { get; init; } = XenstoreWire.RelativePathMaximum;

    /// <summary>Entries of a permission list.</summary>
    public int Permissions { get; init; } = 5;
}

/// <summary>Settings of an <see cref="XenstoreServer"/>.</summary>
public sealed record XenstoreOptions
{
    /// <summary>Limits on each unprivileged domain.</summary>
    public XenstoreQuotas Quotas { get; init; } = new();

    /// <summary>
    /// How long a watch event that one guest caused for another waits to be taken. Then it is dropped, so that a guest that
    /// never reads cannot hold up those whose nodes it watches. Zero turns this off.
    /// </summary>
    public TimeSpan WatchEventTimeout { get; init; } = TimeSpan.FromSeconds(20);

    /// <summary>The clock of that timeout.</summary>
    public TimeProvider Time { get; init; } = TimeProvider.System;

    /// <summary>
    /// Maps a domain's ring for an XS_INTRODUCE request that came over a privileged connection: domain id, frame number, event
    /// channel port in the domain; <see langword="null"/> when that is impossible. Without it such requests are refused with
    /// ENOSYS, and domains are introduced with <see cref="XenstoreServer.IntroduceDomain"/> only. Called with the store locked:
    /// it must not call back into it.
    /// </summary>
    public Func<ushort, ulong, uint, IXenstoreTransport?>? Connector { get; init; }

    /// <summary>
    /// Watch events that may wait for a client of the host. One that has more pending does not read: it is disconnected, so that it
    /// cannot make the manager grow.
    /// </summary>
    public int EventBacklog { get; init; } = 16 * 1024;

    /// <summary>
    /// Told what XS_CONTROL's "print", "memreport" and "log" have to say, a line each. Called with the store locked: it must not
    /// call back into it.
    /// </summary>
    public Action<string> Log { get; init; } = static line => System.Console.Error.WriteLine($"xensharp: xenstore: {line}");

    /// <summary>Told about an exception that a watch callback let escape; later events are delivered all the same.</summary>
    public Action<Exception> CallbackFailed { get; init; } =
        static exception => System.Console.Error.WriteLine($"xensharp: a xenstore watch callback failed: {exception}");
}
