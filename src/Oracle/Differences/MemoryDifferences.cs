// Known differences of the scripts in guests/Scripts/Memory.
namespace XenSharp.Oracle.Differences;

internal static class MemoryDifferences
{
    public static IReadOnlyList<KnownDifference> All { get; } =
    [
        KnownDifference.CaseNotBuilt(
            "mmuext-op", "a selector of the LDT is loaded, and its page is typed only then",
            "The LDT is noted but not used: its selectors cannot be loaded, and its pages are not typed."),
        KnownDifference.CaseNotBuilt(
            "memory-op", "the frames of the machine-to-physical table",
            "XENMEM_machphys_mfn_list is refused: the table does not lie in frames that have numbers for the guest."),
    ];
}
