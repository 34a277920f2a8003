// A channel as xl.cfg(5) describes one: a second console, with a name.

using System.Text.Json.Serialization;

namespace XenSharp.Configuration.Devices;

/// <summary>What the host's end of a channel is (libxl_channel_connection).</summary>
[JsonConverter(typeof(KebabCaseEnumConverter<ChannelConnection>))]
public enum ChannelConnection
{
    /// <summary>A pseudo-terminal.</summary>
    Pty,

    /// <summary>A Unix socket that is listened on.</summary>
    Socket,
}

/// <summary>A stream of bytes in both directions between the guest and a program of the host's (xen-pv-channel(7)).</summary>
public sealed record ChannelConfiguration
{
    /// <summary>The name by which the guest's program finds it.</summary>
    public required string Name { get; init; }

    /// <summary>What the host's end is.</summary>
    public required ChannelConnection Connection { get; init; }

    /// <summary>The socket's path; null for a pseudo-terminal.</summary>
    public string? Path { get; init; }

    /// <summary>The channel as a specification of xl.cfg(5).</summary>
    public string ToSpecification() => Connection == ChannelConnection.Socket ? $"name={Name},connection=socket,path={Path}" : $"name={Name},connection=pty";
}
