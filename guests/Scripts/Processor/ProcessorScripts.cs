// The scripts about the processor: exceptions, callbacks, iret, privileged instructions, segments.
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Processor;

/// <summary>The area's scripts.</summary>
internal static class ProcessorScripts
{
    public static IEnumerable<AbiScript> Create() =>
    [
        SetTrapTableScript.Create(),
        SetTrapTableScript.CreateEnding(),
        ExceptionsScript.Create(user: false),
        ExceptionsScript.Create(user: true),
        ExceptionsScript.CreatePageFaults(),
        .. ExceptionsScript.CreateEnding(),
        CallbackScripts.CreateSetCallbacks(),
        CallbackScripts.CreateCallbackOp(),
        CallbackScripts.CreateSystemCalls(),
        CallbackScripts.CreateNmi(),
        IretScripts.CreateIret(),
        IretScripts.CreateStackSwitch(),
        .. IretScripts.CreateEnding(),
        SegmentScripts.CreateSetSegmentBase(),
        SegmentScripts.CreateSelectors(),
        SegmentScripts.CreateTables(),
        LocalTableScript.Create(),
        SegmentScripts.CreateCompatCode(),
        SegmentScripts.CreateCompatSystemCalls(),
        PrivilegedScripts.CreatePrivileged(),
        InstructionFormScript.Create(),
        PrivilegedScripts.CreateControlRegisters(),
        PrivilegedScripts.CreateDebugRegisters(),
        PrivilegedScripts.CreateMsrs(),
        PrivilegedScripts.CreateCpuid(),
        PortScripts.CreatePrivilege(),
        PortScripts.CreatePorts(),
    ];
}
