// Known differences of the scripts in guests/Scripts/Memory.
namespace XenSharp.Oracle.Differences;

internal static class MemoryDifferences
{
    public static IReadOnlyList<KnownDifference> All { get; } =
    [
    ];
}
