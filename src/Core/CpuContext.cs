// The guest-visible processor state as the policy above the VM sees it.
using System.Runtime.InteropServices;

namespace XenSharp.Core;

/// <summary>
/// The general-purpose registers, in the order of KVM's <c>struct kvm_regs</c> so that the policy works on the shared page
/// itself; nothing above <c>Kvm</c> relies on that order.
/// </summary>
[StructLayout(LayoutKind.Sequential)]
public struct CpuRegisters
{
    public ulong Rax, Rbx, Rcx, Rdx;
    public ulong Rsi, Rdi, Rsp, Rbp;
    public ulong R8, R9, R10, R11;
    public ulong R12, R13, R14, R15;
    public ulong Rip, Rflags;
}

/// <summary>Segment selectors and the two bases that 64-bit mode uses.</summary>
public struct SegmentRegisters
{
    public ushort Cs, Ss, Ds, Es, Fs, Gs;
    public ulong FsBase, GsBase;
}

/// <summary>RFLAGS bits (Intel SDM volume 1, 3.4.3).</summary>
[Flags]
public enum Rflags : ulong
{
    Carry = 1 << 0,
    Fixed = 1 << 1,
    Parity = 1 << 2,
    Adjust = 1 << 4,
    Zero = 1 << 6,
    Sign = 1 << 7,
    Trap = 1 << 8,
    InterruptEnable = 1 << 9,
    Direction = 1 << 10,
    Overflow = 1 << 11,
    Iopl = 3 << 12,
    NestedTask = 1 << 14,
    Resume = 1 << 16,
    Virtual8086 = 1 << 17,
    AlignmentCheck = 1 << 18,
    VirtualInterrupt = 1 << 19,
    VirtualInterruptPending = 1 << 20,
    Id = 1 << 21,
}

/// <summary>Exception vectors (Intel SDM volume 3, 6.3.1).</summary>
public enum ExceptionVector : byte
{
    DivideError = 0,
    Debug = 1,
    Nmi = 2,
    Breakpoint = 3,
    Overflow = 4,
    BoundRange = 5,
    InvalidOpcode = 6,
    DeviceNotAvailable = 7,
    DoubleFault = 8,
    InvalidTss = 10,
    SegmentNotPresent = 11,
    StackFault = 12,
    GeneralProtection = 13,
    PageFault = 14,
    X87Error = 16,
    AlignmentCheck = 17,
    MachineCheck = 18,
    SimdError = 19,
    ControlProtection = 21,
}

/// <summary>What the processor does on an exception.</summary>
public static class ExceptionVectors
{
    /// <summary>Whether an error code is pushed for the vector (Intel SDM volume 3, 6.13).</summary>
    public static bool PushesErrorCode(this ExceptionVector vector)
        => vector is ExceptionVector.DoubleFault or (>= ExceptionVector.InvalidTss and <= ExceptionVector.PageFault)
            or ExceptionVector.AlignmentCheck or ExceptionVector.ControlProtection;
}

/// <summary>Page-fault error code bits (Intel SDM volume 3, 4.7).</summary>
[Flags]
public enum PageFaultError : uint
{
    None = 0,
    Present = 1 << 0,
    Write = 1 << 1,
    User = 1 << 2,
    ReservedBit = 1 << 3,
    InstructionFetch = 1 << 4,
}

/// <summary>Xen's flat selectors at CPL 3 (xen/arch-x86/xen-x86_64.h).</summary>
public static class FlatSelectors
{
    public const ushort Ring3Cs32 = 0xe023;
    public const ushort Ring3Data = 0xe02b;
    public const ushort Ring3Cs64 = 0xe033;

    /// <summary>A null selector at CPL 3, the CS of code that came by SYSENTER.</summary>
    public const ushort NullRing3 = 3;

    /// <summary>The CS that a 64-bit guest kernel sees in a bounce frame: <see cref="Ring3Cs64"/> with its RPL cleared.</summary>
    public const ushort KernelCs64 = 0xe030;
}
