// network-attach, network-detach and network-list.

using System.CommandLine;
using System.Globalization;
using System.Text;
using XenSharp.Api;
using XenSharp.Configuration.Devices;

namespace XenSharp.Cli.Management;

/// <summary>The network interfaces of domains.</summary>
internal static class NetworkCommands
{
    internal static Command CreateAttach()
    {
        Argument<string> domain = ManagementCommand.Domain();
        var parts = new Argument<string[]>("parameter")
        {
            Description = "mac=, bridge=, vifname=, ip=, rate=, mtu= and the rest of xl-network-configuration(5).",
            Arity = ArgumentArity.ZeroOrMore,
            DefaultValueFactory = static _ => [],
        };
        Option<bool> json = ManagementCommand.Json();
        Option<bool> dryRun = ManagementCommand.DryRun("Plug nothing in; print the interface as list -l would.");
        var command = new ManagementCommand("network-attach", "Plugs a network interface into a domain.") { domain, parts, json, dryRun };
        command.Does(async (parsed, daemon, cancellation) =>
        {
            string[] specification = parsed.GetRequiredValue(parts);
            VifConfiguration vif = DeviceSpecification.Read(warnings => VifSpecification.Parse(specification, warnings));
            if (parsed.GetValue(dryRun))
            {
                Console.Out.WriteLine($"vif: {LibxlListing.Of(vif)}");
                return;
            }

            NetworkDeviceInfo device = await daemon.AttachNetworkDeviceAsync(
                parsed.GetRequiredValue(domain), new AttachDeviceRequest { Specification = specification }, cancellation).ConfigureAwait(false);
            if (parsed.GetValue(json))
                JsonOutput.Print(device, JsonOutput.Types.NetworkDeviceInfo);
        });
        return command;
    }

    internal static Command CreateDetach()
    {
        Argument<string> domain = ManagementCommand.Domain();
        var device = new Argument<string>("DevId") { Description = "The interface's index, or its MAC address.", HelpName = "DevId|mac" };
        var force = new Option<bool>("--force", "-f") { Description = "Do not wait until the guest lets go of it." };
        var command = new ManagementCommand("network-detach", "Unplugs a network interface from a domain.") { domain, device, force };
        command.Does((parsed, daemon, cancellation)
            => daemon.DetachNetworkDeviceAsync(parsed.GetRequiredValue(domain), parsed.GetRequiredValue(device), parsed.GetValue(force), cancellation));
        return command;
    }

    internal static Command CreateList()
    {
        Argument<string[]> domains = ManagementCommand.Domains("The domains.");
        domains.Arity = ArgumentArity.OneOrMore;
        Option<bool> json = ManagementCommand.Json();
        var command = new ManagementCommand("network-list", "Lists the network interfaces of domains.") { domains, json };
        command.Does(async (parsed, daemon, cancellation) =>
        {
            var devices = new List<NetworkDeviceInfo>();
            int status = await ManagementCommand.ForEachAsync(parsed.GetRequiredValue(domains), async domain
                => devices.AddRange(await daemon.ListNetworkDevicesAsync(domain, cancellation).ConfigureAwait(false))).ConfigureAwait(false);
            if (parsed.GetValue(json))
                JsonOutput.Print(devices, JsonOutput.Types.IReadOnlyListNetworkDeviceInfo);
            else
                Print(devices);
            return status;
        });
        return command;
    }

    private static void Print(List<NetworkDeviceInfo> devices)
    {
        var text = new StringBuilder()
            .AppendLine($"{"Idx",-3} {"BE",-2} {"Mac Addr.",-17} {"handle",-6} {"state",-5} {"evt-ch",-6} {"tx-",5}/{"rx-ring-ref",-5} {"BE-path",-30}");
        foreach (NetworkDeviceInfo device in devices)
        {
            text.AppendLine(
                CultureInfo.InvariantCulture,
                $"{device.DeviceId,-3} {device.BackendId,-2} {device.Mac,-17} {device.DeviceId,6} {device.State,5} {device.EventChannel ?? -1,6} {device.TransmitRingReference ?? -1,5}/{device.ReceiveRingReference ?? -1,-11} {device.BackendPath,-30}");
        }

        Console.Out.Write(text);
    }
}
