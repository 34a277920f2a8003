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
        ref HypercallArguments rest = ref vcpu->Continuation.Arguments;
        rest.A0 = arguments.A0;
        rest.A1 = arguments.A1;
        rest.A2 = arguments.A2;
        rest.A3 = arguments.A3;
        rest.A4 = arguments.A4;
        rest.A5 = arguments.A5;
        return 0;
    }
}
