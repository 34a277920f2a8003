// Known differences of the scripts in guests/Scripts/Events.
namespace XenSharp.Oracle.Differences;

internal static class EventDifferences
{
    public static IReadOnlyList<KnownDifference> All { get; } =
    [
    ];
}
