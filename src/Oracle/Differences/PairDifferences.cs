// Known differences of the scripts in guests/Scripts/Pairs.
namespace XenSharp.Oracle.Differences;

internal static class PairDifferences
{
    private const string Frames =
        "A domain reaches another's pages by frames of its own VM: a page that is granted or given to it has another number there.";

    private const string Dead =
        "Of a domain that has died Xen still maps and copies by its record of an entry that is mapped; here its frames are not taken any more.";

    public static IReadOnlyList<KnownDifference> All { get; } =
    [
        KnownDifference.ByDesign("pair-grant-map", "a page that both have", "b: bus address other than the frame's", "positive", Frames),
        KnownDifference.ByDesign("pair-grant-transfer", "a page goes over", "b: got other than frame", "positive", Frames),
        KnownDifference.ByDesign(
            "pair-frames", "the machine-to-physical table", "b: pfn of a's frame", "-1",
            "A domain's machine-to-physical table tells of its own frames and of those that are granted to it, not of other domains."),
        KnownDifference.ByDesign("pair-grant-versions", "a page for an entry of version 2", "a: got other than frame", "positive", Frames),
        KnownDifference.NotBuilt("pair-end-granter", "its table", "b: load16 map+18", "0xfff7", Dead),
        KnownDifference.NotBuilt("pair-end-granter", "its table", "b: load16 copy+36", "0xfff7", Dead),
        KnownDifference.NotBuilt("pair-end-granter", "its pages are let go", "b: load16 map+18", "0xfff7", Dead),
    ];
}
