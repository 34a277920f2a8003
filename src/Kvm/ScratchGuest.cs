// A VM with one page of CPL 3 code and two of data: what the host probes and the raw-exit benchmark run in.
using Iced.Intel;
using XenSharp.Core;

namespace XenSharp.Kvm;

/// <summary>A few pages of guest with hand-made page tables and no policy above it.</summary>
internal sealed unsafe class ScratchGuest : IDisposable
{
    /// <summary>Where <see cref="Load"/> puts its code.</summary>
    public const ulong CodeAddress = 0x40_0000;

    /// <summary>A page that is mapped to <see cref="FirstDataFrame"/> until a test changes <see cref="DataEntry"/>.</summary>
    public const ulong DataAddress = CodeAddress + (CodePages << Paging.PageShift);

    /// <summary>A writable page whose end is the stack.</summary>
    public const ulong StackTop = DataAddress + (2 << Paging.PageShift);

    private const ulong CodePages = 16;
    private const int Frames = 128;
    private const PageFlags UserPage = PageFlags.Present | PageFlags.Writable | PageFlags.User | PageFlags.Accessed | PageFlags.Dirty;

    private readonly Mfn _root;
    private readonly Mfn _leafTable;

    public ScratchGuest(KvmSystem system, HostCapabilities capabilities, (uint Leaf, uint Eax)? cpuidMark = null, ulong windowFrames = 0)
    {
        Machine = new KvmVirtualMachine(system, capabilities, Frames << Paging.PageShift, windowFrames) { CpuidMark = cpuidMark };
        try
        {
            Mfn frame = Machine.Memory.FirstFrame;
            _root = frame;
            _leafTable = frame + 3;
            for (ulong level = 0; level < 3; level++)
                Machine.Memory.Table(frame + level)[level == 2 ? (int)(CodeAddress >> 21) : 0] = new PageTableEntry(frame + level + 1, UserPage);
            Machine.HypervisorSlots.CopyTo(new Span<ulong>((ulong*)Machine.Memory.Table(frame) + Paging.FirstHypervisorSlot, Paging.HypervisorSlots));
            for (ulong page = 0; page < CodePages; page++)
                Machine.Memory.Table(_leafTable)[page] = new PageTableEntry(CodeFrame + page, UserPage);
            *DataEntry = new PageTableEntry(FirstDataFrame, UserPage);
            DataEntry[1] = new PageTableEntry(frame + 6 + CodePages, UserPage);
            Vcpu = Machine.CreateKvmVcpu(0);
            Vcpu.PageTableRoot = _root;
        }
        catch
        {
            Machine.Dispose();
            throw;
        }
    }

    public KvmVirtualMachine Machine { get; }

    public KvmVirtualCpu Vcpu { get; }

    public Mfn FirstDataFrame => Machine.Memory.FirstFrame + 4;

    public Mfn SecondDataFrame => Machine.Memory.FirstFrame + 5;

    /// <summary>Host view of the entry that maps <see cref="DataAddress"/>.</summary>
    public PageTableEntry* DataEntry => Machine.Memory.Table(_leafTable) + CodePages;

    /// <summary>Host view of the entry that maps <see cref="CodeAddress"/>.</summary>
    public PageTableEntry* CodeEntry => Machine.Memory.Table(_leafTable);

    /// <summary>Machine address of <see cref="DataEntry"/>.</summary>
    public MachineAddress DataEntryAddress => _leafTable.Address + (CodePages * sizeof(ulong));

    private Mfn CodeFrame => Machine.Memory.FirstFrame + 6;

    /// <summary>Assembles code and points the vCPU at its start.</summary>
    public void Load(Action<Assembler> write)
    {
        var assembler = new Assembler(64);
        write(assembler);
        using var stream = new MemoryStream();
        _ = assembler.Assemble(new StreamCodeWriter(stream), CodeAddress);
        if (stream.Length > (long)(CodePages << Paging.PageShift))
            throw new InvalidOperationException("The scratch code is too long.");
        new ReadOnlySpan<byte>(stream.GetBuffer(), 0, (int)stream.Length).CopyTo(new Span<byte>(Machine.Memory.Page(CodeFrame), (int)stream.Length));
        *Vcpu.Registers = new CpuRegisters { Rip = CodeAddress, Rsp = StackTop, Rflags = (ulong)(Rflags.Fixed | Rflags.InterruptEnable) };
        *Vcpu.Segments = new SegmentRegisters { Cs = FlatSelectors.Ring3Cs64, Ss = FlatSelectors.Ring3Data };
    }

    /// <summary>Loads code and runs it to its first exit.</summary>
    public VcpuExit Run(Action<Assembler> write)
    {
        Load(write);
        return Vcpu.Run();
    }

    public void Dispose() => Machine.Dispose();
}
