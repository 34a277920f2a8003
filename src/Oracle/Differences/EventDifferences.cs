// Known differences of the scripts in guests/Scripts/Events.
namespace XenSharp.Oracle.Differences;

internal static class EventDifferences
{
    private const string Console =
        "A domain may always write to the emergency console, as on a Xen built for debugging: what a kernel says before it has a console is what one wants to see.";

    public static IReadOnlyList<KnownDifference> All { get; } =
    [
        .. new (string Step, string Answer)[]
        {
            ("console_io(0, 0, null)", "0"), ("console_io(0, 8, null)", "-EFAULT"), ("console_io(0, 8, non-canonical)", "-EFAULT"),
            ("console_io(0, 8, 4 bytes before a page's end)", "-EFAULT"), ("console_io(0, 1, text)", "0"),
        }.Select(static write => KnownDifference.ByDesign("console-io", "writing is not for a domU", write.Step, write.Answer, Console)),
    ];
}
