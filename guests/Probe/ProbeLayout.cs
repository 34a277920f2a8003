// Where everything of the probe guest lies: known before its script is written, so that scripts can name addresses.
using XenSharp.Guests.Assembly;

namespace XenSharp.Guests.Probe;

/// <summary>
/// The probe's address space. Its variables, the script's buffers and the script come first; from <see cref="ScratchBase"/> on lies
/// memory that is not in the file: scratch pages, one region a vCPU, the L4 of user mode; the interpreter's code comes last.
/// </summary>
public static class ProbeLayout
{
    public const int PageSize = 4096;

    /// <summary>Address of the first scratch page: the first that its L1 maps, so that all scratch pages share one L1.</summary>
    public const ulong ScratchBase = PvAssembler.VirtBase + 0x200000;

    /// <summary>Scratch pages that a script can take.</summary>
    public const int ScratchPages = 256;

    /// <summary>vCPUs that can run a script.</summary>
    public const int MaxVcpus = 4;

    internal const int RegionShift = 15;

    /// <summary>Bytes of the region of a vCPU, and its alignment, by which an exception handler finds it from its stack pointer.</summary>
    public const int RegionSize = 1 << RegionShift;

    /// <summary>Page that becomes the L4 of user mode: the same image at the same addresses.</summary>
    public const ulong UserRootPage = ScratchBase + (ulong)ScratchPages * PageSize;

    /// <summary>A page of stack for user mode.</summary>
    public const ulong UserStackPage = UserRootPage + PageSize;

    /// <summary>Where user code starts with its stack pointer.</summary>
    public const ulong UserStackTop = UserStackPage + PageSize - 64;

    /// <summary>Page at which shared_info is mapped.</summary>
    public const ulong SharedInfoPage = UserStackPage + PageSize;

    /// <summary>
    /// Page of a pair's first domain that both have at this address: a word that says whose turn it is, then places for values that the one
    /// finds out and the other uses.
    /// </summary>
    public const ulong PairPage = SharedInfoPage + PageSize;

    /// <summary>Page at which the first domain of a pair has its grant table while it shares that page.</summary>
    public const ulong GrantTablePage = PairPage + PageSize;

    /// <summary>Values that each domain of a pair can leave for the other.</summary>
    internal const int Notes = 255;

    /// <summary>First region; vCPU n has the nth.</summary>
    public const ulong Regions = (GrantTablePage + PageSize + RegionSize - 1) & ~(ulong)(RegionSize - 1);

    /// <summary>First byte behind all that is not in the file.</summary>
    public const ulong End = Regions + (ulong)MaxVcpus * RegionSize;

    /// <summary>Where a domain of a pair leaves values for the other, 8 bytes each.</summary>
    internal static ulong NotesOf(bool second) => PairPage + 8 + (second ? Notes * 8UL : 0);

    /// <summary>Region of a vCPU.</summary>
    public static ulong Region(int vcpu) => Regions + (ulong)vcpu * RegionSize;

    // In a region, from its start: the context, the line that is being written, the interpreter's stack, the stack for entries from user mode.

    /// <summary>Address of the step that comes next.</summary>
    internal const int Next = 0x00;

    /// <summary>Stack pointer to go on with after an exception.</summary>
    internal const int GuardStack = 0x08;

    /// <summary>Nonzero while a step runs: an exception ends the step, and the script goes on.</summary>
    internal const int Guarded = 0x10;

    /// <summary>Where the next character of output goes.</summary>
    internal const int Output = 0x18;

    /// <summary>Exceptions of this step that are to be returned from.</summary>
    internal const int Resumes = 0x20;

    /// <summary>Exceptions logged in this step.</summary>
    internal const int ExceptionCount = 0x28;

    /// <summary>Upcalls taken since they were last printed.</summary>
    internal const int UpcallCount = 0x30;

    /// <summary>Where a run of user code ends: a SYSCALL that returns to this address.</summary>
    internal const int UserEnd = 0x38;

    /// <summary>Set when the vCPU's script is done.</summary>
    internal const int Finished = 0x40;

    /// <summary>Address of the vCPU's vcpu_info; scripts that move it store the new one here.</summary>
    internal const int VcpuInfo = 0x48;

    /// <summary>The header of the running step.</summary>
    internal const int Header = 0x50;

    /// <summary>Where the line of the running step starts.</summary>
    internal const int Line = 0x58;

    /// <summary>The set of registers that a run shows.</summary>
    internal const int Shown = 0x60;

    /// <summary>Sixteen registers, in the processor's order, that code is run with; then RFLAGS.</summary>
    internal const int RegistersIn = 0x80;

    /// <summary>The same after the run.</summary>
    internal const int RegistersOut = 0x110;

    /// <summary><see cref="MaxLogged"/> records of <see cref="ExceptionRecordSize"/> bytes.</summary>
    internal const int Exceptions = 0x200;

    internal const int ExceptionRecordSize = 0x50;

    /// <summary><see cref="MaxLogged"/> records of <see cref="UpcallRecordSize"/> bytes.</summary>
    internal const int Upcalls = 0x700;

    internal const int UpcallRecordSize = 0x18;

    /// <summary>Records that a log holds; what comes beyond is counted only.</summary>
    internal const int MaxLogged = 16;

    internal const int OutputBuffer = 0x1000;
    internal const int OutputBufferSize = 0x3000;
    internal const int InterpreterStackTop = 0x6000;
    internal const int EntryStackTop = 0x8000;

    /// <summary>Offset in a region of the pointer to the vCPU's vcpu_info, for scripts that register another.</summary>
    public static ulong VcpuInfoPointer(int vcpu) => Region(vcpu) + VcpuInfo;

    /// <summary>Top of the stack on which the kernel is entered from user mode.</summary>
    public static ulong EntryStack(int vcpu) => Region(vcpu) + EntryStackTop;

    /// <summary>Top of the stack that the interpreter runs on.</summary>
    public static ulong InterpreterStack(int vcpu) => Region(vcpu) + InterpreterStackTop;
}
