// Fetches what guests and test beds are made of, Debian's kernel, busybox and others, once, and keeps it unpacked in a cache folder.
using System.Buffers.Binary;
using System.Security.Cryptography;
using System.Text;

namespace XenSharp.Guests.Fetching;

/// <summary>
/// The cache of unpacked Debian packages. Nothing is installed and nothing of the system's is changed; no root is needed.
/// </summary>
/// <remarks>
/// Each package is a folder that appears by one rename when it is complete, so an interrupted fetch leaves nothing half done.
/// Fetches of several processes take turns on a lock file that dies with its holder.
/// </remarks>
/// <param name="root">The cache folder; made when it is first needed.</param>
/// <param name="runner">Runs apt and dpkg-deb; null for those in PATH.</param>
public sealed class GuestCache(string root, CommandRunner? runner = null)
{
    const string ByHand =
        "Or give a guest by hand: `xensharp run --kernel FILE --ramdisk FILE`, with a Linux bzImage built with " +
        "CONFIG_XEN_PV (Debian's kernels are) and an initramfs.";

    const string TemporaryPrefix = ".fetch-";

    // EAGAIN, which .NET hands on as the exception's HResult when another process holds the lock.
    const int WouldBlock = 11;

    static readonly TimeSpan LockRetry = TimeSpan.FromMilliseconds(100);

    readonly CommandRunner runner = runner ?? new CommandRunner();

    /// <summary>The cache folder, absolute.</summary>
    public string Root { get; } = Path.GetFullPath(root);

    /// <summary>The folder that XENSHARP_CACHE names, else xensharp in XDG_CACHE_HOME, else in the home's .cache.</summary>
    /// <exception cref="GuestFetchException">None of the variables XENSHARP_CACHE, XDG_CACHE_HOME and HOME is set.</exception>
    public static string DefaultRoot(Func<string, string?>? environment = null)
    {
        environment ??= Environment.GetEnvironmentVariable;
        if (environment("XENSHARP_CACHE") is { Length: > 0 } own)
            return Path.GetFullPath(own);
        // The XDG base directory specification: a relative path is invalid and to be ignored.
        if (environment("XDG_CACHE_HOME") is { Length: > 0 } xdg && Path.IsPathRooted(xdg))
            return Path.Combine(xdg, "xensharp");
        if (environment("HOME") is { Length: > 0 } home && Path.IsPathRooted(home))
            return Path.Combine(home, ".cache", "xensharp");
        throw new GuestFetchException(
            "There is no place for the guest's files: neither XENSHARP_CACHE nor XDG_CACHE_HOME nor HOME is set. " +
            "Set XENSHARP_CACHE to a folder with 600 MB of room.");
    }

    /// <summary>The kernel from the cache, fetched first if it is not there.</summary>
    /// <exception cref="GuestFetchException">It cannot be had; the message says why and what to do.</exception>
    /// <exception cref="OperationCanceledException">Cancelled; the cache is as it was.</exception>
    public async Task<DebianKernel> GetKernelAsync(
        DebianKernelFlavour flavour, IProgress<FetchProgress>? progress = null, CancellationToken cancellation = default)
    {
        string meta = flavour switch
        {
            DebianKernelFlavour.Amd64 => "linux-image-amd64",
            DebianKernelFlavour.CloudAmd64 => "linux-image-cloud-amd64",
            _ => throw new ArgumentOutOfRangeException(nameof(flavour), flavour, "There is no such kernel flavour."),
        };
        Recipe recipe = new(meta, (apt, token) => ResolveKernelAsync(apt, meta, token), folder => FindKernel(folder, "") is not null,
            "a Linux bzImage (boot/vmlinuz-*)", ByHand);
        string folder = await GetAsync(recipe, progress, cancellation).ConfigureAwait(false);
        string version = await File.ReadAllTextAsync(VersionFile(folder), cancellation).ConfigureAwait(false);
        return FindKernel(folder, version.Trim()) ?? throw Damaged(folder);
    }

    /// <summary>Path of a statically linked busybox, fetched first if it is not there.</summary>
    /// <param name="progress">Told what is done.</param>
    /// <param name="cancellation">Ends the fetch.</param>
    /// <param name="architecture">Another of Debian's architectures, such as i386, than the host's.</param>
    /// <exception cref="GuestFetchException">It cannot be had; the message says why and what to do.</exception>
    /// <exception cref="OperationCanceledException">Cancelled; the cache is as it was.</exception>
    public async Task<string> GetBusyboxAsync(
        IProgress<FetchProgress>? progress = null, CancellationToken cancellation = default, string? architecture = null)
    {
        const string Package = "busybox-static";
        Recipe recipe = new(
            architecture is null ? Package : $"{Package}-{architecture}", (apt, token) => ResolveAloneAsync(apt, [Package], token),
            folder => FindBusybox(folder) is not null, "an executable bin/busybox", ByHand) { Architecture = architecture };
        string folder = await GetAsync(recipe, progress, cancellation).ConfigureAwait(false);
        return FindBusybox(folder) ?? throw Damaged(folder);
    }

    /// <summary>The unpacked files of any package, without those that it depends on, fetched first if it is not there.</summary>
    /// <param name="package">The package's name.</param>
    /// <param name="content">A path relative to the package's root that it must hold, with no wildcard.</param>
    /// <param name="progress">Told what is done.</param>
    /// <param name="cancellation">Ends the fetch.</param>
    /// <returns>The folder that stands for the root of the file system.</returns>
    /// <exception cref="GuestFetchException">It cannot be had; the message says why and what to do.</exception>
    /// <exception cref="OperationCanceledException">Cancelled; the cache is as it was.</exception>
    public Task<string> GetPackageAsync(
        string package, string content, IProgress<FetchProgress>? progress = null, CancellationToken cancellation = default)
    {
        ArgumentException.ThrowIfNullOrEmpty(package);
        return GetPackagesAsync(new PackageSet(package, content) { Alone = [package] }, progress, cancellation);
    }

    /// <summary>The files of several packages, unpacked into one folder, fetched first if they are not there.</summary>
    /// <returns>The folder that stands for the root of the file system.</returns>
    /// <exception cref="GuestFetchException">They cannot be had; the message says why and what to do.</exception>
    /// <exception cref="OperationCanceledException">Cancelled; the cache is as it was.</exception>
    public Task<string> GetPackagesAsync(
        PackageSet set, IProgress<FetchProgress>? progress = null, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(set);
        ArgumentException.ThrowIfNullOrEmpty(set.Name);
        ArgumentException.ThrowIfNullOrEmpty(set.Content);
        return GetAsync(
            new Recipe(
                set.Name,
                async (apt, token) =>
                {
                    (IReadOnlyList<AptPackage>? whole, string complaint) = set.WithDependencies.Count == 0
                        ? ([], "")
                        : await apt.ResolveAsync(set.WithDependencies, token).ConfigureAwait(false);
                    if (whole is null)
                        return (null, complaint);
                    (IReadOnlyList<AptPackage>? alone, complaint) = await ResolveAloneAsync(apt, set.Alone, token).ConfigureAwait(false);
                    return (alone is null ? null : [.. whole, .. alone], complaint);
                },
                folder => Path.Exists(Path.Combine(folder, set.Content)), set.Content, set.Advice),
            progress, cancellation);
    }

    /// <summary>A file of the cache that is made from its packages, made first if it is not there.</summary>
    /// <param name="name">What it is, a file name.</param>
    /// <param name="key">What it is made from, such as package versions; another key is another file.</param>
    /// <param name="stage">What is told to <paramref name="progress"/> while it is made.</param>
    /// <param name="write">Writes it to a path where nothing is yet. It must not ask this cache for anything.</param>
    /// <param name="progress">Told what is done.</param>
    /// <param name="cancellation">Ends the making.</param>
    /// <exception cref="GuestFetchException">It cannot be kept in the cache; the message says why and what to do.</exception>
    /// <exception cref="OperationCanceledException">Cancelled; the cache is as it was.</exception>
    public async Task<string> GetFileAsync(
        string name, string key, string stage, Func<string, CancellationToken, Task> write,
        IProgress<FetchProgress>? progress = null, CancellationToken cancellation = default)
    {
        ArgumentException.ThrowIfNullOrEmpty(name);
        ArgumentNullException.ThrowIfNull(write);
        string hash = Convert.ToHexStringLower(SHA256.HashData(Encoding.UTF8.GetBytes(key)))[..16];
        string file = Path.Combine(Root, "made", $"{hash}-{name}");
        await MakeAsync(
            file,
            async () =>
            {
                progress?.Report(new FetchProgress(stage, null));
                Directory.CreateDirectory(Path.GetDirectoryName(file)!);
                await InTemporaryAsync(async temporary =>
                {
                    string unfinished = Path.Combine(temporary, name);
                    await write(unfinished, cancellation).ConfigureAwait(false);
                    File.Move(unfinished, file);
                }).ConfigureAwait(false);
            },
            progress, cancellation).ConfigureAwait(false);
        return file;
    }

    /// <summary>
    /// The version of the package that <see cref="GetPackageAsync"/> unpacked into a folder; for the folder of
    /// <see cref="GetPackagesAsync"/> a line "NAME VERSION" for each package.
    /// </summary>
    public static string VersionOf(string folder) => File.ReadAllText(VersionFile(folder)).Trim();

    /// <summary>The version of a package that is in the cache by itself, or null when it is not there.</summary>
    public string? FindVersion(string package)
    {
        string file = VersionFile(Path.Combine(Root, package));
        return File.Exists(file) ? File.ReadAllText(file).Trim() : null;
    }

    // What to fetch: the folder's name, how to find the packages (null: apt's lists lack them; with apt's complaint or none), how
    // to tell the right content, its name, and what else people can do.
    sealed record Recipe(
        string Name,
        Func<AptRepository, CancellationToken, Task<(IReadOnlyList<AptPackage>? Packages, string Complaint)>> Resolve,
        Func<string, bool> IsGood,
        string Content,
        string Advice)
    {
        // One of Debian's; null for the host's own.
        public string? Architecture { get; init; }
    }

    async Task<string> GetAsync(Recipe recipe, IProgress<FetchProgress>? progress, CancellationToken cancellation)
    {
        string folder = Path.Combine(Root, recipe.Name);
        await MakeAsync(folder, () => FetchAsync(recipe, folder, progress, cancellation), progress, cancellation).ConfigureAwait(false);
        return folder;
    }

    // Makes what is not there yet, under the lock.
    async Task MakeAsync(string path, Func<Task> make, IProgress<FetchProgress>? progress, CancellationToken cancellation)
    {
        if (Path.Exists(path))
            return;
        // apt's configuration has no way to quote these.
        if (Root.AsSpan().ContainsAny('"', '\n'))
            throw new GuestFetchException(
                $"apt cannot use the cache folder {Root}, which has a quotation mark or newline in its name; " +
                "set XENSHARP_CACHE to another.");
        try
        {
            Directory.CreateDirectory(Root);
            using FileStream _ = await LockAsync(progress, cancellation).ConfigureAwait(false);
            // Another process may have made it while this one waited.
            if (!Path.Exists(path))
                await make().ConfigureAwait(false);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new GuestFetchException(
                $"The guest's files cannot be kept in {Root}: {e.Message} Set XENSHARP_CACHE to a folder with 600 MB of room.", e);
        }
    }

    async Task<FileStream> LockAsync(IProgress<FetchProgress>? progress, CancellationToken cancellation)
    {
        string file = Path.Combine(Root, ".lock");
        bool told = false;
        while (true)
        {
            try
            {
                // Exclusive sharing is flock(2) on Unix: the kernel lets go of it when the process ends, however it ends.
                return new FileStream(file, FileMode.OpenOrCreate, FileAccess.ReadWrite, FileShare.None);
            }
            catch (IOException e) when (e.HResult == WouldBlock)
            {
                if (!told)
                    progress?.Report(new FetchProgress("Waiting for another fetch to finish", null));
                told = true;
                await Task.Delay(LockRetry, cancellation).ConfigureAwait(false);
            }
        }
    }

    // Runs with a folder that is gone afterwards.
    async Task InTemporaryAsync(Func<string, Task> work)
    {
        // The lock is ours, so these were left by processes that were killed.
        foreach (string stale in Directory.EnumerateDirectories(Root, TemporaryPrefix + "*"))
            Directory.Delete(stale, recursive: true);

        string temporary = Path.Combine(Root, TemporaryPrefix + Guid.NewGuid().ToString("N"));
        Directory.CreateDirectory(temporary);
        try
        {
            await work(temporary).ConfigureAwait(false);
        }
        finally
        {
            Directory.Delete(temporary, recursive: true);
        }
    }

    Task FetchAsync(Recipe recipe, string folder, IProgress<FetchProgress>? progress, CancellationToken cancellation) =>
        InTemporaryAsync(async temporary =>
        {
            (IReadOnlyList<AptPackage> packages, IReadOnlyList<string> files) =
                await DownloadAsync(recipe, temporary, progress, cancellation).ConfigureAwait(false);
            string unpacked = Path.Combine(temporary, "unpacked");
            for (int i = 0; i < packages.Count; i++)
            {
                double? fraction = packages.Count == 1 ? null : (double)i / packages.Count;
                progress?.Report(new FetchProgress($"Unpacking {Describe(recipe, packages)}", fraction));
                await UnpackAsync(packages[i], files[i], unpacked, recipe, cancellation).ConfigureAwait(false);
            }
            if (!recipe.IsGood(unpacked))
                throw new GuestFetchException(
                    $"The package {packages[0].Name} {packages[0].Version} does not hold {recipe.Content}; " +
                    $"are the host's package sources Debian's? {recipe.Advice}");
            string version = packages.Count == 1
                ? packages[0].Version
                : string.Join('\n', packages.Select(package => $"{package.Name} {package.Version}"));
            await File.WriteAllTextAsync(VersionFile(unpacked), version + "\n", cancellation).ConfigureAwait(false);
            Directory.Move(unpacked, folder);
        });

    async Task<(IReadOnlyList<AptPackage> Packages, IReadOnlyList<string> Files)> DownloadAsync(
        Recipe recipe, string temporary, IProgress<FetchProgress>? progress, CancellationToken cancellation)
    {
        string complaint = "";
        try
        {
            // The system's lists answer at once where they are current; where they are empty or name versions that are gone
            // from the mirror, lists of our own are fetched.
            foreach (bool privateLists in (bool[])[false, true])
            {
                string state = recipe.Architecture is { } architecture ? $"apt-{architecture}" : "apt";
                AptRepository apt = AptRepository.Open(runner, Path.Combine(Root, state), privateLists, recipe.Architecture);
                if (privateLists)
                {
                    const string Stage = "Fetching the package lists";
                    progress?.Report(new FetchProgress(Stage, null));
                    if (await apt.UpdateAsync(f => progress?.Report(new(Stage, f)), cancellation).ConfigureAwait(false) is { } failed)
                        complaint = failed;
                }
                progress?.Report(new FetchProgress($"Looking up {recipe.Name}", null));
                (IReadOnlyList<AptPackage>? packages, string unresolved) =
                    await recipe.Resolve(apt, cancellation).ConfigureAwait(false);
                if (packages is null)
                {
                    // That the lists could not be fetched is the cause where they then lack something.
                    complaint = complaint.Length == 0 ? unresolved : complaint;
                    continue;
                }

                long? size = packages.Aggregate((long?)0, (sum, package) => sum + package.Size);
                string stage = size is { } bytes
                    ? string.Create(null, $"Downloading {Describe(recipe, packages)} ({bytes / 1e6:0.0} MB)")
                    : $"Downloading {Describe(recipe, packages)}";
                progress?.Report(new FetchProgress(stage, 0));
                (IReadOnlyList<string>? files, string failure) = await apt.DownloadAsync(
                    packages, Path.Combine(temporary, "download"), f => progress?.Report(new(stage, f)), cancellation)
                    .ConfigureAwait(false);
                if (files is not null)
                    return (packages, files);
                complaint = failure;
            }
        }
        catch (CommandNotFoundException e)
        {
            throw new GuestFetchException(
                $"{recipe.Name} is fetched with apt-get and apt-cache, which this host does not have. {recipe.Advice}", e);
        }
        throw new GuestFetchException(complaint.Length == 0
            ? $"The host's package sources have no {recipe.Name}; Debian's (bookworm or later, {recipe.Architecture ?? "amd64"}) do. {recipe.Advice}"
            : $"{recipe.Name} cannot be downloaded: {complaint} Check the network and the host's package sources. {recipe.Advice}");
    }

    static string Describe(Recipe recipe, IReadOnlyList<AptPackage> packages) =>
        packages.Count == 1 ? packages[0].Name : $"{recipe.Name}, {packages.Count} packages";

    static async Task<(IReadOnlyList<AptPackage>? Packages, string Complaint)> ResolveAloneAsync(
        AptRepository apt, IReadOnlyList<string> packages, CancellationToken cancellation)
    {
        List<AptPackage> found = [];
        foreach (string package in packages)
        {
            if (await apt.ShowAsync(package, cancellation).ConfigureAwait(false) is not { } shown)
                return (null, "");
            found.Add(shown);
        }
        return (found, "");
    }

    static async Task<(IReadOnlyList<AptPackage>? Packages, string Complaint)> ResolveKernelAsync(
        AptRepository apt, string meta, CancellationToken cancellation)
    {
        AptPackage? asked = await apt.ShowAsync(meta, cancellation).ConfigureAwait(false);
        string? kernel = asked is null ? null : KernelPackage(asked);
        return kernel is null ? (null, "") : await ResolveAloneAsync(apt, [kernel], cancellation).ConfigureAwait(false);
    }

    async Task UnpackAsync(AptPackage package, string file, string folder, Recipe recipe, CancellationToken cancellation)
    {
        CommandResult unpacked;
        try
        {
            unpacked = await runner.RunAsync(new Command("dpkg-deb", "-x", file, folder), cancellation).ConfigureAwait(false);
        }
        catch (CommandNotFoundException e)
        {
            throw new GuestFetchException($"Packages are unpacked with dpkg-deb, which this host does not have. {recipe.Advice}", e);
        }
        if (unpacked.ExitCode != 0)
            throw new GuestFetchException(
                $"{package.Name} cannot be unpacked: {unpacked.Error.Trim()} (dpkg-deb ended with status {unpacked.ExitCode}). " +
                "Try again; if it stays so, look whether the disk is full.");
    }

    // The meta package depends on the kernel of the day: "linux-image-6.1.0-53-amd64 (= 6.1.187-1)".
    static string? KernelPackage(AptPackage meta) => meta.Depends.Split(',', '|')
        .Select(dependency => dependency.Trim().Split(' ', '(', ':')[0])
        .FirstOrDefault(name => name.StartsWith("linux-image-", StringComparison.Ordinal));

    static DebianKernel? FindKernel(string folder, string version)
    {
        const string Prefix = "vmlinuz-";
        string boot = Path.Combine(folder, "boot");
        if (!Directory.Exists(boot))
            return null;
        string? image = Directory.EnumerateFiles(boot, Prefix + "*").FirstOrDefault(IsBzImage);
        if (image is null)
            return null;
        string release = Path.GetFileName(image)[Prefix.Length..];
        string? modules = new[] { "usr/lib/modules", "lib/modules" }
            .Select(place => Path.Combine(folder, place, release)).FirstOrDefault(Directory.Exists);
        return new DebianKernel(image, release, version, modules);
    }

    static string? FindBusybox(string folder) => new[] { "usr/bin/busybox", "bin/busybox" }
        .Select(place => Path.Combine(folder, place)).FirstOrDefault(IsElf);

    static bool IsBzImage(string file)
    {
        // The "HdrS" signature of the Linux x86 boot protocol, at offset 0x202 of the setup header.
        const int SignatureOffset = 0x202;
        const uint Signature = 0x53726448;
        Span<byte> head = stackalloc byte[SignatureOffset + 4];
        return ReadHead(file, head) && BinaryPrimitives.ReadUInt32LittleEndian(head[SignatureOffset..]) == Signature;
    }

    static bool IsElf(string file)
    {
        Span<byte> head = stackalloc byte[4];
        return File.Exists(file) && ReadHead(file, head) && head.SequenceEqual("\u007fELF"u8);
    }

    static bool ReadHead(string file, Span<byte> head)
    {
        using FileStream stream = File.OpenRead(file);
        return stream.ReadAtLeast(head, head.Length, throwOnEndOfStream: false) == head.Length;
    }

    static string VersionFile(string folder) => Path.Combine(folder, ".version");

    static GuestFetchException Damaged(string folder) =>
        new($"The cached guest in {folder} is damaged; delete that folder and it is fetched again.");
}
