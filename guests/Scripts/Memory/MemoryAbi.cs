// The numbers of Xen's public interface, and of x86 page tables, that the scripts about memory use.
namespace XenSharp.Guests.Scripts.Memory;

/// <summary>Flags of a page-table entry (AMD64 manual volume 2, 5.4), as the guest writes them.</summary>
internal static class Pte
{
    public const ulong Present = 1 << 0;
    public const ulong Writable = 1 << 1;
    public const ulong User = 1 << 2;
    public const ulong WriteThrough = 1 << 3;
    public const ulong CacheDisable = 1 << 4;
    public const ulong Accessed = 1 << 5;
    public const ulong Dirty = 1 << 6;

    /// <summary>PSE above L1; the PAT bit in an L1 entry.</summary>
    public const ulong LargePage = 1 << 7;
    public const ulong Global = 1 << 8;
    public const ulong Available0 = 1 << 9;
    public const ulong Available2 = 1 << 11;

    /// <summary>The lowest software bit of the upper ones, with which Xen marks kernel entries.</summary>
    public const ulong GuestKernel = 1UL << 52;
    public const ulong AvailableHigh = 1UL << 58;
    public const ulong NoExecute = 1UL << 63;

    /// <summary>The frame number's bits.</summary>
    public const ulong Frame = 0x000f_ffff_ffff_f000;

    /// <summary>A readable and a writable entry that the processor needs not touch.</summary>
    public const ulong ReadOnly = Present | Accessed | Dirty;
    public const ulong ReadWrite = ReadOnly | Writable;

    /// <summary>An entry for a lower table.</summary>
    public const ulong Table = ReadWrite | User;
}

/// <summary>UVMF_* of update_va_mapping.</summary>
internal static class Uvmf
{
    public const ulong None = 0;
    public const ulong TlbFlush = 1;
    public const ulong Invlpg = 2;
    public const ulong Local = 0;
    public const ulong All = 4;
}

/// <summary>DOMID_*.</summary>
internal static class Domid
{
    public const ulong Self = 0x7ff0;
    public const ulong Io = 0x7ff1;
    public const ulong Xen = 0x7ff2;
    public const ulong Cow = 0x7ff3;
    public const ulong Invalid = 0x7ff4;
    public const ulong Idle = 0x7fff;

    /// <summary>A number that no domain of a test host has.</summary>
    public const ulong Absent = 0x7e00;
}

/// <summary>Commands in the low bits of a request's address (MMU_*).</summary>
internal static class MmuCommand
{
    public const ulong NormalPtUpdate = 0;
    public const ulong MachphysUpdate = 1;
    public const ulong PtUpdatePreserveAd = 2;
    public const ulong PtUpdateNoTranslate = 3;

    /// <summary>MMU_UPDATE_PREEMPTED, in a count.</summary>
    public const ulong Preempted = 1UL << 31;
}

/// <summary>MMUEXT_*.</summary>
internal static class Mmuext
{
    public const ulong PinL1Table = 0;
    public const ulong PinL2Table = 1;
    public const ulong PinL3Table = 2;
    public const ulong PinL4Table = 3;
    public const ulong UnpinTable = 4;
    public const ulong NewBaseptr = 5;
    public const ulong TlbFlushLocal = 6;
    public const ulong InvlpgLocal = 7;
    public const ulong TlbFlushMulti = 8;
    public const ulong InvlpgMulti = 9;
    public const ulong TlbFlushAll = 10;
    public const ulong InvlpgAll = 11;
    public const ulong FlushCache = 12;
    public const ulong SetLdt = 13;
    public const ulong NewUserBaseptr = 15;
    public const ulong ClearPage = 16;
    public const ulong CopyPage = 17;
    public const ulong FlushCacheGlobal = 18;
    public const ulong MarkSuper = 19;
    public const ulong UnmarkSuper = 20;
}

/// <summary>XENMEM_*.</summary>
internal static class Xenmem
{
    public const ulong IncreaseReservation = 0;
    public const ulong DecreaseReservation = 1;
    public const ulong MaximumRamPage = 2;
    public const ulong CurrentReservation = 3;
    public const ulong MaximumReservation = 4;
    public const ulong MachphysMfnList = 5;
    public const ulong PopulatePhysmap = 6;
    public const ulong AddToPhysmap = 7;
    public const ulong MemoryMap = 9;
    public const ulong MachineMemoryMap = 10;
    public const ulong Exchange = 11;
    public const ulong MachphysMapping = 12;
    public const ulong SetMemoryMap = 13;
    public const ulong MaximumGpfn = 14;
    public const ulong RemoveFromPhysmap = 15;
    public const ulong SetPodTarget = 16;
    public const ulong GetPodTarget = 17;
    public const ulong GetSharingFreedPages = 18;
    public const ulong GetSharingSharedPages = 19;
    public const ulong PagingOp = 20;
    public const ulong AccessOp = 21;
    public const ulong SharingOp = 22;
    public const ulong AddToPhysmapBatch = 23;
    public const ulong ClaimPages = 24;
    public const ulong MachphysCompatMfnList = 25;
    public const ulong GetVnumainfo = 26;
    public const ulong ReservedDeviceMemoryMap = 27;
    public const ulong AcquireResource = 28;

    /// <summary>Extents done by an earlier part of the call stand above the command.</summary>
    public const int ExtentShift = 6;

    /// <summary>XENMEMF_populate_on_demand, XENMEMF_exact_node_request.</summary>
    public const ulong PopulateOnDemand = 1 << 16;
    public const ulong ExactNodeRequest = 1 << 17;

    /// <summary>XENMEMF_node(0).</summary>
    public const ulong NodeZero = 1 << 8;
}

/// <summary>VMASST_CMD_* and VMASST_TYPE_*.</summary>
internal static class VmAssist
{
    public const ulong Enable = 0;
    public const ulong Disable = 1;
    public const ulong FourGigabyteSegments = 0;
    public const ulong FourGigabyteSegmentsNotify = 1;
    public const ulong WritablePagetables = 2;
    public const ulong PaeExtendedCr3 = 3;
    public const ulong ArchitecturalIopl = 4;
    public const ulong RunstateUpdateFlag = 5;
    public const ulong M2PStrict = 32;
}

/// <summary>Addresses that no operation may take, and frames that no domain owns.</summary>
internal static class Bad
{
    /// <summary>Below the sign-extended half, above the other.</summary>
    public const ulong NonCanonical = 0x8000_0000_0000_0000;

    /// <summary>First and last of the addresses that are the hypervisor's (HYPERVISOR_VIRT_START to _END).</summary>
    public const ulong HypervisorStart = 0xffff_8000_0000_0000;
    public const ulong HypervisorLast = 0xffff_87ff_ffff_ffff;

    /// <summary>Canonical, the guest's own, and mapped by nobody.</summary>
    public const ulong Unmapped = 0x0000_1234_5678_9000;

    /// <summary>A frame beyond all memory that an entry can still name.</summary>
    public const ulong Frame = 0x000f_ffff_fff0;

    /// <summary>A frame number with no place in an entry.</summary>
    public const ulong HugeFrame = 0x00ff_ffff_ffff_ffff;

    /// <summary>The frame number of all ones, as an entry can hold it.</summary>
    public const ulong InvalidFrame = Pte.Frame >> 12;
}
