// console: the terminal at a domain's console.

using System.CommandLine;
using System.Globalization;
using XenSharp.Api;
using XenSharp.Cli.Commands;
using XenSharp.Cli.Terminal;

namespace XenSharp.Cli.Management;

/// <summary>Attaches the terminal to the console of a domain that the daemon runs.</summary>
internal static class ConsoleCommand
{
    internal static Command Create()
    {
        Argument<string> domain = ManagementCommand.Domain();
        var number = new Option<int>("-n")
        {
            Description = "Which console: 0, the first, or a channel's number.",
            HelpName = "number",
            CustomParser = static result =>
            {
                if (ushort.TryParse(result.Tokens[0].Value, NumberStyles.None, CultureInfo.InvariantCulture, out ushort found))
                    return found;
                result.AddError($"-n takes a console's number from 0 on; \"{result.Tokens[0].Value}\" is none.");
                return 0;
            },
        };
        var type = new Option<string?>("-t") { Description = "The type of the console: pv.", HelpName = "type" };
        type.Validators.Add(static result =>
        {
            if (result.GetValueOrDefault<string?>() is { } text and not "pv")
                result.AddError($"PV domains have consoles of the type pv; \"{text}\" is another.");
        });
        var fresh = new Option<bool>("--no-history") { Description = "Begin with what is printed from now on." };
        var command = new ManagementCommand("console", "Attaches to a domain's console. Ctrl-] leaves.") { domain, number, type, fresh };
        command.Does(async (parsed, daemon, cancellation) =>
        {
            DomainInfo found = await daemon.GetAsync(parsed.GetRequiredValue(domain), cancellation).ConfigureAwait(false);
            await using Stream console = await daemon
                .AttachConsoleAsync(Number(found), !parsed.GetValue(fresh), parsed.GetValue(number), cancellation).ConfigureAwait(false);
            return await ServeAsync(console, found.Name, cancellation).ConfigureAwait(false);
        });
        return command;
    }

    /// <summary>Attaches to a domain that was made paused, and lets it run once somebody looks.</summary>
    /// <returns>The console, to be served.</returns>
    internal static async Task<Stream> AttachNewAsync(DaemonClient daemon, DomainInfo domain, bool leavePaused, CancellationToken cancellation)
    {
        Stream console;
        try
        {
            console = await daemon.AttachConsoleAsync(Number(domain), history: true, channel: 0, cancellation).ConfigureAwait(false);
        }
        catch (DaemonException) when (!leavePaused)
        {
            // It was asked for all the same.
            await daemon.UnpauseAsync(Number(domain), cancellation).ConfigureAwait(false);
            throw;
        }

        try
        {
            if (!leavePaused)
                await daemon.UnpauseAsync(Number(domain), cancellation).ConfigureAwait(false);
            return console;
        }
        catch
        {
            await console.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    private static string Number(DomainInfo domain) => domain.Id.ToString(CultureInfo.InvariantCulture);

    /// <summary>Has somebody look at a console, and type, until the domain ends or the key that leaves is hit.</summary>
    /// <returns>The exit status.</returns>
    internal static async Task<int> ServeAsync(Stream console, string name, CancellationToken cancellation)
    {
        SessionEnd end;
        bool typed;
        using (var terminal = new TerminalAttachment())
        {
            typed = terminal.IsTerminal;
            end = await terminal.ServeAsync(console, cancellation).ConfigureAwait(false);
        }

        // The guest's last line may have no end.
        if (typed)
            Console.Error.WriteLine();
        if (end.InputFailure is { } failure)
            ManagementCommand.Say(failure);
        switch (end.Reason)
        {
            case SessionEndReason.OutputClosed when end.Output!.ReaderGone:
                return ExitStatus.OutputReaderGone;
            case SessionEndReason.OutputClosed:
                ManagementCommand.Say($"The console's output cannot be written ({end.Output!.Message}). Send standard output where there is room for it.");
                return ExitStatus.Failed;
            case SessionEndReason.DomainEnded when typed:
                ManagementCommand.Say($"The domain {name} has ended, and its console with it.");
                return ExitStatus.Success;
            default:
                return ExitStatus.Success;
        }
    }
}
