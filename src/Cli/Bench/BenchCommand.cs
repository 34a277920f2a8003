// xensharp bench: what the ABI costs on this host.
using System.CommandLine;
using System.Globalization;
using System.Runtime.CompilerServices;
using System.Text.Json;
using Microsoft.Extensions.DependencyInjection;
using Spectre.Console;
using XenSharp.Cli.Commands;
using XenSharp.Cli.Hosting;
using XenSharp.Toolstack;

namespace XenSharp.Cli.Bench;

/// <summary>Measures and prints; every time is also given as a ratio to a bare KVM exit taken in the same run.</summary>
internal static class BenchCommand
{
    private const int NestedRounds = 2;
    private const string FloorName = "raw KVM exit from CPL 3 (the floor)";

    internal static Command Create(IServiceProvider services)
    {
        var rounds = new Option<int>("--rounds") { Description = "Times that each figure is taken; medians are shown.", DefaultValueFactory = static _ => 5 };
        var iterations = new Option<int>("--iterations") { Description = "Operations of a figure in one round.", DefaultValueFactory = static _ => 3000 };
        var hypercalls = new Option<int>("--hypercalls") { Description = "Hypercalls over which allocations are counted.", DefaultValueFactory = static _ => 1_000_000 };
        var noDebian = new Option<bool>("--no-debian") { Description = "Leave the Debian guest out; nothing is downloaded." };
        var disks = new Option<bool>("--disks") { Description = "Only the Debian guest's disks, beside the same transfers by a process of the host." };
        var idle = new Option<bool>("--idle") { Description = "Only Debian guests that sleep, beside a thread that does, by the processor time that they take." };
        var only = new Option<string[]>("--only")
        {
            Description = "Of the disks' transfers only those whose names have one of these words in them, as in --only \"4 KiB\" O_DIRECT.",
            AllowMultipleArgumentsPerToken = true,
        };
        var nested = new Option<bool>("--nested")
        {
            Description = "Instead, real Xen and this command side by side, each in an emulated machine: some minutes a round, 2 rounds unless --rounds says otherwise.",
        };
        var json = new Option<bool>("--json") { Description = "Print JSON, for programs." };
        AtLeast(rounds, 1);
        AtLeast(iterations, 64);
        AtLeast(hypercalls, 1);
        var command = new Command("bench", "Measures what the Xen ABI costs here, as ratios to a bare KVM exit.") { rounds, iterations, hypercalls, noDebian, disks, idle, only, nested, json };
        command.SetAction(async (parsed, _) =>
        {
            using var signals = new EndingSignals();
            try
            {
                if (parsed.GetValue(nested))
                {
                    int nestedRounds = parsed.GetResult(rounds) is { Implicit: false } ? parsed.GetValue(rounds) : NestedRounds;
                    NestedBenchResult sideBySide = await RunNestedAsync(
                        new NestedBenchmarkPlan(nestedRounds, parsed.GetValue(iterations)), signals.Token).ConfigureAwait(false);
                    if (parsed.GetValue(json))
                        Console.Out.WriteLine(JsonSerializer.Serialize(sideBySide, BenchJson.Default.NestedBenchResult));
                    else
                        Print(sideBySide);
                    return ExitStatus.Success;
                }

                var plan = new BenchmarkPlan(
                    parsed.GetValue(rounds), parsed.GetValue(iterations), parsed.GetValue(hypercalls), !parsed.GetValue(noDebian), parsed.GetValue(disks),
                    parsed.GetValue(idle), parsed.GetValue(only));
                var benchmark = new Benchmark(
                    services.GetRequiredService<KvmHost>(), plan, static stage => Console.Error.WriteLine($"{Tool.Name}: {stage}"));
                BenchResult result = await benchmark.RunAsync(signals.Token).ConfigureAwait(false);
                if (parsed.GetValue(json))
                    Console.Out.WriteLine(JsonSerializer.Serialize(result, BenchJson.Default.BenchResult));
                else
                    Print(result);
                return ExitStatus.Success;
            }
            catch (OperationCanceledException) when (signals.Received != 0)
            {
                return ExitStatus.OfSignal + signals.Received;
            }
        });
        return command;
    }

    private static void AtLeast(Option<int> option, int minimum) => option.Validators.Add(result =>
    {
        if (result.GetValueOrDefault<int>() < minimum)
            result.AddError($"{option.Name} must be at least {minimum}.");
    });

    private static Task<NestedBenchResult> RunNestedAsync(NestedBenchmarkPlan plan, CancellationToken cancellation)
    {
        if (RuntimeFeature.IsDynamicCodeSupported || Environment.ProcessPath is not { } command)
            throw new UsageException(
                $"bench --nested puts the native command into an emulated machine, and this is not it; make it with "
                + $"`dotnet publish src/Cli -c Release -r linux-x64 -o artifacts/native` and run artifacts/native/{Tool.Name} bench --nested.");
        return new NestedBenchmark(command, plan, static stage => Console.Error.WriteLine($"{Tool.Name}: {stage}")).RunAsync(cancellation);
    }

    private static void Print(NestedBenchResult result)
    {
        IAnsiConsole console = CreateConsole();
        var times = new Table { Border = TableBorder.Simple };
        times.AddColumn("figure");
        times.AddColumn(new TableColumn($"{result.Beds[0]}, µs").RightAligned());
        foreach (string bed in result.Beds.Skip(1))
        {
            times.AddColumn(new TableColumn($"{bed}, µs").RightAligned());
            times.AddColumn(new TableColumn("× Xen").RightAligned());
            times.AddColumn(new TableColumn("× floor").RightAligned());
        }

        times.AddRow(
        [
            FloorName,
            string.Empty,
            .. result.FloorNanoseconds.Skip(1).SelectMany(static floor => new[] { floor is { } time ? Microseconds(time) : string.Empty, string.Empty, "1" }),
        ]);
        foreach (NestedBenchFigure figure in result.Figures)
        {
            IEnumerable<string> others = figure.Nanoseconds.Zip(result.FloorNanoseconds).Skip(1).SelectMany(bed => new[]
            {
                Microseconds(bed.First),
                Ratio(bed.First / figure.Nanoseconds[0]),
                bed.Second is { } floor ? Ratio(bed.First / floor) : string.Empty,
            });
            times.AddRow([figure.Name, Microseconds(figure.Nanoseconds[0]), .. others]);
        }

        console.Write(times);
    }

    private static IAnsiConsole CreateConsole()
    {
        IAnsiConsole console = AnsiConsole.Create(new AnsiConsoleSettings { Out = new AnsiConsoleOutput(Console.Out) });
        if (Console.IsOutputRedirected)
            console.Profile.Width = 160;
        return console;
    }

    private static void Print(BenchResult result)
    {
        IAnsiConsole console = CreateConsole();
        var times = new Table { Border = TableBorder.Simple };
        times.AddColumn("figure");
        foreach (string name in (ReadOnlySpan<string>)["µs", "× floor", "lowest", "highest", "at most"])
            times.AddColumn(new TableColumn(name).RightAligned());
        times.AddRow(FloorName, Microseconds(result.FloorNanoseconds), "1", string.Empty, string.Empty, string.Empty);
        foreach (BenchFigure figure in result.Figures)
        {
            times.AddRow(
                figure.Name,
                Microseconds(figure.Nanoseconds),
                Ratio(figure.Ratio),
                Ratio(figure.LowestRatio),
                Ratio(figure.HighestRatio),
                figure.Required is { } limit ? $"{Ratio(limit)}{(figure.IsMet ? string.Empty : " MISSED")}" : string.Empty);
        }

        console.Write(times);
        Print(console, result.Disks);
        Print(console, result.Idle);
        foreach (BenchCount count in result.Counts)
        {
            string limit = count.Required is { } required ? $" (at most {required.ToString(CultureInfo.InvariantCulture)}{(count.IsMet ? string.Empty : ": MISSED")})" : string.Empty;
            console.WriteLine($"{count.Name}: {count.Value.ToString("N1", CultureInfo.InvariantCulture)} {count.Unit}{limit}");
        }
    }

    private static void Print(IAnsiConsole console, IReadOnlyList<DiskFigure> disks)
    {
        if (disks.Count == 0)
            return;
        var table = new Table { Border = TableBorder.Simple };
        table.AddColumn("32 transfers at once");
        foreach (string name in (ReadOnlySpan<string>)["guest, µs", "MiB/s", "host, µs", "MiB/s", "guest / host", "CPU, µs", "hypercalls each", "wake-ups each", "interrupts each"])
            table.AddColumn(new TableColumn(name).RightAligned());
        foreach (DiskFigure figure in disks)
        {
            table.AddRow(
                figure.Name, Microseconds(figure.GuestNanoseconds), Throughput(figure, figure.GuestNanoseconds), Microseconds(figure.HostNanoseconds),
                Throughput(figure, figure.HostNanoseconds), Ratio(figure.Throughput), Microseconds(figure.ProcessorNanoseconds), Ratio(figure.Hypercalls), Ratio(figure.Wakeups),
                Ratio(figure.Notifications));
        }

        console.Write(table);

        static string Throughput(DiskFigure figure, double nanoseconds)
            => (figure.BlockSize / (double)(1 << 20) / (nanoseconds / 1e9)).ToString("N0", CultureInfo.InvariantCulture);
    }

    private static void Print(IAnsiConsole console, IReadOnlyList<IdleFigure> idle)
    {
        if (idle.Count == 0)
            return;
        var table = new Table { Border = TableBorder.Simple };
        table.AddColumn("idle Debian, processor time of a wake-up");
        foreach (string name in (ReadOnlySpan<string>)["a second", "sleep only, µs", "with a bare exit, µs", "guest, µs", "guest / bare exit", "bare exit, % of a core", "guest, % of a core"])
            table.AddColumn(new TableColumn(name).RightAligned());
        foreach (IdleFigure figure in idle)
        {
            table.AddRow(
                figure.Name, Ratio(figure.WakeUps), Microseconds(figure.Bare.SleepNanoseconds), Microseconds(figure.Bare.EntryNanoseconds),
                Microseconds(figure.ProcessorNanoseconds), Ratio(figure.ProcessorNanoseconds / figure.Bare.EntryNanoseconds), Percent(figure.BarePercent), Percent(figure.Percent));
        }

        console.Write(table);

        static string Percent(double percent) => percent.ToString("N3", CultureInfo.InvariantCulture);
    }

    private static string Microseconds(double nanoseconds) => (nanoseconds / 1000).ToString(nanoseconds < 1e7 ? "N2" : "N0", CultureInfo.InvariantCulture);

    private static string Ratio(double ratio) => ratio.ToString(ratio < 100 ? "N2" : "N0", CultureInfo.InvariantCulture);
}
