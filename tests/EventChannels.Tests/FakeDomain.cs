// A domain without a VM: machine memory, page tables that map it all, vcpu_infos in shared_info, and processors that count kicks.
using System.Runtime.InteropServices;
using XenSharp.Core;

namespace XenSharp.EventChannels.Tests;

/// <summary>Counts kicks, and sleeps and wakes as a real one does.</summary>
internal sealed unsafe class FakeCpu : IVirtualCpu
{
    private readonly SemaphoreSlim _kicked = new(0, 1);
    private int _kicks;

    internal int Kicks => Volatile.Read(ref _kicks);

    public CpuRegisters* Registers => throw new NotSupportedException();

    public SegmentRegisters* Segments => throw new NotSupportedException();

    public VirtualAddress FaultAddress => throw new NotSupportedException();

    public Mfn PageTableRoot { get; set; }

    public PageTableWriteQueue* PageTableWrites => throw new NotSupportedException();

    public DescriptorWindow DescriptorWindow => default;

    public uint LdtEntries { get; set; }

    public bool ReadsSelectorsAsNull => false;

    public int* KickPending => throw new NotSupportedException();

    public delegate* unmanaged[SuppressGCTransition]<ulong> ReadTimeStampCounter => throw new NotSupportedException();

    public void SetTaskSwitched(bool value) => throw new NotSupportedException();

    public void SetTimeStampDisable(bool value) => throw new NotSupportedException();

    public void SetFsgsbase(bool value) => throw new NotSupportedException();

    public void SetXcr0(ulong value) => throw new NotSupportedException();

    public void SetDebugRegisters(ReadOnlySpan<ulong> values) => throw new NotSupportedException();

    public void SetFpu(ReadOnlySpan<byte> image) => throw new NotSupportedException();

    public void GetExtendedState(Span<byte> area) => throw new NotSupportedException();

    public bool TrySetExtendedState(ReadOnlySpan<byte> area) => throw new NotSupportedException();

    public void Settle() => throw new NotSupportedException();

    public ulong TakeDebugStatus() => throw new NotSupportedException();

    public VcpuExit Run() => throw new NotSupportedException();

    public void WaitForKick(long deadline) => _kicked.Wait();

    public void SetWakeTimer(long deadline) => throw new NotSupportedException();

    public void Kick()
    {
        Interlocked.Increment(ref _kicks);
        lock (_kicked)
        {
            if (_kicked.CurrentCount == 0)
                _kicked.Release();
        }
    }

    public void Dispose() => _kicked.Dispose();
}

/// <summary>Counts how often frames are held.</summary>
internal sealed unsafe class FakeFrames : IWritableFrames
{
    private readonly Dictionary<ulong, int> _held = [];

    /// <summary>What is answered instead, when it is an error.</summary>
    internal Errno Error { get; set; }

    internal int Total => _held.Values.Sum();

    public Errno Hold(VcpuContext* vcpu, Mfn frame)
    {
        if (Error != Errno.None)
            return Error;
        if (frame.Value - FakeDomain.FifoFrame >= FakeDomain.FifoFrames)
            return Errno.EINVAL;
        _held[frame.Value] = _held.GetValueOrDefault(frame.Value) + 1;
        return Errno.None;
    }

    public void Release(VcpuContext* vcpu, Mfn frame)
    {
        if (--_held[frame.Value] < 0)
            throw new InvalidOperationException($"{frame} was not held");
    }
}

/// <summary>
/// Frames, from <see cref="FirstFrame"/>: four page tables, shared_info, a page that the guest can write
/// (<see cref="Arguments"/>), one that it can only read (<see cref="ReadOnly"/>), one for a registered vcpu_info, those of the
/// FIFO ABI; between two canary pages that nothing may touch.
/// </summary>
internal sealed unsafe class FakeDomain : IDisposable
{
    internal const ulong FirstFrame = 0x100;
    internal const ulong Arguments = 0x40_0000;
    internal const ulong ReadOnly = Arguments + 0x1000;
    internal const ulong Unmapped = Arguments + 0x2000;

    /// <summary>The first of <see cref="FifoFrames"/> frames for control blocks and event words.</summary>
    internal const ulong FifoFrame = FirstFrame + 8;
    internal const int FifoFrames = 5;

    private const int Frames = 8 + FifoFrames;
    private const byte Canary = 0xa5;

    private readonly byte* _allocation;
    private readonly byte* _host;
    private readonly List<nint> _owned = [];

    internal FakeDomain(ushort id = 1, int vcpus = 2, Dictionary<ushort, EventChannelDomain>? directory = null, uint maxPort = 4095)
    {
        _allocation = (byte*)NativeMemory.AlignedAlloc((Frames + 2) * 4096, 4096);
        new Span<byte>(_allocation, (Frames + 2) * 4096).Fill(Canary);
        _host = _allocation + 4096;
        new Span<byte>(_host, Frames * 4096).Clear();
        Context = Own<DomainContext>();
        Context->State = Own<DomainState>();
        Context->State->Id = id;
        Context->State->VcpuCount = vcpus;
        Context->Memory = new MachineMemory(_host, new Mfn(FirstFrame), Frames);
        Context->SharedInfo = Page(4);
        MapTables();

        Directory = directory ?? [];
        Channels = new EventChannelDomain(Context, id, other => Directory.GetValueOrDefault(other), Held, maxPort);
        Directory[id] = Channels;
        Cpus = new FakeCpu[vcpus];
        Vcpus = new nint[vcpus];
        KickPending = Own<int>();
        for (int i = 0; i < vcpus; i++)
        {
            VcpuContext* vcpu = Own<VcpuContext>();
            vcpu->Domain = Context;
            vcpu->State = Own<VcpuState>();
            vcpu->State->Id = i;
            vcpu->State->KernelMode = 1;
            vcpu->State->KernelRoot = FirstFrame;
            vcpu->Info = i < SharedInfoLayout.LegacyVcpus ? (VcpuInfo*)Context->SharedInfo + i : null;
            vcpu->KickPending = KickPending;
            Vcpus[i] = (nint)vcpu;
            Cpus[i] = new FakeCpu();
            Channels.AddVcpu(vcpu, Cpus[i]);
        }
    }

    internal Dictionary<ushort, EventChannelDomain> Directory { get; }

    internal DomainContext* Context { get; }

    internal EventChannelDomain Channels { get; }

    internal FakeFrames Held { get; } = new();

    internal FakeCpu[] Cpus { get; }

    internal nint[] Vcpus { get; }

    internal int* KickPending { get; }

    internal byte* ArgumentPage => Page(5);

    internal byte* ReadOnlyPage => Page(6);

    internal VcpuInfo* SpareInfo => (VcpuInfo*)Page(7);

    /// <summary>The control block of a vCPU, 0 or 1, that <see cref="EnterFifo"/> gives it, 72 bytes.</summary>
    internal uint* Block(int vcpu) => (uint*)(Page(8) + (vcpu * 2048));

    /// <summary>The event word of a port below 4096, once its page is there.</summary>
    internal uint* Word(uint port) => (uint*)Page(9) + port;

    internal Span<byte> FifoPages => new(Page(8), FifoFrames * 4096);

    internal Span<byte> SharedInfo => new(Context->SharedInfo, 4096);

    internal VcpuContext* Vcpu(int number) => (VcpuContext*)Vcpus[number];

    internal VcpuInfo* Info(int number) => Vcpu(number)->Info;

    internal bool CanariesIntact
        => !new Span<byte>(_allocation, 4096).ContainsAnyExcept(Canary)
            && !new Span<byte>(_host + (Frames * 4096), 4096).ContainsAnyExcept(Canary);

    internal bool IsPending(uint port) => Bit(SharedInfoLayout.EvtchnPending, port, null);

    internal void SetPending(uint port, bool value) => Bit(SharedInfoLayout.EvtchnPending, port, value);

    internal void SetMasked(uint port, bool value) => Bit(SharedInfoLayout.EvtchnMask, port, value);

    internal bool IsMasked(uint port) => Bit(SharedInfoLayout.EvtchnMask, port, null);

    /// <summary>Forgets all events of a vCPU, as a guest that handles them does.</summary>
    internal void Acknowledge(int vcpu)
    {
        Info(vcpu)->EvtchnUpcallPending = 0;
        Info(vcpu)->EvtchnPendingSel = 0;
        new Span<byte>(Context->SharedInfo + SharedInfoLayout.EvtchnPending, 512).Clear();
    }

    /// <summary>Issues the hypercall with a structure in guest memory, which is read back.</summary>
    internal long Call<T>(EventChannelOperation operation, ref T structure, int vcpu = 0)
        where T : unmanaged
    {
        *(T*)(ArgumentPage + (vcpu * 64)) = structure;
        long result = CallAt(operation, Arguments + (ulong)(vcpu * 64), vcpu);
        structure = *(T*)(ArgumentPage + (vcpu * 64));
        return result;
    }

    internal long CallAt(EventChannelOperation operation, ulong address, int vcpu = 0)
        => Channels.Execute(Vcpu(vcpu), new HypercallArguments { A0 = (ulong)operation, A1 = address });

    /// <summary>Issues an operation whose structure is one port.</summary>
    internal long Port(EventChannelOperation operation, uint port, int vcpu = 0) => Call(operation, ref port, vcpu);

    internal uint BindIpi(uint vcpu)
    {
        var ipi = new EvtchnBindIpi { Vcpu = vcpu };
        Assert.That(Call(EventChannelOperation.BindIpi, ref ipi), Is.Zero);
        return ipi.Port;
    }

    internal uint BindVirq(int virq, uint vcpu)
    {
        var bind = new EvtchnBindVirq { Virq = (uint)virq, Vcpu = vcpu };
        Assert.That(Call(EventChannelOperation.BindVirq, ref bind), Is.Zero);
        return bind.Port;
    }

    internal uint AllocUnbound(ushort remote)
    {
        var unbound = new EvtchnAllocUnbound { Domain = DomainId.Self.Value, RemoteDomain = remote };
        Assert.That(Call(EventChannelOperation.AllocUnbound, ref unbound), Is.Zero);
        return unbound.Port;
    }

    internal uint BindInterdomain(ushort remote, uint remotePort)
    {
        var bind = new EvtchnBindInterdomain { RemoteDomain = remote, RemotePort = remotePort };
        Assert.That(Call(EventChannelOperation.BindInterdomain, ref bind), Is.Zero);
        return bind.LocalPort;
    }

    internal long InitControl(ulong frame, uint offset, uint vcpu)
    {
        var control = new EvtchnInitControl { Frame = frame, Offset = offset, Vcpu = vcpu };
        return Call(EventChannelOperation.InitControl, ref control);
    }

    internal long ExpandArray(ulong frame) => Call(EventChannelOperation.ExpandArray, ref frame);

    internal long SetPriority(uint port, uint priority)
    {
        var request = new EvtchnSetPriority { Port = port, Priority = priority };
        return Call(EventChannelOperation.SetPriority, ref request);
    }

    /// <summary>Goes over to the FIFO ABI, with control blocks for vCPUs 0 and 1 and so many pages of words, 4 at most.</summary>
    internal void EnterFifo(int pages = 1)
    {
        for (uint vcpu = 0; vcpu < Math.Min(2, Cpus.Length); vcpu++)
            Assert.That(InitControl(FifoFrame, vcpu * 2048, vcpu), Is.Zero);
        for (int page = 1; page <= pages; page++)
            Assert.That(ExpandArray(FifoFrame + (ulong)page), Is.Zero);
    }

    internal EvtchnStatus Status(uint port)
    {
        var status = new EvtchnStatus { Domain = DomainId.Self.Value, Port = port, Status = 99, Vcpu = 99 };
        Assert.That(Call(EventChannelOperation.Status, ref status), Is.Zero);
        return status;
    }

    public void Dispose()
    {
        Channels.Dispose();
        foreach (FakeCpu cpu in Cpus)
            cpu.Dispose();
        foreach (nint owned in _owned)
            NativeMemory.Free((void*)owned);
        NativeMemory.AlignedFree(_allocation);
    }

    private void MapTables()
    {
        const PageFlags Table = PageFlags.Present | PageFlags.Writable | PageFlags.User;
        var address = new VirtualAddress(Arguments);
        for (int level = 4; level > 1; level--)
            ((PageTableEntry*)Page(4 - level))[address.TableIndex(level)] = new PageTableEntry(new Mfn(FirstFrame) + (ulong)(5 - level), Table);
        var leaves = (PageTableEntry*)Page(3);
        leaves[address.TableIndex(1)] = new PageTableEntry(new Mfn(FirstFrame) + 5, Table);
        leaves[address.TableIndex(1) + 1] = new PageTableEntry(new Mfn(FirstFrame) + 6, PageFlags.Present | PageFlags.User);
    }

    private byte* Page(int index) => _host + (index * 4096);

    private bool Bit(int array, uint port, bool? value)
    {
        ulong* word = (ulong*)(Context->SharedInfo + array) + (port / 64);
        ulong bit = 1UL << (int)(port % 64);
        if (value is { } set)
            _ = set ? Interlocked.Or(ref *word, bit) : Interlocked.And(ref *word, ~bit);
        return (Volatile.Read(ref *word) & bit) != 0;
    }

    private T* Own<T>()
        where T : unmanaged
    {
        void* memory = NativeMemory.AllocZeroed((nuint)sizeof(T));
        _owned.Add((nint)memory);
        return (T*)memory;
    }
}
