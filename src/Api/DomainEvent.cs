// What happens to domains, as it happens: for commands that wait, and for orchestrators.

namespace XenSharp.Api;

/// <summary>What happened.</summary>
public enum DomainEventKind
{
    /// <summary>The first of every stream, about no domain: from here on nothing is missed.</summary>
    Ready,

    /// <summary>It was made.</summary>
    Created,

    /// <summary>It was paused.</summary>
    Paused,

    /// <summary>It was unpaused.</summary>
    Unpaused,

    /// <summary>It has shut down by itself, or crashed; <see cref="DomainEvent.Reason"/> says why.</summary>
    Shutdown,

    /// <summary>It is gone, and its number free.</summary>
    Destroyed,

    /// <summary>It has another name.</summary>
    Renamed,

    /// <summary>Its configuration, memory, vCPUs or devices are to be others.</summary>
    Changed,

    /// <summary>Some events were lost, as the client did not read them in time; ask for the list again.</summary>
    Overrun,
}

/// <summary>One event.</summary>
public sealed record DomainEvent
{
    public required DomainEventKind Kind { get; init; }

    /// <summary>When.</summary>
    public required DateTimeOffset Time { get; init; }

    /// <summary>The domain's number; 0 where it is about none.</summary>
    public int Id { get; init; }

    /// <summary>The domain's name, after the event.</summary>
    public string Name { get; init; } = string.Empty;

    public Guid Uuid { get; init; }

    /// <summary>With <see cref="DomainEventKind.Shutdown"/>: why.</summary>
    public DomainShutdownReason? Reason { get; init; }

    /// <summary>With <see cref="DomainEventKind.Destroyed"/>: the number of the incarnation that takes its place (a reboot), or 0 for none.</summary>
    public int SuccessorId { get; init; }
}
