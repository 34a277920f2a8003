// How the parts above Kvm meet a virtual machine: one VM per domain, one virtual CPU per guest vCPU.
namespace XenSharp.Core;

/// <summary>Why <see cref="IVirtualCpu.Run"/> came back.</summary>
public enum VcpuExitKind
{
    /// <summary>The guest executed SYSCALL. RIP is the instruction after it and RFLAGS the flags before it.</summary>
    Syscall,

    /// <summary>An exception at CPL 3; RIP, RSP and RFLAGS are as the processor pushed them.</summary>
    Exception,

    /// <summary>A kick arrived, or the entry was refused because one was pending.</summary>
    Kicked,

    /// <summary>The guest executed an I/O instruction that the VM let through; RIP is still on it.</summary>
    GuestIo,

    /// <summary>The VM cannot go on: <see cref="VcpuExit.Failure"/> says why. The domain has to be crashed.</summary>
    Failed,
}

/// <summary>One return from the guest.</summary>
/// <param name="Kind">What happened.</param>
/// <param name="Vector">For an exception, its vector.</param>
/// <param name="ErrorCode">For an exception that pushes one, the error code; else 0.</param>
/// <param name="Failure">For a failure, a sentence for the crash report.</param>
public readonly record struct VcpuExit(
    VcpuExitKind Kind, ExceptionVector Vector = 0, uint ErrorCode = 0, string? Failure = null);

/// <summary>
/// One virtual processor. All members but <see cref="Kick"/> belong to the one thread that first called <see cref="Run"/>.
/// </summary>
public unsafe interface IVirtualCpu : IDisposable
{
    /// <summary>General-purpose registers: valid after an exit, taken over at the next entry.</summary>
    CpuRegisters* Registers { get; }

    /// <summary>Segment state: valid after an exit, taken over at the next entry.</summary>
    SegmentRegisters* Segments { get; }

    /// <summary>CR2 after a page fault.</summary>
    VirtualAddress FaultAddress { get; }

    /// <summary>
    /// The L4 frame that the next entry runs on; after an exit the one that it ran on last, which may be the other one of those that
    /// <see cref="Core.EntryService.ModeSwitch"/> is about.
    /// </summary>
    Mfn PageTableRoot { get; set; }

    /// <summary>Page-table entries that must be stored again from inside the VM before the guest runs on.</summary>
    PageTableWriteQueue* PageTableWrites { get; }

    /// <summary>Where the guest's descriptor tables are mapped for this processor.</summary>
    DescriptorWindow DescriptorWindow { get; }

    /// <summary>
    /// Descriptors of the local table, 0 for none: the next entry runs with a table of that size at <see cref="DescriptorWindow.Ldt"/>.
    /// </summary>
    uint LdtEntries { get; set; }

    /// <summary>
    /// A guest that reads a segment register may see a null selector although the segment is loaded: the processor's table is not the
    /// guest's.
    /// </summary>
    bool ReadsSelectorsAsNull { get; }

    /// <summary>Not 0 once <see cref="Kick"/> was called, until <see cref="Run"/> or <see cref="WaitForKick"/> took note of it.</summary>
    int* KickPending { get; }

    /// <summary>Reads the host's time-stamp counter, which paces long operations; null where they need no pacing.</summary>
    delegate* unmanaged[SuppressGCTransition]<ulong> ReadTimeStampCounter { get; }

    /// <summary>What the processor's SYSCALL entry serves inside the VM; null where it serves nothing.</summary>
    EntryService* EntryService => null;

    /// <summary>What the SYSCALL entry has served since this was last looked at; null where it serves nothing.</summary>
    EntryReport* EntryReport => null;

    /// <summary>Shows vcpu_info to the SYSCALL entry, which needs it for what it serves.</summary>
    /// <param name="frame">The frame of <see cref="IVirtualMachine.Memory"/> that it lies in, which stays the guest's and writable.</param>
    /// <param name="offset">Where in the frame, in bytes.</param>
    void ShowVcpuInfo(Mfn frame, int offset)
    {
    }

    /// <summary>CR0.TS: the next FPU instruction raises #NM.</summary>
    void SetTaskSwitched(bool value);

    /// <summary>CR4.TSD: RDTSC raises #GP at CPL 3.</summary>
    void SetTimeStampDisable(bool value);

    /// <summary>CR4.FSGSBASE: RDFSBASE and its kin are not #UD. Only where the host has them; off at first.</summary>
    void SetFsgsbase(bool value);

    /// <summary>Loads XCR0; the value was checked against what the host offers.</summary>
    void SetXcr0(ulong value);

    /// <summary>Loads the x87 and SSE state, before the first <see cref="Run"/>.</summary>
    /// <param name="image">512 bytes as FXSAVE writes them in 64-bit mode (Intel SDM volume 1, 10.5.1).</param>
    void SetFpu(ReadOnlySpan<byte> image);

    /// <summary>Reads the extended state. For a thread that is not the processor's own, while that one is at rest or has ended.</summary>
    /// <param name="area">
    /// <see cref="ExtendedState.Size"/> bytes: an XSAVE area of the standard form (Intel SDM volume 1, 13.4), without what the processor does
    /// not have. Its header says which components it holds; the x87 and SSE state is there on every host.
    /// </param>
    void GetExtendedState(Span<byte> area);

    /// <summary>Loads the extended state, before the first <see cref="Run"/>.</summary>
    /// <param name="area">As <see cref="GetExtendedState"/> gives it. Its header was checked against what the host offers.</param>
    /// <returns>False where the processor refuses it; all is as it was.</returns>
    bool TrySetExtendedState(ReadOnlySpan<byte> area);

    /// <summary>Loads the debug registers 0–3, 6 and 7.</summary>
    void SetDebugRegisters(ReadOnlySpan<ulong> values);

    /// <summary>DR6 as the processor left it after a debug exception; sets it back to what it is without any.</summary>
    ulong TakeDebugStatus();

    /// <summary>Enters the guest until something has to be decided above.</summary>
    VcpuExit Run();

    /// <summary>
    /// Makes what is queued in <see cref="PageTableWrites"/> seen without entering the guest, which costs all that KVM made from the
    /// tables: for a processor that will not enter for a while.
    /// </summary>
    void Settle();

    /// <summary>
    /// Sleeps until <see cref="Kick"/> is called or <paramref name="deadline"/> passes, for which it may use the timer of
    /// <see cref="SetWakeTimer"/>, to be set anew afterwards.
    /// </summary>
    /// <param name="deadline">CLOCK_MONOTONIC nanoseconds; <see cref="long.MaxValue"/> for none.</param>
    void WaitForKick(long deadline);

    /// <summary>Arms the one-shot timer that kicks this processor out of the guest.</summary>
    /// <param name="deadline">CLOCK_MONOTONIC nanoseconds; <see cref="long.MaxValue"/> disarms it.</param>
    void SetWakeTimer(long deadline);

    /// <summary>
    /// Makes the current or the next <see cref="Run"/> return with <see cref="VcpuExitKind.Kicked"/>, or wakes
    /// <see cref="WaitForKick"/>. Any thread, any time; never lost.
    /// </summary>
    void Kick();
}

/// <summary>The VM around one domain: its machine memory and its virtual processors.</summary>
public unsafe interface IVirtualMachine : IDisposable
{
    /// <summary>The domain's RAM.</summary>
    MachineMemory Memory { get; }

    /// <summary>
    /// Copies into <see cref="Memory"/>, for much that is not looked at soon: pages that it is the first to store into need not be mapped here
    /// for it.
    /// </summary>
    /// <param name="address">Where to; within the memory, with all that is copied.</param>
    /// <param name="bytes">What to copy.</param>
    unsafe void Load(MachineAddress address, ReadOnlySpan<byte> bytes)
        => bytes.CopyTo(new Span<byte>(Memory.Page(address.Frame) + (address.Value & Paging.PageOffsetMask), bytes.Length));

    /// <summary>Host view of the M2P table; entry i belongs to frame <c>Memory.FirstFrame + i</c>.</summary>
    ulong* MachineToPhys { get; }

    /// <summary>The frame that the M2P table starts in, outside <see cref="Memory"/>; those that follow are the table's too.</summary>
    Mfn MachineToPhysFrame { get; }

    /// <summary>Where the guest reads the M2P table: the address of the entry of machine frame 0.</summary>
    VirtualAddress MachineToPhysStart { get; }

    /// <summary>The 16 entries for L4 slots 256–271 of every guest L4.</summary>
    ReadOnlySpan<ulong> HypervisorSlots { get; }

    /// <summary>
    /// The L4 slot of <see cref="HypervisorSlots"/> that is for kernel mode alone: roots of user mode have <see cref="UserSlot"/> there. 0 for
    /// none.
    /// </summary>
    int KernelSlot => 0;

    /// <summary>The entry that roots of user mode have for <see cref="KernelSlot"/>.</summary>
    ulong UserSlot => 0;

    /// <summary>The time-stamp counter as the guest reads it.</summary>
    TimeStampCounter TimeStampCounter { get; }

    /// <summary>
    /// Gives the host the memory of frames back that nobody uses. They read as zeroes from then on, and take memory again when they
    /// are written to. Any thread.
    /// </summary>
    /// <param name="first">The first of them, in <see cref="Memory"/>.</param>
    /// <param name="count">How many neighbouring frames, at least 1.</param>
    void Discard(Mfn first, ulong count);

    /// <summary>
    /// How many neighbouring frames from one on take no memory of the host's: they read as zeroes, and would take some by being read. Any
    /// thread; only a look, where others may write to them.
    /// </summary>
    /// <param name="first">A frame of <see cref="Memory"/>.</param>
    /// <returns>0 where this one takes memory, or it is not known.</returns>
    ulong CountEmpty(Mfn first);

    /// <summary>
    /// Reserved frames behind which frames of other VMs can be shown, outside <see cref="Memory"/> and there from the start; of no size
    /// where there are none. Nobody can access one that shows nothing.
    /// </summary>
    MachineMemory Window { get; }

    /// <summary>Host view of the M2P entries of the frames of <see cref="Window"/>.</summary>
    ulong* WindowToPhys { get; }

    /// <summary>Shows a frame of another VM behind a frame of the window. Any thread.</summary>
    /// <param name="window">A frame of <see cref="Window"/>.</param>
    /// <param name="owner">A VM of the same kind, which is not being disposed; what is shown stays in memory after that.</param>
    /// <param name="frame">A frame of its <see cref="Memory"/>.</param>
    /// <param name="writable">Whether it can be written to.</param>
    /// <returns>False where the host has no room for it; then all is as it was.</returns>
    bool TryShow(Mfn window, IVirtualMachine owner, Mfn frame, bool writable);

    /// <summary>What is shown there can be written to no more, whatever this VM's processors remember. Any thread.</summary>
    /// <returns>False where the host has no room for it; then all is as it was.</returns>
    bool TryProtect(Mfn window);

    /// <summary>Shows nothing there any more, whatever this VM's processors remember. Any thread.</summary>
    void Hide(Mfn window);

    /// <summary>
    /// Makes the VM forget all that it derived from page tables in <see cref="Memory"/>, so that it sees what others than its processors
    /// wrote since; from then on its processors store nothing there again that others may have changed. Any thread; it costs the VM time.
    /// </summary>
    void ForgetTables();

    /// <summary>Keeps <see cref="Memory"/> in place, past the end of the VM too, until what this returns is disposed.</summary>
    IDisposable HoldMemory();

    /// <summary>Creates a virtual processor. Its number is 0-based and may be used once.</summary>
    IVirtualCpu CreateVcpu(int number);
}

/// <summary>The XSAVE area as <see cref="IVirtualCpu"/> exchanges it.</summary>
public static class ExtendedState
{
    /// <summary>Bytes: more than any component ends at that a guest can have.</summary>
    public const int Size = 4096;
}

/// <summary>The guest-visible TSC.</summary>
/// <param name="KiloHertz">Its frequency.</param>
/// <param name="Offset">What has to be added to the host's RDTSC to get the guest's.</param>
public readonly record struct TimeStampCounter(uint KiloHertz, long Offset);
