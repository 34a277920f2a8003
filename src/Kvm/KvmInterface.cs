// The part of Linux's KVM interface (linux/kvm.h, asm/kvm.h) that XenSharp uses: request numbers and structures.
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using XenSharp.Core;

namespace XenSharp.Kvm;

/// <summary>ioctl request numbers.</summary>
internal static class KvmRequest
{
    public const int GetApiVersion = 0xAE00;
    public const int CreateVm = 0xAE01;
    public const int CheckExtension = 0xAE03;
    public const int GetVcpuMmapSize = 0xAE04;
    public const int GetSupportedCpuid = unchecked((int)0xC008AE05);
    public const int CreateVcpu = 0xAE41;
    public const int SetNrMmuPages = 0xAE44;
    public const int SetUserMemoryRegion = 0x4020AE46;
    public const int SetTssAddress = 0xAE47;
    public const int SetIdentityMapAddress = 0x4008AE48;
    public const int Run = 0xAE80;
    public const int GetSregs = unchecked((int)0x8138AE83);
    public const int SetSregs = 0x4138AE84;
    public const int GetMsrs = unchecked((int)0xC008AE88);
    public const int SetMsrs = 0x4008AE89;
    public const int SetSignalMask = 0x4004AE8B;
    public const int SetCpuid2 = 0x4008AE90;
    public const int GetVcpuEvents = unchecked((int)0x8040AE9F);
    public const int Translate = unchecked((int)0xC018AE85);
    public const int SetVcpuEvents = 0x4040AEA0;
    public const int GetDebugRegs = unchecked((int)0x8080AEA1);
    public const int SetDebugRegs = 0x4080AEA2;
    public const int SetFpu = 0x41A0AE8D;
    public const int GetTscKhz = 0xAEA3;
    public const int GetXsave = unchecked((int)0x9000AEA4);
    public const int SetXsave = 0x5000AEA5;
    public const int SetXcrs = 0x4188AEA7;
    public const int SetDeviceAttribute = 0x4018AEE1;
}

/// <summary>KVM_CAP_* numbers.</summary>
internal enum KvmCapability
{
    UserMemory = 3,
    SyncRegs = 74,
    ImmediateExit = 136,
    MaxVcpus = 66,
}

/// <summary>KVM_EXIT_* reasons.</summary>
internal enum KvmExitReason : uint
{
    Unknown = 0,
    Exception = 1,
    Io = 2,
    Hypercall = 3,
    Debug = 4,
    Halt = 5,
    Mmio = 6,
    InterruptWindowOpen = 7,
    Shutdown = 8,
    FailEntry = 9,
    Interrupted = 10,
    InternalError = 17,
}

/// <summary>KVM_SYNC_X86_* bits of kvm_valid_regs and kvm_dirty_regs.</summary>
[Flags]
internal enum KvmSyncRegs : ulong
{
    None = 0,
    Regs = 1,
    Sregs = 2,
    Events = 4,
}

/// <summary>struct kvm_segment.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct KvmSegment
{
    public ulong Base;
    public uint Limit;
    public ushort Selector;
    public byte Type;
    public byte Present, Dpl, Db, S, L, G, Avl;
    public byte Unusable;
    public byte Padding;
}

/// <summary>struct kvm_dtable.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct KvmDescriptorTable
{
    public ulong Base;
    public ushort Limit;
    private ushort _padding0, _padding1, _padding2;
}

/// <summary>struct kvm_sregs.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct KvmSregs
{
    public KvmSegment Cs, Ds, Es, Fs, Gs, Ss;
    public KvmSegment Tr, Ldt;
    public KvmDescriptorTable Gdt, Idt;
    public ulong Cr0, Cr2, Cr3, Cr4, Cr8;
    public ulong Efer;
    public ulong ApicBase;
    public InterruptBitmap Interrupts;

    [InlineArray(4)]
    internal struct InterruptBitmap
    {
        private ulong _element;
    }
}

/// <summary>struct kvm_run as far as it is used; the union of exit data starts at 32 and is 256 bytes.</summary>
[StructLayout(LayoutKind.Explicit)]
internal struct KvmRun
{
    [FieldOffset(0)] public byte RequestInterruptWindow;
    [FieldOffset(1)] public byte ImmediateExit;
    [FieldOffset(8)] public KvmExitReason ExitReason;
    [FieldOffset(32)] public KvmIoExit Io;
    [FieldOffset(32)] public KvmMmioExit Mmio;
    [FieldOffset(32)] public ulong HardwareReason;
    [FieldOffset(32)] public KvmInternalErrorExit InternalError;
    [FieldOffset(288)] public KvmSyncRegs ValidRegs;
    [FieldOffset(296)] public KvmSyncRegs DirtyRegs;
    [FieldOffset(304)] public CpuRegisters Regs;
    [FieldOffset(448)] public KvmSregs Sregs;
    [FieldOffset(760)] public KvmVcpuEvents Events;
}

/// <summary>KVM_EXIT_IO.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct KvmIoExit
{
    /// <summary>0 in, 1 out.</summary>
    public byte Direction;

    /// <summary>Bytes an access.</summary>
    public byte Size;
    public ushort Port;
    public uint Count;
    public ulong DataOffset;
}

/// <summary>KVM_EXIT_MMIO.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct KvmMmioExit
{
    public ulong PhysicalAddress;
    public ulong Data;
    public uint Length;
    public byte IsWrite;
}

/// <summary>KVM_EXIT_INTERNAL_ERROR, with the instruction bytes of an emulation failure.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct KvmInternalErrorExit
{
    public uint Suberror;
    public uint DataCount;
    public ulong Flags;
    public byte InstructionSize;
    public InstructionBytes Instruction;

    [InlineArray(15)]
    internal struct InstructionBytes
    {
        private byte _element;
    }
}

/// <summary>struct kvm_userspace_memory_region.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct KvmUserMemoryRegion
{
    public uint Slot;
    public uint Flags;
    public ulong GuestPhysicalAddress;
    public ulong Size;
    public ulong UserspaceAddress;
}

/// <summary>struct kvm_translation.</summary>
[StructLayout(LayoutKind.Sequential, Size = 24)]
internal struct KvmTranslation
{
    public ulong LinearAddress;
    public ulong PhysicalAddress;
    public byte Valid;
}

/// <summary>struct kvm_msr_entry.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct KvmMsrEntry
{
    public uint Index;
    private uint _reserved;
    public ulong Data;
}

/// <summary>The head of struct kvm_vcpu_events (64 bytes): an exception that KVM has yet to deliver.</summary>
[StructLayout(LayoutKind.Explicit, Size = 64)]
internal struct KvmVcpuEvents
{
    [FieldOffset(0)] public byte ExceptionInjected;
    [FieldOffset(1)] public byte ExceptionVector;
    [FieldOffset(2)] public byte ExceptionHasErrorCode;
    [FieldOffset(3)] public byte ExceptionPending;

    /// <summary>Which of the further fields are to be taken over.</summary>
    [FieldOffset(24)] public uint Flags;
}

/// <summary>struct kvm_fpu.</summary>
[StructLayout(LayoutKind.Sequential)]
internal unsafe struct KvmFpu
{
    public fixed byte Registers[8 * 16];
    public ushort Control;
    public ushort Status;

    /// <summary>A bit a register that is in use, as FXSAVE abridges it.</summary>
    public byte Tags;
    private readonly byte _padding1;
    public ushort LastOpcode;
    public ulong LastInstruction;
    public ulong LastOperand;
    public fixed byte Xmm[16 * 16];
    public uint Mxcsr;
    private readonly uint _padding2;
}

/// <summary>struct kvm_debugregs.</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct KvmDebugRegs
{
    public ulong Db0, Db1, Db2, Db3;
    public ulong Dr6, Dr7;
    public ulong Flags;
    private Reserved _reserved;

    [InlineArray(9)]
    private struct Reserved
    {
        private ulong _element;
    }
}

/// <summary>struct kvm_device_attr; of a vCPU, group 0 attribute 0 is the offset of its time-stamp counter (KVM_VCPU_TSC_OFFSET).</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct KvmDeviceAttribute
{
    public uint Flags;
    public uint Group;
    public ulong Attribute;
    public ulong Address;
}

/// <summary>Model-specific registers that the VM's own set-up needs (Intel SDM volume 4).</summary>
internal static class Msr
{
    public const uint TimeStampCounter = 0x10;
    public const uint Star = 0xC000_0081;
    public const uint Lstar = 0xC000_0082;
    public const uint Cstar = 0xC000_0083;
    public const uint SfMask = 0xC000_0084;
    public const uint KernelGsBase = 0xC000_0102;
}
