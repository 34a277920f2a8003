// What the SYSCALL entry of a vCPU may serve without the manager, and what comes of it.
using XenSharp.Core;
using XenSharp.Domains.Emulation;
using XenSharp.Domains.Hypercalls;
using XenSharp.Mmu;

namespace XenSharp.Domains;

/// <summary>
/// Lets the entry serve, on hosts where it can, what an idle guest asks for at every tick, the return from its interrupt and the next
/// timer, and what a busy one asks for at every switch to another task and with every system call. The vCPU's own thread only.
/// </summary>
/// <remarks>
/// A timer that was set that way is not known here before something else brings the vCPU back. So the entry only takes one that is not due
/// before the manager looks anyway; and as a vCPU that was woken mostly sets its timer and sleeps again, a look soon after that is made sure of.
/// </remarks>
internal sealed unsafe class InsideCalls
{
    /// <summary>Nanoseconds from a wake-up to the look at what was served since.</summary>
    private const long Soon = 1_000_000;

    private readonly Vcpu _vcpu;
    private readonly EntryService* _service;
    private readonly EntryReport* _report;
    private VcpuInfo* _info;
    private bool _serves;
    private ulong _lastGsBaseRead;
    private ulong _gsBaseRead;

    private InsideCalls(Vcpu vcpu)
    {
        _vcpu = vcpu;
        _service = vcpu.Cpu.EntryService;
        _report = vcpu.Cpu.EntryReport;
    }

    /// <summary>Null where the host's entries serve nothing, or all that a vCPU does is to be recorded.</summary>
    public static InsideCalls? Of(Vcpu vcpu) => vcpu.Cpu.EntryService == null || vcpu.Trace != null ? null : new InsideCalls(vcpu);

    /// <summary>System time at which the vCPU is to leave the guest for no other reason than a look; <see cref="long.MaxValue"/> for none.</summary>
    public long LookTime { get; private set; } = long.MaxValue;

    /// <summary>The vCPU was woken: what it does at first is looked at soon.</summary>
    public void LookSoon(long now) => LookTime = now + Soon;

    /// <summary>The vCPU has come back by itself, to sleep.</summary>
    public void Look() => LookTime = long.MaxValue;

    /// <summary>Says what may be served in the entry that follows.</summary>
    /// <param name="nextLook">System time at which the vCPU is brought back at the latest.</param>
    public void BeforeEntry(long nextLook)
    {
        VcpuState* state = _vcpu.Context->State;
        bool isShown = IsInfoShown();

        // What iret changes besides is left to the manager.
        bool irets = isShown && state->NmiMasked == 0 && !_vcpu.Domain.Context->State->Has(VmAssist.ArchitecturalIopl);
        bool switches = irets && MaySwitchModes();
        _serves = isShown && (state->KernelMode != 0 || switches);
        _service->Iret = _serves && irets ? 1 : 0;
        _service->SingleshotTimer = _service->TaskSwitch = _serves ? 1 : 0;
        _service->NextLook = (ulong)Math.Max(nextLook, 1);
        _service->ModeSwitch = switches ? 1 : 0;
        _service->GsBaseRead = _serves && !HasBreakpoints ? _gsBaseRead : 0;
        if (!_serves)
            return;
        _service->KernelRoot = state->KernelRoot;
        _service->UserRoot = state->UserRoot;
        _service->SyscallCallback = state->SyscallCallback;
        _report->KernelSs = state->KernelSs;
        _report->KernelSp = state->KernelSp;
        _report->InactiveGsBase = state->InactiveGsBase;
    }

    /// <inheritdoc cref="IPrivilegedState.NoteGsBaseRead"/>
    public void NoteGsBaseRead(ulong rip, int length)
    {
        const int withoutPrefixes = 2;

        // Two of them, that take turns, do not drive each other out.
        if (rip == _lastGsBaseRead && length == withoutPrefixes)
            _gsBaseRead = rip;
        _lastGsBaseRead = rip;
    }

    /// <summary>Takes over what was served.</summary>
    public void AfterExit()
    {
        // Else nothing was; what stands there then is another vCPU's doing.
        if (_serves)
            TakeReport();
        if (LookTime != long.MaxValue && _vcpu.Domain.Time.SystemTime >= LookTime)
            LookTime = long.MaxValue;
    }

    /// <summary>
    /// Whether the ways between the modes are as the entry has them: a callback that masks events, and two roots, each of which shows its
    /// own mode's entry; and no breakpoint, which the way to user mode would have the processor pass over once.
    /// </summary>
    private bool MaySwitchModes()
    {
        VcpuState* state = _vcpu.Context->State;
        DomainContext* domain = _vcpu.Context->Domain;
        return !HasBreakpoints
            && state->SyscallCallback != 0 && (state->CallbackFlags & CallbackFlags.SyscallDisablesEvents) != 0
            && domain->KernelSlot != 0 && state->UserRoot != 0 && state->UserRoot != state->KernelRoot
            && PageTables.ShowsKernelSlot(domain, new Mfn(state->KernelRoot), kernelMode: true)
            && PageTables.ShowsKernelSlot(domain, new Mfn(state->UserRoot), kernelMode: false);
    }

    private bool HasBreakpoints => (_vcpu.Context->State->DebugRegisters[7] & DebugRegisters.ActiveMask) != 0;

    private void TakeReport()
    {
        VcpuState* state = _vcpu.Context->State;
        ulong timeout = Volatile.Read(ref _report->SingleshotTimeout);
        if (timeout != 0)
        {
            _report->SingleshotTimeout = 0;
            _vcpu.Timers.Singleshot = (long)Math.Min(timeout, long.MaxValue);
        }

        _ = TaskSwitch.StackSwitch(_vcpu.Context, new HypercallArguments { A0 = _report->KernelSs, A1 = _report->KernelSp });
        ulong inactive = Volatile.Read(ref _report->InactiveGsBase);
        if (new VirtualAddress(inactive).IsCanonical)
            state->InactiveGsBase = inactive;
        if (_service->ModeSwitch != 0)
            state->KernelMode = _vcpu.Cpu.PageTableRoot.Value == state->UserRoot ? 0 : 1;
    }

    private bool IsInfoShown()
    {
        var info = (VcpuInfo*)Volatile.Read(ref *(nint*)&_vcpu.Context->Info);
        if (info == _info)
            return true;
        MachineMemory memory = _vcpu.Domain.Context->Memory;
        MachineAddress address = memory.AddressOf(info);
        if (!memory.Contains(address.Frame))
            return false;
        _vcpu.Cpu.ShowVcpuInfo(address.Frame, address.Offset);
        _info = info;
        return true;
    }
}
