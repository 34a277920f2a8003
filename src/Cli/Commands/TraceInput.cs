// Traces that the user names, and what of them is wanted.

using System.CommandLine;
using System.CommandLine.Parsing;
using System.Globalization;
using XenSharp.Core.Trace;
using XenSharp.Tracing;

namespace XenSharp.Cli.Commands;

/// <summary>Opens traces, with a sentence for everything that can be wrong with them.</summary>
internal static class TraceInput
{
    /// <summary>Opens a trace, and says on standard error what is wrong with its end.</summary>
    /// <exception cref="UsageException">It cannot be read, is no trace, or has no record.</exception>
    internal static TraceFile Open(string path)
    {
        if (path.Length == 0)
            throw new UsageException("An empty name was given for a trace; give the name of a file.");
        if (Directory.Exists(path))
            throw new UsageException($"{path} is a folder; give the name of a trace that run --trace has written.");
        try
        {
            TraceFile file = TraceFile.Open(OpenStream(path));
            if (file.Count == 0)
            {
                file.Dispose();
                throw new UsageException(file.Damage is null
                    ? $"The trace {path} has no records: its guest never ran. Make it anew with --trace."
                    : $"The trace {path} has no whole block, so nothing of it can be shown. Make it anew with --trace.");
            }

            if (file.Damage is { } damage)
                Console.Error.WriteLine($"{Tool.Name}: The trace {path} {damage}");
            return file;
        }
        catch (TraceFormatException failure)
        {
            throw Unusable(path, failure);
        }
        catch (Exception failure) when (failure is FileNotFoundException or DirectoryNotFoundException)
        {
            throw new UsageException($"There is no file {path}; give the name of a trace that run --trace has written.");
        }
        catch (UnauthorizedAccessException)
        {
            throw new UsageException($"There is no permission to read {path}; change its mode, or run as a user who may read it.");
        }
        catch (IOException failure)
        {
            throw new UsageException($"{path} cannot be read: {failure.Message}");
        }
    }

    /// <summary>What is found wrong only while the records are read.</summary>
    internal static UsageException Unusable(string path, TraceFormatException failure) => new($"{path} {failure.Message}");

    private static Stream OpenStream(string path)
    {
        var file = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite | FileShare.Delete, bufferSize: 0);
        if (file.CanSeek)
            return file;
        using (file)
        {
            // A pipe: kept in memory, since the records are read after all was checked.
            var copy = new MemoryStream();
            file.CopyTo(copy);
            copy.Position = 0;
            return copy;
        }
    }
}

/// <summary>The options by which records are chosen, for one of the commands.</summary>
internal sealed class TraceFilterOptions
{
    private readonly Option<TraceKind[]> _kinds = new("--kind", "-k")
    {
        Description = "Only records of this kind: boot, hypercall, exception, upcall, emulation or syscall. Several with commas.",
        HelpName = "KIND",
        CustomParser = ParseKinds,
    };

    private readonly Option<string[]> _hypercalls = new("--hypercall")
    {
        Description = "Only this hypercall, such as mmu_update, also with a command, such as sched_op/block. Several with commas.",
        HelpName = "NAME",
        CustomParser = ParseHypercalls,
    };

    private readonly Option<double> _from = Time("--from", "Only what began at this time or later, in seconds from the begin of the trace.", double.NegativeInfinity);
    private readonly Option<double> _to = Time("--to", "Only what began before this time, in seconds from the begin of the trace.", double.PositiveInfinity);
    private readonly Option<bool> _errors = new("--errors") { Description = "Only hypercalls that returned an error, and what ended the domain." };

    private readonly Option<int[]> _vcpus = new("--vcpu")
    {
        Description = "Only this vCPU's records. Several with commas.",
        HelpName = "NUMBER",
        CustomParser = ParseVcpus,
    };

    /// <summary>Adds the options to a command.</summary>
    internal TraceFilterOptions(Command command)
    {
        foreach (Option option in (ReadOnlySpan<Option>)[_kinds, _hypercalls, _from, _to, _errors, _vcpus])
            command.Add(option);
    }

    /// <summary>The filter that was asked for.</summary>
    internal TraceFilter FilterOf(ParseResult parsed) => new()
    {
        Kinds = parsed.GetValue(_kinds) ?? [],
        Hypercalls = parsed.GetValue(_hypercalls) ?? [],
        From = parsed.GetValue(_from),
        To = parsed.GetValue(_to),
        ErrorsOnly = parsed.GetValue(_errors),
        Vcpus = parsed.GetValue(_vcpus) ?? [],
    };

    private static Option<double> Time(string name, string description, double none)
    {
        return new Option<double>(name) { Description = description, HelpName = "SECONDS", DefaultValueFactory = _ => none, CustomParser = Parse };

        double Parse(ArgumentResult result)
        {
            string text = result.Tokens[0].Value;
            if (!double.TryParse(text, NumberStyles.Float, CultureInfo.InvariantCulture, out double value) || !double.IsFinite(value))
                result.AddError($"{name} takes a time in seconds, such as 1.25; \"{text}\" is none.");
            return value;
        }
    }

    private static TraceKind[] ParseKinds(ArgumentResult result) => ParseList(result, static (string word, out TraceKind kind) =>
    {
        foreach (TraceKind candidate in Enum.GetValues<TraceKind>())
        {
            kind = candidate;
            if (TraceText.KindName(candidate) == word)
                return true;
        }

        kind = default;
        return false;
    }, "--kind takes boot, hypercall, exception, upcall, emulation or syscall; \"{0}\" is none of them.");

    private static string[] ParseHypercalls(ArgumentResult result) => ParseList(result, static (string word, out string name) =>
    {
        // A number that Xen does not use can have been called all the same.
        name = uint.TryParse(word, NumberStyles.None, CultureInfo.InvariantCulture, out uint number) ? TraceText.HypercallName(number) : word;
        string call = name.Split('/')[0];
        return TraceText.HypercallNames.Contains(call) || call.StartsWith("hypercall_", StringComparison.Ordinal);
    }, "--hypercall takes a name from xen.h without its prefix, such as mmu_update or sched_op/block; \"{0}\" is none.");

    private static int[] ParseVcpus(ArgumentResult result) => ParseList(
        result,
        static (string word, out int vcpu) => int.TryParse(word, NumberStyles.None, CultureInfo.InvariantCulture, out vcpu) && vcpu <= ushort.MaxValue,
        "--vcpu takes the number of a vCPU, from 0 on; \"{0}\" is none.");

    private delegate bool Parser<T>(string word, out T value);

    private static T[] ParseList<T>(ArgumentResult result, Parser<T> parser, string complaint)
    {
        var list = new List<T>();
        foreach (string word in result.Tokens.SelectMany(static token => token.Value.Split(',')))
        {
            if (parser(word.Trim().ToLowerInvariant(), out T value))
                list.Add(value);
            else
                result.AddError(string.Format(CultureInfo.InvariantCulture, complaint, word));
        }

        return [.. list];
    }
}
