// What the daemon answers where it does not do what it was asked: problem details as of RFC 9457.

using System.Text.Json.Serialization;

namespace XenSharp.Api;

/// <summary>A problem, with media type application/problem+json.</summary>
public sealed record ApiProblem
{
    /// <summary>The media type.</summary>
    public const string MediaType = "application/problem+json";

    /// <summary>What every <see cref="Type"/> begins with.</summary>
    public const string TypePrefix = "urn:xensharp:problem:";

    /// <summary>Which kind: <see cref="TypePrefix"/> and a constant of <see cref="ProblemKind"/>.</summary>
    public string Type { get; init; } = TypePrefix + ProblemKind.Failed;

    /// <summary>A few words, the same for each problem of that type.</summary>
    public string Title { get; init; } = string.Empty;

    /// <summary>The status of the HTTP answer.</summary>
    public int Status { get; init; }

    /// <summary>A sentence for people that says what is wrong and what to do.</summary>
    public string Detail { get; init; } = string.Empty;

    /// <summary>The <see cref="ProblemKind"/> of <see cref="Type"/>.</summary>
    [JsonIgnore]
    public string Kind => Type.StartsWith(TypePrefix, StringComparison.Ordinal) ? Type[TypePrefix.Length..] : ProblemKind.Failed;
}

/// <summary>The kinds of problems, which programs may tell apart.</summary>
public static class ProblemKind
{
    /// <summary>404: there is no such domain.</summary>
    public const string NoSuchDomain = "no-such-domain";

    /// <summary>404: the domain has no such device.</summary>
    public const string NoSuchDevice = "no-such-device";

    /// <summary>404: there is nothing at that path.</summary>
    public const string NoSuchResource = "no-such-resource";

    /// <summary>409: a domain of that name is there already.</summary>
    public const string NameTaken = "name-taken";

    /// <summary>409: the domain is not in a state in which that can be done.</summary>
    public const string WrongState = "wrong-state";

    /// <summary>400: the request's body or query is not what it should be.</summary>
    public const string BadRequest = "bad-request";

    /// <summary>422: the configuration cannot be used.</summary>
    public const string BadConfiguration = "bad-configuration";

    /// <summary>501: this is not for PV domains, or not in this build.</summary>
    public const string NotSupported = "not-supported";

    /// <summary>503: the host cannot run domains, or has no room for this one.</summary>
    public const string HostCannot = "host-cannot";

    /// <summary>504: the guest did not do its part in time.</summary>
    public const string GuestTimeout = "guest-timeout";

    /// <summary>500: it failed otherwise.</summary>
    public const string Failed = "failed";
}
