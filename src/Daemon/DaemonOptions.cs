// What can be said about a daemon.

using XenSharp.Api;

namespace XenSharp.Daemon;

/// <summary>Where a <see cref="DaemonServer"/> listens and keeps things. All paths are absolute.</summary>
public sealed record DaemonOptions
{
    /// <summary>The mode of the socket where nothing is said: its owner and group.</summary>
    public const UnixFileMode DefaultSocketMode = UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.GroupRead | UnixFileMode.GroupWrite;

    /// <summary>The API's socket, whose folder is made if need be.</summary>
    public string Socket { get; init; } = DaemonSocket.DefaultPath;

    /// <summary>Who may use the socket, and so do with domains and files whatever the daemon may: those who may write to it.</summary>
    public UnixFileMode SocketMode { get; init; } = DefaultSocketMode;

    /// <summary>The group that the socket is to belong to; null for the daemon's own.</summary>
    public string? SocketGroup { get; init; }

    /// <summary>Where records are kept.</summary>
    public string StateFolder { get; init; } = DaemonSocket.StateFolder;

    /// <summary>Where consoles are logged; null for nowhere.</summary>
    public string? ConsoleLogFolder { get; init; }

    /// <summary>The socket of xenstore; null for none.</summary>
    public string? XenstoreSocket { get; init; }

    /// <summary>The version of the program.</summary>
    public required string Version { get; init; }
}
