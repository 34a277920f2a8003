// Xen's public structures as guests lay them out in memory (xen/xen.h, xen/vcpu.h, xen/arch-x86/xen.h), 64-bit form.
using System.Runtime.InteropServices;

namespace XenSharp.Core;

/// <summary>struct vcpu_time_info: one vCPU's clock, under the version protocol (odd while it is being changed).</summary>
[StructLayout(LayoutKind.Explicit, Size = 32)]
public struct VcpuTimeInfo
{
    [FieldOffset(0)] public uint Version;

    /// <summary>TSC at the moment that <see cref="SystemTime"/> describes.</summary>
    [FieldOffset(8)] public ulong TscTimestamp;

    /// <summary>Nanoseconds since the domain's boot.</summary>
    [FieldOffset(16)] public ulong SystemTime;

    /// <summary>Nanoseconds a (shifted) TSC tick, as a 32-bit binary fraction.</summary>
    [FieldOffset(24)] public uint TscToSystemMul;

    /// <summary>Shift applied to a TSC difference before the multiplication; left if positive.</summary>
    [FieldOffset(28)] public sbyte TscShift;

    /// <summary>XEN_PVCLOCK_TSC_STABLE_BIT (1), XEN_PVCLOCK_GUEST_STOPPED (2).</summary>
    [FieldOffset(29)] public byte Flags;
}

/// <summary>struct vcpu_info: what a vCPU shares with the hypervisor; in shared_info or where the guest registered it.</summary>
[StructLayout(LayoutKind.Explicit, Size = 64)]
public struct VcpuInfo
{
    [FieldOffset(0)] public byte EvtchnUpcallPending;
    [FieldOffset(1)] public byte EvtchnUpcallMask;
    [FieldOffset(8)] public ulong EvtchnPendingSel;

    /// <summary>arch.cr2: the faulting address of the last #PF.</summary>
    [FieldOffset(16)] public ulong Cr2;
    [FieldOffset(32)] public VcpuTimeInfo Time;
}

/// <summary>Offsets in struct shared_info, one page.</summary>
public static class SharedInfoLayout
{
    /// <summary>vCPUs that have a vcpu_info here (XEN_LEGACY_MAX_VCPUS).</summary>
    public const int LegacyVcpus = 32;
    public const int EvtchnPending = 2048;
    public const int EvtchnMask = 2560;
    public const int WallClockVersion = 3072;
    public const int WallClockSeconds = 3076;
    public const int WallClockNanoseconds = 3080;

    /// <summary>High half of the seconds, in what is padding on 64-bit.</summary>
    public const int WallClockSecondsHigh = 3084;
    public const int MaxPfn = 3088;
    public const int FrameListList = 3096;
    public const int NmiReason = 3104;

    /// <summary>The root of the tables that map the guest's p2m list, as a value of CR3; 0 where it has none (arch.p2m_cr3).</summary>
    public const int P2MCr3 = 3112;

    /// <summary>Where the list is under that root (arch.p2m_vaddr).</summary>
    public const int P2MAddress = 3120;
}

/// <summary>struct trap_info: one entry of a trap table.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct TrapInfo
{
    public byte Vector;

    /// <summary>Bits 0–1: DPL that <c>int n</c> needs; bit 2: mask events on entry.</summary>
    public byte Flags;
    public ushort Cs;
    private uint _padding;
    public ulong Address;

    public readonly int PrivilegeLevel => Flags & 3;

    public readonly bool MasksEvents => (Flags & 4) != 0;
}

/// <summary>struct start_info.</summary>
[StructLayout(LayoutKind.Explicit, Size = 1168)]
public unsafe struct StartInfo
{
    public const int CommandLineSize = 1024;

    [FieldOffset(0)] public fixed byte Magic[32];
    [FieldOffset(32)] public ulong PageCount;

    /// <summary>Machine address of shared_info.</summary>
    [FieldOffset(40)] public ulong SharedInfo;

    /// <summary>SIF_* bits.</summary>
    [FieldOffset(48)] public uint Flags;
    [FieldOffset(56)] public ulong StoreMfn;
    [FieldOffset(64)] public uint StoreEventChannel;
    [FieldOffset(72)] public ulong ConsoleMfn;
    [FieldOffset(80)] public uint ConsoleEventChannel;

    /// <summary>Virtual address of the L4.</summary>
    [FieldOffset(88)] public ulong PageTableBase;
    [FieldOffset(96)] public ulong PageTableFrames;

    /// <summary>Virtual address of the p2m list.</summary>
    [FieldOffset(104)] public ulong MfnList;

    /// <summary>Virtual address of the ramdisk, or its pfn with SIF_MOD_START_PFN.</summary>
    [FieldOffset(112)] public ulong ModuleStart;
    [FieldOffset(120)] public ulong ModuleLength;
    [FieldOffset(128)] public fixed byte CommandLine[CommandLineSize];

    /// <summary>First pfn of the p2m list where it is mapped outside the kernel's range.</summary>
    [FieldOffset(1152)] public ulong FirstP2MPfn;
    [FieldOffset(1160)] public ulong P2MFrames;
}

/// <summary>struct vcpu_runstate_info.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct VcpuRunstateInfo
{
    /// <summary>RUNSTATE_*: 0 running, 1 runnable, 2 blocked, 3 offline.</summary>
    public int State;
    private int _padding;

    /// <summary>System time of the last change; bit 63 (XEN_RUNSTATE_UPDATE) while being updated, where the guest asked for it.</summary>
    public ulong StateEntryTime;

    /// <summary>Nanoseconds spent in each state.</summary>
    public RunstateTimes Time;
}

/// <summary>Nanoseconds by runstate.</summary>
[System.Runtime.CompilerServices.InlineArray(4)]
public struct RunstateTimes
{
    private ulong _element;
}

/// <summary>struct e820entry: a range of a memory map.</summary>
[StructLayout(LayoutKind.Sequential, Pack = 1)]
public struct E820Entry
{
    /// <summary>Most entries of a domain's map (E820MAX).</summary>
    public const int MaxEntries = 1024;

    /// <summary>Ordinary memory, as a type.</summary>
    public const uint Ram = 1;

    public ulong Address;
    public ulong Size;
    public uint Type;
}
