// Known differences of the scripts in guests/Scripts/Pairs.
namespace XenSharp.Oracle.Differences;

internal static class PairDifferences
{
    private const string Frames =
        "Each domain is a VM of its own and numbers its machine frames by itself: another's page has a number of the mapping domain's own.";

    public static IReadOnlyList<KnownDifference> All { get; } =
    [
        KnownDifference.ByDesign("pair-grant-map", "a page that both have", "b: bus address other than the frame's", "positive", Frames),
        KnownDifference.ByDesign("pair-grant-transfer", "a page goes over", "b: got other than frame", "positive", Frames),
        KnownDifference.ByDesign("pair-grant-versions", "a page for an entry of version 2", "a: got other than frame", "positive", Frames),
    ];
}
