// What a domain's grant table may grow to.
namespace XenSharp.Domains.Grants;

/// <summary>
/// Limits of a grant table (grant_opts, max_grant_frames and max_maptrack_frames of struct xen_domctl_createdomain); the defaults are those
/// of Xen 4.17, where neither xl.cfg nor xl.conf says otherwise.
/// </summary>
public sealed record GrantLimits
{
    /// <summary>The most that <see cref="Frames"/> can be: Xen has 64, unless its command line says more (gnttab_max_frames).</summary>
    public const int MostFrames = 1024;

    /// <summary>The most that <see cref="HandlePages"/> can be: Xen has 1024, unless its command line says more (gnttab_max_maptrack_frames).</summary>
    public const int MostHandlePages = 16384;

    /// <summary>Frames, of 512 entries of version 1 each; 1 to <see cref="MostFrames"/>.</summary>
    public int Frames { get; init; } = 64;

    /// <summary>Pages of handles for what the domain has mapped of others' grants, of 256 each; 0 to <see cref="MostHandlePages"/>.</summary>
    public int HandlePages { get; init; } = 1024;

    /// <summary>The latest version of the table's entries that the guest can choose: 1 or 2.</summary>
    public int Version { get; init; } = 2;
}
