// Known differences of the scripts in guests/Scripts/Memory.
namespace XenSharp.Oracle.Differences;

internal static class MemoryDifferences
{
    private const string Behind = "the tables behind the hypervisor's slots, taken for the guest's own";
    private const string MonitorFrames = "The monitor's tables do not lie in the machine's memory; those of Xen do, and are its own.";
    private const string MachineToPhysFrames =
        "The frames of the machine-to-physical table are refused as frames that are no memory, where Xen refuses them as somebody else's.";

    public static IReadOnlyList<KnownDifference> All { get; } =
    [
        KnownDifference.ByDesign("hostile-reserved", Behind, "mmu_update(l1[0] := frame of root[256]|0x61)", "-EPERM", MonitorFrames),
        KnownDifference.ByDesign("hostile-reserved", Behind, "mmu_update(l1[0] := frame of root[256]|0x63)", "-EPERM", MonitorFrames),
        KnownDifference.ByDesign("hostile-reserved", Behind, "mmu_update(l1[0] := frame of root[260]|0x61)", "-EPERM", MonitorFrames),
        KnownDifference.ByDesign("hostile-reserved", Behind, "mmu_update(l1[0] := frame of root[260]|0x63)", "-EPERM", MonitorFrames),
        .. new[]
        {
            "update_va_mapping(page, m2p frame|0x61, 2)", "update_va_mapping(page, m2p frame|0x63, 2)", "mmu_update(l1[0] := m2p frame|0x61)",
            "mmu_update(l1[0] := m2p frame|0x61, domains 0x7ff1)",
        }.Select(static step => KnownDifference.NotBuilt(
            "memory-op", "the frames of the machine-to-physical table are not for an unprivileged domain to map", step, "-EPERM", MachineToPhysFrames)),
    ];
}
