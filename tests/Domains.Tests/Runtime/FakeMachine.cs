// A virtual machine without a processor: plain memory, and a vCPU whose guest is played by the test.
using System.Diagnostics;
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Domains.Builder;

namespace XenSharp.Domains.Tests.Runtime;

/// <summary>Machine memory, M2P and vCPUs on memory of this process.</summary>
internal sealed unsafe class FakeMachine : IVirtualMachine
{
    public const ulong FirstFrame = 0x4000;
    public const ulong FirstWindowFrame = 0x2000;
    public const ulong WindowFrames = 24;
    private readonly ulong[] _slots = [.. Enumerable.Range(0, Paging.HypervisorSlots).Select(static i => 0xfee0_0000_0003UL | ((ulong)i << 12))];
    private readonly FakeMemory _memory;
    private readonly FakeMemory _window = new(WindowFrames << 12);
    private ulong* _machineToPhys;
    private bool _disposed;

    public FakeMachine(ulong frames, TimeStampCounter counter, ulong firstFrame = FirstFrame)
    {
        _memory = new FakeMemory(frames << 12);
        _machineToPhys = (ulong*)NativeMemory.Alloc((nuint)((frames + WindowFrames) * 8));
        Memory = new MachineMemory(_memory.Address, new Mfn(firstFrame), frames);
        Window = new MachineMemory(_window.Address, new Mfn(FirstWindowFrame), WindowFrames);
        WindowToPhys = _machineToPhys + frames;
        for (ulong i = 0; i < WindowFrames; i++)
        {
            WindowToPhys[i] = Mfn.Invalid.Value;
            Hide(Window.FirstFrame + i);
        }

        TimeStampCounter = counter;
    }

    public MachineMemory Window { get; }

    public ulong* WindowToPhys { get; }

    /// <summary>Frames of the window that show something, and whether it can be written to.</summary>
    public Dictionary<Mfn, bool> Shown { get; } = [];

    /// <summary>What was asked to be forgotten, how often.</summary>
    public int Forgotten { get; private set; }

    /// <summary>The host has no room for more than this in the window.</summary>
    public int MaxShown { get; set; } = int.MaxValue;

    public bool TryShow(Mfn window, IVirtualMachine owner, Mfn frame, bool writable)
    {
        if (Shown.Count >= MaxShown)
            return false;
        var other = (FakeMachine)owner;
        _window.Show(Window.IndexOf(window) << 12, other._memory, other.Memory.IndexOf(frame) << 12, writable);
        Shown[window] = writable;
        return true;
    }

    public bool TryProtect(Mfn window)
    {
        _window.Protect(Window.IndexOf(window) << 12);
        Shown[window] = false;
        return true;
    }

    public void Hide(Mfn window)
    {
        _window.Hide(Window.IndexOf(window) << 12);
        _ = Shown.Remove(window);
    }

    public void ForgetTables() => Forgotten++;

    public IDisposable HoldMemory() => _memory.Hold();

    public MachineMemory Memory { get; }

    public ulong* MachineToPhys => _machineToPhys;

    public Mfn MachineToPhysFrame => new(0x100);

    public VirtualAddress MachineToPhysStart => new(0xffff_8200_0000_0000);

    public ReadOnlySpan<ulong> HypervisorSlots => _slots;

    public TimeStampCounter TimeStampCounter { get; }

    /// <summary>Plays the guest of the vCPU that is created next.</summary>
    public Func<FakeVcpu, IEnumerable<VcpuExit>> Script { get; set; } = static _ => [];

    public FakeVcpu? Vcpu { get; private set; }

    /// <summary>Frames that were given back to the host, in the order of that.</summary>
    public List<Mfn> Discarded { get; } = [];

    public void Discard(Mfn first, ulong count)
    {
        for (ulong i = 0; i < count; i++)
            Discarded.Add(first + i);
        NativeMemory.Clear(Memory.Page(first), (nuint)(count << Paging.PageShift));
    }

    /// <summary>Not known.</summary>
    public ulong CountEmpty(Mfn first) => 0;

    public IVirtualCpu CreateVcpu(int number) => Vcpu = new FakeVcpu(this);

    public void Dispose()
    {
        if (_disposed)
            return;
        _disposed = true;
        _memory.Dispose();
        _window.Dispose();
        NativeMemory.Free(_machineToPhys);
        _machineToPhys = null;
    }
}

/// <summary>
/// A vCPU that executes a script: each exit that the script yields is what one <see cref="Run"/> returns; between two of them
/// the script may look at and change what a guest could.
/// </summary>
internal sealed unsafe class FakeVcpu : IVirtualCpu
{
    private readonly FakeMachine _machine;
    private readonly ManualResetEventSlim _kicked = new();
    private readonly Block* _block;
    private IEnumerator<VcpuExit>? _script;

    private struct Block
    {
        public CpuRegisters Registers;
        public SegmentRegisters Segments;
        public PageTableWriteQueue Writes;
        public fixed ulong Tables[DescriptorWindow.GdtPages + DescriptorWindow.LdtPages];
        public int Kick;
        public EntryService Service;
        public EntryReport Report;
    }

    public FakeVcpu(FakeMachine machine)
    {
        _machine = machine;
        _block = (Block*)NativeMemory.AllocZeroed((nuint)sizeof(Block));
    }

    public CpuRegisters* Registers => &_block->Registers;

    public SegmentRegisters* Segments => &_block->Segments;

    public VirtualAddress FaultAddress { get; set; }

    public Mfn PageTableRoot { get; set; }

    public PageTableWriteQueue* PageTableWrites => &_block->Writes;

    public DescriptorWindow DescriptorWindow
        => new(new VirtualAddress(0xffff_8201_0000_0000), (nint)_block->Tables, new MachineAddress(0xfee1_0000), default);

    public uint LdtEntries { get; set; }

    public EntryService* EntryService => &_block->Service;

    public EntryReport* EntryReport => &_block->Report;

    /// <summary>Where vcpu_info was last shown.</summary>
    public (Mfn Frame, int Offset) VcpuInfo { get; private set; }

    public void ShowVcpuInfo(Mfn frame, int offset) => VcpuInfo = (frame, offset);

    public bool ReadsSelectorsAsNull => false;

    public int* KickPending => &_block->Kick;

    public void Settle()
    {
    }

    public void SetFpu(ReadOnlySpan<byte> image) => Fpu = image.ToArray();

    /// <summary>The last x87 and SSE state that was loaded; empty for none.</summary>
    public byte[] Fpu { get; private set; } = [];

    /// <summary>The extended state, as an XSAVE area.</summary>
    public byte[] Extended { get; } = new byte[ExtendedState.Size];

    public void GetExtendedState(Span<byte> area) => Extended.CopyTo(area);

    public bool TrySetExtendedState(ReadOnlySpan<byte> area)
    {
        area[..ExtendedState.Size].CopyTo(Extended);
        return true;
    }

    /// <summary>None: a step must not depend on how long it takes.</summary>
    public delegate* unmanaged[SuppressGCTransition]<ulong> ReadTimeStampCounter => null;

    public bool TaskSwitched { get; private set; }

    public bool TimeStampDisabled { get; private set; }

    public ulong Xcr0 { get; private set; }

    public ulong[] DebugRegisters { get; private set; } = new ulong[8];

    /// <summary>What <see cref="TakeDebugStatus"/> says next.</summary>
    public ulong DebugStatus { get; set; } = 0xffff_0ff0;

    public bool Fsgsbase { get; private set; }

    /// <summary>What the script threw: an assertion that failed, mostly.</summary>
    public Exception? Failure { get; private set; }

    /// <summary>Entries into the guest.</summary>
    public int Entries { get; private set; }

    /// <summary>RAX as the script finds it.</summary>
    public long Result => (long)_block->Registers.Rax;

    public ulong Rip
    {
        get => _block->Registers.Rip;
        set => _block->Registers.Rip = value;
    }

    public ulong Rsp
    {
        get => _block->Registers.Rsp;
        set => _block->Registers.Rsp = value;
    }

    public ulong Rflags
    {
        get => _block->Registers.Rflags;
        set => _block->Registers.Rflags = value;
    }

    public void SetTaskSwitched(bool value) => TaskSwitched = value;

    public void SetTimeStampDisable(bool value) => TimeStampDisabled = value;

    public void SetFsgsbase(bool value) => Fsgsbase = value;

    public void SetXcr0(ulong value) => Xcr0 = value;

    public void SetDebugRegisters(ReadOnlySpan<ulong> values) => DebugRegisters = values.ToArray();

    public ulong TakeDebugStatus()
    {
        const ulong none = 0xffff_0ff0;
        ulong status = DebugStatus;
        DebugStatus = none;
        return status;
    }

    public VcpuExit Run()
    {
        Entries++;
        _block->Writes.Count = 0;
        _block->Writes.FlushPending = 0;
        if (TakeKick())
            return new VcpuExit(VcpuExitKind.Kicked);
        try
        {
            _script ??= _machine.Script(this).GetEnumerator();
            return _script.MoveNext() ? _script.Current : PowerOff();
        }
        catch (Exception exception)
        {
            Failure = exception;
            return PowerOff();
        }
    }

    public void WaitForKick(long deadline)
    {
        long now = Stopwatch.GetTimestamp();
        if (deadline > now)
            _ = _kicked.Wait(deadline == long.MaxValue ? TimeSpan.FromSeconds(30) : TimeSpan.FromTicks(((deadline - now) / 100) + 1));
        _ = TakeKick();
    }

    public void SetWakeTimer(long deadline)
    {
    }

    public void Kick()
    {
        Volatile.Write(ref _block->Kick, 1);
        _kicked.Set();
    }

    public void Dispose()
    {
        _kicked.Dispose();
        NativeMemory.Free(_block);
    }

    /// <summary>The guest executes SYSCALL.</summary>
    public VcpuExit Hypercall(HypercallNumber number, ulong a0 = 0, ulong a1 = 0, ulong a2 = 0, ulong a3 = 0, ulong a4 = 0, ulong a5 = 0)
    {
        CpuRegisters* registers = Registers;
        (registers->Rax, registers->Rdi, registers->Rsi, registers->Rdx) = ((ulong)number, a0, a1, a2);
        (registers->R10, registers->R8, registers->R9) = (a3, a4, a5);
        return Again();
    }

    /// <summary>The guest executes the SYSCALL that RIP is on.</summary>
    public VcpuExit Again()
    {
        Rip += 2;
        Registers->Rcx = Rip;
        Registers->R11 = Rflags;
        return new VcpuExit(VcpuExitKind.Syscall);
    }

    public static VcpuExit Exception(ExceptionVector vector, uint errorCode = 0) => new(VcpuExitKind.Exception, vector, errorCode);

    private bool TakeKick()
    {
        if (Volatile.Read(ref _block->Kick) == 0)
            return false;
        _kicked.Reset();
        Volatile.Write(ref _block->Kick, 0);
        return true;
    }

    /// <summary>sched_op_compat(shutdown, by value): needs no memory. In user mode the kernel is asked first.</summary>
    private VcpuExit PowerOff() => Hypercall(HypercallNumber.SchedOpCompat, 2, (ulong)ShutdownReason.PowerOff);
}

/// <summary>A domain that the builder made on a <see cref="FakeMachine"/>, with a small kernel of zeroes.</summary>
internal sealed unsafe class FakeDomain : IDisposable
{
    public const ulong Base = 0xffff_ffff_8000_0000;
    public const ulong KernelSize = 0x1_0000;

    /// <summary>A page of the kernel's for arguments and results.</summary>
    public const ulong Data = Base + 0x4000;
    public const ulong Stack = Base + 0x9000;
    public const ulong Handler = Base + 0x1230;

    /// <param name="memoryMiB">Memory.</param>
    /// <param name="change">Changes the options.</param>
    /// <param name="spareFrames">Frames of the machine that are not the domain's.</param>
    /// <param name="manager">The domains that it is one of; null for none.</param>
    public FakeDomain(
        int memoryMiB = 8, Func<DomainOptions, DomainOptions>? change = null, ulong spareFrames = 8, DomainManager? manager = null)
    {
        var options = new DomainOptions
        {
            Name = "fake",
            Id = 7,
            Kernel = Kernel(),
            MemoryMiB = memoryMiB,
            HostTsc = static () => (ulong)Stopwatch.GetTimestamp(),
        };
        options = change?.Invoke(options) ?? options;
        Machine = new FakeMachine(((ulong)options.MemoryMiB << 8) + spareFrames, new TimeStampCounter(1_000_000, 0));
        try
        {
            Domain = new Domain(options, Machine, manager);
        }
        catch
        {
            Machine.Dispose();
            throw;
        }
    }

    public FakeMachine Machine { get; }

    public Domain Domain { get; }

    public Vcpu Vcpu => Domain.FindVcpu(0)!;

    public FakeVcpu Cpu => Machine.Vcpu!;

    public VcpuContext* Context => Vcpu.Context;

    public StartInfo* StartInfo => (StartInfo*)Machine.Memory.Page(Domain.Layout.StartInfo);

    public static KernelImage Kernel(ulong size = KernelSize, ulong virtualBase = Base, ulong? hypercallPage = null, ulong? initP2M = null, bool modStartPfn = false,
        KernelSegment[]? segments = null)
        => new()
        {
            Segments = [.. segments ?? [new KernelSegment(0, virtualBase, new byte[] { 0x90, 0x91, 0x92 }, size)]],
            VirtualBase = virtualBase,
            VirtualKernelStart = virtualBase,
            VirtualKernelEnd = virtualBase + size,
            VirtualEntry = virtualBase + 0x100,
            HypercallPage = hypercallPage,
            InitP2M = initP2M,
            ModStartPfn = modStartPfn,
            PaddrOffset = 0,
            PaeMode = PaeMode.Yes,
            HypervisorStartLow = null,
            SuspendCancel = false,
            L1MfnValid = [],
            BsdSymbolTable = false,
            GuestOs = "fake",
            GuestVersion = "1",
            Loader = "generic",
            XenVersion = "xen-3.0",
            SupportedFeatures = XenFeatures.None,
            RequiredFeatures = XenFeatures.None,
            NoteSource = KernelNoteSource.Sections,
            IsBzImage = false,
            Compression = KernelCompression.None,
        };

    /// <summary>Host view of an address of the boot mapping.</summary>
    public byte* Host(ulong address) => Machine.Memory.Page(new Mfn(FakeMachine.FirstFrame)) + (address - Base);

    public T Read<T>(ulong address)
        where T : unmanaged => *(T*)Host(address);

    public void Write<T>(ulong address, T value)
        where T : unmanaged => *(T*)Host(address) = value;

    public void WriteAll(ulong address, params ReadOnlySpan<ulong> values) => values.CopyTo(new Span<ulong>(Host(address), values.Length));

    /// <summary>Calls a hypercall on the test's own thread, the domain not running.</summary>
    public long Call(HypercallNumber number, ulong a0 = 0, ulong a1 = 0, ulong a2 = 0, ulong a3 = 0)
        => Hypercalls.HypercallDispatcher.Call(Vcpu, (ulong)number, new HypercallArguments { A0 = a0, A1 = a1, A2 = a2, A3 = a3 });

    /// <summary>Runs the domain with a guest that the script plays, until it stops. What the script throws is thrown here.</summary>
    public DomainExit Run(Func<FakeVcpu, IEnumerable<VcpuExit>> script)
    {
        Machine.Script = script;
        Domain.Start();
        bool stopped = Domain.Completion.Wait(TimeSpan.FromSeconds(20));
        if (Cpu.Failure != null)
            throw new AssertionException("The script failed: " + Cpu.Failure.Message, Cpu.Failure);
        Assert.That(stopped, Is.True, "the domain stops");
        return Domain.Completion.Result;
    }

    public void Dispose()
    {
        Domain.Dispose();
        Machine.Dispose();
    }
}
