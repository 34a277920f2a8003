// Fetches what the demonstration guest is made of, Debian's kernel and busybox, once, and keeps it unpacked in a cache folder.
using System.Buffers.Binary;

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
        Recipe recipe = new(meta, package => KernelPackage(package), folder => FindKernel(folder, "") is not null,
            "a Linux bzImage (boot/vmlinuz-*)");
        string folder = await GetAsync(recipe, progress, cancellation).ConfigureAwait(false);
        string version = await File.ReadAllTextAsync(VersionFile(folder), cancellation).ConfigureAwait(false);
        return FindKernel(folder, version.Trim()) ?? throw Damaged(folder);
    }

    /// <summary>Path of a statically linked busybox, fetched first if it is not there.</summary>
    /// <exception cref="GuestFetchException">It cannot be had; the message says why and what to do.</exception>
    /// <exception cref="OperationCanceledException">Cancelled; the cache is as it was.</exception>
    public async Task<string> GetBusyboxAsync(IProgress<FetchProgress>? progress = null, CancellationToken cancellation = default)
    {
        Recipe recipe = new("busybox-static", package => package.Name, folder => FindBusybox(folder) is not null,
            "an executable bin/busybox");
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
        ArgumentException.ThrowIfNullOrEmpty(content);
        return GetAsync(
            new Recipe(package, found => found.Name, folder => Path.Exists(Path.Combine(folder, content)), content), progress, cancellation);
    }

    /// <summary>The version of a package that <see cref="GetPackageAsync"/> unpacked into a folder.</summary>
    public static string VersionOf(string folder) => File.ReadAllText(VersionFile(folder)).Trim();

    // What to fetch: the package to ask for, the package it leads to (null: none), how to tell the right content, and its name.
    sealed record Recipe(string Package, Func<AptPackage, string?> Target, Func<string, bool> IsGood, string Content);

    async Task<string> GetAsync(Recipe recipe, IProgress<FetchProgress>? progress, CancellationToken cancellation)
    {
        string folder = Path.Combine(Root, recipe.Package);
        if (Directory.Exists(folder))
            return folder;
        // apt's configuration has no way to quote these.
        if (Root.AsSpan().ContainsAny('"', '\n'))
            throw new GuestFetchException(
                $"apt cannot use the cache folder {Root}, which has a quotation mark or newline in its name; " +
                "set XENSHARP_CACHE to another.");
        try
        {
            Directory.CreateDirectory(Root);
            using FileStream _ = await LockAsync(progress, cancellation).ConfigureAwait(false);
            // Another process may have fetched it while this one waited.
            if (!Directory.Exists(folder))
                await FetchAsync(recipe, folder, progress, cancellation).ConfigureAwait(false);
            return folder;
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

    async Task FetchAsync(Recipe recipe, string folder, IProgress<FetchProgress>? progress, CancellationToken cancellation)
    {
        // The lock is ours, so these were left by processes that were killed.
        foreach (string stale in Directory.EnumerateDirectories(Root, TemporaryPrefix + "*"))
            Directory.Delete(stale, recursive: true);

        string temporary = Path.Combine(Root, TemporaryPrefix + Guid.NewGuid().ToString("N"));
        Directory.CreateDirectory(temporary);
        try
        {
            (AptPackage package, string file) = await DownloadAsync(recipe, temporary, progress, cancellation).ConfigureAwait(false);
            string unpacked = Path.Combine(temporary, "unpacked");
            await UnpackAsync(package, file, unpacked, progress, cancellation).ConfigureAwait(false);
            if (!recipe.IsGood(unpacked))
                throw new GuestFetchException(
                    $"The package {package.Name} {package.Version} does not hold {recipe.Content}; " +
                    $"are the host's package sources Debian's? {ByHand}");
            await File.WriteAllTextAsync(VersionFile(unpacked), package.Version + "\n", cancellation).ConfigureAwait(false);
            Directory.Move(unpacked, folder);
        }
        finally
        {
            Directory.Delete(temporary, recursive: true);
        }
    }

    async Task<(AptPackage Package, string File)> DownloadAsync(
        Recipe recipe, string temporary, IProgress<FetchProgress>? progress, CancellationToken cancellation)
    {
        string complaint = "";
        try
        {
            // The system's lists answer at once where they are current; where they are empty or name versions that are gone
            // from the mirror, lists of our own are fetched.
            foreach (bool privateLists in (bool[])[false, true])
            {
                AptRepository apt = AptRepository.Open(runner, Path.Combine(Root, "apt"), privateLists);
                if (privateLists)
                {
                    const string Stage = "Fetching the package lists";
                    progress?.Report(new FetchProgress(Stage, null));
                    if (await apt.UpdateAsync(f => progress?.Report(new(Stage, f)), cancellation).ConfigureAwait(false) is { } failed)
                        complaint = failed;
                }
                progress?.Report(new FetchProgress($"Looking up {recipe.Package}", null));
                AptPackage? package = await ResolveAsync(apt, recipe, cancellation).ConfigureAwait(false);
                if (package is null)
                    continue;

                string stage = package.Size is { } size
                    ? string.Create(null, $"Downloading {package.Name} ({size / 1e6:0.0} MB)")
                    : $"Downloading {package.Name}";
                progress?.Report(new FetchProgress(stage, 0));
                (string? file, string failure) = await apt.DownloadAsync(
                    package, Path.Combine(temporary, "download"), f => progress?.Report(new(stage, f)), cancellation)
                    .ConfigureAwait(false);
                if (file is not null)
                    return (package, file);
                complaint = failure;
            }
        }
        catch (CommandNotFoundException e)
        {
            throw new GuestFetchException(
                $"The demonstration guest is fetched with apt-get and apt-cache, which this host does not have. {ByHand}", e);
        }
        throw new GuestFetchException(complaint.Length == 0
            ? $"The host's package sources have no {recipe.Package}; Debian's (bookworm or later, amd64) do. {ByHand}"
            : $"{recipe.Package} cannot be downloaded: {complaint} Check the network and the host's package sources. {ByHand}");
    }

    static async Task<AptPackage?> ResolveAsync(AptRepository apt, Recipe recipe, CancellationToken cancellation)
    {
        AptPackage? asked = await apt.ShowAsync(recipe.Package, cancellation).ConfigureAwait(false);
        string? target = asked is null ? null : recipe.Target(asked);
        if (target is null || target == recipe.Package)
            return target is null ? null : asked;
        return await apt.ShowAsync(target, cancellation).ConfigureAwait(false);
    }

    async Task UnpackAsync(
        AptPackage package, string file, string folder, IProgress<FetchProgress>? progress, CancellationToken cancellation)
    {
        progress?.Report(new FetchProgress($"Unpacking {package.Name}", null));
        CommandResult unpacked;
        try
        {
            unpacked = await runner.RunAsync(new Command("dpkg-deb", "-x", file, folder), cancellation).ConfigureAwait(false);
        }
        catch (CommandNotFoundException e)
        {
            throw new GuestFetchException($"Packages are unpacked with dpkg-deb, which this host does not have. {ByHand}", e);
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
