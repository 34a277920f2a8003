// Where the daemon's socket is, unless somebody says otherwise.

using System.Runtime.InteropServices;

namespace XenSharp.Api;

/// <summary>Default places of sockets and records, for the daemon and those who talk to it.</summary>
public static partial class DaemonSocket
{
    /// <summary>Names another socket than the default one.</summary>
    public const string EnvironmentVariable = "XENSHARP_SOCKET";

    /// <summary>
    /// What <see cref="EnvironmentVariable"/> says, else /run/xensharp/xensharp.sock for root and xensharp/xensharp.sock under
    /// $XDG_RUNTIME_DIR for others.
    /// </summary>
    public static string DefaultPath
        => Environment.GetEnvironmentVariable(EnvironmentVariable) is { Length: > 0 } named ? named : Path.Combine(RuntimeFolder, "xensharp.sock");

    /// <summary>Where a daemon has the store's socket, unless it is told otherwise: in a folder beside its own.</summary>
    /// <param name="socket">Absolute path of the daemon's socket.</param>
    public static string XenstoreBeside(string socket) => Path.Combine(Path.GetDirectoryName(socket) ?? "/", "xenstored", "socket");

    /// <summary>Where sockets and locks of the running daemon are: they are of no use after a restart of the machine.</summary>
    public static string RuntimeFolder
        => IsRoot ? "/run/xensharp"
            : Path.Combine(Environment.GetEnvironmentVariable("XDG_RUNTIME_DIR") is { Length: > 0 } folder ? folder : Path.GetTempPath(), "xensharp");

    /// <summary>Where records are that outlive the machine's restart: /var/lib/xensharp for root, under $XDG_STATE_HOME for others.</summary>
    public static string StateFolder
        => IsRoot ? "/var/lib/xensharp"
            : Path.Combine(
                Environment.GetEnvironmentVariable("XDG_STATE_HOME") is { Length: > 0 } folder
                    ? folder : Path.Combine(Environment.GetFolderPath(Environment.SpecialFolder.UserProfile), ".local", "state"),
                "xensharp");

    private static bool IsRoot => geteuid() == 0;

    [LibraryImport("libc")]
    private static partial uint geteuid();
}
