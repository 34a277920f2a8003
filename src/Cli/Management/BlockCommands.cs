// block-attach, block-detach and block-list.

using System.CommandLine;
using System.Globalization;
using System.Text;
using XenSharp.Api;
using XenSharp.Cli.Commands;
using XenSharp.Configuration.Devices;

namespace XenSharp.Cli.Management;

/// <summary>The block devices of domains.</summary>
internal static class BlockCommands
{
    internal static Command CreateAttach()
    {
        Argument<string> domain = ManagementCommand.Domain();
        var parts = new Argument<string[]>("disk-spec-component")
        {
            Description = "The disk, as xl-disk-configuration(5) has it; words are parts of one specification.", Arity = ArgumentArity.OneOrMore,
        };
        Option<bool> json = ManagementCommand.Json();
        Option<bool> dryRun = ManagementCommand.DryRun("Plug nothing in; print the disk as list -l would.");
        var command = new ManagementCommand("block-attach", "Plugs a disk into a domain.") { domain, parts, json, dryRun };
        command.Does(async (parsed, daemon, cancellation) =>
        {
            string[] specification = parsed.GetRequiredValue(parts);
            DiskConfiguration disk = DeviceSpecification.Read(warnings => DiskSpecification.Parse(specification, warnings));
            if (parsed.GetValue(dryRun))
            {
                Console.Out.WriteLine($"disk: {LibxlListing.Of(disk)}");
                return;
            }

            BlockDeviceInfo device = await daemon.AttachBlockDeviceAsync(
                parsed.GetRequiredValue(domain), new AttachDeviceRequest { Specification = specification, Folder = Directory.GetCurrentDirectory() }, cancellation).ConfigureAwait(false);
            if (parsed.GetValue(json))
                JsonOutput.Print(device, JsonOutput.Types.BlockDeviceInfo);
        });
        return command;
    }

    internal static Command CreateDetach()
    {
        Argument<string> domain = ManagementCommand.Domain();
        var device = new Argument<string>("DevId") { Description = "The device's name in the guest, such as xvdb, or its number." };
        var force = new Option<bool>("--force", "-f") { Description = "Do not wait until the guest lets go of it." };
        var command = new ManagementCommand("block-detach", "Unplugs a disk from a domain.") { domain, device, force };
        command.Does((parsed, daemon, cancellation)
            => daemon.DetachBlockDeviceAsync(parsed.GetRequiredValue(domain), parsed.GetRequiredValue(device), parsed.GetValue(force), cancellation));
        return command;
    }

    internal static Command CreateList()
    {
        Argument<string[]> domains = ManagementCommand.Domains("The domains.");
        domains.Arity = ArgumentArity.OneOrMore;
        Option<bool> json = ManagementCommand.Json();
        var command = new ManagementCommand("block-list", "Lists the disks of domains.") { domains, json };
        command.Does(async (parsed, daemon, cancellation) =>
        {
            var devices = new List<BlockDeviceInfo>();
            int status = await ManagementCommand.ForEachAsync(parsed.GetRequiredValue(domains), async domain
                => devices.AddRange(await daemon.ListBlockDevicesAsync(domain, cancellation).ConfigureAwait(false))).ConfigureAwait(false);
            if (parsed.GetValue(json))
                JsonOutput.Print(devices, JsonOutput.Types.IReadOnlyListBlockDeviceInfo);
            else
                Print(devices);
            return status;
        });
        return command;
    }

    private static void Print(List<BlockDeviceInfo> devices)
    {
        var text = new StringBuilder().AppendLine($"{"Vdev",-5} {"BE",-3} {"handle",-6} {"state",-5} {"evt-ch",-6} {"ring-ref",-8} {"BE-path",-30}");
        foreach (BlockDeviceInfo device in devices)
        {
            text.AppendLine(
                CultureInfo.InvariantCulture,
                $"{device.VirtualDevice,-5} {device.BackendId,-3} {0,-6} {device.State,-5} {device.EventChannel ?? -1,-6} {device.RingReference ?? -1,-8} {device.BackendPath,-30}");
        }

        Console.Out.Write(text);
    }
}
