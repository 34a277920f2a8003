// Known differences of the scripts in guests/Scripts/Pairs.
namespace XenSharp.Oracle.Differences;

internal static class PairDifferences
{
    private const string Frames =
        "Each domain is a VM of its own and numbers its machine frames by itself: another's page has a number of the mapping domain's own.";

    private const string Nobodys = "Each domain numbers its machine frames by itself: another's number that is none of its own is nobody's.";

    public static IReadOnlyList<KnownDifference> All { get; } =
    [
        KnownDifference.ByDesign("pair-grant-map", "a page that both have", "b: bus address other than the frame's", "positive", Frames),
        KnownDifference.ByDesign("pair-grant-transfer", "a page goes over", "b: got other than frame", "positive", Frames),
        .. new[]
        {
            "b: update_va_mapping(page6, frame of a|0x63, 2)", "b: mmu_update(&pte(page6) := frame of a|0x63)",
            "b: update_va_mapping(page6, frame of a|0x61, 2)", "b: mmu_update(&pte(page6) := frame of a|0x61)",
        }.Select(static step => KnownDifference.ByDesign("pair-frames", "frames that were never granted", step, "-EPERM", Nobodys)),
        KnownDifference.ByDesign("pair-end-granter", "its table", "b: update_va_mapping(page3, a frame of a's, 2)", "-EPERM", Nobodys),
        KnownDifference.ByDesign(
            "pair-frames", "the machine-to-physical table", "b: pfn of a's frame",
            "#PF(0){cr2 0xffff808000814000, rip probe, cs e030, rflags 46, same stack, ss e02b, mask 1->1}",
            "A domain's table has the frames that it can map: its own and those that were granted to it."),
        KnownDifference.ByDesign("pair-grant-versions", "a page for an entry of version 2", "a: got other than frame", "positive", Frames),
    ];
}
