// xensharp trace: what run --trace has recorded, as lines, as figures, and against another run.

using System.Buffers;
using System.CommandLine;
using System.CommandLine.Parsing;
using System.Globalization;
using System.Text;
using System.Text.Encodings.Web;
using System.Text.Json;
using Spectre.Console;
using XenSharp.Cli.Hosting;
using XenSharp.Core.Trace;
using XenSharp.Tracing;

namespace XenSharp.Cli.Commands;

/// <summary>Reads traces. Needs no KVM.</summary>
internal static class TraceCommand
{
    /// <summary>The runs differ.</summary>
    private const int Different = 1;

    private const int OutputBufferSize = 1 << 16;

    /// <summary>Records that are shown before and after a difference.</summary>
    private const int Context = 2;

    private static readonly JsonWriterOptions Json = new() { Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping };

    internal static Command Create()
    {
        Argument<string> file = FileArgument("FILE", "A trace that run --trace or demo --trace has written.");
        Option<int> limit = Limit("Only so many records, the first ones.", int.MaxValue);
        var json = new Option<bool>("--json") { Description = "Print an object a line, for programs." };
        var command = new Command("trace", "Lists what a guest asked for while run --trace recorded it.") { file, limit, json };
        var filter = new TraceFilterOptions(command);
        command.SetAction(parsed => Guard(parsed.GetRequiredValue(file), output =>
        {
            using TraceFile trace = TraceInput.Open(parsed.GetRequiredValue(file));
            List(trace, filter.FilterOf(parsed), parsed.GetValue(limit), parsed.GetValue(json), output);
            return ExitStatus.Success;
        }));
        command.Add(CreateSummary());
        command.Add(CreateDiff());
        return command;
    }

    private static Command CreateSummary()
    {
        Argument<string> file = FileArgument("FILE", "A trace.");
        var json = new Option<bool>("--json") { Description = "Print JSON, for programs; times in nanoseconds." };
        var svg = new Option<string?>("--svg") { Description = "A file that gets a picture of the durations (SVG).", HelpName = "FILE" };
        var command = new Command("summary", "Counts what is in a trace, and shows how long it took.") { file, json, svg };
        var filter = new TraceFilterOptions(command);
        command.SetAction(parsed => Guard(parsed.GetRequiredValue(file), output =>
        {
            string path = parsed.GetRequiredValue(file);
            using TraceFile trace = TraceInput.Open(path);
            TraceSummary summary = TraceSummary.Of(trace, filter.FilterOf(parsed));
            if (parsed.GetValue(svg) is { } picture)
                WritePicture(picture, TraceHistogram.Draw(summary, $"{trace.Header.GuestName}: {Path.GetFileName(path)}"));
            if (parsed.GetValue(json))
                WriteSummaryJson(trace, summary, output);
            else
                PrintSummary(trace, summary, output);
            return ExitStatus.Success;
        }));
        return command;
    }

    private static Command CreateDiff()
    {
        Argument<string> a = FileArgument("A", "The trace of one run.");
        Argument<string> b = FileArgument("B", "The trace of another.");
        Option<int> limit = Limit("Show only so many differences, the first ones; all are counted.", 100);
        var command = new Command(
            "diff", "Compares two runs by what they asked for, without addresses, machine frames and times. Status 0: the same, 1: different.")
        {
            a, b, limit,
        };
        var filter = new TraceFilterOptions(command);
        command.SetAction(parsed => Guard(parsed.GetRequiredValue(a), output =>
        {
            string nameA = parsed.GetRequiredValue(a);
            string nameB = parsed.GetRequiredValue(b);
            TraceDiff diff = TraceDiff.Of(Read(nameA, filter.FilterOf(parsed)), Read(nameB, filter.FilterOf(parsed)));
            PrintDiff(diff, nameA, nameB, parsed.GetValue(limit), output);
            return diff.IsSame ? ExitStatus.Success : Different;
        }));
        return command;

        static List<ComparedRecord> Read(string path, TraceFilter filter)
        {
            using TraceFile trace = TraceInput.Open(path);
            try
            {
                return TraceDiff.Read(trace, filter);
            }
            catch (TraceFormatException failure)
            {
                throw TraceInput.Unusable(path, failure);
            }
        }
    }

    private static Argument<string> FileArgument(string name, string description) => new(name) { Description = description };

    private static Option<int> Limit(string description, int usual)
    {
        var limit = new Option<int>("--limit", "-n") { Description = description, HelpName = "COUNT", DefaultValueFactory = _ => usual };
        limit.Validators.Add(static result =>
        {
            if (result.GetValueOrDefault<int>() < 1)
                result.AddError("--limit must be at least 1.");
        });
        return limit;
    }

    /// <summary>Gives an action standard output, and turns what can go wrong with that and with the trace into sentences.</summary>
    private static int Guard(string path, Func<StreamWriter, int> action)
    {
        using var standard = new StandardOutput();

        // Not disposed: after a failure there is nothing more to be said to standard output.
        var output = new StreamWriter(standard, new UTF8Encoding(encoderShouldEmitUTF8Identifier: false), OutputBufferSize) { NewLine = "\n" };
        try
        {
            int status = action(output);
            output.Flush();
            return status;
        }
        catch (TraceFormatException failure)
        {
            // What was found up to there is worth seeing.
            output.Flush();
            throw TraceInput.Unusable(path, failure);
        }
        catch (IOException) when (standard.ReaderGone)
        {
            return ExitStatus.OutputReaderGone;
        }
    }

    private static void List(TraceFile trace, TraceFilter filter, int limit, bool json, StreamWriter output)
    {
        var text = new TraceText();
        foreach (TraceRecord record in trace.Records())
        {
            if (!filter.Matches(record, trace.Header, text))
                continue;
            if (json)
                WriteRecordJson(trace, record, text, output);
            else
                PrintRecord(trace, record, text, output);
            if (--limit == 0)
                return;
        }
    }

    private static void PrintRecord(TraceFile trace, TraceRecord record, TraceText text, StreamWriter output)
    {
        double start = TraceTime.SecondsOf(record, trace.Header);
        string duration = TraceUnits.Duration(TraceTime.Nanoseconds(record.Duration, trace.Header));
        string mode = record.Has(TraceFlags.KernelMode) ? "kernel" : "user";
        string kind = TraceText.KindName(record.Kind);
        string what = (record.Has(TraceFlags.Nested) ? "  " : string.Empty) + text.Describe(record);
        output.WriteLine(string.Create(
            CultureInfo.InvariantCulture, $"{start,12:0.000000}  vcpu{record.Vcpu}  {duration,8}  {mode,-6} {record.Rip:x16}  {kind,-9}  {what}"));
    }

    private static void WriteRecordJson(TraceFile trace, TraceRecord record, TraceText text, StreamWriter output) => WriteJson(output, json =>
    {
        json.WriteNumber("time", Math.Round(TraceTime.SecondsOf(record, trace.Header), 9));
        json.WriteNumber("vcpu", record.Vcpu);
        json.WriteString("kind", TraceText.KindName(record.Kind));
        json.WriteString("name", text.Name(record));
        json.WriteString("mode", record.Has(TraceFlags.KernelMode) ? "kernel" : "user");
        json.WriteString("rip", Hex(record.Rip));
        json.WriteNumber("nanoseconds", Math.Round(TraceTime.Nanoseconds(record.Duration, trace.Header)));
        json.WriteString("text", text.Describe(record));
        switch (record.Kind)
        {
            case TraceKind.Hypercall or TraceKind.SystemCall:
                json.WriteNumber("number", record.Number);
                json.WriteStartArray("arguments");
                foreach (ulong argument in TraceText.ArgumentsOf(record))
                    json.WriteStringValue(Hex(argument));
                json.WriteEndArray();
                if (record.Kind == TraceKind.SystemCall)
                    break;
                if (!record.Has(TraceFlags.Continued))
                    json.WriteNumber("result", record.Result);
                if (TraceText.ErrorOf(record) is { } error)
                    json.WriteString("error", error);
                json.WriteBoolean("nested", record.Has(TraceFlags.Nested));
                json.WriteBoolean("continued", record.Has(TraceFlags.Continued));
                json.WriteBoolean("resumed", record.Has(TraceFlags.Resumed));
                if (record.Has(TraceFlags.HasData))
                    json.WriteString("data", Convert.ToHexStringLower(((ReadOnlySpan<byte>)record.Data)[..record.DataLength]));
                break;
            case TraceKind.Upcall:
                json.WriteString("callback", Hex(record.Address));
                json.WriteString("outcome", OutcomeName(record.Outcome));
                break;
            case TraceKind.Exception or TraceKind.Emulation:
                WriteTrapJson(json, record, text);
                break;
        }
    });

    private static void WriteTrapJson(Utf8JsonWriter json, TraceRecord record, TraceText text)
    {
        json.WriteNumber("vector", record.Vector);
        json.WriteNumber("errorCode", record.ErrorCode);
        if (record.Vector == (byte)Core.ExceptionVector.PageFault)
            json.WriteString("address", Hex(record.Address));
        json.WriteString("outcome", OutcomeName(record.Outcome));
        if (record.Outcome == TraceOutcome.Delivered)
        {
            json.WriteNumber("deliveredVector", record.DeliveredVector);
            json.WriteNumber("deliveredErrorCode", record.DeliveredErrorCode);
        }

        if (text.Disassemble(record) is { } instruction)
        {
            json.WriteString("instruction", instruction);
            json.WriteString("bytes", Convert.ToHexStringLower(((ReadOnlySpan<byte>)record.Instruction)[..record.InstructionLength]));
            WriteRegisters(json, "before", record.RegistersRead, record.Before);
            WriteRegisters(json, "after", record.RegistersWritten, record.After);
        }

        if (record.Has(TraceFlags.HasEntry))
        {
            json.WriteString("entryBefore", Hex(record.EntryBefore));
            json.WriteString("entryAfter", Hex(record.EntryAfter));
        }
    }

    private static void WriteRegisters(Utf8JsonWriter json, string name, ushort mask, ReadOnlySpan<ulong> values)
    {
        json.WriteStartObject(name);
        foreach ((string register, ulong value) in TraceText.Registers(mask, values))
            json.WriteString(register, Hex(value));
        json.WriteEndObject();
    }

    private static string OutcomeName(TraceOutcome outcome) => outcome.ToString().ToLowerInvariant();

    /// <summary>64 bits are more than a number of JSON holds.</summary>
    private static string Hex(ulong value) => $"0x{value:x}";

    private static void WriteJson(StreamWriter output, Action<Utf8JsonWriter> write)
    {
        var buffer = new ArrayBufferWriter<byte>();
        using (var json = new Utf8JsonWriter(buffer, Json))
        {
            json.WriteStartObject();
            write(json);
            json.WriteEndObject();
        }

        output.WriteLine(Encoding.UTF8.GetString(buffer.WrittenSpan));
    }

    private static void WriteSummaryJson(TraceFile trace, TraceSummary summary, StreamWriter output) => WriteJson(output, json =>
    {
        json.WriteString("guest", trace.Header.GuestName);
        json.WriteString("start", trace.Header.StartTime);
        json.WriteString("xen", trace.Header.XenVersion);
        json.WriteString("xenSharp", trace.Header.XenSharpVersion);
        json.WriteNumber("tscKiloHertz", trace.Header.TscKiloHertz);
        json.WriteBoolean("complete", trace.Damage is null);
        json.WriteNumber("seconds", summary.Seconds);
        json.WriteStartArray("rows");
        foreach (TraceSummaryRow row in summary.Rows)
        {
            json.WriteStartObject();
            json.WriteString("kind", TraceText.KindName(row.Kind));
            json.WriteString("name", row.Name);
            json.WriteNumber("count", row.Count);
            json.WriteNumber("errors", row.Errors);
            foreach ((string name, double value) in (ReadOnlySpan<(string, double)>)
                [("total", row.Total), ("p50", row.Median), ("p90", row.Percentile90), ("p99", row.Percentile99), ("max", row.Longest)])
            {
                json.WriteNumber(name, Math.Round(value));
            }

            json.WriteEndObject();
        }

        json.WriteEndArray();
    });

    private static void PrintSummary(TraceFile trace, TraceSummary summary, StreamWriter output)
    {
        TraceHeader header = trace.Header;
        output.Write(string.Create(
            CultureInfo.InvariantCulture,
            $"{header.GuestName} on XenSharp {header.XenSharpVersion} (Xen {header.XenVersion}), {header.StartTime:yyyy-MM-dd HH:mm:ss} UTC: "));
        output.WriteLine(string.Create(
            CultureInfo.InvariantCulture, $"{summary.Rows.Sum(static row => row.Count):N0} records in {summary.Seconds:0.000} s"));
        var table = new Table { Border = TableBorder.Simple };
        table.AddColumn("kind");
        table.AddColumn("name");
        foreach (string name in (ReadOnlySpan<string>)["count", "errors", "total", "p50", "p90", "p99", "max"])
            table.AddColumn(new TableColumn(name) { NoWrap = true }.RightAligned());
        foreach (TraceSummaryRow row in summary.Rows)
        {
            table.AddRow(
                new Text(TraceText.KindName(row.Kind)),
                new Text(row.Name),
                new Text(row.Count.ToString("N0", CultureInfo.InvariantCulture)),
                new Text(row.Errors == 0 ? string.Empty : row.Errors.ToString("N0", CultureInfo.InvariantCulture)),
                new Text(TraceUnits.Duration(row.Total)),
                new Text(TraceUnits.Duration(row.Median)),
                new Text(TraceUnits.Duration(row.Percentile90)),
                new Text(TraceUnits.Duration(row.Percentile99)),
                new Text(TraceUnits.Duration(row.Longest)));
        }

        Print(table, output);
    }

    private static void PrintDiff(TraceDiff diff, string nameA, string nameB, int limit, StreamWriter output)
    {
        if (diff.IsSame)
        {
            output.WriteLine(string.Create(CultureInfo.InvariantCulture, $"The same: {diff.A.Count:N0} records."));
            return;
        }

        output.WriteLine($"--- {nameA}");
        output.WriteLine($"+++ {nameB}");
        foreach (TraceDifference difference in diff.Differences.Take(limit))
            PrintDifference(diff, difference, output);
        if (diff.Differences.Count > limit)
            output.WriteLine(string.Create(CultureInfo.InvariantCulture, $"... and {diff.Differences.Count - limit:N0} more differences (--limit shows more)"));
        output.WriteLine();
        int onlyA = diff.Rows.Sum(static row => row.OnlyA);
        int onlyB = diff.Rows.Sum(static row => row.OnlyB);
        output.Write(string.Create(CultureInfo.InvariantCulture, $"{diff.Differences.Count:N0} differences: "));
        output.WriteLine(string.Create(
            CultureInfo.InvariantCulture, $"{onlyA:N0} of {diff.A.Count:N0} records only in {nameA}, {onlyB:N0} of {diff.B.Count:N0} only in {nameB}"));
        var table = new Table { Border = TableBorder.Simple };
        table.AddColumn("name");
        foreach (string name in (ReadOnlySpan<string>)["in A", "in B", "only in A", "only in B"])
            table.AddColumn(new TableColumn(name) { NoWrap = true }.RightAligned());
        foreach (TraceDiffRow row in diff.Rows)
        {
            table.AddRow([new Text(row.Name), .. ((int[])[row.CountA, row.CountB, row.OnlyA, row.OnlyB])
                .Select(static count => new Text(count.ToString("N0", CultureInfo.InvariantCulture)))]);
        }

        Print(table, output);
    }

    private static void PrintDifference(TraceDiff diff, TraceDifference difference, StreamWriter output)
    {
        output.WriteLine($"@@ {Place(diff.A, difference.StartA, difference.CountA)} | {Place(diff.B, difference.StartB, difference.CountB)} @@");
        for (int i = Math.Max(0, difference.StartA - Context); i < difference.StartA; i++)
            output.WriteLine($"  {diff.A[i].Text}");
        for (int i = 0; i < difference.CountA; i++)
            output.WriteLine($"- {diff.A[difference.StartA + i].Text}");
        for (int i = 0; i < difference.CountB; i++)
            output.WriteLine($"+ {diff.B[difference.StartB + i].Text}");
        int end = difference.StartA + difference.CountA;
        for (int i = end; i < Math.Min(end + Context, diff.A.Count); i++)
            output.WriteLine($"  {diff.A[i].Text}");
    }

    /// <summary>Which records, and when: "120-122 at 0.351 s".</summary>
    private static string Place(IReadOnlyList<ComparedRecord> run, int start, int count)
    {
        if (start >= run.Count)
            return "the end";
        string range = count > 1 ? string.Create(CultureInfo.InvariantCulture, $"{start + 1}-{start + count}") : (start + 1).ToString(CultureInfo.InvariantCulture);
        return string.Create(CultureInfo.InvariantCulture, $"{(count == 0 ? "before " : string.Empty)}{range} at {run[start].Seconds:0.000} s");
    }

    private static void Print(Table table, StreamWriter output)
    {
        IAnsiConsole console = AnsiConsole.Create(new AnsiConsoleSettings { Out = new AnsiConsoleOutput(output) });

        // Into a file or pipe nothing is folded: a line is a row.
        if (Console.IsOutputRedirected)
            console.Profile.Width = 1000;
        console.Write(table);
    }

    private static void WritePicture(string path, string picture)
    {
        if (path.Length == 0)
            throw new UsageException("--svg was given an empty name; give it the name of a file.");
        if (Directory.Exists(path))
            throw new UsageException($"{path} is a folder; give --svg the name of a file.");
        try
        {
            File.WriteAllText(path, picture);
        }
        catch (UnauthorizedAccessException)
        {
            throw new UsageException($"There is no permission to write the picture {path}; name another file, or run as a user who may write it.");
        }
        catch (DirectoryNotFoundException)
        {
            throw new UsageException($"The picture {path} cannot be written: its folder does not exist; make it, or name another.");
        }
        catch (IOException failure)
        {
            throw new UsageException($"The picture {path} cannot be written: {TraceOutput.Reason(failure.Message)}. Name another file with --svg.");
        }
    }
}
