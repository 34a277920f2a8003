// What the rings need of a guest's grants, so that they can be tried on plain memory.
using XenSharp.Domains.Grants;

namespace XenSharp.Devices.Network;

/// <summary>Copies from and to pages that a guest grants; see <see cref="BackendGrants"/>. Any thread.</summary>
internal interface IGrantCopier
{
    /// <inheritdoc cref="BackendGrants.CopyFrom"/>
    GrantStatus CopyFrom(uint reference, int offset, Span<byte> destination);

    /// <inheritdoc cref="BackendGrants.CopyTo"/>
    GrantStatus CopyTo(uint reference, int offset, ReadOnlySpan<byte> source);
}

/// <summary>A domain's.</summary>
internal sealed class DomainGrantCopier(BackendGrants grants) : IGrantCopier
{
    public GrantStatus CopyFrom(uint reference, int offset, Span<byte> destination) => grants.CopyFrom(reference, offset, destination);

    public GrantStatus CopyTo(uint reference, int offset, ReadOnlySpan<byte> source) => grants.CopyTo(reference, offset, source);
}
