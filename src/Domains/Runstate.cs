using XenSharp.Core;

namespace XenSharp.Domains;

/// <summary>RUNSTATE_*.</summary>
internal enum RunstateKind
{
    Running = 0,
    Runnable = 1,
    Blocked = 2,
    Offline = 3,
}

/// <summary>How long a vCPU was running, blocked and so on, and the guest's copy of it.</summary>
internal sealed unsafe class Runstate(Vcpu vcpu)
{
    /// <summary>XEN_RUNSTATE_UPDATE: set in the entry time while the guest's copy changes.</summary>
    private const ulong UpdateFlag = 1UL << 63;

    private readonly Lock _lock = new();
    private readonly Vcpu _vcpu = vcpu;
    private VcpuRunstateInfo _info = new() { State = (int)RunstateKind.Offline };

    /// <summary>Guest address of the copy, 0 for none.</summary>
    public ulong Area { get; private set; }

    /// <summary>Goes to another state.</summary>
    public void Change(RunstateKind state)
    {
        lock (_lock)
        {
            ulong now = (ulong)_vcpu.Domain.Time.SystemTime;
            _info = UpTo(now);
            _info.State = (int)state;
            _info.StateEntryTime = now;
            Publish();
        }
    }

    /// <summary>The times up to now; the state was entered when it was.</summary>
    public VcpuRunstateInfo Snapshot()
    {
        lock (_lock)
            return UpTo((ulong)_vcpu.Domain.Time.SystemTime);
    }

    private VcpuRunstateInfo UpTo(ulong now)
    {
        VcpuRunstateInfo info = _info;
        info.Time[info.State] += Math.Max(now, info.StateEntryTime) - info.StateEntryTime;
        return info;
    }

    /// <summary>VCPUOP_register_runstate_memory_area; the first copy is written where the caller has the area mapped.</summary>
    public void Register(Vcpu caller, ulong area)
    {
        lock (_lock)
        {
            Area = area;
            if (area != 0)
                caller.WriteAsKernel(area, _info);
        }
    }

    private void Publish()
    {
        if (Area == 0)
            return;
        if (!_vcpu.Domain.Context->State->Has(VmAssist.RunstateUpdateFlag))
        {
            _vcpu.WriteAsKernel(Area, _info);
            return;
        }

        // The guest re-reads while the flag is set, and when the entry time changed under it.
        const ulong entryTimeOffset = 8;
        ulong entryTime = _info.StateEntryTime;
        _vcpu.WriteAsKernel(Area + entryTimeOffset, entryTime | UpdateFlag);
        VcpuRunstateInfo marked = _info;
        marked.StateEntryTime |= UpdateFlag;
        _vcpu.WriteAsKernel(Area, marked);
        _vcpu.WriteAsKernel(Area + entryTimeOffset, entryTime);
    }
}
