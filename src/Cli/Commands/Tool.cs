// The command's own name and version, and the one entry that every invocation takes.

using System.CommandLine;
using System.CommandLine.Help;
using System.CommandLine.Parsing;
using System.Reflection;
using Microsoft.Extensions.DependencyInjection;
using XenSharp.Cli.Bench;
using XenSharp.Cli.Compare;
using XenSharp.Cli.Hosting;
using XenSharp.Cli.Management;
using XenSharp.Cli.Xenstore;
using XenSharp.Toolstack;

namespace XenSharp.Cli.Commands;

/// <summary>The <c>xensharp</c> command.</summary>
public static class Tool
{
    /// <summary>What it is called.</summary>
    public const string Name = "xensharp";

    /// <summary>Its version, without what the build knows about the sources.</summary>
    public static string Version { get; } = (typeof(Tool).Assembly.GetCustomAttribute<AssemblyInformationalVersionAttribute>()?
        .InformationalVersion ?? "unknown").Split('+')[0];

    /// <summary>Does what the arguments say.</summary>
    /// <returns>The exit status.</returns>
    public static async Task<int> RunAsync(IReadOnlyList<string> arguments)
    {
        // Parsing comes before composing, and the commands need the composition: so it takes the option's value when asked.
        var device = new Option<string>("--kvm-device")
        {
            Description = "The KVM device.",
            Hidden = true,
            Recursive = true,
            DefaultValueFactory = static _ => KvmHost.DefaultDevice,
        };
        ParseResult? parsed = null;
        await using ServiceProvider services = Compose(() => parsed!.GetValue(device)!);
        RootCommand root = CreateRoot(services, device);
        try
        {
            parsed = root.Parse(CommandWords.Understand(root, arguments), new ParserConfiguration { ResponseFileTokenReplacer = null });
            if (parsed.Errors.Count > 0)
                return Complain(Describe(parsed));

            // Signals and exceptions are this command's own affair.
            var configuration = new InvocationConfiguration { EnableDefaultExceptionHandler = false, ProcessTerminationTimeout = null };
            return await parsed.InvokeAsync(configuration).ConfigureAwait(false);
        }
        catch (Exception failure) when (FailureSentence.Of(failure) is { } sentence)
        {
            return Complain(sentence);
        }
        catch (Exception defect)
        {
            await Console.Error.WriteLineAsync($"{Name}: This is a defect of XenSharp's; please report it with what follows.\n{defect}")
                .ConfigureAwait(false);
            return ExitStatus.Defect;
        }
    }

    private static ServiceProvider Compose(Func<string> kvmDevice) => new ServiceCollection()
        .AddSingleton(_ => new KvmHost(kvmDevice()))
        .AddSingleton(services => new ForegroundRun(services.GetRequiredService<KvmHost>()))
        .BuildServiceProvider();

    private static RootCommand CreateRoot(IServiceProvider services, Option<string> device)
    {
        var root = new RootCommand("Runs unmodified Xen PV guests on Linux's KVM, without Xen.")
        {
            RunCommand.Create(services),
            DemoCommand.Create(services),
            InfoCommand.Create(services),
            BenchCommand.Create(services),
            CompareCommand.Create(services),
            TraceCommand.Create(),
            XenstoreCommand.Create(),
            DaemonCommand.Create(services),
        };
        foreach (Command command in ManagementCommands.Create())
            root.Add(command);
        foreach (Command command in AbsentCommands.Create())
            root.Add(command);
        root.Add(HelpCommand.Create(root));
        root.Add(device);
        root.SetAction(parsed =>
        {
            _ = new HelpAction().Invoke(parsed);
            return ExitStatus.Error;
        });
        return root;
    }

    private static int Complain(string sentence)
    {
        Console.Error.WriteLine($"{Name}: {sentence}");
        return ExitStatus.Error;
    }

    /// <summary>One sentence for what is wrong with the command line: a word that means nothing first, since all else may
    /// follow from it.</summary>
    private static string Describe(ParseResult parsed)
    {
        string command = Name;
        foreach (CommandResult result in Path(parsed.CommandResult))
            command += " " + result.Command.Name;
        string what = parsed.UnmatchedTokens.Count > 0
            ? $"{command} does not know \"{parsed.UnmatchedTokens[0]}\"."
            : Missing(parsed.CommandResult) is { } missing ? $"{command} takes {missing}." : parsed.Errors[0].Message;
        return $"{what} See {command} --help.";
    }

    /// <summary>All that a command must be given, where some of it was not; null where nothing is missing.</summary>
    private static string? Missing(CommandResult command)
    {
        IEnumerable<Argument> required = command.Command.Arguments.Where(static argument => argument.Arity.MinimumNumberOfValues > 0 && !argument.HasDefaultValue);
        return required.Any(argument => command.GetResult(argument) is not { Tokens.Count: > 0 })
            ? string.Join(" and ", required.Select(static argument => $"<{argument.HelpName ?? argument.Name}>")) : null;
    }

    /// <summary>The command and those that it is part of, from the root's on down.</summary>
    private static IEnumerable<CommandResult> Path(CommandResult command)
        => command.Parent is CommandResult parent ? Path(parent).Append(command) : [];
}
