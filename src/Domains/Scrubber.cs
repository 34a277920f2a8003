// Gives the memory of free frames back to the host.
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains;

/// <summary>
/// Scrubs frames that nobody owns any more, on the threads of the domain's vCPUs: some between two entries of a guest that gives
/// up many, and all that are left before one sleeps. A page costs the host a few microseconds, less than an exit.
/// </summary>
internal sealed unsafe class Scrubber(DomainContext* domain, IVirtualMachine machine)
{
    /// <summary>Fewer wait until the vCPU sleeps.</summary>
    private const long Batch = 128;

    /// <summary>Runs of neighbouring frames that are scrubbed at once, so that the guest does not wait long.</summary>
    private const int RunsAtOnce = 64;
    private const ulong LongestRun = 512;

    private readonly FrameTable* _frames = FrameTable.Of(domain);

    /// <summary>Between two entries.</summary>
    public void AfterExit()
    {
        if (_frames->Scrub.Pending >= Batch)
            _ = Scrub();
    }

    /// <summary>Before a vCPU sleeps.</summary>
    /// <param name="vcpu">Which; it is not kept from an event.</param>
    public void BeforeSleep(VcpuContext* vcpu)
    {
        while (_frames->Scrub.Pending != 0 && !vcpu->PreemptionDue && Scrub())
        {
        }
    }

    /// <summary>False where nothing was left to do.</summary>
    private bool Scrub()
    {
        for (int run = 0; run < RunsAtOnce; run++)
        {
            if (!_frames->Scrub.TryBeginRun(LongestRun, out ulong first, out ulong count))
                return run != 0;
            machine.Discard(domain->Memory.FirstFrame + first, count);
            _frames->Scrub.EndRun(first, count);
        }

        return true;
    }
}
