// xensharp daemon: hosts domains, and answers those who manage them.

using System.CommandLine;
using System.CommandLine.Parsing;
using System.Diagnostics;
using System.Globalization;
using Microsoft.Extensions.DependencyInjection;
using XenSharp.Api;
using XenSharp.Cli.Hosting;
using XenSharp.Daemon;
using XenSharp.Toolstack;
using XenSharp.Toolstack.Management;

namespace XenSharp.Cli.Commands;

/// <summary>Runs a <see cref="DaemonServer"/> until a signal asks it to end.</summary>
internal static class DaemonCommand
{
    private const int DefaultPatience = 60;

    /// <summary>The longest time that an option takes, in seconds: a day.</summary>
    private const int LongestTime = 86_400;

    private const string None = "none";

    internal static Command Create(IServiceProvider services)
    {
        var socket = new Option<string?>("--socket") { Description = $"The socket of the API. [default: {DaemonSocket.DefaultPath}]", HelpName = "PATH" };
        var mode = new Option<UnixFileMode>("--socket-mode")
        {
            Description = "Who may use it, as of chmod. [default: 0660]",
            HelpName = "MODE",
            DefaultValueFactory = static _ => DaemonOptions.DefaultSocketMode,
            CustomParser = ParseMode,
        };
        var group = new Option<string?>("--socket-group") { Description = "The group that it belongs to.", HelpName = "GROUP" };
        var state = new Option<string?>("--state") { Description = $"The folder of records of domains. [default: {DaemonSocket.StateFolder}]", HelpName = "DIR" };
        var log = new Option<string?>("--console-log")
        {
            Description = $"The folder of the consoles' logs, or {None}. [default: the folder console under that of --state]",
            HelpName = "DIR",
        };
        var xenstore = new Option<string?>("--xenstore-socket")
        {
            Description = $"The socket of xenstore, or {None}. [default: xenstored/socket beside the API's]",
            HelpName = "PATH",
        };
        var patience = new Option<int>("--exit-timeout")
        {
            Description = "Seconds that guests have to shut down when the daemon is asked to end; those that did not are destroyed. 0 asks none.",
            HelpName = "SECONDS",
            DefaultValueFactory = static _ => DefaultPatience,
        };
        patience.Validators.Add(static result =>
        {
            if (!result.Errors.Any() && result.GetValueOrDefault<int>() is < 0 or > LongestTime)
                result.AddError($"--exit-timeout takes a number of seconds from 0 to {LongestTime}.");
        });
        var idle = new Option<int>("--idle-exit")
        {
            Description = "Ends the daemon when it has had no domain for so many seconds. 0: it stays.",
            HelpName = "SECONDS",
        };
        idle.Validators.Add(static result =>
        {
            if (!result.Errors.Any() && result.GetValueOrDefault<int>() is < 0 or > LongestTime)
                result.AddError($"--idle-exit takes a number of seconds from 0 to {LongestTime}.");
        });
        var command = new Command("daemon", "Hosts domains, and answers create, list, console and the other commands of that kind.")
        {
            socket, mode, group, state, log, xenstore, patience, idle,
        };
        command.SetAction((parsed, _) =>
        {
            string path = Path.GetFullPath(parsed.GetValue(socket) ?? DaemonSocket.DefaultPath);
            string folder = Path.GetFullPath(parsed.GetValue(state) ?? DaemonSocket.StateFolder);
            return RunAsync(
                services.GetRequiredService<KvmHost>(),
                new DaemonOptions
                {
                    Socket = path,
                    SocketMode = parsed.GetValue(mode),
                    SocketGroup = parsed.GetValue(group),
                    StateFolder = folder,
                    ConsoleLogFolder = Chosen(parsed.GetValue(log), Path.Combine(folder, "console")),
                    XenstoreSocket = Chosen(parsed.GetValue(xenstore), DaemonSocket.XenstoreBeside(path)),
                    Version = Tool.Version,
                },
                TimeSpan.FromSeconds(parsed.GetValue(patience)),
                TimeSpan.FromSeconds(parsed.GetValue(idle)));
        });
        return command;
    }

    private static string? Chosen(string? given, string usual) => given == None ? null : Path.GetFullPath(given ?? usual);

    private static UnixFileMode ParseMode(ArgumentResult result)
    {
        const int most = 0x1ff;
        string text = result.Tokens[0].Value;
        int mode = 0;
        foreach (char digit in text)
            mode = mode > most || digit is < '0' or > '7' ? most + 1 : (mode << 3) | (digit - '0');
        if (text.Length > 0 && mode <= most)
            return (UnixFileMode)mode;
        result.AddError($"--socket-mode takes three octal digits, such as 0660; \"{text}\" is none.");
        return DaemonOptions.DefaultSocketMode;
    }

    private static async Task<int> RunAsync(KvmHost host, DaemonOptions options, TimeSpan patience, TimeSpan idle)
    {
        using var signals = new EndingSignals();
        var log = new ManagerLog(static sentence => Console.Error.WriteLine($"{Tool.Name}: {sentence}"));
        DaemonServer server;
        try
        {
            server = await DaemonServer.StartAsync(host, options, log).ConfigureAwait(false);
        }
        catch (ToolstackException refusal)
        {
            throw new UsageException(refusal.Message);
        }

        await using (server.ConfigureAwait(false))
        {
            log.Write($"{Tool.Name} {Tool.Version} answers at {options.Socket}.");
            ServiceNotification.Send(ServiceNotification.Ready);
            ProgramPages.GiveBack();
            await WaitForEndAsync(server.Toolstack, idle, signals.Token).ConfigureAwait(false);
            ServiceNotification.Send(ServiceNotification.Stopping);
            log.Write(signals.Received == 0
                ? "The daemon ends, as it has no domain any more."
                : string.Create(CultureInfo.InvariantCulture, $"Signal {signals.Received} asks the daemon to end, and it ends its {server.Toolstack.Domains.Count} domains."));
            await server.CloseAsync(patience).ConfigureAwait(false);
        }

        return ExitStatus.Success;
    }

    private static async Task WaitForEndAsync(DomainToolstack toolstack, TimeSpan idle, CancellationToken ending)
    {
        TimeSpan look = idle == TimeSpan.Zero ? Timeout.InfiniteTimeSpan : TimeSpan.FromSeconds(1);
        long since = Stopwatch.GetTimestamp();
        while (!ending.IsCancellationRequested && (idle == TimeSpan.Zero || Stopwatch.GetElapsedTime(since) < idle))
        {
            await Task.Delay(look, ending).ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
            if (!toolstack.IsIdle)
                since = Stopwatch.GetTimestamp();
        }
    }
}
