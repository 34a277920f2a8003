// The scripts about the processor: exceptions, callbacks, iret, privileged instructions, segments.
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Processor;

/// <summary>The area's scripts.</summary>
internal static class ProcessorScripts
{
    public static IEnumerable<AbiScript> Create() =>
    [
    ];
}
