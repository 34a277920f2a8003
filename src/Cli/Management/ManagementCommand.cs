// What the commands that talk to the daemon have in common: its socket, names of domains, and how they end.

using System.CommandLine;
using System.CommandLine.Completions;
using System.CommandLine.Parsing;
using System.Globalization;
using XenSharp.Api;
using XenSharp.Cli.Commands;
using XenSharp.Cli.Hosting;
using XenSharp.Configuration;

namespace XenSharp.Cli.Management;

/// <summary>A command of xl's, done by the daemon.</summary>
internal sealed class ManagementCommand : Command
{
    /// <summary>How long completion waits for the daemon: a shell waits with it.</summary>
    private static readonly TimeSpan s_completionPatience = TimeSpan.FromSeconds(3);

    private readonly Option<string?> _socket = new("--daemon")
    {
        Description = $"The daemon's socket, if it is not the usual one; {DaemonSocket.EnvironmentVariable} in the environment names it, too.",
        HelpName = "SOCKET",
    };

    internal ManagementCommand(string name, string description)
        : base(name, description) => Options.Add(_socket);

    /// <summary>The name, number or UUID of one domain. Without a name for help's sake, help would ask for completions.</summary>
    internal static Argument<string> Domain(string name = "Domain", string description = "The domain's name or number.")
    {
        var argument = new Argument<string>(name) { Description = description, HelpName = name };
        argument.CompletionSources.Add(DomainNames);
        argument.Validators.Add(RefuseOptions);
        return argument;
    }

    /// <summary>The names, numbers or UUIDs of any number of domains.</summary>
    internal static Argument<string[]> Domains(string description)
    {
        var argument = new Argument<string[]>("Domain")
        {
            Description = description, HelpName = "Domain", Arity = ArgumentArity.ZeroOrMore, DefaultValueFactory = static _ => [],
        };
        argument.CompletionSources.Add(DomainNames);
        argument.Validators.Add(RefuseOptions);
        return argument;
    }

    /// <summary><c>--json</c>.</summary>
    internal static Option<bool> Json() => new("--json", "-j") { Description = "Print JSON, for programs." };

    /// <summary>An option of xl's that makes no difference here.</summary>
    internal static Option<bool> Accepted(string description, string name, params string[] aliases) => new(name, aliases) { Description = description, Hidden = true };

    /// <summary>xl's options for looking at a domain's screen, of which there is none.</summary>
    internal static IEnumerable<Option> RefusedScreen()
    {
        foreach ((string name, string alias) in ((string, string)[])[("--vncviewer", "-V"), ("--vncviewer-autopass", "-A")])
        {
            var option = new Option<bool>(name, alias) { Description = "Refused: domains here have no screen.", Hidden = true };
            Refuse(option, "Domains here have no screen and no VNC server: -c attaches to the console.");
            yield return option;
        }
    }

    /// <summary>Has an option, where it is given, come to an error.</summary>
    internal static void Refuse(Option option, string sentence) => option.Validators.Add(result =>
    {
        if (result.IdentifierTokenCount > 0)
            result.AddError(sentence);
    });

    /// <summary>xl's global <c>-N</c>, as <see cref="CommandWords"/> hands it on.</summary>
    internal static Option<bool> DryRun(string description) => new(CommandWords.DryRun) { Description = description, Hidden = true };

    /// <summary>What the command does: with the daemon, until it is done or a signal asks it to end.</summary>
    internal void Does(Func<ParseResult, DaemonClient, CancellationToken, Task<int>> action)
        => SetAction(async (parsed, _) =>
        {
            using var signals = new EndingSignals();
            using var daemon = new DaemonClient(parsed.GetValue(_socket));
            try
            {
                return await action(parsed, daemon, signals.Token).ConfigureAwait(false);
            }
            catch (OperationCanceledException) when (signals.Received != 0)
            {
                return ExitStatus.OfSignal + signals.Received;
            }
            catch (Exception failure) when (failure is DaemonException or UsageException)
            {
                Say(failure.Message);
                return ExitStatus.Failed;
            }
            catch (ConfigurationException failure)
            {
                // Each line begins with a place in a file, as those of compilers do.
                await Console.Error.WriteLineAsync(failure.Message).ConfigureAwait(false);
                return ExitStatus.Failed;
            }
        });

    /// <summary>What the command does, where it has nothing to say but failures.</summary>
    internal void Does(Func<ParseResult, DaemonClient, CancellationToken, Task> action)
        => Does(async (parsed, daemon, cancellation) =>
        {
            await action(parsed, daemon, cancellation).ConfigureAwait(false);
            return ExitStatus.Success;
        });

    /// <summary>A sentence for the user, on standard error.</summary>
    internal static void Say(string sentence) => Console.Error.WriteLine($"{Tool.Name}: {sentence}");

    /// <summary>Does something with each of several domains; one that fails does not keep the others from it.</summary>
    /// <returns>The exit status.</returns>
    internal static async Task<int> ForEachAsync<T>(IEnumerable<T> all, Func<T, Task> action)
    {
        int status = ExitStatus.Success;
        foreach (T one in all)
        {
            try
            {
                await action(one).ConfigureAwait(false);
            }
            catch (DaemonException failure)
            {
                Say(failure.Message);
                status = ExitStatus.Failed;
            }
        }

        return status;
    }

    /// <summary>The domains of these names, or all where there is no name.</summary>
    internal static async Task<IReadOnlyList<DomainInfo>> FindAsync(DaemonClient daemon, string[] domains, CancellationToken cancellation)
    {
        if (domains.Length == 0)
            return await daemon.ListAsync(cancellation).ConfigureAwait(false);
        var found = new List<DomainInfo>(domains.Length);
        foreach (string domain in domains)
            found.Add(await daemon.GetAsync(domain, cancellation).ConfigureAwait(false));
        return found;
    }

    /// <summary>A word that looks like an option is one that is mistyped, and no domain.</summary>
    private static void RefuseOptions(ArgumentResult result)
    {
        if (result.Tokens.FirstOrDefault(static token => token.Value.StartsWith('-')) is { } option)
            result.AddError($"{Tool.Name} {(result.Parent as CommandResult)?.Command.Name} does not know \"{option.Value}\".");
    }

    private static IEnumerable<CompletionItem> DomainNames(CompletionContext context)
    {
        try
        {
            using var patience = new CancellationTokenSource(s_completionPatience);
            using var daemon = new DaemonClient(context.ParseResult.CommandResult.Command is ManagementCommand command ? context.ParseResult.GetValue(command._socket) : null);
            return [.. daemon.ListAsync(patience.Token).GetAwaiter().GetResult()
                .Select(static domain => new CompletionItem(domain.Name, detail: domain.Id.ToString(CultureInfo.InvariantCulture)))];
        }
        catch (Exception failure) when (failure is DaemonException or OperationCanceledException)
        {
            // There is nothing to complete with.
            return [];
        }
    }
}
