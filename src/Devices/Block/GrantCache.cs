// Pages of a front end's that stay mapped between requests (feature-persistent).
using XenSharp.Domains.Grants;

namespace XenSharp.Devices.Block;

/// <summary>A page in use by requests, and after that kept, or not.</summary>
internal sealed class GrantedBlockPage
{
    internal required MappedGrant Mapping { get; init; }

    internal required uint Reference { get; init; }

    /// <summary>Requests that use it.</summary>
    internal int Uses { get; set; }

    /// <summary>Whether it is among those that stay mapped.</summary>
    internal bool IsKept { get; set; }

    /// <summary>Environment.TickCount64 of its last use.</summary>
    internal long LastUse { get; set; }

    internal LinkedListNode<GrantedBlockPage>? Node { get; set; }
}

/// <summary>
/// Maps the pages of requests of a front end that uses its pages again. Up to a bound of them stays mapped, and writable; the least recently
/// used go first, and what was not used for a while goes too. Its owner sees to it that one thread at a time calls.
/// </summary>
/// <param name="grants">Where pages come from.</param>
/// <param name="maximum">The most that stay mapped.</param>
internal sealed class GrantCache(BackendGrants grants, int maximum)
{
    /// <summary>As long as xen-blkback keeps what is not used, by default.</summary>
    internal static readonly TimeSpan IdleTime = TimeSpan.FromSeconds(60);

    private readonly Dictionary<uint, GrantedBlockPage> _kept = [];

    /// <summary>All kept pages that no request uses, those first that were used longest ago.</summary>
    private readonly LinkedList<GrantedBlockPage> _idle = [];

    /// <summary>Pages that stay mapped.</summary>
    internal int Count => _kept.Count;

    /// <summary>Gets a page for a request.</summary>
    /// <param name="reference">Its grant reference.</param>
    /// <returns>Null if it cannot be mapped writable.</returns>
    internal GrantedBlockPage? Acquire(uint reference)
    {
        if (_kept.TryGetValue(reference, out GrantedBlockPage? page))
        {
            if (page.Uses++ == 0)
                _idle.Remove(page.Node!);
            return page;
        }

        if (grants.TryMap(reference, writable: true, out MappedGrant? mapping) != GrantStatus.Okay)
            return null;
        page = new GrantedBlockPage { Mapping = mapping!, Reference = reference, Uses = 1 };
        if (_kept.Count >= maximum && _idle.First is { } oldest)
            Drop(oldest.Value);
        if (_kept.Count < maximum)
        {
            page.IsKept = true;
            page.Node = new LinkedListNode<GrantedBlockPage>(page);
            _kept.Add(reference, page);
        }

        return page;
    }

    /// <summary>Ends <see cref="Acquire"/>.</summary>
    internal void Release(GrantedBlockPage page)
    {
        if (--page.Uses > 0)
            return;
        if (page.IsKept)
        {
            page.LastUse = Environment.TickCount64;
            _idle.AddLast(page.Node!);
        }
        else
        {
            page.Mapping.Dispose();
        }
    }

    /// <summary>Gives back what was not used since a time.</summary>
    internal void DropUnused(long since)
    {
        while (_idle.First is { } oldest && oldest.Value.LastUse <= since)
            Drop(oldest.Value);
    }

    private void Drop(GrantedBlockPage page)
    {
        _idle.Remove(page.Node!);
        _ = _kept.Remove(page.Reference);
        page.Mapping.Dispose();
    }
}
