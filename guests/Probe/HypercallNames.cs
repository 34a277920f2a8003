// Hypercalls as Xen's headers call them.
using System.Text.RegularExpressions;
using XenSharp.Guests.Assembly;

namespace XenSharp.Guests.Probe;

/// <summary>Names for transcripts, from those of the enumeration.</summary>
internal static partial class HypercallNames
{
    public static string Of(GuestHypercall number)
        => Enum.IsDefined(number) ? Word().Replace(number.ToString(), "_$1").TrimStart('_').ToLowerInvariant() : $"hypercall_{(uint)number}";

    [GeneratedRegex("([A-Z])")]
    private static partial Regex Word();
}
