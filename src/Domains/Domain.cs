using System.Diagnostics.CodeAnalysis;
using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Domains.Builder;
using XenSharp.Domains.Emulation;
using XenSharp.Domains.Grants;
using XenSharp.Domains.Migration;
using XenSharp.Domains.Trace;
using XenSharp.EventChannels;
using XenSharp.Mmu;

namespace XenSharp.Domains;

/// <summary>
/// One domain: its memory and vCPUs, from being built to having stopped. Made by <see cref="DomainBuilder"/>'s rules, started
/// once, disposed by its owner after <see cref="Completion"/>.
/// </summary>
public sealed unsafe partial class Domain : IDisposable
{
    private const int VcpuStackSize = 1 << 20;

    private readonly DomainMemory _memory;
    private TaskCompletionSource<DomainExit> _completion = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly List<Vcpu> _vcpus = [];

    /// <summary>Threads of vCPUs; its lock is also held where vCPUs go up and down, and while it counts which still run.</summary>
    private readonly List<Thread> _threads = [];
    private readonly GrantTable _managersGrants = new();
    private readonly Lock _emergencyLock = new();
    private readonly byte* _handle;
    private readonly DomainManager _manager;
    private readonly CpuidOptions _processor;
    private DomainExit? _exit;
    private string? _crashRequest;
    private ShutdownReason? _shutdownCode;
    private int _stopping;
    private int _pauses;
    private int _running;
    private long _allocatedBytes;
    private bool _disposed;

    /// <summary>Builds the domain in a fresh VM. The VM stays the caller's to dispose, after this.</summary>
    /// <param name="options">What to build.</param>
    /// <param name="machine">The VM.</param>
    /// <param name="manager">The domains that it is to know, and be known to; null for none.</param>
    /// <exception cref="DomainBuildException">What was asked for cannot be built; the message says why.</exception>
    public Domain(DomainOptions options, IVirtualMachine machine, DomainManager? manager = null)
        : this(options, machine, manager, image: null)
    {
    }

    private Domain(DomainOptions options, IVirtualMachine machine, DomainManager? manager, DomainImageReader? image)
    {
        ArgumentNullException.ThrowIfNull(options);
        ArgumentNullException.ThrowIfNull(machine);
        Name = options.Name;
        _manager = manager ?? new DomainManager();
        Time = new Timekeeping(machine.TimeStampCounter, options.HostTsc) { WallClockOffset = TimeSpan.FromSeconds(options.TimeOffsetSeconds) };
        Rest = new VcpuRest(Time);
        Ports = new IoPorts(() => Time.SystemTime);
        _processor = options.Cpuid with
        {
            TscKiloHertz = machine.TimeStampCounter.KiloHertz,
            HostTscKiloHertz = machine.TimeStampCounter.KiloHertz,
            EndOfMachineFrames = machine.Memory.EndFrame,
            VcpuCount = options.Vcpus,
        };
        Cpuid = CpuidPolicy.FromHost(_processor);
        Id = new DomainId(_manager.Reserve(options.Id));
        try
        {
            Watchdogs = new Watchdogs(() => Stop(new DomainExit(ShutdownReason.Watchdog)));
            _handle = (byte*)NativeMemory.Alloc(16);
            _ = options.Uuid.TryWriteBytes(new Span<byte>(_handle, 16), bigEndian: true, out _);
            _memory = new DomainMemory(
                machine, Id.Value, options.Vcpus, DomainOptions.MaxPages(options.MemoryMiB),
                DomainOptions.Pages(Math.Max(options.MemoryMiB, options.MaxMemoryMiB)), options.ShadowPageTables);
            Context->KnownDomains = _manager.Known;
            Context->MachineFrames = _manager.MachineFrames;
            Outside = new OutsideUse(Context, machine, () => _manager.Remove(Id.Value));
            Window = new GrantWindow(Context, machine, _manager);
            Granted = new BackendGrants(this);
            Scrubber = new Scrubber(Context, machine);
            Audit = options.AuditInterval == 0 ? null : new DomainAudit(options.AuditInterval);
            DomainBuilder? builder = image == null ? new DomainBuilder(_memory.Context, options) : null;
            builder?.AllocateMemory();
            DomainBuilder.AllocateSharedInfo(Context);
            Events = new EventChannelDomain(
                Context, Id.Value, id => _manager.Find(id)?.Events, new WritableFrames(), options.MaxEventChannels);
            ConsoleChannel = Events.AllocateBackend(out EventChannelPort consolePort);
            StoreChannel = Events.AllocateBackend(out EventChannelPort storePort);
            ConsolePort = consolePort.Value;
            StorePort = storePort.Value;
            Context->State->VcpuCount = options.Vcpus;
            for (int i = 0; i < options.Vcpus; i++)
                AddVcpu(machine, i, options);
            if (builder != null)
            {
                Layout = builder.Build(_vcpus[0].Context, ConsolePort, StorePort);
                _vcpus[0].MarkInitialised();
            }
            else
            {
                // A balloon may have grown past the memory that is asked for: what the domain had it keeps.
                ulong mayOwn = MaxPages;
                MaxPages = DomainOptions.MaxPages(Math.Max(options.MemoryMiB, options.MaxMemoryMiB));
                Layout = new DomainRestorer(this, image!).Restore();
                MaxPages = Math.Max(mayOwn, OwnedPages);
            }

            Grants = new GrantTable(this, options.Vcpus, options.GrantLimits);
            GrantRings();
            Time.UpdateWallClock(Context->SharedInfo);
            _manager.Publish(this);
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

    /// <summary>
    /// Completes when the domain has stopped and no vCPU runs any more. After <see cref="Resume"/> it is another one, of the run that
    /// began with it.
    /// </summary>
    public Task<DomainExit> Completion
    {
        get
        {
            lock (_threads)
                return _completion.Task;
        }
    }

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

    /// <summary>What the guest grants to domain 0, for back ends in this process.</summary>
    public BackendGrants Granted { get; } = null!;

    /// <summary>The guest's port of the console.</summary>
    public uint ConsolePort { get; }

    /// <summary>The guest's port of xenstore.</summary>
    public uint StorePort { get; }

    /// <summary>Receives what the guest prints by console_io; called on the vCPU's thread with bytes to copy.</summary>
    public EmergencyConsole? EmergencyOutput { get; set; }

    /// <summary>Raised on the first vCPU's thread right before the domain's first entry; one that is made paused waits before it.</summary>
    public Action? BeforeFirstEntry { get; set; }

    /// <summary>Bytes of managed memory that serving the guest took on its vCPUs' threads; known once the domain has stopped.</summary>
    public long AllocatedBytes => Volatile.Read(ref _allocatedBytes);

    /// <summary>Hypercalls that the guest has made, by now.</summary>
    public ulong HypercallCount
    {
        get
        {
            ulong count = 0;
            foreach (Vcpu vcpu in _vcpus)
                count += vcpu.History.Count;
            return count;
        }
    }

    /// <summary>Where each vCPU is; for a look at a domain that runs.</summary>
    public IReadOnlyList<VcpuActivity> Activity
        => [.. _vcpus.Select(static vcpu => vcpu.Activity)];

    /// <summary>Frames that the domain owns (tot_pages); changes while it runs.</summary>
    public ulong OwnedPages => Volatile.Read(in Context->State->OwnedPages);

    /// <summary>Frames that the domain may own (max_pages). It keeps those that it has beyond that, and gets no more.</summary>
    public ulong MaxPages
    {
        get => Volatile.Read(in Context->State->MaxPages);
        set => Volatile.Write(ref Context->State->MaxPages, value);
    }

    /// <summary>Frames of other domains that the domain has mapped by their grants; changes while it runs.</summary>
    public int ForeignPages => Window.ShownCount;

    internal DomainContext* Context => _memory.Context;

    /// <summary>How often the domain's books were checked (<see cref="DomainOptions.AuditInterval"/>).</summary>
    public long AuditCount => Audit?.Count ?? 0;

    /// <summary>How often <see cref="Pause"/> was called and not yet taken back.</summary>
    public int PauseCount => Volatile.Read(in _pauses);

    internal VcpuRest Rest { get; }

    internal Scrubber Scrubber { get; } = null!;

    /// <summary>Checks the domain's books now and then; null where nobody wants it.</summary>
    internal DomainAudit? Audit { get; }

    internal EventChannelDomain Events { get; } = null!;

    /// <summary>What the domain grants to others, and has mapped of theirs.</summary>
    internal GrantTable Grants { get; } = null!;

    /// <summary>What others do with the domain's memory.</summary>
    internal OutsideUse Outside { get; } = null!;

    /// <summary>What the domain has mapped of others' memory.</summary>
    internal GrantWindow Window { get; } = null!;

    internal Timekeeping Time { get; }

    internal CpuidPolicy Cpuid { get; private set; }

    /// <summary>Has CPUID show no more than a guest knows already that was saved elsewhere; before any vCPU has run.</summary>
    internal void RestrictCpuid(IReadOnlyList<CpuidOverride> overrides)
        => Cpuid = CpuidPolicy.FromHost(_processor with { Overrides = [.. _processor.Overrides, .. overrides] });

    internal IoPorts Ports { get; }

    internal PhysicalInterrupts PhysicalInterrupts { get; } = new();

    internal Watchdogs Watchdogs { get; }

    /// <summary>The UUID's 16 bytes, for XENVER_guest_handle.</summary>
    internal byte* Handle => _handle;

    internal bool IsStopping => Volatile.Read(ref _stopping) != 0;

    /// <summary>Connects a back end, in domain 0's name, to a port that the guest allocated for it. Any thread, as long as there is the domain.</summary>
    /// <param name="guestPort">The port, as the guest told it (event-channel in its part of xenstore).</param>
    /// <param name="backend">The far end, which completes with the domain.</param>
    /// <returns>False for a port that does not wait for domain 0, and when the domain is going away.</returns>
    public bool TryConnect(uint guestPort, [NotNullWhen(true)] out EventChannelBackend? backend)
        => Events.TryBindBackend(new EventChannelPort(guestPort), out backend) == 0;

    /// <summary>Starts the vCPUs that are up: the first one, of a domain that was restored all that were when it was saved.</summary>
    public void Start()
    {
        foreach (Vcpu vcpu in _vcpus)
        {
            if (vcpu.IsUp)
                vcpu.Begin();
        }
    }

    /// <summary>
    /// Stops all vCPUs until <see cref="Unpause"/> was called as often (XEN_DOMCTL_pausedomain): once this returns nothing of the guest is
    /// executed, and no vCPU's thread writes to its memory. Time goes on, and timers that have run out fire afterwards. A domain that is
    /// paused before it was started waits with its first instruction. Not for the domain's own threads.
    /// </summary>
    public void Pause()
    {
        _ = Interlocked.Increment(ref _pauses);
        Rest.Want();
        foreach (Vcpu vcpu in _vcpus)
            vcpu.Cpu.Kick();
        _ = Rest.Await();
    }

    /// <summary>Takes one <see cref="Pause"/> back (XEN_DOMCTL_unpausedomain).</summary>
    /// <returns>False when the domain was not paused.</returns>
    public bool Unpause()
    {
        int pauses;
        do
        {
            pauses = Volatile.Read(in _pauses);
            if (pauses == 0)
                return false;
        }
        while (Interlocked.CompareExchange(ref _pauses, pauses - 1, pauses) != pauses);
        Rest.Release();
        return true;
    }

    /// <summary>Makes a non-maskable interrupt pending on a vCPU (XEN_DOMCTL_sendtrigger). A guest without a handler for it does not notice.</summary>
    /// <param name="vcpu">The vCPU's number.</param>
    /// <returns>False where there is no such vCPU.</returns>
    public bool SendNmi(int vcpu)
    {
        if (vcpu < 0 || FindVcpu((uint)vcpu) is not { } target)
            return false;
        Volatile.Write(ref target.Context->State->NmiPending, 1);
        target.Cpu.Kick();
        return true;
    }

    /// <summary>Says which of the host's processors a vCPU may run on (XEN_DOMCTL_setvcpuaffinity's hard affinity).</summary>
    /// <param name="vcpu">The vCPU's number.</param>
    /// <param name="processors">Numbers of the host's processors, at least one.</param>
    /// <returns>False where there is no such vCPU, or the host does not let it.</returns>
    public bool SetProcessors(int vcpu, IReadOnlyList<int> processors)
        => vcpu >= 0 && FindVcpu((uint)vcpu) is { } target && target.HostThread.SetProcessors(processors);

    /// <summary>Ends the domain from outside, as xl destroy does. It has stopped when <see cref="Completion"/> says so.</summary>
    public void Destroy()
    {
        // One that is suspended is not resumed any more; where it was resumed before this, it stops again.
        EndResumability();
        Stop(new DomainExit(ShutdownReason.PowerOff));
    }

    /// <summary>Ends the domain from outside with a report of where it is, for a guest that seems to hang.</summary>
    /// <param name="why">A sentence for the report.</param>
    public void Crash(string why)
    {
        _ = Interlocked.CompareExchange(ref _crashRequest, why, null);
        Stop(new DomainExit(ShutdownReason.Crash));
    }

    /// <summary>Recounts every reference and use of the domain's frames (<see cref="FrameTableAudit"/>). The vCPUs must be at rest.</summary>
    /// <returns>Null when all counts are what holds them; else sentences about those that are not.</returns>
    public string? AuditFrames()
    {
        List<ulong> writable = [.. Layout.WrittenByManager, PhysicalInterrupts.EoiFrame ?? 0, .. Events.HeldFrames];
        List<ulong> referenced = [];
        Grants.AddHeld(writable, referenced);
        Outside.AddHeld(writable, referenced);
        return FrameTableAudit.Check(Context, CollectionsMarshal.AsSpan(writable), CollectionsMarshal.AsSpan(referenced)) ?? ScrubAudit.Check(Context);
    }

    public void Dispose()
    {
        if (_disposed)
            return;
        _disposed = true;
        Destroy();

        // None is added any more: a vCPU that could start one has seen that the domain stops.
        Thread[] threads;
        lock (_threads)
            threads = [.. _threads];
        foreach (Thread thread in threads)
            thread.Join();

        // A constructor that failed may have come to any point.
        Watchdogs?.Dispose();
        if (Grants != null)
            GrantMap.ReleaseAll(this);
        Window?.Dispose();
        Events?.Dispose();

        // Nobody looks at the domain's memory from here on, but who has some of it mapped.
        bool lives = Outside?.Close() ?? false;
        foreach (Vcpu vcpu in _vcpus)
            vcpu.Dispose();
        Grants?.Dispose();
        _managersGrants.Dispose();
        _memory?.Dispose();
        NativeMemory.Free(_handle);
        if (!lives)
            _manager.Remove(Id.Value);
    }

    /// <summary>Whether there is a domain of this number: itself, another, or the manager, which is domain 0 to it.</summary>
    internal bool Knows(ushort id) => id == Id.Value || id == 0 || _manager.Find(id) != null;

    /// <summary>
    /// The grant table of a domain that there is: the domain's own, the manager's, or another's, which stays in place with its memory until
    /// <see cref="LeaveGrants"/>.
    /// </summary>
    /// <param name="id">A number, not DOMID_SELF.</param>
    internal GrantTable? EnterGrants(ushort id)
        => id == Id.Value ? Grants : id == 0 ? _managersGrants
            : _manager.Find(id) is { } other && other.Outside.TryEnter() ? other.Grants : null;

    /// <summary>
    /// What a request comes to whose domain <see cref="EnterGrants"/> does not find: where there still is one, because others have its
    /// memory mapped, it has no pages.
    /// </summary>
    internal GrantStatus WhyNotEntered(ushort id) => Knows(id) ? GrantStatus.BadPage : GrantStatus.BadDomain;

    /// <summary>Ends <see cref="EnterGrants"/>.</summary>
    internal void LeaveGrants(GrantTable? table)
    {
        if (table?.Owner is { } owner && owner != this)
            owner.Outside.Exit();
    }

    /// <summary>Whether a domain is still known by its number, if only because others have its memory mapped.</summary>
    internal bool StillKnows(Domain other) => _manager.Find(other.Id.Value) == other;

    internal Vcpu? FindVcpu(uint id) => id < (uint)_vcpus.Count ? _vcpus[(int)id] : null;

    /// <summary>Makes all vCPUs but one come to the top of their loops.</summary>
    internal void KickOthers(Vcpu vcpu)
    {
        foreach (Vcpu other in _vcpus)
            other.KickFrom(vcpu);
    }

    internal void WriteEmergencyConsole(ReadOnlySpan<byte> text)
    {
        lock (_emergencyLock)
            EmergencyOutput?.Invoke(text);
    }

    /// <summary>Starts the thread of a vCPU that is up for the first time.</summary>
    internal void StartThread(Vcpu vcpu)
    {
        lock (_threads)
        {
            if (IsStopping)
                return;
            int run = _run;
            var thread = new Thread(() => RunVcpu(vcpu, run), VcpuStackSize) { Name = $"{Name} vcpu{vcpu.Id}", IsBackground = true };
            _threads.Add(thread);
            _running++;
            thread.Start();
        }
    }

    /// <summary>Takes a vCPU down, unless it is the only one that is up.</summary>
    internal bool TakeDown(Vcpu vcpu)
    {
        lock (_threads)
        {
            if (_vcpus.TrueForAll(other => other == vcpu || !other.IsUp))
                return false;
            vcpu.TakeDown();
            return true;
        }
    }

    /// <summary>The guest asked to stop (SCHEDOP_shutdown).</summary>
    internal void Shutdown(Vcpu vcpu, ShutdownReason reason)
    {
        reason = _shutdownCode ?? reason;
        string? report = reason == ShutdownReason.Crash ? CrashReport.Write(vcpu, "The guest's kernel reported that it has crashed.") : null;
        Stop(new DomainExit(reason, report), vcpu);
    }

    /// <summary>SCHEDOP_shutdown_code: the reason that a later shutdown will have, the first one given counts.</summary>
    internal void SetShutdownCode(ShutdownReason reason) => _shutdownCode ??= reason;

    /// <summary>The domain cannot go on: stops it with a report. Called on the vCPU's own thread.</summary>
    internal void Crash(Vcpu vcpu, string why) => Stop(new DomainExit(ShutdownReason.Crash, CrashReport.Write(vcpu, why)));

    private void Stop(DomainExit exit, Vcpu? asker = null)
    {
        lock (_threads)
        {
            if (_exit == null)
            {
                _exit = exit;
                _suspender = exit.Reason == ShutdownReason.Suspend ? asker : null;
                Volatile.Write(ref _stopping, 1);
            }

            Rest.End();
        }

        foreach (Vcpu vcpu in _vcpus)
            vcpu.Cpu.Kick();
        lock (_threads)
        {
            if (_running == 0)
                _ = _completion.TrySetResult(_exit);
        }
    }

    /// <summary>Gives the domain the first frame of its grant table, with the rings that it shares with the manager (xc_dom_gnttab_seed).</summary>
    private void GrantRings()
    {
        if (Grants.Grow(_vcpus[0].Context, 1) != Errno.None)
            throw new DomainBuildException("The virtual machine has no room for the domain's grant table.");
        Grants.Seed(GrantTable.ConsoleReference, Layout.Console);
        Grants.Seed(GrantTable.XenstoreReference, Layout.Store);
    }

    private void AddVcpu(IVirtualMachine machine, int id, DomainOptions options)
    {
        VcpuContext* context = _memory.VcpuContexts + id;
        context->Domain = Context;
        context->State = _memory.VcpuStates + id;
        context->Info = id < SharedInfoLayout.LegacyVcpus ? (VcpuInfo*)Context->SharedInfo + id : _memory.VcpuInfos + id;
        _vcpus.Add(new Vcpu(this, machine.CreateVcpu(id), context, id)
        {
            Trace = options.Trace is { } recorder ? new VcpuTrace(context, recorder.Stream((ushort)id), options.HostTsc) : null,
        });
    }

    private void RunVcpu(Vcpu vcpu, int run)
    {
        do
            RunUntilStopped(vcpu);
        while (AwaitResumption(ref run));
    }

    private void RunUntilStopped(Vcpu vcpu)
    {
        vcpu.HostThread.Begin();
        Rest.Leave();
        try
        {
            long before = GC.GetAllocatedBytesForCurrentThread();
            vcpu.Run();
            _ = Interlocked.Add(ref _allocatedBytes, GC.GetAllocatedBytesForCurrentThread() - before);
        }
        catch (Exception exception)
        {
            // A defect of ours must end this domain, and only this one.
            Stop(new DomainExit(ShutdownReason.Crash, CrashReport.Write(vcpu, $"XenSharp failed while serving the guest: {exception}")));
        }

        Rest.Enter();
        vcpu.HostThread.End();
        lock (_threads)
        {
            if (--_running != 0)
                return;
            _ = _completion.TrySetResult(
                _crashRequest is { } why && _exit is { Reason: ShutdownReason.Crash, Report: null }
                    ? _exit with { Report = CrashReport.Write(vcpu, why) }
                    : _exit!);
        }
    }
}

/// <summary>Takes what a guest prints by console_io.</summary>
public delegate void EmergencyConsole(ReadOnlySpan<byte> text);
