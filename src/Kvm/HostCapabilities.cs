using XenSharp.Core;

namespace XenSharp.Kvm;

/// <summary>
/// What this host's KVM does, found by probes in a scratch VM and never by vendor or version. The whole difference between
/// hosts is in this record.
/// </summary>
public sealed record HostCapabilities
{
    /// <summary>
    /// The processor walks shadow copies of the guest's page tables: entries stored by the host are not seen until the
    /// monitor stores them again from inside the VM.
    /// </summary>
    public required bool ShadowPageTables { get; init; }

    /// <summary>
    /// Of shadowed page tables: KVM lets the VM store into a last-level table without looking ("unsync"), and takes the new
    /// entries over only when the VM flushes translations.
    /// </summary>
    public required bool StoresNeedFlush { get; init; }

    /// <summary>Privilege level at which SYSCALL enters the monitor, 0 or 3.</summary>
    public required int SyscallEntryLevel { get; init; }

    /// <summary>
    /// KVM emulates the SYSCALL of 32-bit code and loses the upper half of its entry's address, so that the guest would go on at CPL 0 in
    /// its own memory. Such a KVM is told that its vCPUs are Intel's: for those the instruction raises #UD.
    /// </summary>
    public required bool CompatibilitySyscallAstray { get; init; }

    /// <summary>
    /// KVM interprets 32-bit code, at half a microsecond an instruction, and raises #UD for floating point and for vectors: see
    /// <see cref="CompatibilityInstruction"/>.
    /// </summary>
    public required bool InterpretsCompatibilityMode { get; init; }

    /// <summary>
    /// Instructions at CPL 3 find the host's own descriptor table: the host's selectors can be loaded there, and KVM does not see it.
    /// </summary>
    public required bool HostDescriptorTable { get; init; }

    /// <summary>L4 slot 256 can be read at CPL 3; otherwise the M2P table lies in slot 257.</summary>
    public required bool Slot256Usable { get; init; }

    /// <summary>Vector that <c>int 0x80</c> raises at CPL 3 while no gate allows it: #GP as in hardware, or #UD.</summary>
    public required ExceptionVector SoftwareInterruptVector { get; init; }

    /// <summary>CPUID at CPL 3 shows the VM's policy; otherwise the host's own leaves.</summary>
    public required bool CpuidPolicyApplies { get; init; }

    /// <summary>Guest-visible time-stamp counter.</summary>
    public required TimeStampCounter TimeStampCounter { get; init; }

    /// <summary>
    /// Loads of Xen's flat data selector at CPL 3 need nothing of XenSharp. KVM may still be emulating them, in which case the
    /// guest reads back 0 although the segment is loaded.
    /// </summary>
    public required bool FlatSegmentLoads { get; init; }

    /// <summary>CR0.TS has an effect: the next FPU instruction at CPL 3 raises #NM, which lazy FPU switching rests on.</summary>
    public required bool TaskSwitchedTraps { get; init; }

    /// <summary>CR4.TSD has an effect: RDTSC at CPL 3 raises #GP.</summary>
    public required bool TimeStampDisableTraps { get; init; }

    /// <summary>Breakpoints set in the debug registers raise #DB at CPL 3.</summary>
    public required bool DebugRegistersWork { get; init; }

    /// <summary>KVM_CAP_MAX_VCPUS.</summary>
    public required int MaxVcpus { get; init; }

    /// <summary>
    /// What a scratch VM is built with before anything is known: every choice works, if slowly, on every host.
    /// </summary>
    internal static HostCapabilities Assumed { get; } = new()
    {
        ShadowPageTables = true,
        StoresNeedFlush = true,
        SyscallEntryLevel = 3,
        CompatibilitySyscallAstray = false,
        InterpretsCompatibilityMode = false,
        HostDescriptorTable = false,
        Slot256Usable = true,
        SoftwareInterruptVector = ExceptionVector.GeneralProtection,
        CpuidPolicyApplies = true,
        TimeStampCounter = new TimeStampCounter(0, 0),
        FlatSegmentLoads = false,
        TaskSwitchedTraps = false,
        TimeStampDisableTraps = false,
        DebugRegistersWork = false,
        MaxVcpus = 1,
    };
}
