// Real Xen's transcripts, as they are kept in the repository and in this assembly.
using System.Reflection;
using XenSharp.Guests.Probe;

namespace XenSharp.Oracle.Comparison;

/// <summary>The recorded transcripts: src/Oracle/Recorded, one file a script.</summary>
public static class RecordedTruth
{
    private const string Prefix = "Recorded/";
    private const string Suffix = ".txt";

    /// <summary>Names of the scripts that were recorded, in order.</summary>
    public static IReadOnlyList<string> Scripts { get; } =
    [
        .. typeof(RecordedTruth).Assembly.GetManifestResourceNames()
            .Where(static name => name.StartsWith(Prefix, StringComparison.Ordinal))
            .Select(static name => name[Prefix.Length..^Suffix.Length]).Order(StringComparer.Ordinal),
    ];

    /// <summary>Xen's transcript of a script.</summary>
    /// <exception cref="OracleException">It was never recorded, or what was is no transcript.</exception>
    public static Transcript Of(string script)
    {
        using Stream stream = typeof(RecordedTruth).Assembly.GetManifestResourceStream(Prefix + script + Suffix)
            ?? throw new OracleException($"There is no recorded transcript of {script}; record it with xensharp compare --record.");
        using var reader = new StreamReader(stream);
        try
        {
            return Transcript.Parse(script, reader.ReadToEnd());
        }
        catch (FormatException e)
        {
            throw new OracleException($"{e.Message} Record it anew with xensharp compare --record.", e);
        }
    }

    /// <summary>What a transcript is kept as.</summary>
    /// <param name="transcript">The transcript.</param>
    /// <param name="hypervisor">What it was made on: the bed's name.</param>
    public static string FileOf(Transcript transcript, string hypervisor)
    {
        ArgumentNullException.ThrowIfNull(transcript);
        return $"# What {hypervisor} answers. Made by: xensharp compare {transcript.Script} --record src/Oracle/Recorded\n{transcript.ToText()}";
    }

    /// <summary>Writes a transcript into a folder.</summary>
    /// <returns>Whether the file is new or other than it was.</returns>
    public static bool Write(string folder, Transcript transcript, string hypervisor)
    {
        ArgumentNullException.ThrowIfNull(transcript);
        string file = Path.Combine(folder, transcript.Script + Suffix);
        string text = FileOf(transcript, hypervisor);
        if (File.Exists(file) && File.ReadAllText(file) == text)
            return false;
        string temporary = file + ".new";
        File.WriteAllText(temporary, text);
        File.Move(temporary, file, overwrite: true);
        return true;
    }
}
