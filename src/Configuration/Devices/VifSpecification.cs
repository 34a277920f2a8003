// The network interfaces of xl-network-configuration(5).

using System.Globalization;

namespace XenSharp.Configuration.Devices;

/// <summary>Parses interface specifications as xl does (parse_nic_config, 4.17).</summary>
public static class VifSpecification
{
    /// <summary>The longest name of a network device on Linux (IFNAMSIZ less its NUL).</summary>
    private const int LongestDeviceName = 15;

    private const int SmallestMtu = 68;
    private const int LargestMtu = 65535;

    /// <summary>Parses a specification: one of a configuration, or the words of a network-attach command.</summary>
    /// <param name="parts">KEY=VALUE and flags, separated by commas; several parts as if they were.</param>
    /// <param name="warnings">Gets sentences about what has no effect.</param>
    /// <exception cref="FormatException">It is none; the message is a sentence.</exception>
    public static VifConfiguration Parse(IEnumerable<string> parts, ICollection<string> warnings)
    {
        ArgumentNullException.ThrowIfNull(parts);
        ArgumentNullException.ThrowIfNull(warnings);
        var vif = new VifConfiguration();
        foreach (string item in parts.SelectMany(static part => part.Split(',')).Select(static item => item.TrimStart(' ')).Where(static item => item.Length > 0))
        {
            int equals = item.IndexOf('=');
            vif = equals < 0
                ? item switch
                {
                    "trusted" => vif with { Trusted = true },
                    "untrusted" => vif with { Trusted = false },
                    _ => throw new FormatException($"\"{item}\" is no flag of a network interface, and no KEY=VALUE."),
                }
                : With(vif, item[..equals].TrimEnd(' '), item[(equals + 1)..], warnings);
        }

        return vif;
    }

    /// <summary>An address as it is kept: small letters, two digits a byte.</summary>
    /// <returns>Null if the text is none that an interface can have.</returns>
    public static string? NormalizeMac(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        string[] parts = text.Split(':', '-');
        if (parts.Length != 6)
            return null;
        Span<byte> bytes = stackalloc byte[6];
        for (int at = 0; at < 6; at++)
        {
            if (parts[at].Length is 0 or > 2 || !byte.TryParse(parts[at], NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out bytes[at]))
                return null;
        }

        return (bytes[0] & 1) != 0 ? null : string.Join(':', bytes.ToArray().Select(static one => one.ToString("x2", CultureInfo.InvariantCulture)));
    }

    private static VifConfiguration With(VifConfiguration vif, string key, string value, ICollection<string> warnings)
    {
        switch (key)
        {
            case "mac":
                return vif with
                {
                    Mac = NormalizeMac(value) ?? throw new FormatException(
                        $"\"{value}\" is no address for a network interface: write six bytes such as 00:16:3e:74:34:32, of which the first is even."),
                };
            case "bridge":
                return vif with { Bridge = DeviceName(value, "bridge") };
            case "vifname":
                return vif with { Name = DeviceName(value, "vifname") };
            case "ip":
                return vif with { Ip = NotEmpty(value) };
            case "rate":
                return vif with
                {
                    Rate = VifRate.TryParse(value, out VifRate? rate) ? rate : throw new FormatException(
                        $"\"{value}\" is no rate: write a number and Gb/s, Mb/s, Kb/s, b/s or the same with B for bytes, and perhaps an interval, as in 10MB/s@20ms."),
                };
            case "devid":
                return vif with { DeviceId = Number(value, "devid", 0, ushort.MaxValue) };
            case "mtu":
                return vif with { Mtu = Number(value, "mtu", SmallestMtu, LargestMtu) };
            case "type":
                if (value is not ("vif" or "ioemu"))
                    throw new FormatException($"type= takes vif; \"{value}\" is none.");
                if (value == "ioemu")
                    warnings.Add("type=ioemu asks for an emulated device beside the paravirtual one, which PV guests do not have; it has no effect.");
                return vif;
            case "model":
                warnings.Add($"model={value} is about emulated devices, which PV guests do not have; it has no effect.");
                return vif;
            case "script":
                // vif-bridge is what there is without scripts, too: xl's usual one puts the interface into the bridge.
                if (value.Length > 0 && Path.GetFileName(value) != "vif-bridge")
                    warnings.Add($"Scripts ({value}) are not run here: bridge= puts the interface into a bridge, all else is to be set up on the host.");
                return vif;
            case "backend":
                return BackendDomain.IsHost(value)
                    ? vif
                    : throw new FormatException($"The back end cannot be in another domain ({value}): leave backend= out.");
            case "gatewaydev" or "netdev":
                warnings.Add($"{key}={value} is for the script vif-route, and scripts are not run here; it has no effect.");
                return vif;
            case "accel":
                warnings.Add("accel= has no effect, as with xl.");
                return vif;
            case "forwarddev":
                throw new FormatException("forwarddev= is for COLO replication, which there is not here: leave it out.");
            default:
                throw new FormatException(key.StartsWith("colo_", StringComparison.Ordinal)
                    ? $"{key}= is for COLO replication, which there is not here: leave it out."
                    : $"{key}= is no parameter of a network interface.");
        }
    }

    private static string? NotEmpty(string value) => value.Length == 0 ? null : value;

    private static string? DeviceName(string value, string key)
    {
        if (value.Length > LongestDeviceName || value is "." or ".." || value.AsSpan().IndexOfAnyExceptInRange('!', '~') >= 0 || value.AsSpan().ContainsAny('/', ':'))
            throw new FormatException($"{key}={value} is no name of a network device: it has 1 to {LongestDeviceName} characters without blanks, slashes and colons.");
        return NotEmpty(value);
    }

    private static int Number(string value, string key, int least, int most)
        => int.TryParse(value, NumberStyles.None, CultureInfo.InvariantCulture, out int number) && number >= least && number <= most
            ? number
            : throw new FormatException($"{key}= takes a number from {least} to {most}; \"{value}\" is none.");
}
