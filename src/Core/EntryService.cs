// What a vCPU's SYSCALL entry may do for the guest kernel by itself, without leaving the VM, and what it has done.
using System.Runtime.InteropServices;

namespace XenSharp.Core;

/// <summary>
/// Tells a vCPU's SYSCALL entry which hypercalls it may serve inside the VM. The vCPU's own thread writes it before an entry; what is 0 is
/// left to the manager.
/// </summary>
/// <remarks>
/// Such an entry runs at the guest's own privilege, and only where it does: it can do nothing to a guest that the guest's kernel could not
/// do by itself. User mode comes to the same entry, so that nothing may be served while the vCPU is in it.
/// </remarks>
[StructLayout(LayoutKind.Sequential)]
public struct EntryService
{
    /// <summary>1 to serve iret from kernel mode to kernel mode, if no upcall is due after it.</summary>
    public int Iret;

    /// <summary>1 to serve VCPUOP_set_singleshot_timer, for a time that is not before <see cref="NextLook"/>.</summary>
    public int SingleshotTimer;

    /// <summary>1 to serve what a kernel asks for with every task that it switches to: stack_switch, and set_segment_base of user mode's GS.</summary>
    public int TaskSwitch;

    /// <summary>
    /// System time at which the manager looks at <see cref="EntryReport"/> at the latest, without being asked.
    /// </summary>
    public ulong NextLook;
}

/// <summary>What a vCPU's SYSCALL entry has served. The guest's kernel can write to it, so nothing here is to be believed.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct EntryReport
{
    /// <summary>What the one-shot timer was last set to, in system time; 0 for nothing.</summary>
    public ulong SingleshotTimeout;

    /// <summary>1 when <see cref="KernelSs"/> and <see cref="KernelSp"/> were set, as by stack_switch.</summary>
    public ulong StackSwitched;

    public ulong KernelSs;

    public ulong KernelSp;

    /// <summary>1 when <see cref="UserGsBase"/> was set, as by set_segment_base.</summary>
    public ulong UserGsBaseSet;

    public ulong UserGsBase;
}
