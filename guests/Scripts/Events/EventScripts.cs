// The scripts about events, time, scheduling, other vCPUs, grants, and what the hypervisor says of itself.
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Events;

/// <summary>The area's scripts.</summary>
internal static class EventScripts
{
    public static IEnumerable<AbiScript> Create() =>
    [
        EventChannelScript.CreatePorts(),
        EventChannelScript.CreateBindings(),
        EventChannelScript.CreatePointers(),
        EventChannelScript.CreateCompat(),
        EventChannelScript.CreateFifo(),
        EventChannelScript.CreateReset(),
        FifoScript.CreateQueues(),
        FifoScript.CreateReset(),
        UpcallScript.Create(),
        TimerScript.CreateSetTimer(),
        TimerScript.CreateVcpuTimers(),
        SchedulerScript.CreatePoll(),
        SchedulerScript.CreateOthers(),
        VcpuScript.CreateOwn(),
        VcpuScript.CreateRunstate(),
        VcpuScript.CreateVcpuInfo(),
        VcpuScript.CreateTime(),
        VcpuScript.CreateSecond(),
        VcpuScript.CreateFailsafe(),
        VcpuScript.CreateLastDown(),
        MulticallScript.Create(),
        HypervisorScript.CreateVersion(),
        HypervisorScript.CreateUnprivileged(),
        HypervisorScript.CreateUnknown(),
        HypervisorScript.CreatePrivileged(),
        HypervisorScript.CreateOthers(),
        HypervisorScript.CreateConsole(),
        PhysdevScript.CreateBoth(),
        PhysdevScript.CreateUnprivileged(),
        GrantScript.Create(),
        GrantMapScript.CreateMap(),
        GrantMapScript.CreateCopy(),
        GrantMapScript.CreateVersions(),
        .. ShutdownScript.Create(),
    ];
}
