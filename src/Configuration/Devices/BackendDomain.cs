// backend=DOMAIN, which devices have in common.

namespace XenSharp.Configuration.Devices;

/// <summary>Tells the host from driver domains.</summary>
internal static class BackendDomain
{
    /// <summary>Whether a name or number is that of the domain that all back ends are in.</summary>
    internal static bool IsHost(string domain) => domain.Trim() is "" or "0" or "Domain-0" or "dom0";
}
