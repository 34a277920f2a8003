// What is kept about a domain, checked while it runs.
namespace XenSharp.Domains;

/// <summary>
/// Checks a domain's frame table every so many exits, between two operations of the vCPU that came out; once a second vCPU has
/// started there is no such moment, and no check.
/// </summary>
/// <param name="interval">Exits between two checks.</param>
internal sealed unsafe class DomainAudit(int interval)
{
    private long _exits;
    private long _count;

    /// <summary>Checks that were made.</summary>
    public long Count => Volatile.Read(in _count);

    /// <summary>Counts an exit, and checks when it is time to; crashes the domain where something is wrong.</summary>
    public void AfterExit(Vcpu vcpu)
    {
        if (Interlocked.Increment(ref _exits) % interval != 0 || vcpu.Domain.Context->State->StartedVcpus > 1)
            return;
        _ = Interlocked.Increment(ref _count);
        if (vcpu.Domain.AuditFrames() is { } trouble)
            vcpu.Domain.Crash(vcpu, $"The domain's books do not agree: {trouble}");
    }
}
