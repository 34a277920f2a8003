// What emulated instructions reach beyond the vCPU's own memory.
using XenSharp.Core;

namespace XenSharp.Domains.Emulation;

/// <summary>
/// The machine behind one vCPU, as far as privileged instructions can see and change it. Called on the vCPU's thread, with
/// values that are already validated; the vCPU's <see cref="VcpuState"/> holds the new value before each call.
/// </summary>
public interface IPrivilegedState
{
    /// <summary>The domain's CPUID policy.</summary>
    CpuidPolicy Cpuid { get; }

    /// <summary>The domain's I/O ports.</summary>
    IoPorts Ports { get; }

    /// <summary>The time-stamp counter as the guest reads it with RDTSC.</summary>
    ulong ReadTimeStampCounter();

    /// <summary>CR0.TS changed (<see cref="VcpuState.TaskSwitched"/>): arm or disarm #NM.</summary>
    void SetTaskSwitched(bool value);

    /// <summary>
    /// Makes a frame the L4 of guest-kernel mode, as MMUEXT_NEW_BASEPTR does. The frame number is the guest's, unchecked.
    /// </summary>
    /// <returns><see cref="Errno.None"/>, <see cref="Errno.ERESTART"/> to run the instruction again, or any other for #GP.</returns>
    Errno SetPageTableRoot(Mfn root);

    /// <summary>
    /// <see cref="VcpuState.Cr4"/> changed. TSD and FSGSBASE have to reach the processor; OSXSAVE is on there from the start where
    /// <see cref="CpuidPolicy.GuestCr4Mask"/> has it.
    /// </summary>
    void SetControlRegister4(ulong value);

    /// <summary>Sets the processor's XCR0.</summary>
    void SetXcr0(ulong value);

    /// <summary>Sets a debug register of the processor. DR7 comes without the I/O breakpoints that are emulated.</summary>
    /// <param name="register">0–3, 6 or 7.</param>
    /// <param name="value">The value to load.</param>
    void SetDebugRegister(int register, ulong value);

    /// <summary>Sets what RDTSCP and RDPID return, on hosts where <see cref="CpuidOptions.TscAuxUsable"/> was found true.</summary>
    void SetTscAux(uint value);

    /// <summary>An RDMSR of kernel mode has read user mode's GS base, which the host may let it do without the manager from now on.</summary>
    /// <param name="rip">Where it is.</param>
    /// <param name="length">Bytes of it.</param>
    void NoteGsBaseRead(ulong rip, int length);

    /// <summary>Fills in a hypercall page, as the MSR 0x40000000 asks. The frame number is the guest's, unchecked.</summary>
    /// <returns>False where the frame is not a writable page of the domain's.</returns>
    bool InstallHypercallPage(Mfn frame);
}
