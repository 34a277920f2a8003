// Where QEMU is: on the host, or brought into the guest cache from Debian's packages without installing anything.
using XenSharp.Guests.Fetching;

namespace XenSharp.Oracle.Qemu;

/// <summary>A QEMU that can be run.</summary>
/// <param name="Path">The file to execute.</param>
public sealed record QemuProgram(string Path)
{
    private const string Program = "qemu-system-x86_64";

    private const string Install = $"Install {Program} by hand (on Debian: apt-get install qemu-system-x86 seabios).";

    // The library folders of a Debian root, with and without merged /usr.
    private static readonly string[] LibraryFolders = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];

    private static readonly PackageSet Packages = new("qemu", $"usr/bin/{Program}")
    {
        WithDependencies = ["qemu-system-x86", "seabios"],
        Advice = Install,
    };

    /// <summary>Arguments that go before all others.</summary>
    public IReadOnlyList<string> Arguments { get; init; } = [];

    /// <summary>Variables that it needs in its environment.</summary>
    public IReadOnlyDictionary<string, string> Environment { get; init; } = new Dictionary<string, string>();

    /// <summary>The QEMU in PATH, else that of the cache, fetched first if it is not there (43 MB with all its libraries).</summary>
    /// <param name="cache">Where it is kept.</param>
    /// <param name="host">Looks for it on the host; null for PATH.</param>
    /// <param name="progress">Told what is done.</param>
    /// <param name="cancellation">Ends the fetch.</param>
    /// <exception cref="GuestFetchException">There is none and it cannot be fetched; the message says what to install.</exception>
    public static async Task<QemuProgram> GetAsync(
        GuestCache cache, CommandRunner? host = null, IProgress<FetchProgress>? progress = null, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(cache);
        if ((host ?? new CommandRunner()).Find(Program) is { } installed)
            return new QemuProgram(installed);
        string root = await cache.GetPackagesAsync(Packages, progress, cancellation).ConfigureAwait(false);
        return InRoot(root);
    }

    // Runs what is unpacked in a folder by its own dynamic loader, because a loader works only with the C library of its own
    // version, and the host's may be another.
    private static QemuProgram InRoot(string root)
    {
        string[] libraries = [.. LibraryFolders.Select(folder => System.IO.Path.Combine(root, folder)).Where(Directory.Exists)];
        string loader = libraries.Select(folder => System.IO.Path.Combine(folder, "ld-linux-x86-64.so.2")).FirstOrDefault(File.Exists)
            ?? throw new GuestFetchException($"QEMU's packages in {root} hold no dynamic loader; delete that folder and try again. {Install}");
        string modules = libraries.Select(folder => System.IO.Path.Combine(folder, "qemu")).FirstOrDefault(Directory.Exists) ?? root;
        return new QemuProgram(loader)
        {
            Arguments =
            [
                "--library-path", string.Join(':', libraries), System.IO.Path.Combine(root, "usr/bin", Program),
                "-L", System.IO.Path.Combine(root, "usr/share/qemu"), "-L", System.IO.Path.Combine(root, "usr/share/seabios"),
            ],
            Environment = new Dictionary<string, string> { ["QEMU_MODULE_DIR"] = modules },
        };
    }
}
