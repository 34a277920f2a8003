// The scripts about memory: page tables, reservations, descriptor tables.
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Memory;

/// <summary>The area's scripts.</summary>
internal static class MemoryScripts
{
    public static IEnumerable<AbiScript> Create() =>
    [
        MmuUpdateScript.Create(),
        MmuUpdateDomainsScript.Create(),
        UpperTablesScript.Create(),
        UpdateVaMappingScript.Create(),
        MmuextOpScript.Create(),
    ];
}
