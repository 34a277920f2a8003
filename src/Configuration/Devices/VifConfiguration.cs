// A network interface as xl-network-configuration(5) describes one.

namespace XenSharp.Configuration.Devices;

/// <summary>A network interface that a domain has.</summary>
public sealed record VifConfiguration
{
    /// <summary>The guest's address in small letters, such as 00:16:3e:74:34:32 (mac); null for one that is made when the interface is.</summary>
    public string? Mac { get; init; }

    /// <summary>The bridge, of the host's or XenSharp's, that it is put into (bridge); null for the default, xenbr0 with xl.</summary>
    public string? Bridge { get; init; }

    /// <summary>The name of the host's end (vifname), 15 characters at most; null for vifDOMID.DEVID.</summary>
    public string? Name { get; init; }

    /// <summary>Addresses that the guest is to have, for scripts and agents that look for them (ip); null for none.</summary>
    public string? Ip { get; init; }

    /// <summary>What the guest may send, at most (rate); null for as much as it can.</summary>
    public VifRate? Rate { get; init; }

    /// <summary>The number of the device, from 0 on (devid); null for the lowest that is free.</summary>
    public int? DeviceId { get; init; }

    /// <summary>Largest packet, in bytes (mtu), from 68 to 65535; null for the bridge's.</summary>
    public int? Mtu { get; init; }

    /// <summary>The guest is told that it may trust its back end; null where nothing was said (it may).</summary>
    public bool? Trusted { get; init; }

    /// <summary>The interface as a specification of xl-network-configuration(5).</summary>
    public string ToSpecification()
    {
        var parts = new List<string>();
        Add("mac", Mac);
        Add("bridge", Bridge);
        Add("vifname", Name);
        Add("ip", Ip);
        Add("rate", Rate?.ToString());
        Add("devid", DeviceId?.ToString(System.Globalization.CultureInfo.InvariantCulture));
        Add("mtu", Mtu?.ToString(System.Globalization.CultureInfo.InvariantCulture));
        if (Trusted is { } trusted)
            parts.Add(trusted ? "trusted" : "untrusted");
        return string.Join(',', parts);

        void Add(string key, string? value)
        {
            if (value is not null)
                parts.Add($"{key}={value}");
        }
    }
}
