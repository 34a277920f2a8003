// Where the store's socket is.
namespace XenSharp.Devices.Xenstore;

/// <summary>Paths of the Unix socket between the store and the host's tools.</summary>
public static class XenstoreSocketPath
{
    /// <summary>Where the daemon of root has its socket. Xen's own tools find it with XENSTORED_RUNDIR=/run/xensharp/xenstored.</summary>
    public const string SystemDaemon = "/run/xensharp/xenstored/socket";

    /// <summary>Where the daemon of this user has its socket: <see cref="SystemDaemon"/>, or below XDG_RUNTIME_DIR for other users.</summary>
    public static string Default
    {
        get
        {
            string? folder = Environment.IsPrivilegedProcess ? null : Environment.GetEnvironmentVariable("XDG_RUNTIME_DIR");
            return string.IsNullOrEmpty(folder) ? SystemDaemon : Path.Combine(folder, "xensharp", "xenstored", "socket");
        }
    }

    /// <summary>What the environment tells tools to connect to, as it does Xen's own: XENSTORED_PATH, or else the file "socket" in
    /// XENSTORED_RUNDIR; <see langword="null"/> if neither is set.</summary>
    public static string? Named
    {
        get
        {
            if (Environment.GetEnvironmentVariable("XENSTORED_PATH") is { Length: > 0 } path)
                return path;
            return Environment.GetEnvironmentVariable("XENSTORED_RUNDIR") is { Length: > 0 } folder ? folder + "/socket" : null;
        }
    }
}
