// What can be set about a console: how much of it is kept, where it is logged.

namespace XenSharp.Devices.Console;

/// <summary>Settings of a <see cref="ConsoleHub"/>.</summary>
public sealed record ConsoleHubOptions
{
    /// <summary>The least that <see cref="HistoryBytes"/> can be: several of the guest's full rings.</summary>
    public const int MinimumHistoryBytes = 16 * 1024;

    /// <summary>Bytes of output that are kept for viewers who come later or are slow; at least <see cref="MinimumHistoryBytes"/>.
    /// The default is what libxl allows Xen's console daemon (the node "limit").</summary>
    public int HistoryBytes { get; init; } = 1024 * 1024;

    /// <summary>
    /// How long the guest is held for a reader, a viewer or the log, that is more than half the history behind. One who is still
    /// behind then is not waited for again until it has come up, and misses what the history forgets meanwhile.
    /// </summary>
    public TimeSpan Patience { get; init; } = TimeSpan.FromSeconds(1);

    /// <summary>The log file; <see langword="null"/> for none.</summary>
    public ConsoleLogOptions? Log { get; init; }
}

/// <summary>Settings of a console's log file.</summary>
/// <param name="Path">The file; output is appended, and it is created (mode 0644) if need be. Its folder must exist.</param>
public sealed record ConsoleLogOptions(string Path)
{
    /// <summary>The size in bytes at which a new file is begun; 0 for never.</summary>
    public long MaximumBytes { get; init; } = 16 * 1024 * 1024;

    /// <summary>How many earlier files are kept, the newest as Path.1; with 0 the file is begun anew each time.</summary>
    public int Generations { get; init; } = 4;

    /// <summary>How long a file that could not be written is left alone before it is tried again.</summary>
    public TimeSpan RetryInterval { get; init; } = TimeSpan.FromSeconds(1);
}
