// list: the domains there are.

using System.CommandLine;
using System.Globalization;
using System.Text;
using System.Text.Json;
using XenSharp.Api;
using XenSharp.Configuration;

namespace XenSharp.Cli.Management;

/// <summary>Prints domains in xl's columns, or all about them as JSON in libxl's form.</summary>
internal static class ListCommand
{
    /// <summary>What Xen calls the pool of all processors, where no other was made.</summary>
    private const string TheOnlyPool = "Pool-0";

    internal static Command Create()
    {
        Argument<string[]> domains = ManagementCommand.Domains("The domains; all if none is named.");
        var detailed = new Option<bool>("--long", "-l") { Description = "Print all about the domains, as JSON in the form of xl's." };
        var verbose = new Option<bool>("--verbose", "-v") { Description = "Print UUIDs, why a domain has shut down, and security labels, too." };
        var context = new Option<bool>("--context", "-Z") { Description = "Print security labels, too: there are none." };
        var pool = new Option<bool>("--cpupool", "-c") { Description = "Print the CPU pool, too: there is one." };
        var numa = new Option<bool>("--numa", "-n") { Description = "Print the NUMA nodes that memory is taken from, too: all." };
        var lost = new Option<bool>("--lost") { Description = "List what ran when an earlier daemon was ended without taking it down." };
        Option<bool> json = ManagementCommand.Json();
        var command = new ManagementCommand("list", "Lists domains.") { domains, detailed, verbose, context, pool, numa, lost, json };
        command.Does(async (parsed, daemon, cancellation) =>
        {
            if (parsed.GetValue(lost))
            {
                IReadOnlyList<LostDomain> gone = await daemon.ListLostAsync(cancellation).ConfigureAwait(false);
                if (parsed.GetValue(json))
                    JsonOutput.Print(gone, JsonOutput.Types.IReadOnlyListLostDomain);
                else
                    PrintLost(gone);
                return;
            }

            IReadOnlyList<DomainInfo> found = await ManagementCommand.FindAsync(daemon, parsed.GetRequiredValue(domains), cancellation).ConfigureAwait(false);
            if (parsed.GetValue(detailed))
                await PrintLongAsync(daemon, found, single: parsed.GetRequiredValue(domains).Length == 1, cancellation).ConfigureAwait(false);
            else if (parsed.GetValue(json))
                JsonOutput.Print(found, JsonOutput.Types.IReadOnlyListDomainInfo);
            else
                Print(found, parsed.GetValue(verbose), parsed.GetValue(context), parsed.GetValue(pool), parsed.GetValue(numa));
        });
        return command;
    }

    /// <summary>vm-list: which domains there are, and no more.</summary>
    internal static Command CreateVmList()
    {
        Option<bool> json = ManagementCommand.Json();
        var command = new ManagementCommand("vm-list", "Lists domains by UUID.") { json };
        command.Does(async (parsed, daemon, cancellation) =>
        {
            IReadOnlyList<DomainInfo> found = await daemon.ListAsync(cancellation).ConfigureAwait(false);
            if (parsed.GetValue(json))
            {
                JsonOutput.Print(found, JsonOutput.Types.IReadOnlyListDomainInfo);
                return;
            }

            var text = new StringBuilder().AppendLine("UUID                                  ID    name");
            foreach (DomainInfo domain in found)
                text.AppendLine(CultureInfo.InvariantCulture, $"{domain.Uuid}  {domain.Id}    {domain.Name,-30}");
            Console.Out.Write(text);
        });
        return command;
    }

    private static void Print(IReadOnlyList<DomainInfo> domains, bool verbose, bool context, bool pool, bool numa)
    {
        var text = new StringBuilder("Name                                        ID   Mem VCPUs\tState\tTime(s)");
        if (verbose)
            text.Append("   UUID                            Reason-Code\tSecurity Label");
        else if (context)
            text.Append("   Security Label");
        if (pool)
            text.Append("         Cpupool");
        if (numa)
            text.Append(" NODE Affinity");
        text.AppendLine();
        foreach (DomainInfo domain in domains)
        {
            text.Append(
                CultureInfo.InvariantCulture,
                $"{domain.Name,-40} {domain.Id,5} {domain.MemoryKiB / 1024,5} {domain.OnlineVcpus,5}     {domain.State.Letters}  {domain.ProcessorSeconds,8:0.0}");
            if (verbose)
                text.Append(CultureInfo.InvariantCulture, $" {domain.Uuid} {(domain.State.Reason is { } reason ? ((int)reason).ToString("x", CultureInfo.InvariantCulture) : "-"),8}");
            if (verbose || context)
                text.Append(CultureInfo.InvariantCulture, $" {"-",16}");
            if (pool)
                text.Append(CultureInfo.InvariantCulture, $"{TheOnlyPool,16}");
            if (numa)
                text.Append(" all");
            text.AppendLine();
        }

        Console.Out.Write(text);
    }

    private static void PrintLost(IReadOnlyList<LostDomain> domains)
    {
        var text = new StringBuilder().AppendLine(CultureInfo.InvariantCulture, $"{"Name",-40} {"UUID",-36} {"Started",-20} Lost");
        foreach (LostDomain domain in domains)
        {
            text.AppendLine(
                CultureInfo.InvariantCulture,
                $"{domain.Name,-40} {domain.Uuid} {domain.StartTime.LocalDateTime,-20:yyyy-MM-dd HH:mm:ss} {domain.FoundLost.LocalDateTime:yyyy-MM-dd HH:mm:ss}");
        }

        Console.Out.Write(text);
    }

    /// <summary>One object for a domain that was named, as with xl, and an array otherwise.</summary>
    private static async Task PrintLongAsync(DaemonClient daemon, IReadOnlyList<DomainInfo> domains, bool single, CancellationToken cancellation)
    {
        using var buffer = new MemoryStream();
        await using (var writer = new Utf8JsonWriter(buffer, LibxlListing.WriterOptions))
        {
            if (!single)
                writer.WriteStartArray();
            foreach (DomainInfo domain in domains)
            {
                DomainConfigurationDocument document;
                try
                {
                    document = await daemon.GetConfigurationAsync(domain.Id.ToString(CultureInfo.InvariantCulture), cancellation).ConfigureAwait(false);
                }
                catch (DaemonException failure) when (failure.Kind == ProblemKind.NoSuchDomain && !single)
                {
                    // It has ended since.
                    continue;
                }

                LibxlListing.Write(writer, domain.Id, Understand(document) with { Name = domain.Name, Uuid = domain.Uuid });
            }

            if (!single)
                writer.WriteEndArray();
        }

        await Console.Out.WriteLineAsync(Encoding.UTF8.GetString(buffer.GetBuffer(), 0, (int)buffer.Length)).ConfigureAwait(false);
    }

    private static DomainConfiguration Understand(DomainConfigurationDocument document) => document.Json is { } json
        ? DomainConfigurationJson.Read(json.GetRawText(), "the daemon's answer")
        : DomainConfigurationReader.Read(document.Text ?? string.Empty, document.FileName ?? "the daemon's answer", document.Settings).Configuration;
}
