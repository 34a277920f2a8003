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
        PageTableStoresScript.Create(),
        PageTableStoreFormScript.Create(),
        UpdateVaMappingScript.Create(),
        MmuextOpScript.Create(),
        BaseptrScript.Create(),
        RemoteFlushScript.Create(),
        MemoryOpScript.Create(),
        ReservationScript.Create(),
        ExchangeScript.Create(),
        DescriptorTablesScript.SetGdt(),
        DescriptorTablesScript.UpdateDescriptor(),
        HypervisorMemoryScript.Create(),
        HostileTablesScript.Create(),
        HostileTypesScript.Create(),
        HostileReservedScript.Create(),
        HostileStoresScript.Create(),
        VmAssistScript.Create(),
    ];
}
