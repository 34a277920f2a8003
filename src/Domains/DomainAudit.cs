// What is kept about a domain, checked while it runs.
using XenSharp.Core;
using XenSharp.Domains.Builder;
using XenSharp.Mmu;

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
        DomainContext* domain = vcpu.Domain.Context;
        DomainLayout layout = vcpu.Domain.Layout;
        ReadOnlySpan<ulong> held = [layout.Console.Value, layout.Store.Value, vcpu.Domain.PhysicalInterrupts.EoiFrame ?? 0];
        if ((FrameTableAudit.Check(domain, held) ?? ScrubAudit.Check(domain)) is { } trouble)
            vcpu.Domain.Crash(vcpu, $"The domain's books do not agree: {trouble}");
    }
}
