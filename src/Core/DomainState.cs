// The state that hypercalls work on. Blittable, in unmanaged memory, no managed reference: the hot half of the ABI is to be
// compiled a second time without a runtime and run inside the VM on the same bytes.
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace XenSharp.Core;

/// <summary>A domain's identity in the ABI.</summary>
public readonly record struct DomainId(ushort Value)
{
    /// <summary>DOMID_SELF.</summary>
    public static readonly DomainId Self = new(0x7ff0);

    /// <summary>DOMID_IO.</summary>
    public static readonly DomainId Io = new(0x7ff1);

    /// <summary>DOMID_XEN.</summary>
    public static readonly DomainId Xen = new(0x7ff2);

    /// <summary>First id that is not an ordinary domain's (DOMID_FIRST_RESERVED).</summary>
    public const ushort FirstReserved = 0x7ff0;
}

/// <summary>VMASST_TYPE_* bits of <see cref="DomainState.VmAssists"/>.</summary>
[Flags]
public enum VmAssist : ulong
{
    FourGigabyteSegments = 1 << 0,
    FourGigabyteSegmentsNotify = 1 << 1,
    WritablePageTables = 1 << 2,
    PaeExtendedCr3 = 1 << 3,
    ArchitecturalIopl = 1 << 4,
    RunstateUpdateFlag = 1 << 5,
    M2PStrict = 1UL << 32,
}

/// <summary>What all vCPUs of a domain share.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct DomainState
{
    /// <summary>The domain's own id.</summary>
    public ushort Id;

    /// <summary>vCPUs that exist.</summary>
    public int VcpuCount;

    /// <summary>vCPUs that were ever up (<see cref="VcpuState.Started"/>): with one, nobody else can have cached anything.</summary>
    public int StartedVcpus;

    /// <summary>Frames that the domain owns (tot_pages).</summary>
    public ulong OwnedPages;

    /// <summary>Frames that it may own (max_pages).</summary>
    public ulong MaxPages;

    /// <summary>Assists that are on.</summary>
    public ulong VmAssists;

    /// <summary>Entries of <see cref="DomainContext.MemoryMap"/>; 0 when there is no map.</summary>
    public uint MemoryMapEntries;

    /// <summary>Machine frame of shared_info.</summary>
    public ulong SharedInfoFrame;

    public readonly bool Has(VmAssist assist) => (VmAssists & (ulong)assist) != 0;
}

/// <summary>VGCF_* bits that callbacks set.</summary>
[Flags]
public enum CallbackFlags : uint
{
    None = 0,
    FailsafeDisablesEvents = 1 << 0,
    SyscallDisablesEvents = 1 << 1,
    Syscall32DisablesEvents = 1 << 2,
    SysenterDisablesEvents = 1 << 3,
}

/// <summary>One vCPU's state beyond its registers: the "per-vCPU page".</summary>
[StructLayout(LayoutKind.Sequential)]
public struct VcpuState
{
    public int Id;

    /// <summary>1 from the first time on that the vCPU is up.</summary>
    public int Started;

    /// <summary>1 in guest-kernel mode, 0 in guest-user mode (TF_kernel_mode). Not derived from CS: only this is believed.</summary>
    public int KernelMode;

    /// <summary>L4 frame of kernel mode (guest_table); 0 for none.</summary>
    public ulong KernelRoot;

    /// <summary>L4 frame of user mode (guest_table_user); 0 for none.</summary>
    public ulong UserRoot;

    /// <summary>A page table that an operation has dropped and not yet taken apart (old_guest_table); 0 for none.</summary>
    public ulong DeferredTable;

    /// <summary>RSP of the kernel on entry from user mode.</summary>
    public ulong KernelSp;

    /// <summary>SS that goes with it.</summary>
    public ulong KernelSs;

    /// <summary>The GS base that SWAPGS would bring in: the kernel's in user mode, the user's in kernel mode.</summary>
    public ulong InactiveGsBase;

    public ulong EventCallback;
    public ulong FailsafeCallback;
    public ulong SyscallCallback;
    public ulong Syscall32Callback;
    public ulong SysenterCallback;
    public CallbackFlags CallbackFlags;

    /// <summary>The virtual IOPL, in RFLAGS position.</summary>
    public ulong Iopl;

    /// <summary>Guest address and length in bits of the I/O permission bitmap (PHYSDEVOP_set_iobitmap).</summary>
    public ulong IoBitmap;
    public uint IoBitmapPorts;

    /// <summary>Virtual address and entries of the LDT, as MMUEXT_SET_LDT said.</summary>
    public ulong LdtBase;
    public uint LdtEntries;

    /// <summary>Descriptors in the GDT, at most 14 × 512.</summary>
    public uint GdtEntries;
    public GdtFrameArray GdtFrames;

    /// <summary>1 where the guest may have read null for a selector that is loaded (ReadsSelectorsAsNull of the virtual CPU).</summary>
    public int SelectorsReadNull;

    /// <summary>CR0.TS: the next FPU instruction raises #NM.</summary>
    public int TaskSwitched;

    /// <summary>
    /// The address of the last page fault, or what was written to CR2. vcpu_info has a copy, which is the guest's to change.
    /// </summary>
    public ulong Cr2;

    /// <summary>Guest's view of CR4, DR0–DR7 and XCR0.</summary>
    public ulong Cr4;
    public DebugRegisterArray DebugRegisters;
    public ulong Xcr0;

    /// <summary>An NMI waits to be delivered.</summary>
    public int NmiPending;

    /// <summary>1 while an NMI is being handled: cleared by iret.</summary>
    public int NmiMasked;

    /// <summary>Where vcpu_info lies: machine frame and byte offset.</summary>
    public ulong VcpuInfoFrame;
    public int VcpuInfoOffset;

    public TrapTable Traps;

    [InlineArray(14)]
    public struct GdtFrameArray
    {
        private ulong _element;
    }

    [InlineArray(8)]
    public struct DebugRegisterArray
    {
        private ulong _element;
    }

    [InlineArray(256)]
    public struct TrapTable
    {
        private TrapInfo _element;
    }
}

/// <summary>
/// Where a vCPU's state lies for code that runs here. The same state has other addresses inside the VM; this holds nothing
/// but addresses.
/// </summary>
public unsafe struct VcpuContext
{
    public DomainContext* Domain;
    public VcpuState* State;
    public CpuRegisters* Registers;
    public SegmentRegisters* Segments;
    public PageTableWriteQueue* PageTableWrites;

    /// <summary>Host view of vcpu_info. Guest-writable: read once, believe nothing.</summary>
    public VcpuInfo* Info;

    /// <summary>The window in which the GDT and the LDT are mapped.</summary>
    public DescriptorWindow DescriptorWindow;

    /// <summary>Not 0 when a kick has arrived: long operations stop for it.</summary>
    public int* KickPending;

    /// <summary>Makes this vCPU leave the guest (<see cref="IVirtualCpu.Kick"/>); any thread.</summary>
    public delegate*<VcpuContext*, void> Kick;

    /// <summary>What <see cref="Kick"/> finds the vCPU by.</summary>
    public nint Owner;

    /// <summary>
    /// Not 0 while the manager copies to or from memory that it found by walking this vCPU's tables: what it found must not become
    /// something else meanwhile. Kept only where there are several vCPUs.
    /// </summary>
    public int Accessing;

    /// <summary>What the operation under way may still take.</summary>
    public PreemptionBudget Budget;

    /// <summary>Set by an operation that wants to be continued: see <see cref="Continuation"/>.</summary>
    public ContinuationState Continuation;

    /// <summary>The L4 frame that the current mode runs on.</summary>
    public readonly ulong CurrentRoot => State->KernelMode != 0 ? State->KernelRoot : State->UserRoot;

    /// <summary>An upcall is due: vcpu_info says pending and not masked.</summary>
    public readonly bool UpcallDue
    {
        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        get => Volatile.Read(ref Info->EvtchnUpcallPending) != 0 && Volatile.Read(ref Info->EvtchnUpcallMask) == 0;
    }

    /// <summary>True where a long operation must stop between two elements (hypercall_preempt_check).</summary>
    public bool PreemptionDue => IsInterrupted || Budget.IsSpent();

    /// <summary>The part of <see cref="PreemptionDue"/> that comes from outside, and for which no clock has to be read.</summary>
    public bool IsInterrupted => Volatile.Read(ref *KickPending) != 0 || UpcallDue;
}

/// <summary>The machine's RAM: a range in which each domain has frames of its own.</summary>
public struct MachineFrames
{
    /// <summary>Number of the first frame.</summary>
    public ulong First;

    /// <summary>One past the last that a domain has, or had.</summary>
    public ulong End;

    public readonly bool Contains(Mfn frame) => frame.Value >= First && frame.Value < Volatile.Read(in End);
}

/// <summary>Where a domain's state lies for code that runs here.</summary>
public unsafe struct DomainContext
{
    public DomainState* State;

    /// <summary>The vCPUs, of which <see cref="DomainState.VcpuCount"/> exist.</summary>
    public VcpuContext* Vcpus;
    public MachineMemory Memory;

    /// <summary>M2P entry of <c>Memory.FirstFrame</c>.</summary>
    public ulong* MachineToPhys;

    /// <summary>The frame that holds <see cref="MachineToPhys"/>, outside <see cref="Memory"/>; the rest of the table follows.</summary>
    public Mfn MachineToPhysFrame;

    /// <summary>Where the guest reads the M2P table (address of machine frame 0's entry).</summary>
    public VirtualAddress MachineToPhysStart;

    /// <summary>The frame table; its type belongs to Mmu.</summary>
    public void* Frames;

    /// <summary>Frames behind which those of other domains are mapped (<see cref="IVirtualMachine.Window"/>).</summary>
    public MachineMemory Window;

    /// <summary>M2P entry of <c>Window.FirstFrame</c>.</summary>
    public ulong* WindowToPhys;

    /// <summary>A word for each frame of <see cref="Window"/> with what maps it; its layout belongs to Mmu.</summary>
    public ulong* WindowUses;

    /// <summary>One bit for each frame of <see cref="Window"/> that is mapped less than before, for whoever shows and hides them.</summary>
    public ulong* WindowReleases;

    /// <summary>Not 0 when a bit was set in <see cref="WindowReleases"/>.</summary>
    public int WindowReleased;

    /// <summary>
    /// One bit a frame that was ever used as a page table, or null where KVM walks the guest's tables itself. KVM may still
    /// hold a shadow of such a frame, and then sees only stores that are repeated inside the VM.
    /// </summary>
    public ulong* ShadowedFrames;

    /// <summary>The 16 entries for the reserved L4 slots.</summary>
    public ulong* HypervisorSlots;

    /// <summary>The one of the reserved L4 slots that only kernel mode's roots show (<see cref="IVirtualMachine.KernelSlot"/>); 0 for none.</summary>
    public int KernelSlot;

    /// <summary>The entry that user mode's roots have for it (<see cref="IVirtualMachine.UserSlot"/>).</summary>
    public ulong UserSlot;

    /// <summary>One bit a domain that there is beside this one, up to <see cref="DomainId.FirstReserved"/>; null where there can be none.</summary>
    public ulong* KnownDomains;

    /// <summary>The machine frames that domains have, this one and others; null where there can be no others.</summary>
    public MachineFrames* MachineFrames;
    public byte* SharedInfo;

    /// <summary>The pseudo-physical memory map, with room for <see cref="E820Entry.MaxEntries"/>.</summary>
    public E820Entry* MemoryMap;

    /// <summary>Host address of what the guest may have mapped: a frame of its memory, or another domain's; null for anything else.</summary>
    public readonly byte* PageOf(Mfn frame)
        => Memory.Contains(frame) ? Memory.Page(frame) : Window.Contains(frame) ? Window.Page(frame) : null;

    /// <summary>Whether KVM may hold a shadow of the frame, made when it was a page table.</summary>
    public readonly bool MayBeShadowed(Mfn frame)
    {
        ulong index = Memory.IndexOf(frame);
        return ShadowedFrames != null && (Volatile.Read(ref ShadowedFrames[index / 64]) & (1UL << (int)(index % 64))) != 0;
    }

    /// <summary>Notes that the frame is used as a page table.</summary>
    public readonly void MarkShadowed(Mfn frame)
    {
        ulong index = Memory.IndexOf(frame);
        if (ShadowedFrames != null)
            _ = Interlocked.Or(ref ShadowedFrames[index / 64], 1UL << (int)(index % 64));
    }

    /// <summary>Notes that KVM has forgotten about the frame, which is in use as something else than a page table.</summary>
    public readonly void ClearShadowed(Mfn frame)
    {
        ulong index = Memory.IndexOf(frame);
        if (ShadowedFrames != null)
            _ = Interlocked.And(ref ShadowedFrames[index / 64], ~(1UL << (int)(index % 64)));
    }
}
