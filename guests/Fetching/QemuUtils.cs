// Where QEMU's tools for images are: on the host, or brought into the guest cache from Debian's packages without installing anything.
namespace XenSharp.Guests.Fetching;

/// <summary>qemu-img and qemu-nbd, ready to be run.</summary>
public sealed class QemuUtils
{
    private const string Install = "Install qemu-utils by hand (on Debian: apt-get install qemu-utils).";

    private static readonly string[] LibraryFolders = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];

    private static readonly PackageSet Packages = new("qemu-utils", "usr/bin/qemu-nbd") { WithDependencies = ["qemu-utils"], Advice = Install };

    private readonly string? _root;

    private QemuUtils(string? root) => _root = root;

    /// <summary>Those in PATH, else those of the cache, fetched first if they are not there (some 30 MB with all their libraries).</summary>
    /// <param name="cache">Where they are kept.</param>
    /// <param name="progress">Told what is done.</param>
    /// <param name="cancellation">Ends the fetch.</param>
    /// <exception cref="GuestFetchException">There are none and they cannot be fetched; the message says what to install.</exception>
    public static async Task<QemuUtils> GetAsync(
        GuestCache cache, IProgress<FetchProgress>? progress = null, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(cache);
        var host = new CommandRunner();
        if (host.Find("qemu-img") is not null && host.Find("qemu-nbd") is not null)
            return new QemuUtils(null);
        return new QemuUtils(await cache.GetPackagesAsync(Packages, progress, cancellation).ConfigureAwait(false));
    }

    /// <summary>How one of the programs is run: the file to execute, and arguments that go before all others.</summary>
    /// <param name="program">"qemu-img" or "qemu-nbd".</param>
    /// <exception cref="GuestFetchException">The packages are damaged.</exception>
    public (string Path, IReadOnlyList<string> Arguments) Command(string program)
    {
        if (_root is null)
            return (new CommandRunner().Find(program)!, []);

        // By its own dynamic loader, because a loader works only with the C library of its own version, and the host's may be another.
        string[] libraries = [.. LibraryFolders.Select(folder => Path.Combine(_root, folder)).Where(Directory.Exists)];
        string loader = libraries.Select(static folder => Path.Combine(folder, "ld-linux-x86-64.so.2")).FirstOrDefault(File.Exists)
            ?? throw new GuestFetchException($"The packages in {_root} hold no dynamic loader; delete that folder and try again. {Install}");
        return (loader, ["--library-path", string.Join(':', libraries), Path.Combine(_root, "usr/bin", program)]);
    }

    /// <summary>Makes an image.</summary>
    /// <param name="path">The file.</param>
    /// <param name="format">As qemu-img knows it.</param>
    /// <param name="size">As qemu-img takes it, such as "64M".</param>
    /// <param name="cancellation">Ends the making.</param>
    /// <exception cref="GuestFetchException">qemu-img fails; the message says how.</exception>
    public async Task CreateAsync(string path, string format, string size, CancellationToken cancellation = default)
    {
        (string file, IReadOnlyList<string> first) = Command("qemu-img");
        CommandResult result = await new CommandRunner().RunAsync(
            new Command(file, [.. first, "create", "-q", "-f", format, path, size]), cancellation).ConfigureAwait(false);
        if (result.ExitCode != 0)
            throw new GuestFetchException($"qemu-img cannot make {path} (exit status {result.ExitCode}): {result.Error.Trim()}");
    }
}
