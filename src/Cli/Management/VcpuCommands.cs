// vcpu-list, vcpu-set and vcpu-pin.

using System.CommandLine;
using System.Globalization;
using System.Text;
using System.Text.Json;
using XenSharp.Api;
using XenSharp.Cli.Commands;
using XenSharp.Configuration;

namespace XenSharp.Cli.Management;

/// <summary>The vCPUs of domains.</summary>
internal static class VcpuCommands
{
    private const string AllProcessors = "all";

    /// <summary>No vCPU's number.</summary>
    private const int AllVcpus = -1;

    /// <summary>What stands for an affinity that is to stay as it is.</summary>
    private const string Unchanged = "-";

    internal static Command CreateList()
    {
        Argument<string[]> domains = ManagementCommand.Domains("The domains; all if none is named.");
        Option<bool> json = ManagementCommand.Json();
        var command = new ManagementCommand("vcpu-list", "Lists the vCPUs of domains.") { domains, json };
        command.Does(async (parsed, daemon, cancellation) =>
        {
            string[] named = parsed.GetRequiredValue(domains);
            var rows = new List<(DomainInfo Domain, IReadOnlyList<VcpuInfo> Vcpus)>();
            foreach (DomainInfo domain in await ManagementCommand.FindAsync(daemon, named, cancellation).ConfigureAwait(false))
            {
                try
                {
                    rows.Add((domain, await daemon.ListVcpusAsync(domain.Id.ToString(CultureInfo.InvariantCulture), cancellation).ConfigureAwait(false)));
                }
                catch (DaemonException failure) when (failure.Kind == ProblemKind.NoSuchDomain && named.Length == 0)
                {
                    // It has ended since.
                }
            }

            if (parsed.GetValue(json))
                PrintJson(rows);
            else
                Print(rows);
        });
        return command;
    }

    internal static Command CreateSet()
    {
        Argument<string> domain = ManagementCommand.Domain();
        var count = new Argument<int>("vCPUs")
        {
            Description = "How many it is to have online.",
            CustomParser = static result =>
            {
                if (int.TryParse(result.Tokens[0].Value, NumberStyles.None, CultureInfo.InvariantCulture, out int number) && number > 0)
                    return number;
                result.AddError($"vcpu-set takes a number of vCPUs from 1 on; \"{result.Tokens[0].Value}\" is none.");
                return 1;
            },
        };
        var ignoreHost = new Option<bool>("--ignore-host", "-i") { Description = "More than the host has processors may be brought online." };
        var command = new ManagementCommand("vcpu-set", "Sets how many vCPUs a domain has online.") { domain, count, ignoreHost };
        command.Does(async (parsed, daemon, cancellation) =>
        {
            string name = parsed.GetRequiredValue(domain);
            int wanted = parsed.GetValue(count);
            if (!parsed.GetValue(ignoreHost))
            {
                HostInfo host = await daemon.GetHostAsync(cancellation).ConfigureAwait(false);
                if (wanted > host.Processors && wanted > (await daemon.GetAsync(name, cancellation).ConfigureAwait(false)).OnlineVcpus)
                    throw new UsageException($"{wanted} vCPUs are more than the host's {host.Processors} processors; --ignore-host brings them online all the same.");
            }

            await daemon.SetVcpusAsync(name, wanted, cancellation).ConfigureAwait(false);
        });
        return command;
    }

    internal static Command CreatePin()
    {
        Argument<string> domain = ManagementCommand.Domain();
        var vcpu = new Argument<int>("VCPU")
        {
            Description = "The vCPU's number, or all.",
            HelpName = "VCPU|all",
            CustomParser = static result =>
            {
                string text = result.Tokens[0].Value;
                if (text == AllProcessors)
                    return AllVcpus;
                if (ushort.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out ushort number))
                    return number;
                result.AddError($"vcpu-pin takes a vCPU's number from 0 on, or all; \"{text}\" is neither.");
                return AllVcpus;
            },
        };
        vcpu.CompletionSources.Add(AllProcessors);
        var hard = new Argument<string>("CPUs") { HelpName = "CPUs|all", Description = "The host's processors that it may run on, such as 0-3,^1 or node:0; all for every one; - for those it has." };
        hard.CompletionSources.Add(AllProcessors);
        hard.Validators.Add(static result =>
        {
            try
            {
                if (result.Tokens is [{ Value: var text }] && text != Unchanged)
                    _ = ProcessorSet.Parse(text);
            }
            catch (FormatException failure)
            {
                result.AddError(failure.Message);
            }
        });
        var soft = new Argument<string>("SoftCPUs") { Description = "Those that it is to prefer: Linux does not know of such, so - or all.", DefaultValueFactory = static _ => Unchanged };
        soft.Validators.Add(static result =>
        {
            if (result.Tokens is [{ Value: var text }] && text is not (Unchanged or AllProcessors))
                result.AddError($"Linux, which places vCPUs, knows no processors that they only prefer (\"{text}\"): leave them out, or write -.");
        });
        Option<bool> force = ManagementCommand.Accepted("Accepted for xl's sake.", "--force", "-f", "--ignore-global-affinity-masks");
        var command = new ManagementCommand("vcpu-pin", "Sets which of the host's processors a vCPU may run on.") { domain, vcpu, hard, soft, force };
        command.Does(async (parsed, daemon, cancellation) =>
        {
            string name = parsed.GetRequiredValue(domain);
            string processors = parsed.GetRequiredValue(hard);
            if (processors == Unchanged)
                _ = await daemon.GetAsync(name, cancellation).ConfigureAwait(false);
            else
                await daemon.PinVcpusAsync(name, new PinVcpusRequest { Vcpu = parsed.GetValue(vcpu) is var number and not AllVcpus ? number : null, Processors = processors }, cancellation).ConfigureAwait(false);
        });
        return command;
    }

    private static void Print(List<(DomainInfo Domain, IReadOnlyList<VcpuInfo> Vcpus)> rows)
    {
        var text = new StringBuilder().AppendLine($"{"Name",-32} {"ID",5} {"VCPU",5} {"CPU",5} {"State",5} {"Time(s)",9} Affinity (Hard / Soft)");
        foreach ((DomainInfo domain, IReadOnlyList<VcpuInfo> vcpus) in rows)
        {
            foreach (VcpuInfo vcpu in vcpus)
            {
                string processor = vcpu.Online && vcpu.Processor is { } number ? number.ToString(CultureInfo.InvariantCulture) : "-";
                text.AppendLine(
                    CultureInfo.InvariantCulture,
                    $"{domain.Name,-32} {domain.Id,5} {vcpu.Id,5} {processor,5} {vcpu.Letters,5} {vcpu.ProcessorSeconds,9:0.0}  {vcpu.Processors ?? AllProcessors} / {AllProcessors}");
            }
        }

        Console.Out.Write(text);
    }

    /// <summary>An array of domains, each with its vCPUs.</summary>
    private static void PrintJson(List<(DomainInfo Domain, IReadOnlyList<VcpuInfo> Vcpus)> rows)
    {
        using var buffer = new MemoryStream();
        using (var writer = new Utf8JsonWriter(buffer, LibxlListing.WriterOptions))
        {
            writer.WriteStartArray();
            foreach ((DomainInfo domain, IReadOnlyList<VcpuInfo> vcpus) in rows)
            {
                writer.WriteStartObject();
                writer.WriteNumber("id", domain.Id);
                writer.WriteString("name", domain.Name);
                writer.WritePropertyName("vcpus");
                JsonSerializer.Serialize(writer, vcpus, JsonOutput.Types.IReadOnlyListVcpuInfo);
                writer.WriteEndObject();
            }

            writer.WriteEndArray();
        }

        Console.Out.WriteLine(Encoding.UTF8.GetString(buffer.GetBuffer(), 0, (int)buffer.Length));
    }
}
