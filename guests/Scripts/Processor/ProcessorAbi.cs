// The numbers that the processor scripts use, by the names of Xen's public headers and of the processor manuals.
namespace XenSharp.Guests.Scripts.Processor;

/// <summary>Selectors that Xen provides to 64-bit guests (public arch-x86/xen-x86_64.h), as they are at CPL 3.</summary>
internal static class Selectors
{
    public const int FlatRing3Cs32 = 0xe023;
    public const int FlatRing3Ds = 0xe02b;
    public const int FlatRing3Cs64 = 0xe033;

    /// <summary>A code selector without RPL: HYPERVISOR_iret takes it for a return to kernel mode.</summary>
    public const int FlatKernelCs64 = 0xe030;
}

/// <summary>RFLAGS.</summary>
internal static class Eflags
{
    public const ulong Carry = 1 << 0;
    public const ulong Fixed = 1 << 1;
    public const ulong Trap = 1 << 8;
    public const ulong InterruptEnable = 1 << 9;
    public const ulong Direction = 1 << 10;
    public const ulong Iopl = 3 << 12;
    public const ulong NestedTask = 1 << 14;
    public const ulong Resume = 1 << 16;
    public const ulong Virtual8086 = 1 << 17;
    public const ulong AlignmentCheck = 1 << 18;
    public const ulong Id = 1 << 21;

    /// <summary>Interrupts on and nothing else: what leaves the upcall mask clear when iret leads to user mode.</summary>
    public const ulong Usual = Fixed | InterruptEnable;
}

/// <summary>Exception vectors.</summary>
internal static class Vectors
{
    public const int Divide = 0;
    public const int Nmi = 2;
    public const int Breakpoint = 3;
    public const int Overflow = 4;
    public const int InvalidOpcode = 6;
    public const int GeneralProtection = 13;
    public const int PageFault = 14;
}

/// <summary>Flags of struct trap_info (public arch-x86/xen.h).</summary>
internal static class TrapFlags
{
    /// <summary>A privilege level of 3: software interrupts of user mode may use the entry.</summary>
    public const int UserMayRaise = 3;

    /// <summary>A privilege level of 1: the kernel's software interrupts may.</summary>
    public const int KernelMayRaise = 1;

    /// <summary>The handler starts with events masked.</summary>
    public const int MasksEvents = 4;
}

/// <summary>Page-table entry flags.</summary>
internal static class Pte
{
    public const ulong ReadOnly = 0x61;
    public const ulong ReadWrite = 0x63;

    /// <summary>A table entry, or a page of user mode.</summary>
    public const ulong UserTable = 0x67;
    public const ulong NoExecute = 1UL << 63;

    /// <summary>UVMF_INVLPG.</summary>
    public const int InvalidatePage = 2;
}

/// <summary>CALLBACKOP_*, CALLBACKTYPE_* and CALLBACKF_* (public callback.h), XENNMI_* (public nmi.h).</summary>
internal static class Callback
{
    public const int Register = 0;
    public const int Unregister = 1;

    public const int Event = 0;
    public const int Failsafe = 1;
    public const int Syscall = 2;
    public const int Nmi = 4;
    public const int Sysenter = 5;
    public const int SyscallCompat = 7;

    public static readonly int[] Known = [Event, Failsafe, Syscall, Nmi, Sysenter, SyscallCompat];

    /// <summary>
    /// CALLBACKTYPE_sysenter_deprecated and CALLBACKTYPE_vm86, which 64-bit Xen does not know, and one that nobody knows.
    /// </summary>
    public static readonly int[] Unknown = [3, 6, 99];

    public const int MaskEvents = 1;
}

/// <summary>PHYSDEVOP_* (public physdev.h).</summary>
internal static class Physdev
{
    public const int SetIopl = 6;
    public const int SetIobitmap = 7;
}

/// <summary>SEGBASE_* (public xen.h).</summary>
internal static class SegmentBase
{
    public const int Fs = 0;
    public const int GsUser = 1;
    public const int GsKernel = 2;
    public const int GsUserSelector = 3;
}

/// <summary>VCPUOP_* (public vcpu.h).</summary>
internal static class VcpuOperation
{
    public const int SendNmi = 11;
}

/// <summary>VMASST_* (public xen.h).</summary>
internal static class VmAssistOperation
{
    public const int Enable = 0;
    public const int Disable = 1;
    public const int ArchitecturalIopl = 4;
}

/// <summary>Model-specific registers (AMD64 manual volume 2, appendix A; Intel SDM volume 4).</summary>
internal static class MsrNumber
{
    public const uint TimeStampCounter = 0x10;
    public const uint ApicBase = 0x1b;
    public const uint MtrrCapability = 0xfe;
    public const uint MiscFeaturesEnables = 0x140;
    public const uint SysenterCs = 0x174;
    public const uint MachineCheckStatus = 0x17a;
    public const uint DebugControl = 0x1d9;
    public const uint MtrrFix64K = 0x250;
    public const uint Pat = 0x277;
    public const uint X2ApicVersion = 0x803;
    public const uint UserCet = 0x6a0;
    public const uint Hypervisor = 0x4000_0000;
    public const uint Efer = 0xc000_0080;
    public const uint Star = 0xc000_0081;
    public const uint Lstar = 0xc000_0082;
    public const uint Cstar = 0xc000_0083;
    public const uint SyscallMask = 0xc000_0084;
    public const uint FsBase = 0xc000_0100;
    public const uint GsBase = 0xc000_0101;
    public const uint KernelGsBase = 0xc000_0102;
    public const uint VmCr = 0xc001_0114;
    public const uint Unknown = 0x1234_5678;
}

/// <summary>Addresses that mean the same on every hypervisor.</summary>
internal static class Addresses
{
    public const ulong NonCanonical = 0x8000_0000_0000_0000;

    /// <summary>HYPERVISOR_VIRT_START: the first address that the guest cannot have.</summary>
    public const ulong Hypervisor = 0xffff_8000_0000_0000;

    /// <summary>The last page that the guest cannot have.</summary>
    public const ulong HypervisorLast = 0xffff_87ff_ffff_f000;

    /// <summary>Canonical, and no table has it.</summary>
    public const ulong Unmapped = 0x7fff_0000_0000;
}
