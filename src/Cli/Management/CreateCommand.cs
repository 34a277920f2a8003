// create and config-update: domains from xl.cfg(5) files, and from options.

using System.CommandLine;
using System.CommandLine.Parsing;
using System.Globalization;
using System.Text;
using System.Text.Json;
using XenSharp.Api;
using XenSharp.Cli.Commands;
using XenSharp.Configuration;
using XenSharp.Configuration.Language;

namespace XenSharp.Cli.Management;

/// <summary>Has the daemon make domains, or changes what the next incarnation of one is made from.</summary>
internal static class CreateCommand
{
    internal static Command Create()
    {
        var source = new ConfigurationSource();
        var console = new Option<bool>("-c") { Description = "Attach to the console of the domain." };
        var paused = new Option<bool>("-p") { Description = "Leave the domain paused." };
        var dryRun = new Option<bool>(CommandWords.DryRun, "-n") { Description = "Make no domain; print what it would be made from, as list -l does." };
        var quiet = new Option<bool>("--quiet", "-q") { Description = "Say nothing of settings that have no effect." };
        var foreground = new Option<bool>("-F") { Description = "Wait until the domain has been destroyed." };
        Option<bool> ignored = ManagementCommand.Accepted(
            "Accepted for xl's sake: it is the daemon that looks after domains, and there is no xl.conf.", "-e", "-d", "--ignore-global-affinity-masks");
        Option<bool> json = ManagementCommand.Json();
        var command = new ManagementCommand("create", "Makes a domain from a configuration file (xl.cfg(5)), or from options, and starts it.")
        {
            console, paused, dryRun, quiet, foreground, ignored, json,
        };
        foreach (Option refused in ManagementCommand.RefusedScreen())
            command.Options.Add(refused);
        source.AddTo(command);
        command.Does(async (parsed, daemon, cancellation) =>
        {
            (DomainConfigurationDocument document, DomainConfigurationResult understood) = source.Read(parsed);
            if (parsed.GetValue(dryRun))
            {
                Warn(understood.Warnings.Select(static warning => warning.ToString()), parsed.GetValue(quiet));
                PrintConfiguration(understood.Configuration);
                return ExitStatus.Success;
            }

            await DaemonStart.EnsureAsync(daemon, cancellation).ConfigureAwait(false);
            bool attach = parsed.GetValue(console);
            bool leavePaused = parsed.GetValue(paused);
            await using DomainWait? end = parsed.GetValue(foreground) ? await DomainWait.BeginAsync(daemon, cancellation).ConfigureAwait(false) : null;

            // With a console, nothing is to be printed before somebody looks.
            var making = new DomainMaking(daemon, understood.Configuration.Uuid ?? Guid.NewGuid(), understood.Configuration.Name);
            var request = new CreateDomainRequest { Configuration = document, Uuid = making.Uuid, Paused = leavePaused || attach };
            (DomainInfo domain, Stream? looked) = await making.UndoneIfCancelledAsync(async () =>
            {
                CreateDomainResult result = await daemon.CreateAsync(request, cancellation).ConfigureAwait(false);
                Warn(result.Warnings, parsed.GetValue(quiet));
                DomainInfo made = result.Domain ?? throw new DaemonException("The daemon made a domain and did not say which; see the list of domains.");
                return (made, attach ? await ConsoleCommand.AttachNewAsync(daemon, made, leavePaused, cancellation).ConfigureAwait(false) : null);
            }).ConfigureAwait(false);
            if (parsed.GetValue(json))
                JsonOutput.Print(domain, JsonOutput.Types.DomainInfo);
            int status = ExitStatus.Success;
            if (looked is not null)
            {
                await using (looked)
                    status = await ConsoleCommand.ServeAsync(looked, domain.Name, cancellation).ConfigureAwait(false);
            }

            if (end is null || status != ExitStatus.Success)
                return status;
            end.Add(domain.Id);
            await end.WaitAsync(untilDestroyed: true, cancellation).ConfigureAwait(false);
            return status;
        });
        return command;
    }

    internal static Command CreateConfigUpdate()
    {
        Argument<string> domain = ManagementCommand.Domain();
        var source = new ConfigurationSource();
        var quiet = new Option<bool>("--quiet", "-q") { Description = "Say nothing of settings that have no effect." };
        Option<bool> dryRun = ManagementCommand.DryRun("Change nothing; print what it would be made from, as list -l does.");
        Option<bool> ignored = ManagementCommand.Accepted("Accepted for xl's sake.", "-d");
        var command = new ManagementCommand("config-update", "Sets what a domain is made from when it is rebooted.") { domain, quiet, dryRun, ignored };
        source.AddTo(command);
        command.Does(async (parsed, daemon, cancellation) =>
        {
            (DomainConfigurationDocument document, DomainConfigurationResult understood) = source.Read(parsed);
            Warn(understood.Warnings.Select(static warning => warning.ToString()), parsed.GetValue(quiet));
            if (parsed.GetValue(dryRun))
                PrintConfiguration(understood.Configuration);
            else
                await daemon.SetConfigurationAsync(parsed.GetRequiredValue(domain), document, cancellation).ConfigureAwait(false);
        });
        return command;
    }

    private static void Warn(IEnumerable<string> warnings, bool quiet)
    {
        if (quiet)
            return;
        foreach (string warning in warnings)
            Console.Error.WriteLine(warning);
    }

    private static void PrintConfiguration(DomainConfiguration configuration)
    {
        using var buffer = new MemoryStream();
        using (var writer = new Utf8JsonWriter(buffer, LibxlListing.WriterOptions))
            LibxlListing.Write(writer, null, configuration);
        Console.Out.WriteLine(Encoding.UTF8.GetString(buffer.GetBuffer(), 0, (int)buffer.Length));
    }

    /// <summary>Where a configuration comes from: a file, settings in the file's language, and options that stand for some of these.</summary>
    private sealed class ConfigurationSource
    {
        private readonly Argument<string[]> _words = new("ConfigFile")
        {
            Description = "The configuration file; and settings that go behind it, such as memory=512 or 'name=\"web\"'.",
            HelpName = "ConfigFile|KEY=VALUE",
            Arity = ArgumentArity.ZeroOrMore,
            DefaultValueFactory = static _ => [],
        };

        private readonly Option<string?> _file = new("--defconfig", "-f") { Description = "The configuration file.", HelpName = "FILE" };

        /// <summary>Options, and the keys whose text they set.</summary>
        private readonly (Option<string?> Option, string Key)[] _texts =
        [
            (Text("--name", "NAME", "The domain's name."), "name"),
            (Text("--kernel", "FILE", "The kernel."), "kernel"),
            (Text("--ramdisk", "FILE", "The initial ramdisk."), "ramdisk"),
            (Text("--cmdline", "TEXT", "The kernel's command line."), "cmdline"),
            (Text("--bootloader", "PROGRAM", "pygrub: boot the kernel that is in the first disk."), "bootloader"),
            (Text("--memory", "MiB", "Memory that it boots with."), "memory"),
            (Text("--maxmem", "MiB", "Memory up to which its balloon can grow."), "maxmem"),
            (Text("--vcpus", "N", "vCPUs that are online from the start."), "vcpus"),
            (Text("--maxvcpus", "N", "vCPUs that can be brought online."), "maxvcpus"),
        ];

        private readonly Option<string[]> _disks = List("--disk", "SPEC", "A disk, as xl-disk-configuration(5) has it; may be given more than once.");
        private readonly Option<string[]> _vifs = List("--vif", "SPEC", "A network interface, as xl-network-configuration(5) has it; may be given more than once.");

        internal void AddTo(Command command)
        {
            command.Arguments.Add(_words);
            command.Options.Add(_file);
            foreach ((Option<string?> option, _) in _texts)
                command.Options.Add(option);
            command.Options.Add(_disks);
            command.Options.Add(_vifs);
            command.Validators.Add(result =>
            {
                var files = result.GetValue(_words)!.Where(static word => !word.Contains('=')).ToList();
                bool named = result.GetValue(_file) is not null;
                if (files.Count > (named ? 0 : 1))
                    result.AddError($"One configuration file is enough; \"{files[^1]}\" is another. A setting is KEY=VALUE.");
                else if (!named && result.GetValue(_words)!.Length == 0 && _texts.All(text => result.GetResult(text.Option) is null) && result.GetResult(_disks) is null)
                    result.AddError("Name a configuration file, or say with options what the domain is to be.");
            });
        }

        /// <summary>What the command line comes to.</summary>
        internal (DomainConfigurationDocument Document, DomainConfigurationResult Result) Read(ParseResult parsed)
        {
            string[] words = parsed.GetRequiredValue(_words);
            string? file = parsed.GetValue(_file) ?? words.FirstOrDefault(static word => !word.Contains('='));
            var settings = words.Where(static word => word.Contains('=')).ToList();
            foreach ((Option<string?> option, string key) in _texts)
            {
                if (parsed.GetValue(option) is { } text)
                    settings.Add($"{key}={new TextValue(text).ToText()}");
            }

            AddList(settings, "disk", parsed.GetValue(_disks));
            AddList(settings, "vif", parsed.GetValue(_vifs));
            return ConfigurationFile.Understand(file, settings);
        }

        /// <summary>Devices come beside those of the file.</summary>
        private static void AddList(List<string> settings, string key, string[]? items)
        {
            if (items is { Length: > 0 })
                settings.Add($"{key}+={new ListValue([.. items.Select(static item => new TextValue(item))]).ToText()}");
        }

        private static Option<string?> Text(string name, string value, string description) => new(name) { Description = description, HelpName = value };

        private static Option<string[]> List(string name, string value, string description)
            => new(name) { Description = description, HelpName = value, Arity = ArgumentArity.OneOrMore, AllowMultipleArgumentsPerToken = false };
    }
}
