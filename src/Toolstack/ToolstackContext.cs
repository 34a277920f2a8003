// What the domains of one toolstack have in common: a KVM, the list of domains, and one xenstore.

using XenSharp.Devices.Xenstore;
using XenSharp.Domains;

namespace XenSharp.Toolstack;

/// <summary>
/// What <see cref="RunningDomain"/>s are made in (libxl's <c>libxl_ctx</c>): domains of one context know of each other, and see one
/// store. May be used by any thread.
/// </summary>
/// <param name="host">The KVM to run domains with; stays the caller's.</param>
public sealed class ToolstackContext(KvmHost host) : IAsyncDisposable
{
    private readonly Lazy<XenstoreServer> _store = new(CreateStore);

    /// <summary>The KVM that its domains run with.</summary>
    public KvmHost Host { get; } = host ?? throw new ArgumentNullException(nameof(host));

    /// <summary>The domains' numbers, and who there is.</summary>
    public DomainManager Domains { get; } = new();

    /// <summary>The store, with domain 0's tree in it.</summary>
    public XenstoreServer Store => _store.Value;

    /// <summary>Ends the store. The domains must have been disposed.</summary>
    public ValueTask DisposeAsync() => _store.IsValueCreated ? _store.Value.DisposeAsync() : ValueTask.CompletedTask;

    private static XenstoreServer CreateStore()
    {
        var store = new XenstoreServer();
        XenstoreDomainTree.WriteDomain0(store.Domain0);
        return store;
    }
}
