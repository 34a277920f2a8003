// Known differences of the scripts in guests/Scripts/Memory.
namespace XenSharp.Oracle.Differences;

internal static class MemoryDifferences
{
    private const string IntoTable = "hypercalls that answer into the machine-to-physical table";
    private const string IntoRange = "hypercalls that answer into the hypervisor's range";
    private const string AcrossStart = "hypercalls that answer across its start";
    private const string Behind = "the tables behind the hypervisor's slots, taken for the guest's own";
    private const string NoFrameList = "XENMEM_machphys_mfn_list is refused before its argument is looked at.";
    private const string MonitorFrames = "The monitor's tables do not lie in the machine's memory; those of Xen do, and are its own.";

    public static IReadOnlyList<KnownDifference> All { get; } =
    [
        KnownDifference.CaseNotBuilt(
            "mmuext-op", "a selector of the LDT is loaded, and its page is typed only then",
            "The LDT is noted but not used: its selectors cannot be loaded, and its pages are not typed."),
        KnownDifference.CaseNotBuilt(
            "memory-op", "the frames of the machine-to-physical table",
            "XENMEM_machphys_mfn_list is refused: the table does not lie in frames that have numbers for the guest."),
        KnownDifference.NotBuilt("hostile-reserved", IntoTable, "memory_op(m2p frames, &m2p[page])", "-ENOSYS", NoFrameList),
        KnownDifference.NotBuilt("hostile-reserved", IntoRange, "memory_op(m2p frames, 0xffff860000000000)", "-ENOSYS", NoFrameList),
        KnownDifference.NotBuilt("hostile-reserved", AcrossStart, "memory_op(m2p frames, 0x80007ffffffffffc)", "-ENOSYS", NoFrameList),
        KnownDifference.CaseNotBuilt(
            "hostile-reserved", "descriptor tables in the hypervisor's range",
            "The LDT is noted but not used: no selector of it is looked for, so that its page is not asked for either."),
        KnownDifference.ByDesign("hostile-reserved", Behind, "mmu_update(l1[0] := frame of root[256]|0x61)", "-EPERM", MonitorFrames),
        KnownDifference.ByDesign("hostile-reserved", Behind, "mmu_update(l1[0] := frame of root[256]|0x63)", "-EPERM", MonitorFrames),
        KnownDifference.ByDesign("hostile-reserved", Behind, "mmu_update(l1[0] := frame of root[260]|0x61)", "-EPERM", MonitorFrames),
        KnownDifference.ByDesign("hostile-reserved", Behind, "mmu_update(l1[0] := frame of root[260]|0x63)", "-EPERM", MonitorFrames),
    ];
}
