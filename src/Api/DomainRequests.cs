// What is asked of the daemon about domains: the bodies of requests, and the answers that are not the domain itself.

using System.Text.Json;

namespace XenSharp.Api;

/// <summary>What a domain is made from, in one of two forms; with both, <see cref="Json"/> counts.</summary>
public sealed record DomainConfigurationDocument
{
    /// <summary>The text of an xl.cfg(5) file.</summary>
    public string? Text { get; init; }

    /// <summary>What the file is called, for messages; null where the text is from none.</summary>
    public string? FileName { get; init; }

    /// <summary>Settings in the file's language that come after it and win, as those on xl create's command line.</summary>
    public IReadOnlyList<string> Settings
    {
        get => field ?? [];
        init;
    }

    /// <summary>The configuration as a JSON object; what <c>list -l</c> prints under <c>config</c>.</summary>
    public JsonElement? Json { get; init; }

    /// <summary>The folder that relative names of files start from; must be absolute. Null: names of files must be absolute.</summary>
    public string? Folder { get; init; }
}

/// <summary>A domain to be made.</summary>
public sealed record CreateDomainRequest
{
    public required DomainConfigurationDocument Configuration { get; init; }

    /// <summary>The UUID that it gets where its configuration has none, so that whoever asks can name it before it is there; null for a random one.</summary>
    public Guid? Uuid { get; init; }

    /// <summary>It is made, and waits with its first instruction until it is unpaused (xl create -p).</summary>
    public bool Paused { get; init; }

    /// <summary>Only checks whether it could be made: nothing is (xl create -n, which still reads the files).</summary>
    public bool DryRun { get; init; }
}

/// <summary>A domain that was made.</summary>
public sealed record CreateDomainResult
{
    /// <summary>The domain; null for a dry run.</summary>
    public DomainInfo? Domain { get; init; }

    /// <summary>Sentences about settings that have no effect here.</summary>
    public IReadOnlyList<string> Warnings
    {
        get => field ?? [];
        init;
    }

    /// <summary>What it is made from, as it was understood.</summary>
    public DomainConfigurationDocument? Configuration { get; init; }
}

/// <summary>A new name.</summary>
public sealed record RenameRequest
{
    /// <summary>1 to 80 characters; no '/', no control characters, and not only digits.</summary>
    public required string Name { get; init; }
}

/// <summary>How many vCPUs the guest is to have up.</summary>
public sealed record SetVcpusRequest
{
    /// <summary>From 1 to <see cref="DomainInfo.MaximumVcpus"/>; those from this number on go down.</summary>
    public required int Online { get; init; }
}

/// <summary>Which of the host's processors vCPUs may run on.</summary>
public sealed record PinVcpusRequest
{
    /// <summary>Which vCPU; null for all that the domain has.</summary>
    public int? Vcpu { get; init; }

    /// <summary>The processors in xl's notation, such as "0-3,^1", "node:0" or "all".</summary>
    public required string Processors { get; init; }
}

/// <summary>An amount of memory.</summary>
public sealed record SetMemoryRequest
{
    /// <summary>In KiB.</summary>
    public required long MemoryKiB { get; init; }
}

/// <summary>A magic system request.</summary>
public sealed record SysrqRequest
{
    /// <summary>One letter or digit, as after Linux's Alt-SysRq.</summary>
    public required string Key { get; init; }
}

/// <summary>What can be triggered (xl trigger).</summary>
public enum DomainTrigger
{
    Nmi,
    Reset,
    Init,
    Power,
    Sleep,
    S3Resume,
}

/// <summary>Something that hardware would do.</summary>
public sealed record TriggerRequest
{
    /// <summary>PV domains have <see cref="DomainTrigger.Nmi"/>; the others are for machines with a firmware.</summary>
    public required DomainTrigger Trigger { get; init; }

    /// <summary>Which vCPU it is for.</summary>
    public int Vcpu { get; init; }
}

/// <summary>A domain to be saved.</summary>
public sealed record SaveDomainRequest
{
    /// <summary>Absolute path of the file to write; one that is there is replaced when all has been written.</summary>
    public required string Path { get; init; }

    /// <summary>It runs on afterwards (xl save -c).</summary>
    public bool Checkpoint { get; init; }

    /// <summary>It stays, paused (xl save -p).</summary>
    public bool LeavePaused { get; init; }

    /// <summary>What it is to be made from when it is restored, in place of what it is made from now; null for that.</summary>
    public DomainConfigurationDocument? Configuration { get; init; }
}

/// <summary>A domain to be made from what was saved.</summary>
public sealed record RestoreDomainRequest
{
    /// <summary>Absolute path of the file.</summary>
    public required string Path { get; init; }

    /// <summary>In place of what was saved with it; null for that.</summary>
    public DomainConfigurationDocument? Configuration { get; init; }

    /// <summary>It waits until it is unpaused (xl restore -p).</summary>
    public bool Paused { get; init; }
}

/// <summary>A core to be written.</summary>
public sealed record DumpCoreRequest
{
    /// <summary>Absolute path of the file to write.</summary>
    public required string Path { get; init; }
}

/// <summary>How far something long has come. The last of a stream has either <see cref="Finished"/> or <see cref="Problem"/>.</summary>
public sealed record OperationUpdate
{
    /// <summary>What is being done, for people.</summary>
    public string? Stage { get; init; }

    /// <summary>How much is done, in units of <see cref="Total"/>.</summary>
    public long Done { get; init; }

    /// <summary>How much there is to do; 0 while that is not known.</summary>
    public long Total { get; init; }

    /// <summary>All is done.</summary>
    public bool Finished { get; init; }

    /// <summary>It failed.</summary>
    public ApiProblem? Problem { get; init; }

    /// <summary>For restore, with <see cref="Finished"/>: the domain.</summary>
    public DomainInfo? Domain { get; init; }
}
