// The hot operations by one call: as they are compiled into this process, and as they are in the image.
using XenSharp.Core;
using XenSharp.Domains;
using XenSharp.Domains.Hypercalls;
using XenSharp.Mmu;

namespace XenSharp.Freestanding.Tests;

/// <summary>What can be asked of a vCPU; the arguments are a hypercall's, or stand for those of the operation in turn.</summary>
internal enum HotOperation
{
    MmuUpdate,
    UpdateVaMapping,
    UpdateVaMappingOtherdomain,
    MmuextOp,
    SetGdt,
    UpdateDescriptor,
    StackSwitch,
    SetSegmentBase,
    Iret,

    /// <summary>Vector, error code.</summary>
    Trap,

    /// <summary>Address, error code.</summary>
    PageFault,
    Syscall,
    Sysenter,
    Upcall,
}

/// <summary>The operations, compiled for the runtime.</summary>
internal static unsafe class CodeOutside
{
    /// <returns>The hypercall's result; 1 or 0 for what says whether the guest could take it.</returns>
    public static long Call(HotOperation operation, VcpuContext* vcpu, in HypercallArguments arguments, out long restored)
    {
        restored = 0;
        switch (operation)
        {
            case HotOperation.MmuUpdate:
                return MmuUpdate.Execute(vcpu, arguments);
            case HotOperation.UpdateVaMapping:
                return MmuUpdate.UpdateVaMapping(vcpu, arguments);
            case HotOperation.UpdateVaMappingOtherdomain:
                return MmuUpdate.UpdateVaMappingOtherdomain(vcpu, arguments);
            case HotOperation.MmuextOp:
                return MmuextOp.Execute(vcpu, arguments);
            case HotOperation.SetGdt:
                return DescriptorTables.SetGdt(vcpu, arguments);
            case HotOperation.UpdateDescriptor:
                return DescriptorTables.UpdateDescriptor(vcpu, arguments);
            case HotOperation.StackSwitch:
                return TaskSwitch.StackSwitch(vcpu, arguments);
            case HotOperation.SetSegmentBase:
                return TaskSwitch.SetSegmentBase(vcpu, arguments);
            case HotOperation.Iret:
                return GuestMode.Iret(vcpu, out restored) ? 1 : 0;
            case HotOperation.Trap:
                var vector = (ExceptionVector)arguments.A0;
                return GuestEntry.Trap(vcpu, vector, vector.PushesErrorCode(), (uint)arguments.A1) ? 1 : 0;
            case HotOperation.PageFault:
                uint errorCode = (uint)arguments.A1;
                GuestEntry.NotePageFault(vcpu, arguments.A0, ref errorCode);
                return GuestEntry.Trap(vcpu, ExceptionVector.PageFault, hasErrorCode: true, errorCode) ? 1 : 0;
            case HotOperation.Syscall:
                return GuestEntry.Syscall(vcpu) ? 1 : 0;
            case HotOperation.Sysenter:
                return GuestEntry.Sysenter(vcpu) ? 1 : 0;
            default:
                return GuestEntry.Upcall(vcpu) ? 1 : 0;
        }
    }
}

/// <summary>The operations, compiled without one.</summary>
internal sealed unsafe class CodeInside(HotImage image)
{
    private readonly nint[] _entries =
    [
        (nint)image.AddressOf("xensharp_mmu_update"),
        (nint)image.AddressOf("xensharp_update_va_mapping"),
        (nint)image.AddressOf("xensharp_update_va_mapping_otherdomain"),
        (nint)image.AddressOf("xensharp_mmuext_op"),
        (nint)image.AddressOf("xensharp_set_gdt"),
        (nint)image.AddressOf("xensharp_update_descriptor"),
        (nint)image.AddressOf("xensharp_stack_switch"),
        (nint)image.AddressOf("xensharp_set_segment_base"),
        (nint)image.AddressOf("xensharp_iret"),
        (nint)image.AddressOf("xensharp_trap"),
        (nint)image.AddressOf("xensharp_page_fault"),
        (nint)image.AddressOf("xensharp_syscall"),
        (nint)image.AddressOf("xensharp_sysenter"),
        (nint)image.AddressOf("xensharp_upcall"),
    ];

    /// <inheritdoc cref="CodeOutside.Call"/>
    public long Call(HotOperation operation, VcpuContext* vcpu, HypercallArguments arguments, out long restored)
    {
        restored = 0;
        void* entry = (void*)_entries[(int)operation];
        switch (operation)
        {
            case <= HotOperation.SetSegmentBase:
                return ((delegate* unmanaged<VcpuContext*, HypercallArguments*, long>)entry)(vcpu, &arguments);
            case HotOperation.Iret:
                long rax;
                byte returned = ((delegate* unmanaged<VcpuContext*, long*, byte>)entry)(vcpu, &rax);
                restored = rax;
                return returned;
            case HotOperation.Trap:
                return ((delegate* unmanaged<VcpuContext*, byte, uint, byte>)entry)(vcpu, (byte)arguments.A0, (uint)arguments.A1);
            case HotOperation.PageFault:
                return ((delegate* unmanaged<VcpuContext*, ulong, uint, byte>)entry)(vcpu, arguments.A0, (uint)arguments.A1);
            default:
                return ((delegate* unmanaged<VcpuContext*, byte>)entry)(vcpu);
        }
    }
}
