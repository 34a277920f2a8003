// xensharp info: what this build is and what it found this host to be.

using System.CommandLine;
using System.Text.Json;
using Microsoft.Extensions.DependencyInjection;
using Spectre.Console;
using XenSharp.Toolstack;

namespace XenSharp.Cli.Commands;

/// <summary>Prints the <see cref="HostReport"/>.</summary>
internal static class InfoCommand
{
    internal static Command Create(IServiceProvider services)
    {
        var json = new Option<bool>("--json") { Description = "Print JSON, for programs." };
        var numa = new Option<bool>("--numa", "-n") { Description = "Also list where processors are, and which node has how much memory." };
        var command = new Command("info", "Shows the machine, as xl does, versions, and what this host's KVM can do.") { numa, json };
        command.SetAction(parsed =>
        {
            HostReport report = HostReport.Make(services.GetRequiredService<KvmHost>());
            if (parsed.GetValue(json))
                Console.Out.WriteLine(JsonSerializer.Serialize(report, HostReportJson.Default.HostReport));
            else
                Print(report, parsed.GetValue(numa));
            if (report.KvmError is null)
                return ExitStatus.Success;
            Console.Error.WriteLine($"{Tool.Name}: {report.KvmError}");
            return ExitStatus.Error;
        });
        return command;
    }

    private static void Print(HostReport report, bool numa)
    {
        Console.Out.WriteLine(HostRows.Text());
        if (numa)
            Console.Out.WriteLine(HostRows.NumaText());
        var table = new Table { Border = TableBorder.None, ShowHeaders = false };
        table.AddColumn(new TableColumn(string.Empty) { NoWrap = true, Padding = new Padding(0, 0, 2, 0) });
        table.AddColumn(new TableColumn(string.Empty) { NoWrap = true, Padding = new Padding(0, 0, 2, 0) });
        table.AddColumn(new TableColumn(string.Empty));
        foreach (HostReportRow row in report.Rows())
            table.AddRow(new Text(row.Name), new Text(row.Value), new Text(row.Meaning));
        IAnsiConsole console = AnsiConsole.Create(new AnsiConsoleSettings { Out = new AnsiConsoleOutput(Console.Out) });

        // Into a file or pipe nothing is folded: a line is a row.
        if (Console.IsOutputRedirected)
            console.Profile.Width = 1000;
        console.Write(table);
    }
}
