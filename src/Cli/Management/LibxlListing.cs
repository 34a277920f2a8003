// A domain's configuration in the JSON of xl list -l.

using System.Text;
using System.Text.Encodings.Web;
using System.Text.Json;
using XenSharp.Configuration;
using XenSharp.Configuration.Devices;

namespace XenSharp.Cli.Management;

/// <summary>
/// Writes libxl_domain_config as xl does, so that what reads xl's output reads this: domid and config, and in that c_info, b_info,
/// disks, nics, channels and actions, under the names of libxl's types (libxl_types.idl, 4.17).
/// </summary>
internal static class LibxlListing
{
    /// <summary>Indented, and characters as they are: this is for a terminal as well.</summary>
    internal static readonly JsonWriterOptions WriterOptions = new() { Indented = true, IndentSize = 4, Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping };

    /// <param name="writer">Gets the object.</param>
    /// <param name="id">The domain's number; null for one that is not there.</param>
    /// <param name="configuration">The configuration.</param>
    internal static void Write(Utf8JsonWriter writer, int? id, DomainConfiguration configuration)
    {
        writer.WriteStartObject();
        if (id is { } number)
            writer.WriteNumber("domid", number);
        else
            writer.WriteNull("domid");
        writer.WriteStartObject("config");
        WriteCreateInfo(writer, configuration);
        WriteBuildInfo(writer, configuration);
        WriteList(writer, "disks", configuration.Disks, WriteDisk);
        WriteList(writer, "nics", configuration.Vifs, WriteNic);
        WriteList(writer, "channels", configuration.Channels, WriteChannel);
        WriteAction(writer, "on_poweroff", configuration.OnPoweroff);
        WriteAction(writer, "on_reboot", configuration.OnReboot);
        WriteAction(writer, "on_watchdog", configuration.OnWatchdog);
        WriteAction(writer, "on_crash", configuration.OnCrash);
        WriteAction(writer, "on_soft_reset", configuration.OnSoftReset);
        writer.WriteEndObject();
        writer.WriteEndObject();
    }

    /// <summary>A disk by itself: libxl_device_disk.</summary>
    internal static string Of(DiskConfiguration disk) => Text(writer => WriteDisk(writer, disk));

    /// <summary>A network interface by itself: libxl_device_nic.</summary>
    internal static string Of(VifConfiguration vif) => Text(writer => WriteNic(writer, vif));

    private static string Text(Action<Utf8JsonWriter> write)
    {
        using var buffer = new MemoryStream();
        using (var writer = new Utf8JsonWriter(buffer, WriterOptions))
            write(writer);
        return Encoding.UTF8.GetString(buffer.GetBuffer(), 0, (int)buffer.Length);
    }

    private static void WriteCreateInfo(Utf8JsonWriter writer, DomainConfiguration configuration)
    {
        writer.WriteStartObject("c_info");
        writer.WriteString("type", "pv");
        writer.WriteString("name", configuration.Name);
        if (configuration.Uuid is { } uuid)
            writer.WriteString("uuid", uuid.ToString("D"));
        writer.WriteEndObject();
    }

    private static void WriteBuildInfo(Utf8JsonWriter writer, DomainConfiguration configuration)
    {
        writer.WriteStartObject("b_info");
        writer.WriteNumber("max_vcpus", configuration.VcpuCount);
        writer.WriteStartArray("avail_vcpus");
        for (int vcpu = 0; vcpu < configuration.Vcpus; vcpu++)
            writer.WriteNumberValue(vcpu);
        writer.WriteEndArray();
        writer.WriteNumber("max_memkb", (long)configuration.GreatestMemoryMiB << 10);
        writer.WriteNumber("target_memkb", (long)configuration.MemoryMiB << 10);
        if (configuration.RtcTimeOffset != 0)
            writer.WriteNumber("rtc_timeoffset", configuration.RtcTimeOffset);
        if (configuration.LocalTime)
            writer.WriteString("localtime", "True");
        if (configuration.NoMigrate)
            writer.WriteString("disable_migrate", "True");
        WriteCpuid(writer, configuration.Cpuid);
        WriteText(writer, "kernel", configuration.Kernel);
        WriteText(writer, "cmdline", configuration.CommandLine.Length == 0 ? null : configuration.CommandLine);
        WriteText(writer, "ramdisk", configuration.Ramdisk);
        if (configuration.Bootloader is { } bootloader)
        {
            writer.WriteString("bootloader", "pygrub");
            WriteList(writer, "bootloader_args", bootloader.ToArguments(), static (to, argument) => to.WriteStringValue(argument));
        }

        writer.WriteNumber("event_channels", configuration.MaxEventChannels);
        WriteNumber(writer, "max_grant_frames", configuration.MaxGrantFrames);
        WriteNumber(writer, "max_maptrack_frames", configuration.MaxMaptrackFrames);
        WriteNumber(writer, "max_grant_version", configuration.MaxGrantVersion);
        writer.WriteStartObject("type.pv");
        writer.WriteEndObject();
        writer.WriteEndObject();
    }

    private static void WriteCpuid(Utf8JsonWriter writer, IReadOnlyList<CpuidMask> masks)
    {
        if (masks.Count == 0)
            return;
        writer.WriteStartArray("cpuid");
        foreach (IGrouping<(uint Leaf, uint? Subleaf), CpuidMask> leaf in masks.GroupBy(static mask => (mask.Leaf, mask.Subleaf)))
        {
            writer.WriteStartObject();
            writer.WriteNumber("leaf", leaf.Key.Leaf);
            WriteNumber(writer, "subleaf", leaf.Key.Subleaf);
            foreach (CpuidMask mask in leaf)
                writer.WriteString(mask.Register.ToString().ToLowerInvariant(), mask.ToBits());
            writer.WriteEndObject();
        }

        writer.WriteEndArray();
    }

    private static void WriteDisk(Utf8JsonWriter writer, DiskConfiguration disk)
    {
        writer.WriteStartObject();
        writer.WriteString("pdev_path", disk.Target);
        writer.WriteString("vdev", disk.VirtualDevice);
        WriteText(writer, "backend", disk.BackendType);
        writer.WriteString("format", disk.Format.ToString().ToLowerInvariant());
        writer.WriteNumber("removable", disk.Cdrom ? 1 : 0);
        writer.WriteNumber("readwrite", disk.ReadOnly ? 0 : 1);
        writer.WriteNumber("is_cdrom", disk.Cdrom ? 1 : 0);
        if (disk.DirectIoSafe)
            writer.WriteBoolean("direct_io_safe", true);
        WriteBoolean(writer, "discard_enable", disk.Discard);
        WriteBoolean(writer, "trusted", disk.Trusted);
        writer.WriteEndObject();
    }

    private static void WriteNic(Utf8JsonWriter writer, VifConfiguration vif)
    {
        writer.WriteStartObject();
        WriteNumber(writer, "devid", vif.DeviceId);
        WriteNumber(writer, "mtu", vif.Mtu);
        WriteText(writer, "mac", vif.Mac);
        WriteText(writer, "ip", vif.Ip);
        WriteText(writer, "bridge", vif.Bridge);
        WriteText(writer, "ifname", vif.Name);
        writer.WriteString("nictype", "vif");
        if (vif.Rate is { } rate)
        {
            writer.WriteNumber("rate_bytes_per_interval", rate.BytesPerInterval);
            writer.WriteNumber("rate_interval_usecs", rate.IntervalMicroseconds);
        }

        WriteBoolean(writer, "trusted", vif.Trusted);
        writer.WriteEndObject();
    }

    private static void WriteChannel(Utf8JsonWriter writer, ChannelConfiguration channel)
    {
        writer.WriteStartObject();
        writer.WriteString("name", channel.Name);
        writer.WriteStartObject(channel.Connection == ChannelConnection.Socket ? "connection.socket" : "connection.pty");
        WriteText(writer, "path", channel.Path);
        writer.WriteEndObject();
        writer.WriteEndObject();
    }

    /// <summary>libxl_action_on_shutdown's names, which are not all xl.cfg's: they have underscores, and rename-restart is restart_rename.</summary>
    private static void WriteAction(Utf8JsonWriter writer, string name, ShutdownAction action) => writer.WriteString(name, action switch
    {
        ShutdownAction.Destroy => "destroy",
        ShutdownAction.Restart => "restart",
        ShutdownAction.RenameRestart => "restart_rename",
        ShutdownAction.Preserve => "preserve",
        ShutdownAction.CoredumpDestroy => "coredump_destroy",
        _ => "coredump_restart",
    });

    private static void WriteList<T>(Utf8JsonWriter writer, string name, IReadOnlyList<T> items, Action<Utf8JsonWriter, T> write)
    {
        if (items.Count == 0)
            return;
        writer.WriteStartArray(name);
        foreach (T item in items)
            write(writer, item);
        writer.WriteEndArray();
    }

    private static void WriteText(Utf8JsonWriter writer, string name, string? value)
    {
        if (value is not null)
            writer.WriteString(name, value);
    }

    private static void WriteNumber(Utf8JsonWriter writer, string name, long? value)
    {
        if (value is { } number)
            writer.WriteNumber(name, number);
    }

    /// <summary>libxl_defbool's text.</summary>
    private static void WriteBoolean(Utf8JsonWriter writer, string name, bool? value)
    {
        if (value is { } known)
            writer.WriteString(name, known ? "True" : "False");
    }
}
