// Which guest memory goes into the trace with a hypercall: for some the registers alone do not say what is asked for.
using XenSharp.Core;

namespace XenSharp.Domains.Trace;

/// <summary>Finds the first element of what a hypercall works on.</summary>
internal static class HypercallData
{
    /// <summary>struct mmu_update.</summary>
    private const int MmuUpdateSize = 16;

    /// <summary>struct mmuext_op.</summary>
    private const int MmuextOpSize = 24;

    /// <summary>Where it lies.</summary>
    /// <param name="number">The hypercall.</param>
    /// <param name="arguments">Its arguments.</param>
    /// <param name="address">Its guest address.</param>
    /// <returns>Its size in bytes, 0 where there is none.</returns>
    public static int Find(ulong number, in HypercallArguments arguments, out ulong address)
    {
        address = arguments.A0;
        switch ((HypercallNumber)number)
        {
            // The upper bit of the count is a flag of continuations.
            case HypercallNumber.MmuUpdate when ((uint)arguments.A1 & int.MaxValue) != 0:
                return MmuUpdateSize;
            case HypercallNumber.MmuextOp when ((uint)arguments.A1 & int.MaxValue) != 0:
                return MmuextOpSize;
            case HypercallNumber.EventChannelOp:
                address = arguments.A1;
                return EventChannelSize(arguments.A0);
            default:
                return 0;
        }
    }

    /// <summary>What the caller fills in of the structures of event_channel.h, by command.</summary>
    private static int EventChannelSize(ulong command) => command switch
    {
        0 => 8, // bind_interdomain: remote domain, remote port
        1 or 2 or 8 => 8, // bind_virq: virq, vCPU; bind_pirq: pirq, flags; bind_vcpu: port, vCPU
        3 or 4 or 7 or 9 => 4, // close, send, bind_ipi, unmask
        5 => 8, // status: domain, port
        6 => 4, // alloc_unbound: two domains
        _ => 0,
    };
}
