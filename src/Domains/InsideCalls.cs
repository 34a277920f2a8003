// What the SYSCALL entry of a vCPU may serve without the manager, and what comes of it.
using XenSharp.Core;
using XenSharp.Domains.Hypercalls;

namespace XenSharp.Domains;

/// <summary>
/// Lets the entry serve, on hosts where it can, what an idle guest asks for at every tick, the return from its interrupt and the next
/// timer, and what a busy one asks for at every switch to another task. The vCPU's own thread only.
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
        _serves = state->KernelMode != 0 && IsInfoShown();

        // What iret changes besides is left to the manager.
        _service->Iret = _serves && state->NmiMasked == 0 && !_vcpu.Domain.Context->State->Has(VmAssist.ArchitecturalIopl) ? 1 : 0;
        _service->SingleshotTimer = _service->TaskSwitch = _serves ? 1 : 0;
        _service->NextLook = (ulong)Math.Max(nextLook, 1);
    }

    /// <summary>Takes over what was served.</summary>
    public void AfterExit()
    {
        // In user mode nothing was; what stands there then is another vCPU's doing.
        if (_serves)
            TakeReport();
        if (LookTime != long.MaxValue && _vcpu.Domain.Time.SystemTime >= LookTime)
            LookTime = long.MaxValue;
    }

    private void TakeReport()
    {
        ulong timeout = Volatile.Read(ref _report->SingleshotTimeout);
        if (timeout != 0)
        {
            _report->SingleshotTimeout = 0;
            _vcpu.Timers.Singleshot = (long)Math.Min(timeout, long.MaxValue);
        }

        if (_report->StackSwitched != 0)
        {
            _report->StackSwitched = 0;
            _ = TaskSwitch.StackSwitch(_vcpu.Context, new HypercallArguments { A0 = _report->KernelSs, A1 = _report->KernelSp });
        }

        if (_report->UserGsBaseSet != 0)
        {
            _report->UserGsBaseSet = 0;
            _ = TaskSwitch.SetSegmentBase(
                _vcpu.Context, new HypercallArguments { A0 = (ulong)TaskSwitch.SegmentBase.GsUser, A1 = _report->UserGsBase });
        }
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
