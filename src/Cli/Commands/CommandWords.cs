// What xl takes before and for the name of a command: its global options, and names cut short.

using System.CommandLine;

namespace XenSharp.Cli.Commands;

/// <summary>Puts a command line as somebody types it who knows xl into one that names its command in full.</summary>
internal static class CommandWords
{
    /// <summary>xl's global options: more messages, force, carriage returns in progress, time stamps, dry run.</summary>
    private const string GlobalOptions = "vftTN";

    /// <summary>What stands for xl's <c>-N</c> with the commands that have a dry run.</summary>
    internal const string DryRun = "--dryrun";

    /// <summary>Takes xl's global options away, and writes a command's name in full where its beginning tells it from all others.</summary>
    /// <exception cref="UsageException">The command has no dry run, and one was asked for; or the name may stand for several.</exception>
    internal static IReadOnlyList<string> Understand(RootCommand root, IReadOnlyList<string> arguments)
    {
        bool dryRun = false;
        int at = 0;

        // The command's own options that may stand there have a value each, as the KVM device has.
        while (at + 1 < arguments.Count && root.Options.Any(option => option.Recursive && option.Name == arguments[at] && option.Arity.MinimumNumberOfValues == 1))
            at += 2;
        string[] first = [.. arguments.Take(at)];
        while (at < arguments.Count && arguments[at] is ['-', not '-', ..] options && options.AsSpan(1).IndexOfAnyExcept(GlobalOptions) < 0)
        {
            dryRun |= options.Contains('N');
            at++;
        }

        string[] rest = [.. arguments.Skip(at)];
        if (rest is not [[>= 'a' and <= 'z', ..] word, ..])
            return [.. first, .. rest];
        Command? command = Find(root, word);
        if (command is not null)
            rest[0] = command.Name;
        if (!dryRun)
            return [.. first, .. rest];
        return command is null || command.Options.Any(static option => option.Name == DryRun)
            ? [.. first, rest[0], DryRun, .. rest[1..]]
            : throw new UsageException($"{command.Name} has no dry run: -N goes with {string.Join(", ", root.Subcommands.Where(static one => one.Options.Any(static option => option.Name == DryRun)).Select(static one => one.Name))}.");
    }

    /// <summary>The command of that name, or the only one whose name begins so.</summary>
    /// <returns>Null if there is none.</returns>
    /// <exception cref="UsageException">There are several.</exception>
    internal static Command? Find(Command parent, string word)
    {
        Command[] begun = [.. parent.Subcommands.Where(command => command.Name.StartsWith(word, StringComparison.Ordinal))];
        if (begun.FirstOrDefault(command => command.Name == word) is { } exact)
            return exact;
        return begun.Length <= 1
            ? begun.FirstOrDefault()
            : throw new UsageException($"\"{word}\" may stand for {string.Join(", ", begun.Select(static command => command.Name))}: write more of it.");
    }
}
