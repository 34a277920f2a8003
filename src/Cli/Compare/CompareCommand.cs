// xensharp compare: does XenSharp answer as Xen does?
using System.CommandLine;
using Microsoft.Extensions.DependencyInjection;
using XenSharp.Cli.Commands;
using XenSharp.Cli.Hosting;
using XenSharp.Guests.Fetching;
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts;
using XenSharp.Oracle;
using XenSharp.Oracle.Beds;
using XenSharp.Oracle.Comparison;
using XenSharp.Oracle.Differences;
using XenSharp.Toolstack;
using Command = System.CommandLine.Command;

namespace XenSharp.Cli.Compare;

/// <summary>Runs ABI scripts and shows where the answers differ from real Xen's; records Xen's answers.</summary>
internal static class CompareCommand
{
    private const string Recorded = "recorded";
    private const string Xen = "xen";
    private const string XenDom0 = "xen-dom0";

    /// <summary>What a script may take on real Xen, which runs on an emulated processor here.</summary>
    private static readonly TimeSpan EmulatedTimeout = TimeSpan.FromSeconds(60);

    /// <summary>Seconds; a day.</summary>
    private const int LongestTimeout = 86_400;

    /// <summary>How a comparison is shown.</summary>
    /// <param name="Html">Path of a page to be written.</param>
    /// <param name="All">With the steps of cases that agree.</param>
    /// <param name="Json">A line a script, and no tables.</param>
    private readonly record struct Presentation(string? Html, bool All, bool Json);

    internal static Command Create(IServiceProvider services)
    {
        var names = new Argument<string[]>("script")
        {
            Description = "Scripts, or what they are about (see --list); all, if none is named.",
            Arity = ArgumentArity.ZeroOrMore,
        };
        var against = new Option<string>("--against")
        {
            Description = "What to hold XenSharp against: the recorded transcripts, real Xen in QEMU with a domU for each script, or with "
                + "each as its dom0; the latter leaves scripts for pairs of domains out.",
            DefaultValueFactory = static _ => Recorded,
        };
        _ = against.AcceptOnlyFromAmong(Recorded, Xen, XenDom0);
        var html = new Option<string?>("--html") { Description = "Write the comparison as a web page.", HelpName = "FILE" };
        var record = new Option<string?>("--record")
        {
            Description = "Do not compare: run the scripts on real Xen and write the transcripts into a folder.",
            HelpName = "FOLDER",
        };
        var all = new Option<bool>("--all") { Description = "Show the steps of cases that agree, too." };
        var list = new Option<bool>("--list") { Description = "List the scripts." };
        var json = new Option<bool>("--json") { Description = "Print an object a line for each script, as soon as it has run, and no tables." };
        var timeout = new Option<int?>("--timeout") { Description = "What a script may take here, as on a slow host.", HelpName = "SECONDS" };
        timeout.Validators.Add(static result =>
        {
            if (result.GetValueOrDefault<int?>() is < 1 or > LongestTimeout)
                result.AddError($"--timeout is from 1 to {LongestTimeout} seconds.");
        });
        var command = new Command("compare", "Runs ABI scripts here and on real Xen, and shows the differences.")
        {
            names, against, html, record, all, list, json, timeout,
        };
        command.SetAction(async (parsed, _) =>
        {
            using var signals = new EndingSignals();
            try
            {
                string reference = parsed.GetValue(against)!;
                IReadOnlyList<AbiScript> scripts = Select(parsed.GetValue(names) ?? [], reference);
                if (parsed.GetValue(list))
                {
                    ComparisonDisplay.List(scripts);
                    return ExitStatus.Success;
                }

                if (parsed.GetValue(record) is { } folder)
                    return await RecordAsync(scripts, reference == Recorded ? Xen : reference, folder, signals.Token).ConfigureAwait(false);
                KvmHost host = services.GetRequiredService<KvmHost>();
                TimeSpan? patience = parsed.GetValue(timeout) is { } seconds ? TimeSpan.FromSeconds(seconds) : null;
                return await CompareAsync(
                    host, scripts, reference, patience, new Presentation(parsed.GetValue(html), parsed.GetValue(all), parsed.GetValue(json)), signals.Token)
                    .ConfigureAwait(false);
            }
            catch (OperationCanceledException) when (signals.Received != 0)
            {
                return ExitStatus.OfSignal + signals.Received;
            }
        });
        return command;
    }

    private static IReadOnlyList<AbiScript> Select(string[] names, string reference)
    {
        IReadOnlyList<AbiScript> scripts = AbiScripts.Create();
        foreach (string name in names)
        {
            if (!scripts.Any(script => script.Name == name || script.Subject == name))
                throw new UsageException($"There is no script \"{name}\", nor is one about that; {Tool.Name} compare --list shows them all.");
        }

        if (names.Length != 0)
            scripts = [.. scripts.Where(script => names.Contains(script.Name) || names.Contains(script.Subject))];
        if (reference != XenDom0)
            return scripts;
        AbiScript[] alone = [.. scripts.Where(static script => !script.IsPair)];
        return alone.Length != 0
            ? alone
            : throw new UsageException($"Scripts for pairs of domains cannot be held against {XenDom0}, which is one; use --against {Xen}.");
    }

    private static Task<IGuestBed> OpenXenAsync(string kind, CancellationToken cancellation)
        => FetchDisplay.RunAsync<IGuestBed>(async progress =>
        {
            var cache = new GuestCache(GuestCache.DefaultRoot());
            if (kind == XenDom0)
            {
                var dom0 = new XenDom0Bed(cache, progress);
                await dom0.PrepareAsync(cancellation).ConfigureAwait(false);
                return dom0;
            }

            var domU = new XenDomUBed(cache, progress);
            await domU.PrepareAsync(cancellation).ConfigureAwait(false);
            return domU;
        });

    private static async Task<int> RecordAsync(
        IReadOnlyList<AbiScript> scripts, string reference, string folder, CancellationToken cancellation)
    {
        Directory.CreateDirectory(folder);
        IGuestBed bed = await OpenXenAsync(reference, cancellation).ConfigureAwait(false);
        int changed = 0;
        List<string> bad = [];
        await foreach (ScriptRun run in ScriptRun.RunAsync(bed, scripts, EmulatedTimeout, cancellation).ConfigureAwait(false))
        {
            if (run.TimedOut)
            {
                bad.Add(run.Script.Name);
                continue;
            }

            bool written = RecordedTruth.Write(folder, run.Transcript, bed.Name);
            changed += written ? 1 : 0;
            Console.Out.WriteLine($"{run.Script.Name}: {(written ? "written" : "the same as before")}");
        }

        Console.Out.WriteLine($"{scripts.Count} scripts on {bed.Name}, {changed} transcripts new or changed in {folder}.");
        return bad.Count == 0
            ? ExitStatus.Success
            : throw new OracleException($"On {bed.Name} these scripts did not end in time and were not recorded: {string.Join(", ", bad)}.");
    }

    private static async Task<int> CompareAsync(
        KvmHost host, IReadOnlyList<AbiScript> scripts, string reference, TimeSpan? timeout, Presentation presentation, CancellationToken cancellation)
    {
        // Before anything long begins: whether there is a KVM, and a place for the page.
        _ = host.Capabilities;
        using StreamWriter? page = presentation.Html is { } html ? OpenPage(html) : null;
        Dictionary<string, Transcript> expected = [];
        string name = "recorded Xen";
        if (reference == Recorded)
        {
            foreach (AbiScript script in scripts)
                expected[script.Name] = RecordedTruth.Of(script.Name);
        }
        else
        {
            IGuestBed xen = await OpenXenAsync(reference, cancellation).ConfigureAwait(false);
            name = xen.Name;
            await foreach (ScriptRun run in ScriptRun.RunAsync(xen, Rebuild(scripts), EmulatedTimeout, cancellation).ConfigureAwait(false))
            {
                ComparisonDisplay.Progress($"{name}: {run.Script.Name}");
                expected[run.Script.Name] = run.Transcript;
            }
        }

        List<ScriptComparison> comparisons = [];
        await foreach (ScriptRun run in ScriptRun.RunAsync(new XenSharpBed(host), scripts, timeout, cancellation).ConfigureAwait(false))
        {
            ScriptComparison comparison = ScriptComparison.Make(
                run.Script.Subject, expected[run.Script.Name], run.Transcript, KnownDifferences.All);
            comparisons.Add(comparison);
            if (presentation.Json)
                ScriptReport.Print(comparison);
            if (!comparison.IsGood && run.Report.Length != 0)
                ComparisonDisplay.Progress($"XenSharp: {run.Script.Name}: {run.Report}");
        }

        if (!presentation.Json)
            ComparisonDisplay.Show(name, comparisons, presentation.All);
        if (page is not null)
            await page.WriteAsync(HtmlReport.Of(name, comparisons)).ConfigureAwait(false);
        return comparisons.All(static comparison => comparison.IsGood) ? ExitStatus.Success : ExitStatus.Different;
    }

    private static StreamWriter OpenPage(string file)
    {
        try
        {
            return new StreamWriter(file);
        }
        catch (UnauthorizedAccessException)
        {
            throw new UsageException($"{file} is a folder or may not be written; give --html another name.");
        }
    }

    /// <summary>The same scripts again: one can be built once only.</summary>
    private static IReadOnlyList<AbiScript> Rebuild(IReadOnlyList<AbiScript> scripts)
    {
        HashSet<string> names = [.. scripts.Select(static script => script.Name)];
        return [.. AbiScripts.Create().Where(script => names.Contains(script.Name))];
    }
}
