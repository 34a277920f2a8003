using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>Which domain's pages an operation names.</summary>
internal static class ForeignDomain
{
    /// <summary>
    /// Whether a domid argument means the caller (get_pg_owner and the right to the domain found). An unprivileged domain may
    /// name no other: those that always exist are known but refused, all else does not exist as far as it can tell.
    /// </summary>
    public static bool IsSelf(ushort domain, out Errno error)
    {
        // Naming oneself by number is refused too: only DOMID_SELF is meant for that. Domain 0 is there on every Xen host.
        error = domain == DomainId.Self.Value ? Errno.None
            : domain == 0 || domain == DomainId.Io.Value || domain == DomainId.Xen.Value ? Errno.EPERM
            : Errno.ESRCH;
        return error == Errno.None;
    }
}
