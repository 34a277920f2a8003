// The commands that ask the daemon one thing about one domain, or about itself.

using System.CommandLine;
using System.Globalization;
using XenSharp.Api;
using XenSharp.Cli.Commands;

namespace XenSharp.Cli.Management;

/// <summary>destroy, pause, unpause, rename, domid, domname, uptime, sysrq, trigger and dmesg.</summary>
internal static class DomainCommands
{
    internal static Command CreateDestroy()
    {
        ManagementCommand command = OfDomain(
            "destroy", "Ends a domain at once, as if its power were cut.", static (daemon, domain, cancellation) => daemon.DestroyAsync(domain, cancellation));
        command.Add(ManagementCommand.Accepted("Accepted for xl's sake, which asks for it before domain 0 goes.", "-f"));
        return command;
    }

    internal static Command CreatePause()
        => OfDomain("pause", "Stops a domain where it is, until it is unpaused.", static (daemon, domain, cancellation) => daemon.PauseAsync(domain, cancellation));

    internal static Command CreateUnpause()
        => OfDomain("unpause", "Lets a paused domain run on.", static (daemon, domain, cancellation) => daemon.UnpauseAsync(domain, cancellation));

    internal static Command CreateRename()
    {
        Argument<string> domain = ManagementCommand.Domain();
        var name = new Argument<string>("NewDomainName") { Description = "The name that it gets." };
        var command = new ManagementCommand("rename", "Gives a domain another name.") { domain, name };
        command.Does((parsed, daemon, cancellation) => (Task)daemon.RenameAsync(parsed.GetRequiredValue(domain), parsed.GetRequiredValue(name), cancellation));
        return command;
    }

    internal static Command CreateDomid()
    {
        Argument<string> domain = ManagementCommand.Domain("DomainName", "The domain's name.");
        var command = new ManagementCommand("domid", "Prints the number of the domain of a name.") { domain };
        command.Does(async (parsed, daemon, cancellation) =>
        {
            // A name that is a number is a name here, as with xl.
            string name = parsed.GetRequiredValue(domain);
            DomainInfo found = (await daemon.ListAsync(cancellation).ConfigureAwait(false)).FirstOrDefault(one => one.Name == name)
                ?? throw new UsageException($"There is no domain of the name {name}; {Tool.Name} list shows those there are.");
            await Console.Out.WriteLineAsync(found.Id.ToString(CultureInfo.InvariantCulture)).ConfigureAwait(false);
        });
        return command;
    }

    internal static Command CreateDomname()
    {
        var number = new Argument<string>("DomainId") { Description = "The domain's number." };
        var command = new ManagementCommand("domname", "Prints the name of the domain of a number.") { number };
        command.Does(async (parsed, daemon, cancellation) =>
        {
            string text = parsed.GetRequiredValue(number);
            if (!ushort.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out _))
                throw new UsageException($"domname takes a domain's number; \"{text}\" is none.");
            DomainInfo found = await daemon.GetAsync(text, cancellation).ConfigureAwait(false);
            await Console.Out.WriteLineAsync(found.Name).ConfigureAwait(false);
        });
        return command;
    }

    internal static Command CreateUptime()
    {
        var brief = new Option<bool>("-s") { Description = "Print a line as uptime(1) does." };
        Option<bool> json = ManagementCommand.Json();
        Argument<string[]> domains = ManagementCommand.Domains("The domains; all if none is named.");
        var command = new ManagementCommand("uptime", "Prints how long domains have been running.") { domains, brief, json };
        command.Does(async (parsed, daemon, cancellation) =>
        {
            IReadOnlyList<DomainInfo> found = await ManagementCommand.FindAsync(daemon, parsed.GetRequiredValue(domains), cancellation).ConfigureAwait(false);
            if (parsed.GetValue(json))
                JsonOutput.Print(found, JsonOutput.Types.IReadOnlyListDomainInfo);
            else
                PrintUptimes(found, parsed.GetValue(brief));
        });
        return command;
    }

    internal static Command CreateSysrq()
    {
        Argument<string> domain = ManagementCommand.Domain();
        var letter = new Argument<string>("letter") { Description = "The letter, as after Linux's Alt-SysRq." };
        letter.Validators.Add(static result =>
        {
            if (result.Tokens is [{ Value: var text }] && !(text.Length == 1 && char.IsAsciiLetterOrDigit(text[0])))
                result.AddError($"sysrq takes one letter or digit; \"{text}\" is none.");
        });
        var command = new ManagementCommand("sysrq", "Sends a magic system request to a domain's Linux kernel.") { domain, letter };
        command.Does((parsed, daemon, cancellation) => daemon.SysrqAsync(parsed.GetRequiredValue(domain), parsed.GetRequiredValue(letter), cancellation));
        return command;
    }

    internal static Command CreateTrigger()
    {
        Argument<string> domain = ManagementCommand.Domain();
        var trigger = new Argument<DomainTrigger>("trigger")
        {
            Description = "What is to happen: nmi. The others that xl knows (reset, init, power, sleep, s3resume) are for machines with a firmware.",
            HelpName = "nmi",
            CustomParser = static result =>
            {
                string text = result.Tokens[0].Value;
                if (Enum.TryParse(text, ignoreCase: true, out DomainTrigger found) && char.IsAsciiLetter(text[0]))
                    return found;
                result.AddError($"trigger takes nmi, reset, init, power, sleep or s3resume; \"{text}\" is none of them.");
                return default;
            },
        };
        trigger.CompletionSources.Add("nmi");
        var vcpu = new Argument<int>("VCPU") { Description = "The vCPU that it is for.", DefaultValueFactory = static _ => 0 };
        vcpu.Validators.Add(static result =>
        {
            if (result.Tokens.Count > 0 && !ushort.TryParse(result.Tokens[0].Value, NumberStyles.None, CultureInfo.InvariantCulture, out _))
                result.AddError($"A vCPU has a number from 0 on; \"{result.Tokens[0].Value}\" is none.");
        });
        var command = new ManagementCommand("trigger", "Sends an interrupt to a domain that hardware would send.") { domain, trigger, vcpu };
        command.Does((parsed, daemon, cancellation) => daemon.TriggerAsync(
            parsed.GetRequiredValue(domain), new TriggerRequest { Trigger = parsed.GetValue(trigger), Vcpu = parsed.GetValue(vcpu) }, cancellation));
        return command;
    }

    internal static Command CreateDmesg()
    {
        var clear = new Option<bool>("--clear", "-c") { Description = "Clear it as well as printing it." };
        var command = new ManagementCommand("dmesg", "Prints the manager's log.") { clear };
        command.Does(async (parsed, daemon, cancellation) =>
        {
            await Console.Out.WriteAsync(await daemon.GetLogAsync(cancellation).ConfigureAwait(false)).ConfigureAwait(false);
            if (parsed.GetValue(clear))
                await daemon.ClearLogAsync(cancellation).ConfigureAwait(false);
        });
        return command;
    }

    /// <summary>A span as xl writes it: days, hours, minutes, and seconds unless it is to be brief.</summary>
    internal static string Uptime(double seconds, bool brief)
    {
        TimeSpan span = TimeSpan.FromSeconds(Math.Floor(Math.Max(0, seconds)));
        string days = span.Days switch { 0 => string.Empty, 1 => "1 day, ", int more => string.Create(CultureInfo.InvariantCulture, $"{more} days, ") };
        return days + (brief
            ? string.Create(CultureInfo.InvariantCulture, $"{span.Hours,2}:{span.Minutes:00}")
            : string.Create(CultureInfo.InvariantCulture, $"{span.Hours,2}:{span.Minutes:00}:{span.Seconds:00}"));
    }

    private static void PrintUptimes(IReadOnlyList<DomainInfo> domains, bool brief)
    {
        if (!brief)
            Console.Out.WriteLine($"{"Name",-33} {"ID",4} Uptime");
        foreach (DomainInfo domain in domains)
        {
            string up = Uptime(domain.UptimeSeconds, brief);
            Console.Out.WriteLine(brief
                ? string.Create(CultureInfo.InvariantCulture, $" {DateTime.Now:HH:mm:ss} up {up}, {domain.Name} ({domain.Id})")
                : string.Create(CultureInfo.InvariantCulture, $"{domain.Name,-33} {domain.Id,4} {up}"));
        }
    }

    private static ManagementCommand OfDomain(string name, string description, Func<DaemonClient, string, CancellationToken, Task> action)
    {
        Argument<string> domain = ManagementCommand.Domain();
        var command = new ManagementCommand(name, description) { domain };
        command.Does((parsed, daemon, cancellation) => action(daemon, parsed.GetRequiredValue(domain), cancellation));
        return command;
    }
}
