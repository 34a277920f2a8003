// Where the monitor's pages lie, in the VM's physical space and in the L4 slots that Xen reserves.
using XenSharp.Core;

namespace XenSharp.Kvm;

/// <summary>Addresses of the monitor, the supervisor pages that XenSharp puts into every VM.</summary>
internal static class MonitorLayout
{
    /// <summary>Guest-physical start of the monitor's own memory, which also holds the M2P table.</summary>
    public const ulong RegionAddress = 0x10_0000;

    /// <summary>Lowest guest-physical start of a domain's RAM, and so its first machine frame: past every legacy hole.</summary>
    public const ulong RamAddress = 0x1_0000_0000;

    /// <summary>Three pages that VMX wants for real mode; no memory slot may cover them.</summary>
    public const ulong TssAddress = 0xfffb_d000;

    /// <summary>One page that VMX wants for real mode.</summary>
    public const ulong IdentityMapAddress = 0xfffb_c000;

    /// <summary>Two pages between which a memory slot is moved to and fro, see <see cref="KvmVirtualMachine.DropShadowPages"/>.</summary>
    public const ulong DropSlotAddress = IdentityMapAddress - (2 * Paging.PageSize);

    /// <summary>Guest-physical start of the window in which other domains' frames are shown.</summary>
    public const ulong WindowAddress = 0x8000_0000;

    /// <summary>Largest window: a frame for each of the mappings that Xen lets a domain have (256 in each of 1024 maptrack frames).</summary>
    public const ulong MaxWindow = 256 * 1024 * Paging.PageSize;

    /// <summary>Guest-physical end of all RAM: what <see cref="DirectMapStart"/>'s slot can show.</summary>
    public const ulong EndOfRam = Paging.SlotSize;

    /// <summary>The classic place of the M2P table, slot 256.</summary>
    public const ulong ClassicMachineToPhys = Paging.HypervisorVirtualStart;

    /// <summary>Slot 257: the M2P table where slot 256 cannot be used.</summary>
    public const ulong AlternativeMachineToPhys = Paging.HypervisorVirtualStart + Paging.SlotSize;

    /// <summary>Slot 258: the monitor's code, tables and stacks.</summary>
    public const ulong MonitorStart = Paging.HypervisorVirtualStart + (2 * Paging.SlotSize);

    /// <summary>Slot 259: all guest-physical memory, for the monitor's own stores.</summary>
    public const ulong DirectMapStart = Paging.HypervisorVirtualStart + (3 * Paging.SlotSize);

    /// <summary>Slot 260: a window for each vCPU's descriptor tables, the global one and then the local one.</summary>
    public const ulong DescriptorTablesStart = Paging.HypervisorVirtualStart + (4 * Paging.SlotSize);

    /// <summary>
    /// Slot 261, in which the roots of kernel mode and of user mode each show what is theirs, a few pages for each vCPU
    /// (<see cref="VcpuWindowPage"/>).
    /// </summary>
    public const ulong VcpuWindowsStart = Paging.HypervisorVirtualStart + (5 * Paging.SlotSize);

    /// <summary>Bytes of <see cref="VcpuWindowsStart"/>'s slot that belong to a vCPU.</summary>
    public const ulong VcpuWindowSize = ((ulong)VcpuWindowPage.Count) << Paging.PageShift;

    /// <summary>Pages of the global table in a window: 14 of the guest, then the reserved ones.</summary>
    public const int GdtWindowPages = DescriptorWindow.GdtPages;

    /// <summary>Pages of one window (GDT_LDT_VCPU_SHIFT).</summary>
    public const int DescriptorWindowPages = DescriptorWindow.GdtPages + DescriptorWindow.LdtPages;

    /// <summary>What SLDT shows while there is a local table (LDT_SELECTOR). Nothing has to stand there: LDTR is loaded without it.</summary>
    public const ushort LdtSelector = 0xe050;

    /// <summary>Index of the reserved page in a window (FIRST_RESERVED_GDT_PAGE).</summary>
    public const int ReservedGdtPage = 14;

    // Selectors in the reserved page, as xen/arch-x86/xen-x86_64.h and the STAR layout want them.
    public const ushort MonitorCs = 0xe008;
    public const ushort MonitorSs = 0xe010;

    /// <summary>Selector of vCPU 0's TSS descriptor; the following vCPUs are 16 bytes apart.</summary>
    public const ushort FirstTss = 0xe040;

    /// <summary>One port stands for SYSCALL; exceptions use the port of their vector's number.</summary>
    public const byte SyscallPort = 0xe0;

    /// <summary>Exception vectors that have a gate; <c>int n</c> past them raises #GP by the table's limit.</summary>
    public const int Vectors = 32;

    /// <summary>Bytes between two exception stubs, and between the two of SYSCALL.</summary>
    public const int StubSize = 4;

    /// <summary>Pages of a vCPU's return area: the chain of <see cref="MonitorCode"/>'s gadgets, ending in an IRET frame.</summary>
    public const int ReturnAreaPages = 16;

    public static ulong DirectMap(MachineAddress address) => DirectMapStart + address.Value;
}

/// <summary>The pages of a vCPU's window in slot 261, where its SYSCALL entry runs at CPL 3.</summary>
internal enum VcpuWindowPage
{
    /// <summary>The code of the SYSCALL entry: kernel mode's and user mode's are two pages.</summary>
    Entry,

    /// <summary>For kernel mode alone: <see cref="EntryReport"/>, and what <see cref="ModeSwitch"/> keeps.</summary>
    Report,

    /// <summary>For kernel mode alone: the page that vcpu_info lies in.</summary>
    VcpuInfo,

    /// <summary>How many there are.</summary>
    Count,
}
