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
    private ulong _lastFaultRip;
    private ulong _lastFaultAddress;
    private int _repeatedFaults;
    private long _nextCalibration;
    private long _wakeTime = long.MinValue;
    private long _wakeDeadline;

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
        context->State->Cr4 = PrivilegedEmulator.GuestCr4(domain.Cpuid, 0);
        context->State->DebugRegisters[6] = DebugRegisters.StatusOnes;
        context->State->DebugRegisters[7] = DebugRegisters.ControlOnes;
        context->Registers = cpu.Registers;
        context->Segments = cpu.Segments;
        context->PageTableWrites = cpu.PageTableWrites;
        context->DescriptorWindow = cpu.DescriptorWindow;
        context->KickPending = cpu.KickPending;
        context->Info = (VcpuInfo*)domain.Context->SharedInfo + id;
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

    public Domain Domain { get; }

    public IVirtualCpu Cpu { get; }

    public VcpuContext* Context { get; }

    public VcpuTimers Timers { get; } = new();

    public Runstate Runstate { get; }

    public HypercallHistory History { get; } = new();

    /// <summary>Records what the guest asks for; null where nobody wants it.</summary>
    public VcpuTrace? Trace { get; init; }

    /// <summary>Set by SCHEDOP_block and poll: sleep before the guest runs on.</summary>
    public WaitState Waiting { get; set; }

    /// <summary>True while a multicall is being worked through.</summary>
    public bool InMulticall { get; set; }

    /// <summary>Runs until the domain stops. The calling thread is the vCPU's from here on.</summary>
    public void Run()
    {
        Runstate.Change(RunstateKind.Running);
        Trace?.Boot();
        Timers.SetPeriodic(VcpuTimers.InitialPeriod, Domain.Time.SystemTime);
        while (!Domain.IsStopping)
        {
            long now = Domain.Time.SystemTime;
            if (now >= Timers.Next)
                FireTimers(now);
            if (now >= _nextCalibration)
                UpdateClock(now);
            if (Waiting != WaitState.None)
            {
                Wait();
                continue;
            }

            DeliverEvents();
            Cpu.PageTableRoot = new Mfn(Context->CurrentRoot);
            Cpu.LdtEntries = Context->State->LdtEntries;
            Cpu.SetWakeTimer(WakeDeadline());
            VcpuExit exit = Cpu.Run();
            Handle(exit);
        }

        Runstate.Change(RunstateKind.Offline);
    }

    public void Dispose() => Cpu.Dispose();

    /// <summary>Writes a new clock for the guest, at once.</summary>
    public void UpdateClock(long now)
    {
        Domain.Time.Calibrate();
        Domain.Time.Update(&Context->Info->Time);
        if (TimeArea != 0)
        {
            VcpuTimeInfo copy = default;
            Domain.Time.Update(&copy);
            copy.Version = Context->Info->Time.Version;
            WriteAsKernel(TimeArea, copy);
        }

        _nextCalibration = now + Domain.Time.Period;
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
    public ulong TimeArea { get; set; }

    /// <summary>Bounces an exception or a software interrupt through the trap table; crashes the domain if it cannot be taken.</summary>
    public void InjectTrap(ExceptionVector vector, uint? errorCode)
    {
        ref TrapInfo trap = ref Context->State->Traps[(int)vector];
        var bounce = new TrapBounce(trap.Address, trap.MasksEvents, errorCode.HasValue, errorCode.GetValueOrDefault());
        if (GuestMode.Bounce(Context, bounce))
        {
            Trace?.Delivered(vector, errorCode.GetValueOrDefault());
        }
        else
        {
            Domain.Crash(
                this,
                trap.Address == 0
                    ? $"The guest raised {vector} (vector {(int)vector}, error code {errorCode.GetValueOrDefault():x}) and has no handler for it."
                    : $"The guest raised {vector}, and its kernel stack cannot be written.");
        }
    }

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
        bool delivered = GuestMode.Bounce(Context, new TrapBounce(Context->State->EventCallback, MasksEvents: true));
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
        Runstate.Change(RunstateKind.Blocked);
        while (!Domain.IsStopping && StillWaiting())
        {
            long now = Domain.Time.SystemTime;
            if (now >= Timers.NextWhileWaiting)
            {
                FireTimers(now);
                continue;
            }

            Cpu.WaitForKick(Domain.Time.ToMonotonic(Timers.NextWhileWaiting));
            DrainNotifications();
        }

        if (Waiting == WaitState.Polling)
        {
            Domain.Events.EndPoll(Id);
            Timers.Poll = long.MaxValue;
        }

        Waiting = WaitState.None;
        Runstate.Change(RunstateKind.Running);
    }

    private bool StillWaiting() => !Context->UpcallDue && (Waiting != WaitState.Polling || Domain.Events.IsPolling(Id))
        && (Waiting != WaitState.Polling || !Timers.PollExpired);

    /// <summary>CLOCK_MONOTONIC at the next thing to do; the same while that is the same, so that the timer need not be set anew.</summary>
    private long WakeDeadline()
    {
        long time = Math.Min(Timers.Next, _nextCalibration);
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
        switch (exit.Kind)
        {
            case VcpuExitKind.Syscall:
                if (Context->State->KernelMode != 0)
                    HypercallDispatcher.Dispatch(this);
                else
                    BounceSyscall();
                return;
            case VcpuExitKind.Exception:
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
        // 32-bit code has a callback of its own, but not a flag.
        VcpuState* state = Context->State;
        ulong callback = Context->Segments->Cs == FlatSelectors.Ring3Cs32 ? state->Syscall32Callback : state->SyscallCallback;
        if (callback == 0)
        {
            // As on a processor without the instruction.
            Context->Registers->Rip -= SyscallLength;
            Trace?.BeginTrap(ExceptionVector.InvalidOpcode, 0, default);
            InjectTrap(ExceptionVector.InvalidOpcode, null);
            Trace?.EndTrap(Domain.IsStopping);
            return;
        }

        Trace?.BeginSystemCall();
        bool masks = (state->CallbackFlags & CallbackFlags.SyscallDisablesEvents) != 0;
        if (!GuestMode.Bounce(Context, new TrapBounce(callback, masks)))
            Domain.Crash(this, "A user process made a system call, and the guest has no kernel stack to take it on.");

        // The mask of the guest's virtual SYSCALL clears this flag and no other.
        Context->Registers->Rflags &= ~(ulong)Rflags.Direction;
        Trace?.End();
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
                if ((Context->Registers->Rflags & (ulong)Rflags.Trap) != 0)
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
        Context->State->Cr2 = address;
        Context->Info->Cr2 = address;
        uint guestError = errorCode & ~(uint)PageFaultError.User;
        if (Context->State->KernelMode == 0)
            guestError |= (uint)PageFaultError.User;
        InjectTrap(ExceptionVector.PageFault, guestError);
    }
}

/// <summary>What a vCPU waits for.</summary>
internal enum WaitState
{
    None,

    /// <summary>SCHEDOP_block: an upcall.</summary>
    Blocked,

    /// <summary>SCHEDOP_poll: an upcall, one of the ports, or the timeout.</summary>
    Polling,
}
