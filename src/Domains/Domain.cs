using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Domains.Builder;
using XenSharp.Domains.Emulation;
using XenSharp.Domains.Trace;
using XenSharp.EventChannels;
using XenSharp.Mmu;

namespace XenSharp.Domains;

/// <summary>
/// One domain: its memory and vCPUs, from being built to having stopped. Made by <see cref="DomainBuilder"/>'s rules, started
/// once, disposed by its owner after <see cref="Completion"/>.
/// </summary>
public sealed unsafe class Domain : IDisposable
{
    private const int VcpuStackSize = 1 << 20;

    private readonly DomainMemory _memory;
    private readonly TaskCompletionSource<DomainExit> _completion = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly List<Vcpu> _vcpus = [];
    private readonly List<Thread> _threads = [];
    private readonly byte* _handle;
    private DomainExit? _exit;
    private string? _crashRequest;
    private ShutdownReason? _shutdownCode;
    private int _stopping;
    private bool _disposed;

    /// <summary>Builds the domain in a fresh VM. The VM stays the caller's to dispose, after this.</summary>
    /// <exception cref="DomainBuildException">What was asked for cannot be built; the message says why.</exception>
    public Domain(DomainOptions options, IVirtualMachine machine)
    {
        ArgumentNullException.ThrowIfNull(options);
        ArgumentNullException.ThrowIfNull(machine);
        Name = options.Name;
        Id = new DomainId(options.Id);
        Time = new Timekeeping(machine.TimeStampCounter, options.HostTsc);
        Ports = new IoPorts(() => Time.SystemTime);
        Cpuid = CpuidPolicy.FromHost(options.Cpuid with
        {
            TscKiloHertz = machine.TimeStampCounter.KiloHertz,
            HostTscKiloHertz = machine.TimeStampCounter.KiloHertz,
            EndOfMachineFrames = machine.Memory.EndFrame,
        });
        Watchdogs = new Watchdogs(() => Stop(new DomainExit(ShutdownReason.Watchdog)));
        _handle = (byte*)NativeMemory.Alloc(16);
        _ = options.Uuid.TryWriteBytes(new Span<byte>(_handle, 16), bigEndian: true, out _);
        _memory = new DomainMemory(machine, options.Id, maxVcpus: 1, (ulong)options.MemoryMiB << (20 - Paging.PageShift), options.ShadowPageTables);
        try
        {
            var builder = new DomainBuilder(_memory.Context, options);
            builder.AllocateSharedInfo();
            Events = new EventChannelDomain(Context, options.Id, id => id == Id.Value ? Events : null);
            ConsoleChannel = Events.AllocateBackend(out EventChannelPort consolePort);
            StoreChannel = Events.AllocateBackend(out EventChannelPort storePort);
            ConsolePort = consolePort.Value;
            StorePort = storePort.Value;
            _memory.VcpuContexts->Domain = Context;
            _memory.VcpuContexts->State = _memory.VcpuStates;
            var vcpu = new Vcpu(this, machine.CreateVcpu(0), _memory.VcpuContexts, 0)
            {
                Trace = options.Trace is { } recorder ? new VcpuTrace(_memory.VcpuContexts, recorder.Stream(0), options.HostTsc) : null,
            };
            _vcpus.Add(vcpu);
            Context->State->VcpuCount = 1;
            Layout = builder.Build(vcpu.Context, ConsolePort, StorePort);
            Time.UpdateWallClock(Context->SharedInfo);
        }
        catch
        {
            Dispose();
            throw;
        }
    }

    /// <summary>The name given to it.</summary>
    public string Name { get; }

    public DomainId Id { get; }

    /// <summary>Completes when the domain has stopped and no vCPU runs any more.</summary>
    public Task<DomainExit> Completion => _completion.Task;

    /// <summary>Where the builder put things.</summary>
    public DomainLayout Layout { get; } = null!;

    /// <summary>The back end's view of the console ring page, 4096 bytes, mapped until <see cref="Dispose"/>.</summary>
    public byte* ConsolePage => Context->Memory.Page(Layout.Console);

    /// <summary>The back end's view of the xenstore ring page.</summary>
    public byte* StorePage => Context->Memory.Page(Layout.Store);

    /// <summary>The back end's end of the console's event channel.</summary>
    public EventChannelBackend ConsoleChannel { get; } = null!;

    /// <summary>The back end's end of xenstore's event channel.</summary>
    public EventChannelBackend StoreChannel { get; } = null!;

    /// <summary>The guest's port of the console.</summary>
    public uint ConsolePort { get; }

    /// <summary>The guest's port of xenstore.</summary>
    public uint StorePort { get; }

    /// <summary>Receives what the guest prints by console_io; called on the vCPU's thread with bytes to copy.</summary>
    public EmergencyConsole? EmergencyOutput { get; set; }

    /// <summary>Raised on the vCPU's thread right before the guest's first instruction.</summary>
    public Action? BeforeFirstEntry { get; set; }

    /// <summary>Bytes of managed memory that serving the guest took on the vCPU's thread; known once the domain has stopped.</summary>
    public long AllocatedBytes { get; private set; }

    /// <summary>Hypercalls that the guest has made.</summary>
    public ulong HypercallCount => _vcpus[0].History.Count;

    internal DomainContext* Context => _memory.Context;

    internal EventChannelDomain Events { get; } = null!;

    internal Timekeeping Time { get; }

    internal CpuidPolicy Cpuid { get; }

    internal IoPorts Ports { get; }

    internal PhysicalInterrupts PhysicalInterrupts { get; } = new();

    internal Watchdogs Watchdogs { get; }

    /// <summary>The UUID's 16 bytes, for XENVER_guest_handle.</summary>
    internal byte* Handle => _handle;

    internal bool IsStopping => Volatile.Read(ref _stopping) != 0;

    /// <summary>Starts the vCPUs' threads.</summary>
    public void Start()
    {
        foreach (Vcpu vcpu in _vcpus)
        {
            var thread = new Thread(() => RunVcpu(vcpu), VcpuStackSize) { Name = $"{Name} vcpu{vcpu.Id}", IsBackground = true };
            _threads.Add(thread);
            thread.Start();
        }
    }

    /// <summary>Ends the domain from outside, as xl destroy does. It has stopped when <see cref="Completion"/> says so.</summary>
    public void Destroy() => Stop(new DomainExit(ShutdownReason.PowerOff));

    /// <summary>Ends the domain from outside with a report of where it is, for a guest that seems to hang.</summary>
    /// <param name="why">A sentence for the report.</param>
    public void Crash(string why)
    {
        _ = Interlocked.CompareExchange(ref _crashRequest, why, null);
        Stop(new DomainExit(ShutdownReason.Crash));
    }

    /// <summary>Recounts every reference and use of the domain's frames (<see cref="FrameTableAudit"/>). The vCPUs must have stopped.</summary>
    /// <returns>Null when all counts are what holds them; else sentences about those that are not.</returns>
    public string? AuditFrames() => FrameTableAudit.Check(Context, Layout.WrittenByManager);

    public void Dispose()
    {
        if (_disposed)
            return;
        _disposed = true;
        Destroy();
        foreach (Thread thread in _threads)
            thread.Join();
        Watchdogs.Dispose();
        Events?.Dispose();
        foreach (Vcpu vcpu in _vcpus)
            vcpu.Dispose();
        _memory.Dispose();
        NativeMemory.Free(_handle);
    }

    /// <summary>Whether there is a domain of this number: itself, or the manager, which is domain 0 to it.</summary>
    internal bool Knows(ushort id) => id == Id.Value || id == 0;

    internal Vcpu? FindVcpu(uint id) => id < (uint)_vcpus.Count ? _vcpus[(int)id] : null;

    internal void WriteEmergencyConsole(ReadOnlySpan<byte> text) => EmergencyOutput?.Invoke(text);

    /// <summary>The guest asked to stop (SCHEDOP_shutdown).</summary>
    internal void Shutdown(Vcpu vcpu, ShutdownReason reason)
    {
        reason = _shutdownCode ?? reason;
        string? report = reason == ShutdownReason.Crash ? CrashReport.Write(vcpu, "The guest's kernel reported that it has crashed.") : null;
        Stop(new DomainExit(reason, report));
    }

    /// <summary>SCHEDOP_shutdown_code: the reason that a later shutdown will have, the first one given counts.</summary>
    internal void SetShutdownCode(ShutdownReason reason) => _shutdownCode ??= reason;

    /// <summary>The domain cannot go on: stops it with a report. Called on the vCPU's own thread.</summary>
    internal void Crash(Vcpu vcpu, string why) => Stop(new DomainExit(ShutdownReason.Crash, CrashReport.Write(vcpu, why)));

    private void Stop(DomainExit exit)
    {
        if (Interlocked.CompareExchange(ref _exit, exit, null) == null)
            Volatile.Write(ref _stopping, 1);
        foreach (Vcpu vcpu in _vcpus)
            vcpu.Cpu.Kick();
        if (_threads.Count == 0)
            _ = _completion.TrySetResult(_exit!);
    }

    private void RunVcpu(Vcpu vcpu)
    {
        try
        {
            BeforeFirstEntry?.Invoke();
            long before = GC.GetAllocatedBytesForCurrentThread();
            vcpu.Run();
            AllocatedBytes = GC.GetAllocatedBytesForCurrentThread() - before;
        }
        catch (Exception exception)
        {
            // A defect of ours must end this domain, and only this one.
            Stop(new DomainExit(ShutdownReason.Crash, CrashReport.Write(vcpu, $"XenSharp failed while serving the guest: {exception}")));
        }

        DomainExit exit = _exit!;
        if (_crashRequest is { } why && exit is { Reason: ShutdownReason.Crash, Report: null })
            exit = exit with { Report = CrashReport.Write(vcpu, why) };
        _ = _completion.TrySetResult(exit);
    }
}

/// <summary>Takes what a guest prints by console_io.</summary>
public delegate void EmergencyConsole(ReadOnlySpan<byte> text);
