// What a comparison says of one script, for programs.
using System.Text.Json;
using System.Text.Json.Serialization;
using XenSharp.Oracle.Comparison;

namespace XenSharp.Cli.Compare;

/// <summary>A script, as <c>xensharp compare --json</c> prints it.</summary>
/// <param name="Script">Its name.</param>
/// <param name="Subject">What it is about.</param>
/// <param name="Good">Whether all is as it should be.</param>
/// <param name="Agree">Cases that answer as Xen does.</param>
/// <param name="ByDesign">Cases that differ for a stated reason, for good.</param>
/// <param name="NotBuilt">Cases that differ because something is not built yet.</param>
/// <param name="Differ">Cases that differ, and nothing says why.</param>
/// <param name="NotReached">Cases that neither guest came to.</param>
/// <param name="Complaints">What is not as it should be, a text each.</param>
internal sealed record ScriptReport(
    string Script, string Subject, bool Good, int Agree, int ByDesign, int NotBuilt, int Differ, int NotReached, IReadOnlyList<string> Complaints)
{
    /// <summary>Prints it as a line of its own.</summary>
    internal static void Print(ScriptComparison comparison)
    {
        SubjectSummary summary = SubjectSummary.Of(comparison.Subject, comparison.Cases);
        var report = new ScriptReport(
            comparison.Script, comparison.Subject, comparison.IsGood, summary.Agree, summary.ByDesign, summary.NotBuilt, summary.Differ,
            summary.NotReached, comparison.Complaints());
        Console.Out.WriteLine(JsonSerializer.Serialize(report, ScriptReportJson.Default.ScriptReport));
    }
}

/// <summary>Made by the compiler, as there is no reflection in the native command.</summary>
[JsonSerializable(typeof(ScriptReport))]
[JsonSourceGenerationOptions(PropertyNamingPolicy = JsonKnownNamingPolicy.CamelCase)]
internal sealed partial class ScriptReportJson : JsonSerializerContext;
