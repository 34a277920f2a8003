// set_trap_table (0), fpu_taskswitch (5), set_debugreg (8), get_debugreg (9), iret (23).
using XenSharp.Core;
using XenSharp.Domains.Emulation;

namespace XenSharp.Domains.Hypercalls;

/// <summary>The registers and tables that a native kernel would set by privileged instructions.</summary>
internal static unsafe class ProcessorState
{
    /// <summary>set_trap_table(table), up to an entry with address 0; no table clears all.</summary>
    public static long SetTrapTable(Vcpu vcpu, in HypercallArguments arguments)
    {
        VcpuContext* context = vcpu.Context;
        if (arguments.A0 == 0)
        {
            context->State->Traps = default;
            return 0;
        }

        for (ulong address = arguments.A0; ; address += (ulong)sizeof(TrapInfo))
        {
            if (address != arguments.A0 && context->PreemptionDue)
                return Continuation.Create(context, new HypercallArguments { A0 = address });
            if (!GuestAccess.Read(context, address, out TrapInfo trap))
                return -(long)Errno.EFAULT;
            if (trap.Address == 0)
                return 0;
            if (!new VirtualAddress(trap.Address).IsCanonical)
                return -(long)Errno.EINVAL;
            trap.Cs |= 3;
            context->State->Traps[trap.Vector] = trap;
        }
    }

    /// <summary>fpu_taskswitch(set).</summary>
    public static long FpuTaskswitch(Vcpu vcpu, in HypercallArguments arguments)
    {
        bool set = (uint)arguments.A0 != 0;
        vcpu.Context->State->TaskSwitched = set ? 1 : 0;
        vcpu.Cpu.SetTaskSwitched(set);
        return 0;
    }

    /// <summary>set_debugreg(register, value).</summary>
    public static long SetDebugreg(Vcpu vcpu, in HypercallArguments arguments)
    {
        Errno error = DebugRegisters.Set(vcpu.Context->State, (int)arguments.A0, arguments.A1, out int hardware);
        if (error == Errno.None)
            PrivilegedState.LoadDebugRegister(vcpu, hardware);
        return -(long)error;
    }

    /// <summary>get_debugreg(register).</summary>
    public static long GetDebugreg(Vcpu vcpu, in HypercallArguments arguments)
        => DebugRegisters.TryGet(vcpu.Context->State, (int)arguments.A0, out ulong value) ? (long)value : -(long)Errno.ENODEV;

    /// <summary>iret().</summary>
    public static long Iret(Vcpu vcpu, in HypercallArguments arguments)
    {
        if (!GuestMode.Iret(vcpu.Context, out long result))
            vcpu.Domain.Crash(vcpu, "HYPERVISOR_iret found no valid frame on the guest's stack, or no user page tables to return to.");
        return result;
    }
}
