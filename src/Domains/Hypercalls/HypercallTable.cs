// The whole hypercall surface in one place: number, name, owner. A row that is not here is -ENOSYS.
using XenSharp.Core;
using XenSharp.Domains.Grants;
using XenSharp.Mmu;

namespace XenSharp.Domains.Hypercalls;

/// <summary>One row of the table.</summary>
internal readonly unsafe struct HypercallEntry(delegate*<Vcpu, in HypercallArguments, long> function, int argumentCount)
{
    /// <summary>Serves the hypercall; null for none.</summary>
    public readonly delegate*<Vcpu, in HypercallArguments, long> Function = function;

    /// <summary>Arguments that it takes, from the first on.</summary>
    public readonly int ArgumentCount = argumentCount;
}

/// <summary>The dispatch table, made once; no reflection, no allocation a call.</summary>
internal static unsafe class HypercallTable
{
    private static readonly HypercallEntry[] Entries = Build();

    /// <summary>The row of a number, or one without a function.</summary>
    public static HypercallEntry Find(ulong number) => number < (ulong)Entries.Length ? Entries[number] : default;

    /// <summary>Whether a number is served, for the ABI state that people are shown.</summary>
    public static bool IsServed(HypercallNumber number) => Find((ulong)number).Function != null;

    private static HypercallEntry[] Build()
    {
        var table = new HypercallEntry[64];
        void Row(HypercallNumber number, int arguments, delegate*<Vcpu, in HypercallArguments, long> function)
            => table[(int)number] = new HypercallEntry(function, arguments);

        // Processor state.
        Row(HypercallNumber.SetTrapTable, 1, &ProcessorState.SetTrapTable);
        Row(HypercallNumber.StackSwitch, 2, &OnContext.StackSwitch);
        Row(HypercallNumber.SetCallbacks, 3, &Callbacks.SetCallbacks);
        Row(HypercallNumber.CallbackOp, 2, &Callbacks.CallbackOp);
        Row(HypercallNumber.NmiOp, 2, &Callbacks.NmiOp);
        Row(HypercallNumber.FpuTaskswitch, 1, &ProcessorState.FpuTaskswitch);
        Row(HypercallNumber.SetDebugreg, 2, &ProcessorState.SetDebugreg);
        Row(HypercallNumber.GetDebugreg, 1, &ProcessorState.GetDebugreg);
        Row(HypercallNumber.SetSegmentBase, 2, &OnContext.SetSegmentBase);
        Row(HypercallNumber.Iret, 0, &ProcessorState.Iret);
        Row(HypercallNumber.VmAssist, 2, &VmAssistOp.Execute);
        Row(HypercallNumber.PhysdevOp, 2, &PhysdevOp.Execute);
        Row(HypercallNumber.PhysdevOpCompat, 1, &PhysdevOp.ExecuteCompat);

        // Memory, owned by Mmu.
        Row(HypercallNumber.MmuUpdate, 4, &OnContext.MmuUpdate);
        Row(HypercallNumber.MmuextOp, 4, &OnContext.MmuextOp);
        Row(HypercallNumber.UpdateVaMapping, 3, &OnContext.UpdateVaMapping);
        Row(HypercallNumber.UpdateVaMappingOtherdomain, 4, &OnContext.UpdateVaMappingOtherdomain);
        Row(HypercallNumber.MemoryOp, 2, &OnContext.MemoryOp);
        Row(HypercallNumber.SetGdt, 2, &OnContext.SetGdt);
        Row(HypercallNumber.UpdateDescriptor, 2, &OnContext.UpdateDescriptor);

        Row(HypercallNumber.GrantTableOp, 3, &GrantTableOp.Execute);

        // Events, time and scheduling.
        Row(HypercallNumber.EventChannelOp, 2, &OnContext.EventChannelOp);
        Row(HypercallNumber.EventChannelOpCompat, 1, &OnContext.EventChannelOpCompat);
        Row(HypercallNumber.SchedOp, 2, &SchedOp.Execute);
        Row(HypercallNumber.SchedOpCompat, 2, &SchedOp.ExecuteCompat);
        Row(HypercallNumber.SetTimerOp, 1, &SchedOp.SetTimer);
        Row(HypercallNumber.VcpuOp, 3, &VcpuOp.Execute);

        // The rest.
        Row(HypercallNumber.Multicall, 2, &Multicall.Execute);
        Row(HypercallNumber.XenVersion, 2, &XenVersion.Execute);
        Row(HypercallNumber.ConsoleIo, 3, &ConsoleIo.Execute);

        Row(HypercallNumber.HvmOp, 2, &HvmOp.Execute);

        // What real Xen has and gives to no unprivileged domain.
        Row(HypercallNumber.PlatformOp, 1, &PrivilegedOp.Platform);
        Row(HypercallNumber.Sysctl, 1, &PrivilegedOp.Sysctl);
        Row(HypercallNumber.Domctl, 1, &PrivilegedOp.Domctl);
        Row(HypercallNumber.PagingDomctlContinue, 1, &PrivilegedOp.PagingDomctlContinue);
        Row(HypercallNumber.DmOp, 3, &PrivilegedOp.Dm);
        Row(HypercallNumber.XenpmuOp, 2, &PrivilegedOp.Xenpmu);
        Row(HypercallNumber.KexecOp, 2, &PrivilegedOp.Refuse);
        Row(HypercallNumber.HypfsOp, 5, &PrivilegedOp.Refuse);
        Row(HypercallNumber.Mca, 1, &PrivilegedOp.Refuse);
        return table;
    }

    /// <summary>The hypercalls that need nothing but the vCPU's context.</summary>
    private static class OnContext
    {
        public static long StackSwitch(Vcpu vcpu, in HypercallArguments arguments) => TaskSwitch.StackSwitch(vcpu.Context, arguments);

        public static long SetSegmentBase(Vcpu vcpu, in HypercallArguments arguments) => TaskSwitch.SetSegmentBase(vcpu.Context, arguments);

        public static long MmuUpdate(Vcpu vcpu, in HypercallArguments arguments) => Mmu.MmuUpdate.Execute(vcpu.Context, arguments);

        public static long MmuextOp(Vcpu vcpu, in HypercallArguments arguments) => Mmu.MmuextOp.Execute(vcpu.Context, arguments);

        public static long UpdateVaMapping(Vcpu vcpu, in HypercallArguments arguments) => Mmu.MmuUpdate.UpdateVaMapping(vcpu.Context, arguments);

        public static long UpdateVaMappingOtherdomain(Vcpu vcpu, in HypercallArguments arguments)
            => Mmu.MmuUpdate.UpdateVaMappingOtherdomain(vcpu.Context, arguments);

        public static long MemoryOp(Vcpu vcpu, in HypercallArguments arguments) => Mmu.MemoryOp.Execute(vcpu.Context, arguments);

        public static long SetGdt(Vcpu vcpu, in HypercallArguments arguments) => DescriptorTables.SetGdt(vcpu.Context, arguments);

        public static long UpdateDescriptor(Vcpu vcpu, in HypercallArguments arguments) => DescriptorTables.UpdateDescriptor(vcpu.Context, arguments);

        public static long EventChannelOp(Vcpu vcpu, in HypercallArguments arguments) => vcpu.Domain.Events.Execute(vcpu.Context, arguments);

        public static long EventChannelOpCompat(Vcpu vcpu, in HypercallArguments arguments)
            => vcpu.Domain.Events.ExecuteCompat(vcpu.Context, arguments);
    }
}
