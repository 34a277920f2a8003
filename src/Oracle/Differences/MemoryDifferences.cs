// Known differences of the scripts in guests/Scripts/Memory.
namespace XenSharp.Oracle.Differences;

internal static class MemoryDifferences
{
    private const string Behind = "the tables behind the hypervisor's slots, taken for the guest's own";
    private const string MonitorFrames = "The monitor's tables do not lie in the machine's memory; those of Xen do, and are its own.";

    public static IReadOnlyList<KnownDifference> All { get; } =
    [
        KnownDifference.ByDesign("hostile-reserved", Behind, "mmu_update(l1[0] := frame of root[256]|0x61)", "-EPERM", MonitorFrames),
        KnownDifference.ByDesign("hostile-reserved", Behind, "mmu_update(l1[0] := frame of root[256]|0x63)", "-EPERM", MonitorFrames),
        KnownDifference.ByDesign("hostile-reserved", Behind, "mmu_update(l1[0] := frame of root[260]|0x61)", "-EPERM", MonitorFrames),
        KnownDifference.ByDesign("hostile-reserved", Behind, "mmu_update(l1[0] := frame of root[260]|0x63)", "-EPERM", MonitorFrames),
    ];
}
