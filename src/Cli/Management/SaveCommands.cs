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
        var checkpoint = new Option<bool>("-c") { Description = "Let the domain run on afterwards." };
        var paused = new Option<bool>("-p") { Description = "Leave the domain, paused." };
        var command = new ManagementCommand("save", "Saves a domain to a file, to be restored later; the domain ends.") { domain, file, checkpoint, paused };
        command.Validators.Add(result =>
        {
            if (result.GetValue(checkpoint) && result.GetValue(paused))
                result.AddError("save takes -c or -p, not both.");
        });
        command.Does(async (parsed, daemon, cancellation) =>
        {
            var request = new SaveDomainRequest
            {
                Path = Absolute(parsed.GetRequiredValue(file)), Checkpoint = parsed.GetValue(checkpoint), LeavePaused = parsed.GetValue(paused),
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
        var foreground = new Option<bool>("-e") { Description = "Accepted for xl's sake: it is the daemon that looks after domains.", Hidden = true };
        Option<bool> json = ManagementCommand.Json();
        var command = new ManagementCommand("restore", "Makes a domain from a file that one was saved to.") { files, paused, console, foreground, json };
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
            return parsed.GetValue(console)
                ? await ConsoleCommand.AttachNewAsync(daemon, domain, leavePaused: parsed.GetValue(paused), cancellation).ConfigureAwait(false)
                : ExitStatus.Success;
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

    /// <summary>The daemon has another working directory.</summary>
    private static string Absolute(string path)
        => path.Length > 0 ? Path.GetFullPath(path) : throw new UsageException("An empty name was given; give it the name of a file.");
}
