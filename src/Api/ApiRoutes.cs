// Where the daemon's resources are: the paths of its HTTP API, for both of its ends.

namespace XenSharp.Api;

/// <summary>
/// Paths of the API's first version. <c>{domain}</c> is a domain's number, its name, or its UUID; a name that looks like a number is
/// taken for a number, as xl takes it. All bodies are JSON (<see cref="ApiJson"/>) unless a member says otherwise; errors are
/// <see cref="ApiProblem"/>.
/// </summary>
public static class ApiRoutes
{
    /// <summary>What every path of this version begins with.</summary>
    public const string Version = "/v1";

    /// <summary>The API's own description (OpenAPI 3.1).</summary>
    public const string OpenApi = "/openapi/v1.json";

    /// <summary>GET: <see cref="HostInfo"/>.</summary>
    public const string Host = Version + "/host";

    /// <summary>GET: the manager's log as text/plain, oldest line first (<c>xl dmesg</c>); DELETE: clears it.</summary>
    public const string Log = Version + "/log";

    /// <summary>GET: a stream of <see cref="DomainEvent"/>, a JSON object a line (application/x-ndjson), until the client goes.</summary>
    public const string Events = Version + "/events";

    /// <summary>GET: an array of <see cref="DomainInfo"/>, by number; POST <see cref="CreateDomainRequest"/>: 201 with <see cref="CreateDomainResult"/>.</summary>
    public const string Domains = Version + "/domains";

    /// <summary>POST <see cref="RestoreDomainRequest"/>: a stream of <see cref="OperationUpdate"/>, a JSON object a line; the last has the domain.</summary>
    public const string Restore = Version + "/restore";

    /// <summary>GET: an array of <see cref="LostDomain"/>, what ran when an earlier daemon ended without taking it down.</summary>
    public const string Lost = Version + "/lost";

    /// <summary>DELETE: forgets one of those, named by its UUID.</summary>
    public const string LostRecord = Lost + "/{uuid}";

    /// <summary>GET: <see cref="DomainInfo"/>; DELETE: destroys it at once.</summary>
    public const string Domain = Domains + "/{domain}";

    /// <summary>POST: asks the guest to power off. 202: it was asked.</summary>
    public const string Shutdown = Domain + "/shutdown";

    /// <summary>POST: asks the guest to reboot. 202: it was asked.</summary>
    public const string Reboot = Domain + "/reboot";

    /// <summary>POST: stops all its vCPUs.</summary>
    public const string Pause = Domain + "/pause";

    /// <summary>POST: takes a pause back.</summary>
    public const string Unpause = Domain + "/unpause";

    /// <summary>POST <see cref="RenameRequest"/>: <see cref="DomainInfo"/>.</summary>
    public const string Rename = Domain + "/rename";

    /// <summary>GET: an array of <see cref="VcpuInfo"/>; PUT <see cref="SetVcpusRequest"/>: brings vCPUs up or down.</summary>
    public const string Vcpus = Domain + "/vcpus";

    /// <summary>PUT <see cref="PinVcpusRequest"/>: where vCPUs may run (<c>xl vcpu-pin</c>).</summary>
    public const string VcpuProcessors = Vcpus + "/processors";

    /// <summary>PUT <see cref="SetMemoryRequest"/>: what the balloon is to shrink or grow to (<c>xl mem-set</c>).</summary>
    public const string MemoryTarget = Domain + "/memory/target";

    /// <summary>PUT <see cref="SetMemoryRequest"/>: what the domain may have at most (<c>xl mem-max</c>).</summary>
    public const string MemoryMaximum = Domain + "/memory/max";

    /// <summary>POST <see cref="SysrqRequest"/>: a magic system request to the guest's kernel.</summary>
    public const string Sysrq = Domain + "/sysrq";

    /// <summary>POST <see cref="TriggerRequest"/>: an NMI and the like.</summary>
    public const string Trigger = Domain + "/trigger";

    /// <summary>
    /// GET with <c>Connection: Upgrade</c> and <c>Upgrade: <see cref="ConsoleProtocol"/></c>: 101, and from there on the connection is
    /// the console, bytes both ways: first the history, unless <c>?history=false</c>, then what the guest prints; it ends with the domain.
    /// <c>?channel=N</c> names another console than the first.
    /// </summary>
    public const string Console = Domain + "/console";

    /// <summary>GET: what the guest printed so far and the history still has, as application/octet-stream.</summary>
    public const string ConsoleHistory = Console + "/history";

    /// <summary>The name of the protocol that <see cref="Console"/> is upgraded to.</summary>
    public const string ConsoleProtocol = "xensharp-console";

    /// <summary>GET: <see cref="DomainConfigurationDocument"/>; PUT the same: what the next incarnation is made from (<c>xl config-update</c>).</summary>
    public const string Configuration = Domain + "/config";

    /// <summary>GET: an array of <see cref="BlockDeviceInfo"/>; POST <see cref="AttachDeviceRequest"/>: 201 with <see cref="BlockDeviceInfo"/>.</summary>
    public const string BlockDevices = Domain + "/block";

    /// <summary>DELETE: unplugs it; <c>?force=true</c> does not wait for the guest. <c>{device}</c> is "xvda" or its number.</summary>
    public const string BlockDevice = BlockDevices + "/{device}";

    /// <summary>GET: an array of <see cref="NetworkDeviceInfo"/>; POST <see cref="AttachDeviceRequest"/>: 201 with <see cref="NetworkDeviceInfo"/>.</summary>
    public const string NetworkDevices = Domain + "/network";

    /// <summary>DELETE: unplugs it; <c>?force=true</c> does not wait for the guest. <c>{device}</c> is its index or its MAC address.</summary>
    public const string NetworkDevice = NetworkDevices + "/{device}";

    /// <summary>GET: an array of <see cref="ChannelInfo"/>.</summary>
    public const string Channels = Domain + "/channels";

    /// <summary>POST <see cref="SaveDomainRequest"/>: a stream of <see cref="OperationUpdate"/>, a JSON object a line.</summary>
    public const string Save = Domain + "/save";

    /// <summary>POST <see cref="DumpCoreRequest"/>: a stream of <see cref="OperationUpdate"/>, a JSON object a line.</summary>
    public const string DumpCore = Domain + "/dump-core";

    /// <summary>Puts a domain and a device into a path.</summary>
    /// <param name="route">A path of this class.</param>
    /// <param name="domain">What stands for <c>{domain}</c>, or for <c>{uuid}</c>.</param>
    /// <param name="device">What stands for <c>{device}</c>.</param>
    public static string Of(string route, string domain, string? device = null)
    {
        ArgumentNullException.ThrowIfNull(route);
        ArgumentException.ThrowIfNullOrEmpty(domain);
        string path = route.Replace("{domain}", Uri.EscapeDataString(domain), StringComparison.Ordinal)
            .Replace("{uuid}", Uri.EscapeDataString(domain), StringComparison.Ordinal);
        return device is null ? path : path.Replace("{device}", Uri.EscapeDataString(device), StringComparison.Ordinal);
    }
}
