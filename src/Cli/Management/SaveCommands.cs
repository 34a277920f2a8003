// save, restore and dump-core: a domain's memory to a file, and back.

using System.CommandLine;
using XenSharp.Api;
using XenSharp.Cli.Commands;

namespace XenSharp.Cli.Management;

/// <summary>Saves domains, makes them again, and writes their memory for debuggers.</summary>
internal static class SaveCommands
{
    internal static Command CreateSave()
    {
        Argument<string> domain = ManagementCommand.Domain();
        var file = new Argument<string>("CheckpointFile") { Description = "The file to save to." };
        var configuration = new Argument<string?>("ConfigFile")
        {
            Description = "A configuration to be saved with it in place of its own.", Arity = ArgumentArity.ZeroOrOne, DefaultValueFactory = static _ => null,
        };
        var checkpoint = new Option<bool>("-c") { Description = "Let the domain run on afterwards." };
        var paused = new Option<bool>("-p") { Description = "Leave the domain, paused." };
        var command = new ManagementCommand("save", "Saves a domain to a file, to be restored later; the domain ends.") { domain, file, configuration, checkpoint, paused };
        command.Options.Add(RefusedNumber());
        command.Validators.Add(result =>
        {
            if (result.GetValue(checkpoint) && result.GetValue(paused))
                result.AddError("save takes -c or -p, not both.");
        });
        command.Does(async (parsed, daemon, cancellation) =>
        {
            var request = new SaveDomainRequest
            {
                Path = Absolute(parsed.GetRequiredValue(file)),
                Checkpoint = parsed.GetValue(checkpoint),
                LeavePaused = parsed.GetValue(paused),
                Configuration = parsed.GetValue(configuration) is { } named ? ConfigurationFile.Read(named, []) : null,
            };
            await OperationDisplay.RunAsync(async progress =>
            {
                await daemon.SaveAsync(parsed.GetRequiredValue(domain), request, progress, cancellation).ConfigureAwait(false);
                return true;
            }).ConfigureAwait(false);
        });
        return command;
    }

    internal static Command CreateRestore()
    {
        var files = new Argument<string[]>("file")
        {
            Description = "The file that the domain was saved to; before it, a configuration to be used in place of the saved one.",
            HelpName = "ConfigFile|CheckpointFile",
            Arity = new ArgumentArity(1, 2),
        };
        var paused = new Option<bool>("-p") { Description = "Leave the domain paused." };
        var console = new Option<bool>("-c") { Description = "Attach to the console of the domain." };
        Option<bool> foreground = ManagementCommand.Accepted("Accepted for xl's sake: it is the daemon that looks after domains.", "-e", "-d");
        Option<bool> json = ManagementCommand.Json();
        var command = new ManagementCommand("restore", "Makes a domain from a file that one was saved to.") { files, paused, console, foreground, json };
        foreach (Option refused in ManagementCommand.RefusedScreen())
            command.Options.Add(refused);
        command.Does(async (parsed, daemon, cancellation) =>
        {
            string[] named = parsed.GetRequiredValue(files);
            var request = new RestoreDomainRequest
            {
                Path = Absolute(named[^1]),
                Configuration = named.Length == 2 ? ConfigurationFile.Read(named[0], []) : null,

                // With a console, nothing is to be printed before somebody looks.
                Paused = parsed.GetValue(paused) || parsed.GetValue(console),
            };
            await DaemonStart.EnsureAsync(daemon, cancellation).ConfigureAwait(false);
            DomainInfo domain = await OperationDisplay.RunAsync(progress => daemon.RestoreAsync(request, progress, cancellation)).ConfigureAwait(false);
            if (parsed.GetValue(json))
                JsonOutput.Print(domain, JsonOutput.Types.DomainInfo);
            if (!parsed.GetValue(console))
                return ExitStatus.Success;
            await using Stream looked = await new DomainMaking(daemon, domain.Uuid, domain.Name)
                .UndoneIfCancelledAsync(() => ConsoleCommand.AttachNewAsync(daemon, domain, leavePaused: parsed.GetValue(paused), cancellation)).ConfigureAwait(false);
            return await ConsoleCommand.ServeAsync(looked, domain.Name, cancellation).ConfigureAwait(false);
        });
        return command;
    }

    internal static Command CreateDumpCore()
    {
        Argument<string> domain = ManagementCommand.Domain();
        var file = new Argument<string>("filename") { Description = "The file to write." };
        var command = new ManagementCommand("dump-core", "Writes a domain's memory and registers to an ELF file, for crash or gdb.") { domain, file };
        command.Does(async (parsed, daemon, cancellation) =>
        {
            var request = new DumpCoreRequest { Path = Absolute(parsed.GetRequiredValue(file)) };
            await OperationDisplay.RunAsync(async progress =>
            {
                await daemon.DumpCoreAsync(parsed.GetRequiredValue(domain), request, progress, cancellation).ConfigureAwait(false);
                return true;
            }).ConfigureAwait(false);
        });
        return command;
    }

    /// <summary>xl's <c>-D</c>: a domain gets its number when it is made, here also where it was saved.</summary>
    private static Option<bool> RefusedNumber()
    {
        var option = new Option<bool>("-D") { Description = "Refused: a domain's number is not kept.", Hidden = true };
        ManagementCommand.Refuse(option, "A domain that is restored gets the next free number here, and -D cannot keep its old one: use its name or UUID.");
        return option;
    }

    /// <summary>The daemon has another working directory.</summary>
    private static string Absolute(string path)
        => path.Length > 0 ? Path.GetFullPath(path) : throw new UsageException("An empty name was given; give it the name of a file.");
}
