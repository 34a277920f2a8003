// How an operation that takes long stops in the middle and goes on after events were looked at (hypercall_create_continuation).
namespace XenSharp.Core;

/// <summary>Set by an operation that stopped part-way.</summary>
public struct ContinuationState
{
    /// <summary>1 when the operation must be issued again with <see cref="Arguments"/>.</summary>
    public int Pending;

    /// <summary>The arguments that stand for the rest of the work.</summary>
    public HypercallArguments Arguments;
}

/// <summary>
/// How long an operation may go on before the vCPU looks at its timers: what comes from outside is seen at once, by the kick that
/// comes with it.
/// </summary>
public unsafe struct PreemptionBudget
{
    /// <summary>Microseconds that an operation may take in one go.</summary>
    public const ulong Microseconds = 50;

    private ulong _end;

    /// <summary>Reads the time-stamp counter; null where time does not count.</summary>
    public delegate* unmanaged[SuppressGCTransition]<ulong> ReadTimeStampCounter { get; set; }

    /// <summary>The budget in cycles of the time-stamp counter.</summary>
    public ulong Cycles { get; set; }

    /// <summary>An operation begins: it has the whole budget from its first look at the clock on.</summary>
    public void Renew() => _end = 0;

    /// <summary>Looks at the clock.</summary>
    public bool IsSpent()
    {
        if (ReadTimeStampCounter == null)
            return false;
        ulong now = ReadTimeStampCounter();
        if (_end != 0)
            return (long)(now - _end) >= 0;
        _end = now + Cycles;
        return false;
    }
}

/// <summary>Continuing an operation.</summary>
public static unsafe class Continuation
{
    /// <summary>
    /// Says that the hypercall is to be issued again with other arguments: from the guest's <c>syscall</c> instruction, or
    /// by the multicall that it is part of.
    /// </summary>
    /// <returns>A value for the caller to return; the dispatcher replaces it.</returns>
    public static long Create(VcpuContext* vcpu, in HypercallArguments arguments)
    {
        vcpu->Continuation.Pending = 1;
        vcpu->Continuation.Arguments = arguments;
        return 0;
    }
}
