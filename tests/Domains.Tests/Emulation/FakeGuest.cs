// A vCPU without a VM: its state, and a little memory behind page tables of its own.
using System.Runtime.InteropServices;
using Iced.Intel;
using XenSharp.Core;
using XenSharp.Domains.Emulation;

namespace XenSharp.Domains.Tests.Emulation;

/// <summary>A vCPU in guest-kernel mode with code and data pages, and a record of what its machine was asked to do.</summary>
internal sealed unsafe class FakeGuest : IDisposable, IPrivilegedState
{
    public const ulong CodeStart = 0x40_0000;
    public const ulong DataStart = 0x50_0000;

    /// <summary>The page after the data pages is not mapped.</summary>
    public const ulong DataEnd = DataStart + (2 * Paging.PageSize);
    private const ulong FirstFrame = 0x1000;
    private const ulong FrameCount = 32;

    private readonly byte* _memory;
    private readonly DomainState* _domainState;
    private readonly DomainContext* _domain;
    private readonly VcpuState* _state;
    private readonly CpuRegisters* _registers;
    private readonly SegmentRegisters* _segments;
    private readonly VcpuInfo* _info;
    private readonly int* _kick;
    private readonly VcpuContext* _vcpu;
    private ulong _nextFrame = FirstFrame;

    public FakeGuest(CpuidPolicy? policy = null)
    {
        Cpuid = policy ?? new CpuidPolicy(HostProcessor.Everything(HostProcessor.Intel), HostProcessor.Options);
        Ports = new IoPorts(() => Nanoseconds);
        _memory = (byte*)NativeMemory.AlignedAlloc((nuint)(FrameCount * Paging.PageSize), (nuint)Paging.PageSize);
        NativeMemory.Clear(_memory, (nuint)(FrameCount * Paging.PageSize));
        _domainState = New<DomainState>();
        _domain = New<DomainContext>();
        _state = New<VcpuState>();
        _registers = New<CpuRegisters>();
        _segments = New<SegmentRegisters>();
        _info = New<VcpuInfo>();
        _kick = New<int>();
        _vcpu = New<VcpuContext>();
        _domain->State = _domainState;
        _domain->Memory = new MachineMemory(_memory, new Mfn(FirstFrame), FrameCount);
        *_vcpu = new VcpuContext
        {
            Domain = _domain, State = _state, Registers = _registers, Segments = _segments, Info = _info, KickPending = _kick,
        };
        _state->KernelRoot = AllocateFrame().Value;
        _state->UserRoot = _state->KernelRoot;
        _state->Traps[(int)ExceptionVector.GeneralProtection].Address = CodeStart;
        Map(CodeStart, PageFlags.None);
        Map(DataStart, PageFlags.Writable);
        Map(DataStart + Paging.PageSize, PageFlags.Writable);
        Reset();
        Emulator = new PrivilegedEmulator(_vcpu, this);
    }

    public PrivilegedEmulator Emulator { get; }

    public CpuidPolicy Cpuid { get; }

    public IoPorts Ports { get; }

    public VcpuContext* Vcpu => _vcpu;

    public VcpuState* State => _state;

    public CpuRegisters* Registers => _registers;

    public SegmentRegisters* Segments => _segments;

    public VcpuInfo* Info => _info;

    public DomainState* Domain => _domainState;

    public int* KickPending => _kick;

    public long Nanoseconds { get; set; }

    public ulong Tsc { get; set; } = 0x1234_5678_9abc_def0;

    public Errno RootAnswer { get; set; } = Errno.None;

    /// <summary>Calls of <see cref="IPrivilegedState"/> that change something.</summary>
    public List<string> Calls { get; } = [];

    public ulong Rip => _registers->Rip;

    /// <summary>A vCPU in kernel mode about to execute its first instruction.</summary>
    public void Reset()
    {
        *_registers = new CpuRegisters { Rip = CodeStart, Rsp = DataStart + 0x800, Rflags = (ulong)(Rflags.Fixed | Rflags.InterruptEnable) };
        *_segments = new SegmentRegisters { Cs = FlatSelectors.Ring3Cs64, Ss = FlatSelectors.Ring3Data };
        _state->KernelMode = 1;
        _state->Iopl = 0x1000;
        _state->Cr4 = PrivilegedEmulator.GuestCr4(Cpuid, 0);
        _state->DebugRegisters[6] = DebugRegisters.StatusOnes;
        _state->DebugRegisters[7] = DebugRegisters.ControlOnes;
        Calls.Clear();
    }

    /// <summary>Puts an instruction at RIP and lets the emulator have the #GP that it raised.</summary>
    public EmulationResult Execute(Action<Assembler> code, uint errorCode = 0)
    {
        Load(code);
        return Emulator.GeneralProtection(errorCode);
    }

    /// <summary>Assembles at RIP. Returns the length.</summary>
    public int Load(Action<Assembler> code, int bitness = 64)
    {
        var assembler = new Assembler(bitness);
        code(assembler);
        using var stream = new MemoryStream();
        assembler.Assemble(new StreamCodeWriter(stream), _registers->Rip);
        Poke(_registers->Rip, stream.ToArray());
        return (int)stream.Length;
    }

    /// <summary>Writes guest memory past its protections.</summary>
    public void Poke(ulong address, ReadOnlySpan<byte> bytes)
    {
        for (int i = 0; i < bytes.Length; i++)
            *At(address + (uint)i) = bytes[i];
    }

    public byte[] Peek(ulong address, int count)
    {
        byte[] bytes = new byte[count];
        for (int i = 0; i < count; i++)
            bytes[i] = *At(address + (uint)i);
        return bytes;
    }

    /// <summary>Maps a fresh page for CPL 3.</summary>
    public void Map(ulong address, PageFlags flags)
    {
        var linear = new VirtualAddress(address);
        var table = new Mfn(_state->KernelRoot);
        for (int level = 4; level > 1; level--)
        {
            PageTableEntry* entry = _domain->Memory.Table(table) + linear.TableIndex(level);
            if (!entry->IsPresent)
                *entry = new PageTableEntry(AllocateFrame(), PageFlags.Present | PageFlags.Writable | PageFlags.User);
            table = entry->Frame;
        }

        _domain->Memory.Table(table)[linear.TableIndex(1)] = new PageTableEntry(AllocateFrame(), PageFlags.Present | PageFlags.User | flags);
    }

    /// <summary>Puts descriptors into a one-frame GDT.</summary>
    public void SetGdt(params ReadOnlySpan<ulong> descriptors)
    {
        Mfn frame = AllocateFrame();
        descriptors.CopyTo(new Span<ulong>(_domain->Memory.Page(frame), 512));
        _state->GdtFrames[0] = frame.Value;
        _state->GdtEntries = (uint)descriptors.Length;
    }

    public ulong ReadTimeStampCounter() => Tsc;

    public void SetTaskSwitched(bool value) => Calls.Add($"TS {value}");

    public Errno SetPageTableRoot(Mfn root)
    {
        Calls.Add($"CR3 {root.Value:x}");
        return RootAnswer;
    }

    public void SetControlRegister4(ulong value) => Calls.Add($"CR4 {value:x}");

    public void SetXcr0(ulong value) => Calls.Add($"XCR0 {value:x}");

    public void SetDebugRegister(int register, ulong value) => Calls.Add($"DR{register} {value:x}");

    public void SetTscAux(uint value) => Calls.Add($"AUX {value:x}");

    public void NoteGsBaseRead(ulong rip, int length) => Calls.Add($"gs base read at {rip:x}, {length} bytes");

    public bool InstallHypercallPage(Mfn frame)
    {
        Calls.Add($"PAGE {frame.Value:x}");
        return frame.Value is >= FirstFrame and < FirstFrame + FrameCount;
    }

    public void Dispose()
    {
        NativeMemory.AlignedFree(_memory);
        NativeMemory.Free(_domainState);
        NativeMemory.Free(_domain);
        NativeMemory.Free(_state);
        NativeMemory.Free(_registers);
        NativeMemory.Free(_segments);
        NativeMemory.Free(_info);
        NativeMemory.Free(_kick);
        NativeMemory.Free(_vcpu);
    }

    private static T* New<T>()
        where T : unmanaged => (T*)NativeMemory.AllocZeroed((nuint)sizeof(T));

    private Mfn AllocateFrame()
    {
        if (_nextFrame >= FirstFrame + FrameCount)
            throw new InvalidOperationException("The fake guest has no more frames: raise FrameCount.");
        return new Mfn(_nextFrame++);
    }

    private byte* At(ulong address)
    {
        PageTableEntry* entry = GuestAccess.FindEntry(_vcpu, new VirtualAddress(address));
        if (entry == null || !entry->IsPresent)
            throw new InvalidOperationException($"The fake guest has nothing mapped at {address:x}.");
        return _domain->Memory.Page(entry->Frame) + (address & Paging.PageOffsetMask);
    }
}
