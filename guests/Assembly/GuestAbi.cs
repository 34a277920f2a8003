// The numbers of Xen's public interface that assembled guests use, from the guest's side of it.
namespace XenSharp.Guests.Assembly;

// These are deliberately not XenSharp.Core's definitions: a guest that shared them with the manager would agree with it even
// where both were wrong.

/// <summary>Hypercall numbers (__HYPERVISOR_* of Xen's public xen.h).</summary>
public enum GuestHypercall : uint
{
    SetTrapTable = 0,
    MmuUpdate = 1,
    SetGdt = 2,
    StackSwitch = 3,
    SetCallbacks = 4,
    FpuTaskswitch = 5,
    SchedOpCompat = 6,
    PlatformOp = 7,
    SetDebugreg = 8,
    GetDebugreg = 9,
    UpdateDescriptor = 10,
    MemoryOp = 12,
    Multicall = 13,
    UpdateVaMapping = 14,
    SetTimerOp = 15,
    EventChannelOpCompat = 16,
    XenVersion = 17,
    ConsoleIo = 18,
    PhysdevOpCompat = 19,
    GrantTableOp = 20,
    VmAssist = 21,
    UpdateVaMappingOtherdomain = 22,
    Iret = 23,
    VcpuOp = 24,
    SetSegmentBase = 25,
    MmuextOp = 26,
    XsmOp = 27,
    NmiOp = 28,
    SchedOp = 29,
    CallbackOp = 30,
    EventChannelOp = 32,
    PhysdevOp = 33,
    HvmOp = 34,
    Sysctl = 35,
    Domctl = 36,
    KexecOp = 37,
    TmemOp = 38,
    ArgoOp = 39,
    XenpmuOp = 40,
    DmOp = 41,
    HypfsOp = 42,
    Mca = 48,
}

/// <summary>Types of the notes that Xen's domain builder reads (public elfnote.h); their owner is "Xen".</summary>
public enum XenElfNote : uint
{
    Entry = 1,
    HypercallPage = 2,
    VirtBase = 3,
    PaddrOffset = 4,
    XenVersion = 5,
    GuestOs = 6,
    GuestVersion = 7,
    Loader = 8,
    PaeMode = 9,
    Features = 10,
}

/// <summary>Reasons of SCHEDOP_shutdown (public sched.h).</summary>
public enum GuestShutdownReason : uint
{
    PowerOff = 0,
    Reboot = 1,
    Suspend = 2,
    Crash = 3,
    Watchdog = 4,
    SoftReset = 5,
}

/// <summary>Byte offsets into struct start_info of a 64-bit guest (public xen.h).</summary>
public static class StartInfoOffset
{
    public const int Magic = 0;
    public const int NrPages = 32;
    public const int SharedInfo = 40;
    public const int Flags = 48;
    public const int StoreMfn = 56;
    public const int StoreEvtchn = 64;
    public const int ConsoleMfn = 72;
    public const int ConsoleEvtchn = 80;
    public const int PtBase = 88;
    public const int NrPtFrames = 96;
    public const int MfnList = 104;
    public const int ModStart = 112;
    public const int ModLen = 120;
    public const int CmdLine = 128;
    public const int FirstP2mPfn = 1152;
    public const int NrP2mFrames = 1160;

    /// <summary>SIF_INITDOMAIN in flags: the initial domain, whose console is the hypervisor's and not a ring.</summary>
    public const int FlagInitDomain = 1 << 1;
}

/// <summary>Byte offsets into struct xencons_interface, the console ring page (public io/console.h).</summary>
public static class ConsoleRingOffset
{
    public const int In = 0;
    public const int Out = 1024;
    public const int InCons = 3072;
    public const int InProd = 3076;
    public const int OutCons = 3080;
    public const int OutProd = 3084;
    public const int InSize = 1024;
    public const int OutSize = 2048;
}

/// <summary>Byte offsets into struct shared_info of a 64-bit guest (public xen.h).</summary>
public static class SharedInfoOffset
{
    public const int VcpuInfo = 0;
    public const int VcpuInfoSize = 64;
    public const int EvtchnPending = 2048;
    public const int EvtchnMask = 2560;
}
