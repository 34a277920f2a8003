// What a vCPU's SYSCALL entry may do for the guest by itself, without leaving the VM, and what it has done.
using System.Runtime.InteropServices;

namespace XenSharp.Core;

/// <summary>
/// Tells a vCPU's SYSCALL entry what it may serve inside the VM. The vCPU's own thread writes it before an entry; what is 0 is left to the
/// manager.
/// </summary>
/// <remarks>
/// Such an entry runs at the guest's own privilege, and only where it does: it can do nothing to a guest that the guest's kernel could not
/// do by itself. Hypercalls are served to kernel mode alone: user mode's tables show another entry in the same place.
/// </remarks>
[StructLayout(LayoutKind.Sequential)]
public struct EntryService
{
    /// <summary>1 to serve iret from kernel mode, if no upcall is due after it: to kernel mode, and to user mode where <see cref="ModeSwitch"/> is set.</summary>
    public int Iret;

    /// <summary>1 to serve VCPUOP_set_singleshot_timer, for a time that is not before <see cref="NextLook"/>.</summary>
    public int SingleshotTimer;

    /// <summary>1 to serve what a kernel asks for with every task that it switches to: stack_switch, and set_segment_base of user mode's GS.</summary>
    public int TaskSwitch;

    /// <summary>
    /// 1 to take system calls of user mode to <see cref="SyscallCallback"/>, with events masked, and iret back to user mode. The two roots are
    /// different ones, and show in the reserved slots what is their mode's; an exit then leaves <see cref="IVirtualCpu.PageTableRoot"/> at one
    /// of them, which is the mode that the vCPU is in.
    /// </summary>
    public int ModeSwitch;

    /// <summary>
    /// System time at which the manager looks at <see cref="EntryReport"/> at the latest, without being asked.
    /// </summary>
    public ulong NextLook;

    /// <summary>Frame number of kernel mode's root.</summary>
    public ulong KernelRoot;

    /// <summary>Frame number of user mode's root.</summary>
    public ulong UserRoot;

    /// <summary>Where the guest's kernel takes system calls of 64-bit code.</summary>
    public ulong SyscallCallback;

    /// <summary>
    /// Where kernel mode has an RDMSR of user mode's GS base, of two bytes; 0 to leave it to the manager. It finds
    /// <see cref="EntryReport.InactiveGsBase"/>.
    /// </summary>
    public ulong GsBaseRead;
}

/// <summary>
/// What a vCPU's SYSCALL entry has done, and goes by. The guest's kernel can write to it, so nothing here is to be believed. The manager fills
/// it before an entry and takes it over after the exit.
/// </summary>
[StructLayout(LayoutKind.Sequential)]
public struct EntryReport
{
    /// <summary>What the one-shot timer was last set to, in system time; 0 for nothing.</summary>
    public ulong SingleshotTimeout;

    /// <summary>The kernel's stack segment, as stack_switch gives it.</summary>
    public ulong KernelSs;

    /// <summary>The kernel's stack, as stack_switch gives it.</summary>
    public ulong KernelSp;

    /// <summary>The GS base of the mode that the vCPU is not in.</summary>
    public ulong InactiveGsBase;
}
