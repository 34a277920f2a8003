// A disk as xl-disk-configuration(5) describes one.

using System.Text.Json.Serialization;

namespace XenSharp.Configuration.Devices;

/// <summary>What an image file has in it (libxl_disk_format).</summary>
[JsonConverter(typeof(KebabCaseEnumConverter<DiskFormat>))]
public enum DiskFormat
{
    /// <summary>The disk's sectors, one after another.</summary>
    Raw,

    /// <summary>QEMU's second copy-on-write format.</summary>
    Qcow2,

    /// <summary>Nothing: a drive without a medium.</summary>
    Empty,
}

/// <summary>A block device that a domain has. To be treated as immutable, as <see cref="DomainConfiguration"/>.</summary>
public sealed record DiskConfiguration
{
    /// <summary>Absolute path of the file or block device; empty for an empty drive. xl puts /dev/ before what is not absolute.</summary>
    public string Target { get; set; } = string.Empty;

    /// <summary>What is in the file.</summary>
    public DiskFormat Format { get; init; }

    /// <summary>The device's name in the guest, such as xvda or sda1; see <see cref="VirtualDevice"/>.</summary>
    public required string VirtualDevice { get; init; }

    /// <summary>The guest cannot write to it.</summary>
    public bool ReadOnly { get; init; }

    /// <summary>It is a CD-ROM drive: read-only, and its medium may be taken out.</summary>
    public bool Cdrom { get; init; }

    /// <summary>Whether unused blocks can be given back: what the back end advertises. Null for what the file allows.</summary>
    public bool? Discard { get; init; }

    /// <summary>The guest is told that it may trust its back end; null where nothing was said (it may).</summary>
    public bool? Trusted { get; init; }

    /// <summary>The back end that was asked for (phy, qdisk, tap), for the record: there is one here. Null where none was.</summary>
    public string? BackendType { get; init; }

    /// <summary>O_DIRECT was said to be safe (direct-io-safe).</summary>
    public bool DirectIoSafe { get; init; }

    /// <summary>The number of the device in xenstore.</summary>
    /// <exception cref="FormatException"><see cref="VirtualDevice"/> is no device.</exception>
    [JsonIgnore]
    public uint DeviceId => Core.VirtualDevice.Parse(VirtualDevice).Number;

    /// <summary>The disk as a specification of xl-disk-configuration(5).</summary>
    public string ToSpecification()
    {
        var parts = new List<string> { $"format={(Format == DiskFormat.Empty ? "raw" : Format.ToString().ToLowerInvariant())}", $"vdev={VirtualDevice}" };
        parts.Add(ReadOnly ? "access=ro" : "access=rw");
        if (Cdrom)
            parts.Add("devtype=cdrom");
        if (BackendType is not null)
            parts.Add($"backendtype={BackendType}");
        if (DirectIoSafe)
            parts.Add("direct-io-safe");
        if (Discard is { } discard)
            parts.Add(discard ? "discard" : "no-discard");
        if (Trusted is { } trusted)
            parts.Add(trusted ? "trusted" : "untrusted");
        parts.Add($"target={Target}");
        return string.Join(',', parts);
    }
}
