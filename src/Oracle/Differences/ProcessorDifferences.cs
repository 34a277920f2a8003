// Known differences of the scripts in guests/Scripts/Processor.
namespace XenSharp.Oracle.Differences;

internal static class ProcessorDifferences
{
    public static IReadOnlyList<KnownDifference> All { get; } =
    [
    ];
}
