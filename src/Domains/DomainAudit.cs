// What is kept about a domain, checked while it runs.
namespace XenSharp.Domains;

/// <summary>
/// Checks a domain's frame table every so many exits, between two operations: the vCPU that came out has done what it came out for, and
/// the others are brought to rest for as long as the check takes.
/// </summary>
/// <param name="interval">Exits between two checks.</param>
internal sealed class DomainAudit(int interval)
{
    /// <summary>A vCPU that takes longer to come to rest is let go on, and nothing is checked.</summary>
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(1);

    private long _exits;
    private long _count;

    /// <summary>Checks that were made.</summary>
    public long Count => Volatile.Read(in _count);

    /// <summary>Counts an exit, and checks when it is time to; crashes the domain where something is wrong.</summary>
    public void AfterExit(Vcpu vcpu)
    {
        VcpuRest rest = vcpu.Domain.Rest;
        if (Interlocked.Increment(ref _exits) % interval != 0 || !rest.TryWant())
            return;
        vcpu.Domain.KickOthers(vcpu);
        string? trouble = null;
        if (rest.Await(busy: 1, Patience))
        {
            trouble = vcpu.Domain.AuditFrames();
            _ = Interlocked.Increment(ref _count);
        }

        rest.Release();
        if (trouble != null)
            vcpu.Domain.Crash(vcpu, $"The domain's books do not agree: {trouble}");
    }
}
