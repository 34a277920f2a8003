// All ABI scripts, by area.
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts.Events;
using XenSharp.Guests.Scripts.Memory;
using XenSharp.Guests.Scripts.Pairs;
using XenSharp.Guests.Scripts.Processor;

namespace XenSharp.Guests.Scripts;

/// <summary>The catalogue of scripts.</summary>
public static class AbiScripts
{
    /// <summary>All scripts, fresh: a script is built once.</summary>
    public static IReadOnlyList<AbiScript> Create() =>
        [.. MemoryScripts.Create(), .. EventScripts.Create(), .. ProcessorScripts.Create(), .. PairScripts.Create()];
}
