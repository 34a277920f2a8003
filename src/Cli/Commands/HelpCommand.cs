// help: what the commands are, and what one of them takes, as with xl.

using System.CommandLine;
using System.CommandLine.Help;
using System.Text;
using XenSharp.Cli.Management;

namespace XenSharp.Cli.Commands;

/// <summary><c>help</c>, <c>help --long</c> and <c>help COMMAND</c>.</summary>
internal static class HelpCommand
{
    /// <param name="root">The command that all others are in.</param>
    internal static Command Create(RootCommand root)
    {
        var words = new Argument<string[]>("command")
        {
            Description = "The command that is asked about; all if none is named.",
            HelpName = "command",
            Arity = ArgumentArity.ZeroOrMore,
            DefaultValueFactory = static _ => [],
        };
        words.CompletionSources.Add(_ => root.Subcommands.Where(static command => !command.Hidden).Select(static command => new System.CommandLine.Completions.CompletionItem(command.Name)));
        var detailed = new Option<bool>("--long") { Description = "Also list the commands of xl's that are not here, and why." };
        var command = new Command("help", "Shows what the commands are, or what one of them takes.") { words, detailed };
        command.SetAction(parsed =>
        {
            string[] path = parsed.GetRequiredValue(words);
            Command found = root;
            var names = new List<string>();
            foreach (string word in path)
            {
                found = CommandWords.Find(found, word)
                    ?? throw new UsageException($"There is no command \"{string.Join(' ', path)}\"; {Tool.Name} help lists those there are.");
                names.Add(found.Name);
            }

            if (names is [var name] && AbsentCommands.Find(name) is { } absent)
            {
                Console.Out.WriteLine(absent.Refusal);
                return ExitStatus.Success;
            }

            _ = new HelpAction().Invoke(root.Parse(names));
            if (parsed.GetValue(detailed) && path.Length == 0)
                Console.Out.Write(Absent());
            return ExitStatus.Success;
        });
        return command;
    }

    /// <summary>Commands with the same reason are together.</summary>
    private static string Absent()
    {
        var text = new StringBuilder().AppendLine("Commands of xl's that are not here:");
        foreach (IGrouping<string, AbsentCommand> alike in AbsentCommands.All.GroupBy(static command => command.Reason))
            text.AppendLine($"  {string.Join(", ", alike.Select(static command => command.Name))}").AppendLine($"      {alike.Key}");
        return text.AppendLine().ToString();
    }
}
