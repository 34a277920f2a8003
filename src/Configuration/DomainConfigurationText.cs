// From a domain's configuration to an xl.cfg(5) file.

using System.Globalization;
using System.Text;
using XenSharp.Configuration.Language;

namespace XenSharp.Configuration;

/// <summary>Writes configurations so that <see cref="DomainConfigurationReader"/>, and xl, read the same again.</summary>
public static class DomainConfigurationText
{
    /// <summary>The configuration as a file, a setting a line; settings at their defaults are left out.</summary>
    public static string Write(DomainConfiguration configuration)
    {
        ArgumentNullException.ThrowIfNull(configuration);
        var text = new StringBuilder();
        var defaults = new DomainConfiguration { Name = configuration.Name };
        Text("name", configuration.Name);
        Text("type", "pv");
        if (configuration.Uuid is { } uuid)
            Text("uuid", uuid.ToString("D"));
        Text("kernel", configuration.Kernel);
        Text("ramdisk", configuration.Ramdisk);
        Text("cmdline", configuration.CommandLine.Length == 0 ? null : configuration.CommandLine);
        WriteBootloader(configuration.Bootloader);
        Number("memory", configuration.MemoryMiB, null);
        Number("maxmem", configuration.MaxMemoryMiB, 0);
        Number("vcpus", configuration.Vcpus, null);
        Number("maxvcpus", configuration.MaxVcpus, 0);
        List("cpus", configuration.Processors);
        Action("on_poweroff", configuration.OnPoweroff, defaults.OnPoweroff);
        Action("on_reboot", configuration.OnReboot, defaults.OnReboot);
        Action("on_crash", configuration.OnCrash, defaults.OnCrash);
        Action("on_watchdog", configuration.OnWatchdog, defaults.OnWatchdog);
        Action("on_soft_reset", configuration.OnSoftReset, defaults.OnSoftReset);
        List("disk", configuration.Disks.Select(static disk => disk.ToSpecification()));
        List("vif", configuration.Vifs.Select(static vif => vif.ToSpecification()));
        List("channel", configuration.Channels.Select(static channel => channel.ToSpecification()));
        Number("localtime", configuration.LocalTime ? 1 : 0, 0);
        if (configuration.RtcTimeOffset != 0)
            Text("rtc_timeoffset", configuration.RtcTimeOffset.ToString(CultureInfo.InvariantCulture));
        List("cpuid", CpuidLeaves(configuration.Cpuid));
        Number("max_event_channels", configuration.MaxEventChannels, defaults.MaxEventChannels);
        Number("max_grant_frames", configuration.MaxGrantFrames, null);
        Number("max_maptrack_frames", configuration.MaxMaptrackFrames, null);
        Number("max_grant_version", configuration.MaxGrantVersion, null);
        Number("nomigrate", configuration.NoMigrate ? 1 : 0, 0);
        return text.ToString();

        void WriteBootloader(BootloaderConfiguration? bootloader)
        {
            if (bootloader is null)
                return;
            Text("bootloader", "pygrub");
            List("bootloader_args", bootloader.ToArguments());
        }

        void Text(string key, string? value)
        {
            if (value is not null)
                text.Append(key).Append(" = ").Append(new TextValue(value).ToText()).Append('\n');
        }

        void Number(string key, int? value, int? otherwise)
        {
            if (value is not null && value != otherwise)
                text.Append(CultureInfo.InvariantCulture, $"{key} = {value}\n");
        }

        void Action(string key, ShutdownAction value, ShutdownAction otherwise)
        {
            if (value != otherwise)
                Text(key, System.Text.Json.JsonNamingPolicy.KebabCaseLower.ConvertName(value.ToString()));
        }

        void List(string key, IEnumerable<string> items)
        {
            string[] all = [.. items];
            if (all.Length > 0)
                text.Append(key).Append(" = ").Append(new ListValue([.. all.Select(static item => new TextValue(item))]).ToText()).Append('\n');
        }
    }

    /// <summary>xend's notation, a leaf an item.</summary>
    private static IEnumerable<string> CpuidLeaves(IReadOnlyList<CpuidMask> masks) => masks
        .GroupBy(static mask => (mask.Leaf, mask.Subleaf))
        .Select(static leaf =>
            $"0x{leaf.Key.Leaf:x}{(leaf.Key.Subleaf is { } subleaf ? $",0x{subleaf:x}" : string.Empty)}:"
            + string.Join(',', leaf.Select(static mask => $"{mask.Register.ToString().ToLowerInvariant()}={mask.ToBits()}")));
}
