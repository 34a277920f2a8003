using XenSharp.Core;
using XenSharp.Domains.Trace;

namespace XenSharp.Domains.Hypercalls;

/// <summary>From a <c>syscall</c> in guest-kernel mode to a row of the table and back.</summary>
internal static unsafe class HypercallDispatcher
{
    private const int SyscallLength = 2;

    /// <summary>Serves the hypercall in the vCPU's registers and leaves its result there.</summary>
    public static void Dispatch(Vcpu vcpu)
    {
        CpuRegisters* registers = vcpu.Context->Registers;
        ulong number = registers->Rax;
        var arguments = new HypercallArguments
        {
            A0 = registers->Rdi,
            A1 = registers->Rsi,
            A2 = registers->Rdx,
            A3 = registers->R10,
            A4 = registers->R8,
            A5 = registers->R9,
        };
        ulong rip = registers->Rip;
        long result = Call(vcpu, number, arguments);
        vcpu.History.Add(new HypercallRecord(number, arguments, result, rip));
        if (vcpu.Context->Continuation.Pending == 0)
        {
            registers->Rax = (ulong)result;
            return;
        }

        // Issued again from the guest's own instruction, after events were looked at.
        vcpu.Context->Continuation.Pending = 0;
        ref HypercallArguments rest = ref vcpu.Context->Continuation.Arguments;
        registers->Rip = rip - SyscallLength;
        registers->Rax = number;

        // Only the registers that carry arguments of this hypercall are its own to change.
        int count = HypercallTable.Find(number).ArgumentCount;
        if (count > 0)
            registers->Rdi = rest.A0;
        if (count > 1)
            registers->Rsi = rest.A1;
        if (count > 2)
            registers->Rdx = rest.A2;
        if (count > 3)
            registers->R10 = rest.A3;
        if (count > 4)
            registers->R8 = rest.A4;
        if (count > 5)
            registers->R9 = rest.A5;
        vcpu.Continue();
    }

    /// <summary>Serves one hypercall by number; a multicall comes here for each of its entries.</summary>
    public static long Call(Vcpu vcpu, ulong number, in HypercallArguments arguments)
        => vcpu.Trace == null ? Serve(vcpu, number, arguments) : ServeTraced(vcpu, number, arguments);

    private static long ServeTraced(Vcpu vcpu, ulong number, in HypercallArguments arguments)
    {
        HypercallInProgress call = vcpu.Trace!.BeginHypercall(number, arguments, vcpu.InMulticall);
        long result = Serve(vcpu, number, arguments);
        vcpu.Trace.EndHypercall(call, number, arguments, result);
        return result;
    }

    private static long Serve(Vcpu vcpu, ulong number, in HypercallArguments arguments)
    {
        HypercallEntry entry = HypercallTable.Find(number);
        return entry.Function == null ? -(long)Errno.ENOSYS : entry.Function(vcpu, arguments);
    }
}
