// The symbols of the image: one for each hot operation.
using System.Runtime;
using XenSharp.Core;
using XenSharp.Domains;
using XenSharp.Domains.Hypercalls;
using XenSharp.EventChannels;
using XenSharp.Mmu;

[module: System.Runtime.CompilerServices.SkipLocalsInit]

namespace XenSharp.Freestanding;

/// <summary>
/// The hot operations by the System V calling convention: arguments in RDI, RSI, RDX, the result in RAX (AL where it is true or
/// false). They are what they are outside; what has no meaning inside the VM is for the manager: false, and a continuation.
/// </summary>
internal static unsafe class EntryPoints
{
    [RuntimeExport("xensharp_mmu_update")]
    private static long ServeMmuUpdate(VcpuContext* vcpu, in HypercallArguments arguments) => MmuUpdate.Execute(vcpu, arguments);

    [RuntimeExport("xensharp_update_va_mapping")]
    private static long UpdateVaMapping(VcpuContext* vcpu, in HypercallArguments arguments) => MmuUpdate.UpdateVaMapping(vcpu, arguments);

    [RuntimeExport("xensharp_update_va_mapping_otherdomain")]
    private static long UpdateVaMappingOtherdomain(VcpuContext* vcpu, in HypercallArguments arguments)
        => MmuUpdate.UpdateVaMappingOtherdomain(vcpu, arguments);

    [RuntimeExport("xensharp_mmuext_op")]
    private static long ServeMmuextOp(VcpuContext* vcpu, in HypercallArguments arguments) => MmuextOp.Execute(vcpu, arguments);

    [RuntimeExport("xensharp_set_gdt")]
    private static long SetGdt(VcpuContext* vcpu, in HypercallArguments arguments) => DescriptorTables.SetGdt(vcpu, arguments);

    [RuntimeExport("xensharp_update_descriptor")]
    private static long UpdateDescriptor(VcpuContext* vcpu, in HypercallArguments arguments)
        => DescriptorTables.UpdateDescriptor(vcpu, arguments);

    [RuntimeExport("xensharp_stack_switch")]
    private static long StackSwitch(VcpuContext* vcpu, in HypercallArguments arguments) => TaskSwitch.StackSwitch(vcpu, arguments);

    [RuntimeExport("xensharp_set_segment_base")]
    private static long SetSegmentBase(VcpuContext* vcpu, in HypercallArguments arguments) => TaskSwitch.SetSegmentBase(vcpu, arguments);

    [RuntimeExport("xensharp_iret")]
    private static bool Iret(VcpuContext* vcpu, out long result) => GuestMode.Iret(vcpu, out result);

    [RuntimeExport("xensharp_trap")]
    private static bool Trap(VcpuContext* vcpu, ExceptionVector vector, uint errorCode)
        => GuestEntry.Trap(vcpu, vector, vector.PushesErrorCode(), errorCode);

    [RuntimeExport("xensharp_page_fault")]
    private static bool PageFault(VcpuContext* vcpu, ulong address, uint errorCode)
    {
        GuestEntry.NotePageFault(vcpu, address, ref errorCode);
        return GuestEntry.Trap(vcpu, ExceptionVector.PageFault, hasErrorCode: true, errorCode);
    }

    [RuntimeExport("xensharp_syscall")]
    private static bool Syscall(VcpuContext* vcpu) => GuestEntry.Syscall(vcpu);

    [RuntimeExport("xensharp_upcall")]
    private static bool Upcall(VcpuContext* vcpu) => GuestEntry.Upcall(vcpu);

    [RuntimeExport("xensharp_sysenter")]
    private static bool Sysenter(VcpuContext* vcpu) => GuestEntry.Sysenter(vcpu);

    /// <summary>EVTCHNOP_send, up to the bits of the domain that the event is for.</summary>
    /// <param name="context">The sender's domain.</param>
    /// <param name="port">As the guest gave it.</param>
    /// <param name="target">Gets the domain whose vCPUs are to be woken. It may go away as soon as this returns: only the manager, which
    /// knows it by other means, can tell.</param>
    /// <param name="wake">Gets the vCPUs.</param>
    /// <returns>As <see cref="EventDelivery.Send"/>; a back end is the manager's to tell.</returns>
    [RuntimeExport("xensharp_event_send")]
    private static long Send(EventChannelContext* context, uint port, EventChannelContext** target, VcpuMask* wake)
    {
        *target = context;
        if (!context->IsValid(port))
            return -(long)Errno.EINVAL;
        PortLock.Enter(context->Ports + port);
        long result = EventDelivery.Send(context, port, target, wake);
        PortLock.Exit(context->Ports + port);
        return result;
    }

    [RuntimeExport("xensharp_event_unmask")]
    private static long Unmask(EventChannelContext* context, uint port, VcpuMask* wake) => EventDelivery.Unmask(context, port, wake);

    [RuntimeExport("xensharp_event_raise_virq")]
    private static void RaiseVirq(EventChannelContext* context, int vcpu, int virq, VcpuMask* wake)
        => EventDelivery.RaiseVirq(context, vcpu, virq, wake);

    [RuntimeExport("xensharp_event_poll")]
    private static long Poll(EventChannelContext* context, uint port) => EventDelivery.Poll(context, port);
}
