// What came of a script, as text: the same wherever the hypervisor answered the same.
namespace XenSharp.Guests.Probe;

/// <summary>A step and what came of it.</summary>
/// <param name="Step">What was done.</param>
/// <param name="Answer">What came of it; null if the guest did not come to it.</param>
public sealed record TranscriptLine(string Step, string? Answer)
{
    public override string ToString() => $"{Step} = {Answer ?? Transcript.NotReached}";
}

/// <summary>A case and its steps.</summary>
public sealed record CaseTranscript(string Name, IReadOnlyList<TranscriptLine> Lines);

/// <summary>What came of a script.</summary>
/// <param name="Script">Its name.</param>
/// <param name="Cases">Its cases, in order.</param>
/// <param name="Ending">How the domain ended, as a word: a reason of SCHEDOP_shutdown, or "timed out".</param>
public sealed record Transcript(string Script, IReadOnlyList<CaseTranscript> Cases, string Ending)
{
    /// <summary>Stands for the answer of a step that the guest did not come to.</summary>
    public const string NotReached = "(not reached)";

    private const string CaseMark = "== ";
    private const string EndingMark = "-- ended: ";

    /// <summary>The text in which it is kept: a line a step under its case's heading.</summary>
    public string ToText() => string.Concat(
        Cases.SelectMany(static c => c.Lines.Select(static line => line.ToString()).Prepend(CaseMark + c.Name)).Append(EndingMark + Ending)
            .Select(static line => line + "\n"));

    /// <summary>Reads what <see cref="ToText"/> wrote.</summary>
    /// <param name="script">The script's name.</param>
    /// <param name="text">The text; lines that begin with '#' are comments.</param>
    /// <exception cref="FormatException">It is something else, or cut short; a sentence says where.</exception>
    public static Transcript Parse(string script, string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        List<CaseTranscript> cases = [];
        List<TranscriptLine> lines = [];
        string? ending = null;
        foreach ((int index, string line) in text.ReplaceLineEndings("\n").TrimEnd('\n').Split('\n').Index())
        {
            if (line.StartsWith('#'))
                continue;
            if (ending is not null)
                throw new FormatException($"The transcript of {script} goes on after its end, in line {index + 1}.");
            if (line.StartsWith(CaseMark, StringComparison.Ordinal))
            {
                lines = [];
                cases.Add(new CaseTranscript(line[CaseMark.Length..], lines));
            }
            else if (line.StartsWith(EndingMark, StringComparison.Ordinal))
            {
                ending = line[EndingMark.Length..];
            }
            else if (cases.Count != 0 && line.Split(" = ", 2) is [string step, string answer])
            {
                lines.Add(new TranscriptLine(step, answer == NotReached ? null : answer));
            }
            else
            {
                throw new FormatException($"Line {index + 1} of the transcript of {script} is neither a case nor a step: \"{line}\".");
            }
        }

        return ending is null
            ? throw new FormatException($"The transcript of {script} is cut short: it does not say how the domain ended.")
            : new Transcript(script, cases, ending);
    }
}
