using System.Runtime.InteropServices;
using XenSharp.Core;
using XenSharp.Domains.Emulation;
using XenSharp.Domains.Hypercalls;
using XenSharp.Domains.Trace;
using XenSharp.EventChannels;
using XenSharp.Mmu;

namespace XenSharp.Domains;

/// <summary>
/// One virtual CPU of a domain and the loop of its thread: look at timers and events, enter the guest, serve what it came
/// back for.
/// </summary>
internal sealed unsafe class Vcpu : IDisposable
{
    private const int MaxRepeatedFaults = 16;
    private const ulong SyscallLength = 2;

    /// <summary>x87 and SSE state, which every 64-bit processor has.</summary>
    private const ulong InitialXcr0 = 3;

    private readonly ReadOnlyPageFault _readOnlyPageFault;
    private readonly MachineToPhysRead _machineToPhysRead;
    private readonly PrivilegedEmulator _emulator;
    private readonly VcpuNotificationQueue _notifications;
    private readonly Lock _lock = new();
    private GCHandle _handle;
    private int _up;
    private ulong _lastFaultRip;
    private ulong _lastFaultAddress;
    private int _repeatedFaults;
    private bool _continues;
    private long _nextCalibration;
    private long _wakeTime = long.MinValue;
    private long _wakeDeadline;
    private InsideCalls? _insideCalls;

    public Vcpu(Domain domain, IVirtualCpu cpu, VcpuContext* context, int id)
    {
        Domain = domain;
        Cpu = cpu;
        Context = context;
        Id = id;
        context->State->Id = id;
        context->State->Xcr0 = InitialXcr0;
        if (domain.Cpuid.MaxXcr0 != 0)
            cpu.SetXcr0(InitialXcr0);
        context->State->SelectorsReadNull = cpu.ReadsSelectorsAsNull ? 1 : 0;
        context->State->Cr4 = PrivilegedEmulator.GuestCr4(domain.Cpuid, 0);
        context->State->DebugRegisters[6] = DebugRegisters.StatusOnes;
        context->State->DebugRegisters[7] = DebugRegisters.ControlOnes;
        context->Registers = cpu.Registers;
        context->Segments = cpu.Segments;
        context->PageTableWrites = cpu.PageTableWrites;
        context->DescriptorWindow = cpu.DescriptorWindow;
        context->KickPending = cpu.KickPending;
        context->Budget.ReadTimeStampCounter = cpu.ReadTimeStampCounter;
        context->Budget.Cycles = PreemptionBudget.Microseconds * domain.Time.TscKiloHertz / 1000;
        _handle = GCHandle.Alloc(this);
        context->Owner = GCHandle.ToIntPtr(_handle);
        context->Kick = &KickByContext;
        context->State->VcpuInfoFrame = domain.Context->State->SharedInfoFrame;
        context->State->VcpuInfoOffset = id * sizeof(VcpuInfo);
        domain.Events.AddVcpu(context, cpu);
        _notifications = domain.Events.NotificationQueue(id);
        _readOnlyPageFault = new ReadOnlyPageFault(context);
        _machineToPhysRead = new MachineToPhysRead(context);
        _emulator = new PrivilegedEmulator(context, new PrivilegedState(this));
        Runstate = new Runstate(this);
    }

    public int Id { get; }

    /// <summary>Whether the vCPU runs, or would if it had something to do (_VPF_down is clear).</summary>
    public bool IsUp => Volatile.Read(ref _up) != 0;

    /// <summary>Whether it has a state to run with: from the domain builder or VCPUOP_initialise.</summary>
    public bool IsInitialised { get; private set; }

    /// <summary>Whether it has a vcpu_info: those past the ones in shared_info have to be given one before they can be initialised.</summary>
    public bool HasInfo => Id < SharedInfoLayout.LegacyVcpus || Context->State->VcpuInfoFrame != Context->Domain->State->SharedInfoFrame;

    public Domain Domain { get; }

    public IVirtualCpu Cpu { get; }

    public VcpuContext* Context { get; }

    public VcpuTimers Timers { get; } = new();

    public Runstate Runstate { get; }

    public HypercallHistory History { get; } = new();

    /// <summary>Where it is, as far as another thread can see.</summary>
    public VcpuActivity Activity => new(
        Id, IsUp, Volatile.Read(in Context->PageTableWrites->Running) != 0, Waiting, Volatile.Read(in Context->Accessing) != 0,
        Volatile.Read(in Context->PageTableWrites->Count), Volatile.Read(in Context->PageTableWrites->FlushRequested) != 0, Context->Registers->Rip,
        (HypercallNumber)Context->Registers->Rax, History.Count, HostThread.ProcessorTime, HostThread.Id);

    /// <summary>The host's thread that runs it.</summary>
    public VcpuThread HostThread { get; } = new();

    /// <summary>Records what the guest asks for; null where nobody wants it.</summary>
    public VcpuTrace? Trace { get; init; }

    /// <summary>
    /// The hypercall was served in part, and the registers are such that the guest would make it again: unless something else
    /// comes first, that needs no entry into the guest.
    /// </summary>
    public void Continue() => _continues = true;

    /// <summary>Set by SCHEDOP_block and poll: sleep before the guest runs on.</summary>
    public WaitState Waiting { get; set; }

    /// <summary>True while a multicall is being worked through.</summary>
    public bool InMulticall { get; set; }

    /// <summary>Whether <see cref="Run"/> was called before. The vCPU's own thread's to know.</summary>
    public bool HasRun { get; private set; }

    /// <summary>
    /// Runs until the domain stops; again, and from where it was, once the domain was resumed. The calling thread is the vCPU's from here
    /// on.
    /// </summary>
    public void Run()
    {
        Runstate.Change(RunstateKind.Running);
        if (!HasRun)
        {
            BeginFirstRun();

            // One that is made paused waits with its first instruction.
            if (Domain.Rest.Wanted)
                Rest();
            if (Id == 0)
                Domain.BeforeFirstEntry?.Invoke();
        }

        while (!Domain.IsStopping)
        {
            if (Domain.Rest.Wanted)
                Rest();

            if (!IsUp)
            {
                WaitToComeUp();
                continue;
            }

            long now = Domain.Time.SystemTime;
            if (now >= Timers.Next)
                FireTimers(now);
            if (now >= _nextCalibration)
                UpdateClock(this, now);
            if (Waiting != WaitState.None)
            {
                Wait();
                continue;
            }

            bool continues = _continues && !DueToElsewhere();
            _continues = false;
            if (continues)
            {
                // It may wait for another vCPU.
                if (Domain.Context->State->StartedVcpus > 1)
                    _ = Thread.Yield();
                Context->Registers->Rip += SyscallLength;
                Context->Budget.Renew();
                HypercallDispatcher.Dispatch(this);
                continue;
            }

            DeliverEvents();
            Cpu.PageTableRoot = new Mfn(Context->CurrentRoot);
            Cpu.LdtEntries = Context->State->LdtEntries;
            Cpu.SetWakeTimer(WakeDeadline());
            _insideCalls?.BeforeEntry(_wakeTime);
            VcpuExit exit = Cpu.Run();
            _insideCalls?.AfterExit();
            Handle(exit);

            // Entries of other domains' pages may have been overwritten, which ends their use as well as unmapping them does.
            if (Volatile.Read(in Context->Domain->WindowReleased) != 0)
                Domain.Window.Collect(Context);
            Domain.Scrubber.AfterExit();
            Domain.Audit?.AfterExit(this);
        }

        Runstate.Change(RunstateKind.Offline);

        // Others that are not yet at their end may wait for what this one has stored.
        Cpu.Settle();
    }

    private void BeginFirstRun()
    {
        HasRun = true;
        _insideCalls = InsideCalls.Of(this);
        Trace?.Boot();
        Timers.SetPeriodic(VcpuTimers.InitialPeriod, Domain.Time.SystemTime);
        if (!GuestEntry.LoadSegments(Context))
            Domain.Crash(this, "A vCPU starts with segments that cannot be loaded, and the guest has no kernel stack for its failsafe callback.");
    }

    private void Rest()
    {
        // Others that have not come so far may wait for what this one has stored.
        Cpu.Settle();
        bool paused = IsUp && Domain.PauseCount != 0;
        if (paused)
            Runstate.Change(RunstateKind.Offline);
        Domain.Rest.Rest();
        if (paused)
            Runstate.Change(RunstateKind.Running);
    }

    public void Dispose()
    {
        Cpu.Dispose();
        if (_handle.IsAllocated)
            _handle.Free();
    }

    /// <summary>Gives the vCPU the state that it will start in (VCPUOP_initialise).</summary>
    public Errno Initialise(Vcpu caller, in VcpuInitialisation.GuestContext guest)
    {
        lock (_lock)
        {
            if (IsInitialised)
                return Errno.EEXIST;
            Errno error = VcpuInitialisation.Execute(caller, this, guest);
            IsInitialised = error == Errno.None;
            return error;
        }
    }

    /// <summary>The domain builder, or a saved image, has given the vCPU its state: it is up, and waits for <see cref="Begin"/>.</summary>
    public void MarkInitialised()
    {
        IsInitialised = true;
        _up = 1;
    }

    /// <summary>Lets the vCPU run (VCPUOP_up).</summary>
    public void BringUp()
    {
        if (Interlocked.Exchange(ref _up, 1) == 0)
            Begin();
    }

    /// <summary>Goes on with a vCPU that is up: on a new thread, or where it waits.</summary>
    public void Begin()
    {
        if (Interlocked.Exchange(ref Context->State->Started, 1) == 0)
        {
            _ = Interlocked.Increment(ref Domain.Context->State->StartedVcpus);
            Domain.StartThread(this);
        }
        else
        {
            Cpu.Kick();
        }
    }

    /// <summary>Stops the vCPU at its next instruction (VCPUOP_down).</summary>
    public void TakeDown()
    {
        if (Interlocked.Exchange(ref _up, 0) != 0)
            Cpu.Kick();
    }

    /// <summary>Something that the vCPU has to look at was changed, maybe by itself.</summary>
    public void KickFrom(Vcpu caller)
    {
        if (caller != this)
            Cpu.Kick();
    }

    /// <summary>Writes a new clock for the guest, at once.</summary>
    /// <param name="writer">The vCPU on whose thread this is, and whose tables lead to the second copy.</param>
    /// <param name="now">System time.</param>
    public void UpdateClock(Vcpu writer, long now)
    {
        lock (_lock)
        {
            Domain.Time.Calibrate();
            Domain.Time.Update(&Context->Info->Time);
            if (TimeArea != 0)
            {
                VcpuTimeInfo copy = default;
                Domain.Time.Update(&copy);
                copy.Version = Context->Info->Time.Version;
                writer.WriteAsKernel(TimeArea, copy);
            }

            _nextCalibration = now + Domain.Time.Period;
        }
    }

    /// <summary>VCPUOP_register_vcpu_time_memory_area.</summary>
    public void RegisterTimeArea(Vcpu caller, ulong area)
    {
        lock (_lock)
            TimeArea = area;
        UpdateClock(caller, Domain.Time.SystemTime);
    }

    /// <summary>Moves vcpu_info to a page of the guest's (map_vcpu_info).</summary>
    /// <param name="caller">The vCPU on whose thread this is.</param>
    /// <param name="page">The frame.</param>
    /// <param name="offset">Where in it, in bytes.</param>
    /// <returns>ERESTART when it has to be asked for again.</returns>
    public Errno RegisterInfo(Vcpu caller, ulong page, uint offset)
    {
        if (offset > Paging.PageSize - (ulong)sizeof(VcpuInfo) || (offset & 7) != 0)
            return Errno.ENXIO;

        // Two vCPUs may do this for a third at once.
        lock (_lock)
        {
            if (Context->State->VcpuInfoFrame != Context->Domain->State->SharedInfoFrame)
                return Errno.EINVAL;
            var frame = new Mfn(page);

            // The reference keeps the frame the guest's and writable for as long as the domain lives.
            Errno error = PageTables.GetPageAndType(caller.Context, frame, PageType.Writable, out _);
            if (error != Errno.None)
                return error == Errno.ERESTART ? error : Errno.EINVAL;
            var info = (VcpuInfo*)(Context->Domain->Memory.Page(frame) + offset);
            *info = *Context->Info;
            GuestAccess.Written(caller.Context, frame, offset, (ulong)sizeof(VcpuInfo));
            Volatile.Write(ref *(nint*)&Context->Info, (nint)info);
            Context->State->VcpuInfoFrame = frame.Value;
            Context->State->VcpuInfoOffset = (int)offset;
            Domain.Events.VcpuInfoMoved(Id, caller.Id);
            UpdateClock(caller, Domain.Time.SystemTime);
            return Errno.None;
        }
    }

    /// <inheritdoc cref="IPrivilegedState.NoteGsBaseRead"/>
    public void NoteGsBaseRead(ulong rip, int length) => _insideCalls?.NoteGsBaseRead(rip, length);

    private static void KickByContext(VcpuContext* context) => ((Vcpu)GCHandle.FromIntPtr(context->Owner).Target!).Cpu.Kick();

    private void WaitToComeUp()
    {
        Runstate.Change(RunstateKind.Offline);
        Cpu.Settle();
        while (!Domain.IsStopping && !IsUp)
        {
            Sleep(long.MaxValue);
            DrainNotifications();
        }

        Runstate.Change(RunstateKind.Running);
    }

    /// <summary>
    /// Writes to an area that the guest kernel registered, whatever mode the vCPU is in: user mode's tables lack the kernel.
    /// A write that fails is the guest's loss.
    /// </summary>
    public void WriteAsKernel<T>(ulong address, T value)
        where T : unmanaged
    {
        int mode = Context->State->KernelMode;
        Context->State->KernelMode = 1;
        _ = GuestAccess.Write(Context, address, value);
        Context->State->KernelMode = mode;
    }

    /// <summary>Guest address of a second copy of the clock (VCPUOP_register_vcpu_time_memory_area), 0 for none.</summary>
    public ulong TimeArea { get; private set; }

    /// <summary>Bounces an exception or a software interrupt through the trap table; crashes the domain if it cannot be taken.</summary>
    public void InjectTrap(ExceptionVector vector, uint? errorCode)
    {
        if (GuestEntry.Trap(Context, vector, errorCode.HasValue, errorCode.GetValueOrDefault()))
        {
            Trace?.Delivered(vector, errorCode.GetValueOrDefault());
        }
        else
        {
            Domain.Crash(
                this,
                Context->State->Traps[(int)vector].Address == 0
                    ? $"The guest raised {vector} (vector {(int)vector}, error code {errorCode.GetValueOrDefault():x}) and has no handler for it."
                    : $"The guest raised {vector}, and its kernel stack cannot be written.");
        }
    }

    /// <summary>
    /// Whether something comes before the rest of a hypercall: an upcall or an NMI for the guest, or page-table stores that only
    /// an entry makes. A kick is taken note of by trying to enter.
    /// </summary>
    private bool DueToElsewhere()
        => Context->UpcallDue || Context->State->NmiPending != 0 || Volatile.Read(ref *Context->KickPending) != 0
            || Context->PageTableWrites->EntryFirst != 0
            || Context->PageTableWrites->Count > (Domain.Context->State->StartedVcpus > 1 ? 0 : PageTableWriteQueue.Capacity / 2);

    private void DeliverEvents()
    {
        if (Context->State->NmiPending != 0 && Context->State->NmiMasked == 0)
        {
            // Without a handler it is lost. With one that leaves events unmasked, they come on top of it.
            Context->State->NmiPending = 0;
            if (Context->State->Traps[(int)ExceptionVector.Nmi].Address != 0)
            {
                Context->State->NmiMasked = 1;
                Trace?.BeginTrap(ExceptionVector.Nmi, 0, default);
                InjectTrap(ExceptionVector.Nmi, null);
                Trace?.EndTrap(Domain.IsStopping);
            }
        }

        if (!Context->UpcallDue)
            return;
        Trace?.BeginUpcall();
        bool delivered = GuestEntry.Upcall(Context);
        Trace?.EndUpcall(delivered);
        if (!delivered)
            Domain.Crash(this, "An event is due, and the guest has no event callback or no kernel stack to take it on.");
    }

    private void FireTimers(long now)
    {
        if (Timers.Expire(now))
            Domain.Events.SendVirq(Id, Virq.Timer, Id);
    }

    private void Wait()
    {
        // Others may wait for what this one has stored.
        if (Domain.Context->State->StartedVcpus > 1)
            Cpu.Settle();
        Runstate.Change(RunstateKind.Blocked);
        Domain.Scrubber.BeforeSleep(Context);
        _insideCalls?.Look();
        while (!Domain.IsStopping && StillWaiting())
        {
            long now = Domain.Time.SystemTime;
            if (now >= Timers.NextWhileWaiting)
            {
                FireTimers(now);
                continue;
            }

            // The clock is kept right meanwhile: after a long sleep it would be off by more than it may be put right at once.
            Sleep(Domain.Time.ToMonotonic(Math.Min(Timers.NextWhileWaiting, _nextCalibration)));
            DrainNotifications();
            now = Domain.Time.SystemTime;
            if (now >= _nextCalibration)
                UpdateClock(this, now);
        }

        if (Waiting == WaitState.Polling)
        {
            Domain.Events.EndPoll(Id);
            Timers.Poll = long.MaxValue;
        }

        Waiting = WaitState.None;
        Runstate.Change(RunstateKind.Running);
        _insideCalls?.LookSoon(Domain.Time.SystemTime);
    }

    private void Sleep(long deadline)
    {
        Domain.Rest.Enter();
        Cpu.WaitForKick(deadline);
        Domain.Rest.Leave();
    }

    private bool StillWaiting() => !Context->UpcallDue && (Waiting != WaitState.Polling || Domain.Events.IsPolling(Id))
        && (Waiting != WaitState.Polling || !Timers.PollExpired);

    /// <summary>CLOCK_MONOTONIC at the next thing to do; the same while that is the same, so that the timer need not be set anew.</summary>
    private long WakeDeadline()
    {
        long time = Math.Min(Math.Min(Timers.Next, _nextCalibration), _insideCalls?.LookTime ?? long.MaxValue);
        if (time != _wakeTime)
        {
            _wakeTime = time;
            _wakeDeadline = Domain.Time.ToMonotonic(time);
        }

        return _wakeDeadline;
    }

    private void DrainNotifications()
    {
        // What to do is in the shared bits; a notification only says that it is worth looking.
        while (_notifications.TryTake())
        {
        }
    }

    private void Handle(in VcpuExit exit)
    {
        Context->Budget.Renew();
        switch (exit.Kind)
        {
            case VcpuExitKind.Syscall:
                if (Context->State->KernelMode != 0 && Context->Segments->Cs != FlatSelectors.Ring3Cs32)
                    HypercallDispatcher.Dispatch(this);
                else
                    BounceSyscall();
                return;
            case VcpuExitKind.Exception:
                // One that is refused before the entry comes with stores that others may wait for, while this one waits for them.
                if (Domain.Context->State->StartedVcpus > 1)
                    Cpu.Settle();
                Trace?.BeginTrap(exit.Vector, exit.ErrorCode, Cpu.FaultAddress);
                HandleException(exit.Vector, exit.ErrorCode);
                Trace?.EndTrap(Domain.IsStopping);
                return;
            case VcpuExitKind.Kicked:
                // It may have been the timer, on a clock that is a little ahead of the guest's.
                _wakeTime = long.MinValue;
                DrainNotifications();
                return;
            case VcpuExitKind.GuestIo:
                Trace?.BeginTrap(ExceptionVector.GeneralProtection, 0, default);
                Apply(_emulator.GuestIo(), ExceptionVector.GeneralProtection, 0);
                Trace?.EndTrap(Domain.IsStopping);
                return;
            default:
                Domain.Crash(this, exit.Failure ?? "The virtual machine stopped.");
                return;
        }
    }

    private void BounceSyscall()
    {
        if (GuestEntry.SyscallCallback(Context) == 0)
        {
            Context->Registers->Rip -= SyscallLength;
            Trace?.BeginTrap(ExceptionVector.InvalidOpcode, 0, default);
            RefuseSyscall();
            Trace?.EndTrap(Domain.IsStopping);
            return;
        }

        Trace?.BeginSystemCall();
        EnterSyscall();
        Trace?.End();
    }

    /// <summary>A SYSCALL that the processor raised an exception for, and that was emulated.</summary>
    private void BounceEmulatedSyscall()
    {
        if (GuestEntry.SyscallCallback(Context) != 0)
        {
            EnterSyscall();
            return;
        }

        Context->Registers->Rip -= SyscallLength;
        RefuseSyscall();
    }

    private void EnterSyscall()
    {
        if (!GuestEntry.Syscall(Context))
            Domain.Crash(this, "A user process made a system call, and the guest has no kernel stack to take it on.");
    }

    /// <summary>As on a processor without the instruction, which RIP is on.</summary>
    private void RefuseSyscall()
    {
        InjectTrap(ExceptionVector.InvalidOpcode, null);
        Context->Registers->Rflags &= ~(ulong)Rflags.Direction;
    }

    private void BounceSysenter()
    {
        if (Context->State->SysenterCallback == 0)
            InjectTrap(ExceptionVector.GeneralProtection, 0);
        else if (!GuestEntry.Sysenter(Context))
            Domain.Crash(this, "A user process made a system call by SYSENTER, and the guest has no kernel stack to take it on.");
    }

    private void HandleException(ExceptionVector vector, uint errorCode)
    {
        switch (vector)
        {
            case ExceptionVector.PageFault:
                HandlePageFault(errorCode);
                return;
            case ExceptionVector.GeneralProtection:
                Apply(_emulator.GeneralProtection(errorCode), vector, errorCode);
                return;
            case ExceptionVector.InvalidOpcode:
                Apply(_emulator.InvalidOpcode(), vector, null);
                return;
            case ExceptionVector.DeviceNotAvailable:
                if (Context->State->TaskSwitched != 0)
                {
                    Context->State->TaskSwitched = 0;
                    Cpu.SetTaskSwitched(false);
                    InjectTrap(vector, null);
                }

                return;
            case ExceptionVector.Debug:
                DebugRegisters.Note(Context->State, Cpu.TakeDebugStatus());
                InjectTrap(vector, null);
                return;
            case ExceptionVector.DoubleFault:
            case ExceptionVector.MachineCheck:
                Domain.Crash(this, $"The processor raised {vector} in the guest.");
                return;
            default:
                InjectTrap(vector, vector.PushesErrorCode() ? errorCode : null);
                return;
        }
    }

    private void Apply(in EmulationResult result, ExceptionVector vector, uint? errorCode)
    {
        switch (result.Outcome)
        {
            case EmulationOutcome.Done:
                return;
            case EmulationOutcome.NotHandled:
                InjectTrap(vector, errorCode);
                return;
            case EmulationOutcome.SystemCall:
                BounceEmulatedSyscall();
                return;
            case EmulationOutcome.SystemEnter:
                BounceSysenter();
                return;
        }

        if (result.Vector == ExceptionVector.PageFault && !result.IsSoftwareInterrupt)
            InjectPageFault(result.FaultAddress, result.ErrorCode);
        else
            InjectTrap(result.Vector, !result.IsSoftwareInterrupt && result.Vector.PushesErrorCode() ? result.ErrorCode : null);
    }

    private void HandlePageFault(uint errorCode)
    {
        VirtualAddress address = Cpu.FaultAddress;
        var error = (PageFaultError)errorCode;
        const PageFaultError considered = PageFaultError.Present | PageFaultError.Write | PageFaultError.ReservedBit | PageFaultError.InstructionFetch;
        if (Context->State->KernelMode != 0 && (error & considered) == (PageFaultError.Present | PageFaultError.Write)
            && Domain.Context->State->Has(VmAssist.WritablePageTables))
        {
            if (_readOnlyPageFault.TryEmulate(address))
            {
                // Xen leaves DR6 alone here, unlike where it emulates a privileged instruction.
                if ((Context->Registers->Rflags & (ulong)Rflags.Trap) != 0 && !_readOnlyPageFault.MustRetry)
                    InjectTrap(ExceptionVector.Debug, null);
                return;
            }

            if (_readOnlyPageFault.UnreadableAddress is { } unreadable)
            {
                InjectPageFault(unreadable.Value, (uint)PageFaultError.None);
                return;
            }
        }

        if (address.IsHypervisorReserved)
        {
            ulong offset = address.Value - Context->DescriptorWindow.Ldt.Value;
            if ((error & (PageFaultError.Present | PageFaultError.User | PageFaultError.ReservedBit)) == 0
                && offset < Context->State->LdtEntries * sizeof(ulong))
            {
                HandleLdtFault((uint)offset, errorCode);
                return;
            }

            if (_machineToPhysRead.TryEmulate(address, error))
            {
                // On Xen it is an ordinary load.
                if ((Context->Registers->Rflags & (ulong)Rflags.Trap) != 0)
                {
                    DebugRegisters.Note(Context->State, DebugRegisters.StatusOnes | DebugRegisters.SingleStep);
                    InjectTrap(ExceptionVector.Debug, null);
                }

                return;
            }

            // No entry of ours has a reserved bit: it is how a host shows that it has the slot to itself. To the guest nothing is there.
            if ((error & PageFaultError.ReservedBit) != 0)
                errorCode &= ~(uint)(PageFaultError.Present | PageFaultError.ReservedBit);
        }

        if (IsSpurious(address, error))
            return;
        InjectPageFault(address.Value, errorCode);
    }

    /// <summary>
    /// The processor looked for a descriptor of the LDT, whose page is not mapped in the window (handle_ldt_mapping_fault). Where it
    /// cannot be, the guest gets the fault that it would have had at the table's own address.
    /// </summary>
    private void HandleLdtFault(uint offset, uint errorCode)
    {
        const uint selectorMask = 0xfffc;
        const uint localTable = 1 << 2;
        if (DescriptorTables.MapLdtPage(Context, offset))
            return;
        var linear = new VirtualAddress(Context->State->LdtBase + offset);
        if (linear.IsCanonical)
            InjectPageFault(linear.Value, errorCode);
        else
            InjectTrap(ExceptionVector.GeneralProtection, (offset & selectorMask) | localTable);
    }

    /// <summary>
    /// Whether the tables allow the access by now: a processor may fault on a cached translation that has fewer rights, and
    /// drops it in doing so.
    /// </summary>
    private bool IsSpurious(VirtualAddress address, PageFaultError error)
    {
        if (!address.IsGuest || (error & PageFaultError.InstructionFetch) != 0 || (error & PageFaultError.ReservedBit) != 0)
            return false;
        if (GuestAccess.Translate(Context, address.Value, (error & PageFaultError.Write) != 0) == null)
            return false;
        ulong rip = Context->Registers->Rip;
        _repeatedFaults = rip == _lastFaultRip && address.Value == _lastFaultAddress ? _repeatedFaults + 1 : 0;
        _lastFaultRip = rip;
        _lastFaultAddress = address.Value;
        if (_repeatedFaults < MaxRepeatedFaults)
            return true;
        _repeatedFaults = 0;
        return false;
    }

    private void InjectPageFault(ulong address, uint errorCode)
    {
        GuestEntry.NotePageFault(Context, address, ref errorCode);
        InjectTrap(ExceptionVector.PageFault, errorCode);
    }
}

/// <summary>What a vCPU waits for.</summary>
public enum WaitState
{
    None,

    /// <summary>SCHEDOP_block: an upcall.</summary>
    Blocked,

    /// <summary>SCHEDOP_poll: an upcall, one of the ports, or the timeout.</summary>
    Polling,
}
