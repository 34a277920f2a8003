// What can be said about a toolstack that manages domains.

namespace XenSharp.Toolstack.Management;

/// <summary>Where a <see cref="DomainToolstack"/> keeps things, and how long it waits.</summary>
public sealed record ToolstackOptions
{
    /// <summary>The folder of records (<see cref="Management.StateFolder"/>), absolute.</summary>
    public required string StateFolder { get; init; }

    /// <summary>The folder of consoles' logs (guest-NAME.log), which is made if need be; null to have none.</summary>
    public string? ConsoleLogFolder { get; init; }

    /// <summary>How long a guest has to suspend itself, as with libxl.</summary>
    public TimeSpan SuspendTimeout { get; init; } = TimeSpan.FromSeconds(60);

    /// <summary>How long a guest has to let go of a device, as with libxl (LIBXL_DESTROY_TIMEOUT).</summary>
    public TimeSpan DetachTimeout { get; init; } = TimeSpan.FromSeconds(10);

    /// <summary>The least time between two starts of a domain that is restarted, so that one that ends at once does not keep the host busy.</summary>
    public TimeSpan RestartInterval { get; init; } = TimeSpan.FromSeconds(1);

    /// <summary>For tests: called before each step of making a domain, which fails where this throws.</summary>
    internal Action<CreateStep>? BeforeStep { get; init; }
}

/// <summary>The steps of making a domain, in their order.</summary>
internal enum CreateStep
{
    Reserve,
    Load,
    Console,
    Build,
    Devices,
    Record,
    Publish,
    Start,
}
