// channel-list: the consoles of domains beside the first.

using System.CommandLine;
using System.Globalization;
using System.Text;
using XenSharp.Api;

namespace XenSharp.Cli.Management;

/// <summary>Prints the channels of domains, in xl's columns.</summary>
internal static class ChannelCommand
{
    internal static Command Create()
    {
        Argument<string[]> domains = ManagementCommand.Domains("The domains.");
        domains.Arity = ArgumentArity.OneOrMore;
        Option<bool> json = ManagementCommand.Json();
        var command = new ManagementCommand("channel-list", "Lists the channels of domains.") { domains, json };
        command.Does(async (parsed, daemon, cancellation) =>
        {
            var channels = new List<ChannelInfo>();
            int status = await ManagementCommand.ForEachAsync(parsed.GetRequiredValue(domains), async domain
                => channels.AddRange(await daemon.ListChannelsAsync(domain, cancellation).ConfigureAwait(false))).ConfigureAwait(false);
            if (parsed.GetValue(json))
                JsonOutput.Print(channels, JsonOutput.Types.IReadOnlyListChannelInfo);
            else
                Print(channels);
            return status;
        });
        return command;
    }

    /// <summary>The first channel has the index 0, as libxl counts them; where one leads to is printed for sockets as well.</summary>
    private static void Print(List<ChannelInfo> channels)
    {
        var text = new StringBuilder().AppendLine($"{"Idx",-3} {"BE",-2} {"state",-5} {"evt-ch",-6} {"ring-ref",8} {"connection",-10} {string.Empty,-30}");
        foreach (ChannelInfo channel in channels)
        {
            text.AppendLine(
                CultureInfo.InvariantCulture,
                $"{channel.DeviceId - 1,-3} {channel.BackendId,-2} {channel.State,-5} {channel.EventChannel ?? -1,-6} {channel.RingReference ?? -1,-8} {channel.Connection,-10} {channel.Path,-30} ");
        }

        Console.Out.Write(text);
    }
}
