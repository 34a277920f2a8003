// A domain on plain memory, as small as Mmu needs it.
using System.Runtime.InteropServices;
using XenSharp.Core;

namespace XenSharp.Mmu.Tests;

/// <summary>
/// Frames, a vCPU and its state, with a boot address space: L4, L3, L2 and L1 in frames 0–3, and four writable data pages in
/// frames 4–7 at <see cref="DataAddress"/>, where hypercall arguments are put. The other frames are the test's.
/// </summary>
internal sealed unsafe class TestMachine : IDisposable
{
    public const ulong FirstFrame = 0x1000;
    public const ushort Domain = 5;
    public const ulong DataAddress = 0x40_0000;
    public const int DataPages = 4;

    /// <summary>The L4 slot that only kernel mode's roots show.</summary>
    public const int KernelSlot = 265;

    /// <summary>What user mode's roots have there.</summary>
    public const ulong UserSlot = 0xabf007;
    public const ulong Invalid = ulong.MaxValue;

    /// <summary>Frames 0–7 are the boot address space.</summary>
    public const int FirstPlayFrame = 8;

    public const PageFlags Branch = PageFlags.Present | PageFlags.Writable | PageFlags.User | PageFlags.Accessed | PageFlags.Dirty;
    public const PageFlags Leaf = PageFlags.Present | PageFlags.Writable | PageFlags.Accessed;
    public const PageFlags ReadOnly = PageFlags.Present | PageFlags.Accessed;

    private readonly List<nint> _blocks = [];
    private bool _interrupted;

    /// <param name="frames">Frames in all, at least 8.</param>
    /// <param name="owned">Frames that the domain owns, from the first on; the others are free.</param>
    /// <param name="inGuest">Whether page-table stores have to be repeated inside the VM.</param>
    /// <param name="vcpus">vCPUs, all on the boot tables, at most <see cref="DataPages"/>.</param>
    public TestMachine(int frames = 64, int owned = 64, bool inGuest = false, int vcpus = 1)
    {
        FrameCount = frames;
        var memory = new MachineMemory((byte*)Allocate((nuint)frames * 4096), new Mfn(FirstFrame), (ulong)frames);
        Context = (DomainContext*)Allocate((nuint)sizeof(DomainContext));
        Context->State = (DomainState*)Allocate((nuint)sizeof(DomainState));
        Context->State->Id = Domain;
        Context->State->VcpuCount = vcpus;
        Context->State->StartedVcpus = vcpus;
        Context->State->MaxPages = (ulong)frames;
        Context->Memory = memory;
        Context->MachineToPhys = (ulong*)Allocate((nuint)frames * 8);
        Context->MachineToPhysFrame = new Mfn(0x100);
        Context->MachineToPhysStart = new VirtualAddress(0xffff_8300_0000_0000);
        Context->Frames = Allocate((nuint)sizeof(FrameTable));
        Context->ShadowedFrames = inGuest ? (ulong*)Allocate(((nuint)frames + 63) / 64 * 8) : null;
        Context->HypervisorSlots = (ulong*)Allocate(Paging.HypervisorSlots * 8);
        for (int i = 0; i < Paging.HypervisorSlots; i++)
            Context->HypervisorSlots[i] = 0xabc000UL + ((ulong)i << 12) + 7;
        Context->KernelSlot = KernelSlot;
        Context->UserSlot = UserSlot;
        Context->SharedInfo = (byte*)Allocate(4096);
        Context->MemoryMap = (E820Entry*)Allocate((nuint)(E820Entry.MaxEntries * sizeof(E820Entry)));
        *Context->MemoryMap = new E820Entry { Size = (ulong)frames << Paging.PageShift, Type = E820Entry.Ram };
        Context->State->MemoryMapEntries = 1;
        Frames->Initialize(
            (FrameInfo*)Allocate((nuint)frames * (nuint)sizeof(FrameInfo)), memory, Context->State, Context->MachineToPhys,
            (ulong*)Allocate(ScrubMap.SizeOf((ulong)frames)));

        Context->Vcpus = (VcpuContext*)Allocate((nuint)(vcpus * sizeof(VcpuContext)));
        for (int i = 0; i < vcpus; i++)
            AddVcpu(Context->Vcpus + i, i, inGuest);

        for (int i = 0; i < frames; i++)
            Context->MachineToPhys[i] = Invalid;
        for (int i = 0; i < owned; i++)
        {
            Assert.That(Frames->TryAllocate(FrameFlags.None, 0, out _), Is.True);
            Context->MachineToPhys[i] = (ulong)i;
        }

        *Entry(0, 0) = new PageTableEntry(Frame(1), Branch);
        *Entry(1, 0) = new PageTableEntry(Frame(2), Branch);
        *Entry(2, new VirtualAddress(DataAddress).TableIndex(2)) = new PageTableEntry(Frame(3), Branch);
        for (int i = 0; i < DataPages; i++)
            *Entry(3, new VirtualAddress(DataAddress).TableIndex(1) + i) = new PageTableEntry(Frame(4 + i), Leaf);
        Assert.That(MmuextOp.Pin(Vcpu, Frame(0), PageType.L4PageTable), Is.EqualTo(Errno.None));
        for (int i = 0; i < vcpus; i++)
            Assert.That(MmuextOp.NewBaseptr(Context->Vcpus + i, Frame(0)), Is.EqualTo(Errno.None));
        Vcpu->PageTableWrites->Clear();
    }

    public int FrameCount { get; }

    /// <summary>The entries of <see cref="VcpuContext.DescriptorWindow"/>.</summary>
    public PageTableEntry* DescriptorPages => (PageTableEntry*)Vcpu->DescriptorWindow.Entries;

    public DomainContext* Context { get; }

    /// <summary>The first vCPU.</summary>
    public VcpuContext* Vcpu => Context->Vcpus;

    public FrameTable* Frames => (FrameTable*)Context->Frames;

    /// <summary>Host view of the data pages, contiguous.</summary>
    public byte* Data => Context->Memory.Page(Frame(4));

    public PageTableWriteQueue* Queue => Vcpu->PageTableWrites;

    public static Mfn Frame(int index) => new(FirstFrame + (ulong)index);

    public static MachineAddress EntryAddress(int frame, int index) => Frame(frame).Address + ((ulong)index * 8);

    public PageTableEntry* Entry(int frame, int index) => Context->Memory.Table(Frame(frame)) + index;

    public ref FrameInfo Info(int frame) => ref *Frames->Find(Frame(frame));

    /// <summary>An empty page becomes the table of a level, linked from its parent by the hypercall interface's own rules.</summary>
    public void Link(int parent, int index, int child)
        => Assert.That(Update((EntryAddress(parent, index).Value, new PageTableEntry(Frame(child), Branch).Value)), Is.Zero);

    /// <summary>mmu_update on the domain itself.</summary>
    public long Update(params (ulong Pointer, ulong Value)[] requests)
    {
        for (int i = 0; i < requests.Length; i++)
        {
            ((ulong*)Data)[2 * i] = requests[i].Pointer;
            ((ulong*)Data)[(2 * i) + 1] = requests[i].Value;
        }

        return Complete(&MmuUpdate.Execute, new HypercallArguments { A0 = DataAddress, A1 = (ulong)requests.Length, A3 = DomainId.Self.Value });
    }

    /// <summary>mmu_update of one entry.</summary>
    public long Update(int frame, int index, PageTableEntry value) => Update((EntryAddress(frame, index).Value, value.Value));

    /// <summary>One mmuext_op on the domain itself.</summary>
    public long Extended(uint command, ulong first = 0, ulong second = 0, ushort domain = 0x7ff0)
    {
        ((ulong*)Data)[0] = command;
        ((ulong*)Data)[1] = first;
        ((ulong*)Data)[2] = second;
        return Complete(&MmuextOp.Execute, new HypercallArguments { A0 = DataAddress, A1 = 1, A3 = domain });
    }

    public long Pin(int level, int frame) => Extended((uint)level - 1, Frame(frame).Value);

    public long Unpin(int frame) => Extended(4, Frame(frame).Value);

    public long UpdateVa(ulong address, PageTableEntry value, ulong flags = 0)
        => MmuUpdate.UpdateVaMapping(Vcpu, new HypercallArguments { A0 = address, A1 = value.Value, A2 = flags });

    public long Memory(ulong command, ulong pointer = DataAddress)
        => Complete(&MemoryOp.Execute, new HypercallArguments { A0 = command, A1 = pointer });

    /// <summary>From now on calls are stopped at every point where they can be, and continued.</summary>
    public void Interrupt(bool always) => *Vcpu->KickPending = (_interrupted = always) ? 1 : 0;

    /// <summary>Called between the parts of a call that is continued.</summary>
    public Action? Between { get; set; }

    /// <summary>Parts of calls that were followed by another.</summary>
    public int Continuations { get; private set; }

    /// <summary>Makes a hypercall, and where calls are interrupted again as long as it asks for it.</summary>
    public long Complete(delegate*<VcpuContext*, in HypercallArguments, long> call, HypercallArguments arguments)
    {
        while (true)
        {
            long result = call(Vcpu, arguments);
            if (!_interrupted || Vcpu->Continuation.Pending == 0)
                return result;
            Vcpu->Continuation.Pending = 0;
            arguments = Vcpu->Continuation.Arguments;
            Continuations++;
            Between?.Invoke();
        }
    }

    /// <summary>increase/decrease_reservation, populate_physmap; the extents lie 256 bytes behind the structure.</summary>
    public long Reservation(ulong command, ReadOnlySpan<ulong> extents, uint order = 0, uint flags = 0, ushort domain = 0x7ff0)
    {
        ((ulong*)Data)[0] = DataAddress + 256;
        ((ulong*)Data)[1] = (ulong)extents.Length;
        ((uint*)Data)[4] = order;
        ((uint*)Data)[5] = flags;
        ((ulong*)Data)[3] = domain;
        extents.CopyTo(new Span<ulong>(Data + 256, extents.Length));
        return Memory(command);
    }

    public void Dispose()
    {
        foreach (nint block in _blocks)
            NativeMemory.AlignedFree((void*)block);
        _blocks.Clear();
    }

    private void AddVcpu(VcpuContext* vcpu, int id, bool inGuest)
    {
        vcpu->Domain = Context;
        vcpu->State = (VcpuState*)Allocate((nuint)sizeof(VcpuState));
        vcpu->State->Id = id;
        vcpu->State->Started = 1;
        vcpu->State->KernelMode = 1;
        vcpu->Registers = (CpuRegisters*)Allocate((nuint)sizeof(CpuRegisters));
        vcpu->Registers->Rflags = 0x202;
        vcpu->Segments = (SegmentRegisters*)Allocate((nuint)sizeof(SegmentRegisters));
        vcpu->PageTableWrites = (PageTableWriteQueue*)Allocate((nuint)sizeof(PageTableWriteQueue));
        vcpu->PageTableWrites->InGuest = inGuest ? 1 : 0;
        vcpu->Info = (VcpuInfo*)Context->SharedInfo + id;
        vcpu->DescriptorWindow = new DescriptorWindow(
            new VirtualAddress(0xffff_8400_0000_0000), (nint)Allocate(4096), new MachineAddress(0x7770_0000 + ((ulong)id << Paging.PageShift)), default);
        vcpu->KickPending = (int*)Allocate(sizeof(int));
    }

    private void* Allocate(nuint size)
    {
        size = (size + 63) & ~(nuint)63;
        void* block = NativeMemory.AlignedAlloc(size, 4096);
        NativeMemory.Clear(block, size);
        _blocks.Add((nint)block);
        return block;
    }
}
