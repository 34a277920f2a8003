// shutdown and reboot: what is asked of guests, and waiting until they have done it.

using System.CommandLine;
using System.Globalization;
using XenSharp.Api;
using XenSharp.Cli.Commands;

namespace XenSharp.Cli.Management;

/// <summary>Asks guests to power off or to reboot.</summary>
internal static class ShutdownCommands
{
    internal static Command CreateShutdown() => Create("shutdown", "Asks a guest to power off.", "Shutting down", static (daemon, domain, cancellation)
        => daemon.ShutdownAsync(domain, cancellation));

    internal static Command CreateReboot() => Create("reboot", "Asks a guest to reboot.", "Rebooting", static (daemon, domain, cancellation)
        => daemon.RebootAsync(domain, cancellation));

    private static ManagementCommand Create(
        string name, string description, string doing, Func<DaemonClient, string, CancellationToken, Task> ask)
    {
        Argument<string> domain = ManagementCommand.Domain();
        domain.Arity = ArgumentArity.ZeroOrOne;
        var all = new Option<bool>("--all", "-a") { Description = "Ask all guests." };
        var wait = new Option<bool>("--wait", "-w")
        {
            Description = "Wait until it has shut down; given twice, until it has been destroyed.",
            Arity = ArgumentArity.Zero,
        };

        // xl turns to ACPI then, for guests without PV drivers; of PV guests it makes no difference.
        var force = new Option<bool>("-F") { Description = "Accepted for scripts written for xl: a PV guest is always asked." };
        var command = new ManagementCommand(name, description) { domain, all, wait, force };
        command.Validators.Add(result =>
        {
            bool named = result.GetResult(domain) is { Tokens.Count: > 0 };
            if (named == result.GetValue(all))
                result.AddError(named ? $"{name} takes a domain or --all, not both." : $"{name} takes a domain, or --all.");
        });
        command.Does(async (parsed, daemon, cancellation) =>
        {
            IReadOnlyList<DomainInfo> domains = parsed.GetValue(all)
                ? await daemon.ListAsync(cancellation).ConfigureAwait(false)
                : [await daemon.GetAsync(parsed.GetRequiredValue(domain), cancellation).ConfigureAwait(false)];
            int waits = parsed.GetResult(wait)?.IdentifierTokenCount ?? 0;

            // From before the first is asked, so that none is missed.
            await using DomainWait? endings = waits > 0 ? await DomainWait.BeginAsync(daemon, cancellation).ConfigureAwait(false) : null;
            int status = await ManagementCommand.ForEachAsync(domains, async one =>
            {
                await Console.Error.WriteLineAsync(string.Create(CultureInfo.InvariantCulture, $"{doing} domain {one.Id}")).ConfigureAwait(false);
                await ask(daemon, one.Id.ToString(CultureInfo.InvariantCulture), cancellation).ConfigureAwait(false);
                endings?.Add(one.Id);
            }).ConfigureAwait(false);
            if (endings is not null)
                await endings.WaitAsync(untilDestroyed: waits > 1, cancellation).ConfigureAwait(false);
            return status;
        });
        return command;
    }
}
