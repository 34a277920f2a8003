using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>Which domain's pages an operation names.</summary>
internal static unsafe class ForeignDomain
{
    /// <summary>
    /// Whether a domid argument means the caller (get_pg_owner and the right to the domain found). An unprivileged domain may
    /// name no other: those that there are are known but refused.
    /// </summary>
    public static bool IsSelf(DomainContext* caller, ushort domain, out Errno error)
    {
        // Naming oneself by number is refused too: only DOMID_SELF is meant for that.
        bool isKnown = domain == DomainId.Io.Value || domain == DomainId.Xen.Value || (domain != caller->State->Id && Exists(caller, domain));
        error = domain == DomainId.Self.Value ? Errno.None : isKnown ? Errno.EPERM : Errno.ESRCH;
        return error == Errno.None;
    }

    /// <summary>Whether there is an ordinary domain of this number. Domain 0 is there on every Xen host.</summary>
    public static bool Exists(DomainContext* caller, ushort domain)
        => domain == 0 || domain == caller->State->Id
            || (domain < DomainId.FirstReserved && caller->KnownDomains != null
                && (Volatile.Read(ref caller->KnownDomains[domain / 64]) & (1UL << (domain % 64))) != 0);
}
