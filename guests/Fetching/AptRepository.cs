// Asks apt for packages without touching the system's state: its sources and keys are used, its caches are not.
using System.Globalization;

namespace XenSharp.Guests.Fetching;

/// <summary>What apt knows of a package's candidate version.</summary>
/// <param name="Name">The package.</param>
/// <param name="Version">Its candidate version.</param>
/// <param name="Depends">The Depends field as it stands, empty when there is none.</param>
/// <param name="Size">Bytes to download, or null when apt does not say.</param>
sealed record AptPackage(string Name, string Version, string Depends, long? Size);

/// <summary>
/// The host's apt. Everything apt writes goes to a folder of ours; its package lists are either the system's, only read, or
/// lists of our own that <see cref="UpdateAsync"/> fetches from the system's sources.
/// </summary>
/// <remarks>apt checks every download against the signed package lists; that is left switched on.</remarks>
sealed class AptRepository
{
    readonly CommandRunner runner;
    readonly string configuration;

    AptRepository(CommandRunner runner, string configuration)
    {
        this.runner = runner;
        this.configuration = configuration;
    }

    /// <summary>Prepares the folder and the configuration apt is run with.</summary>
    /// <param name="runner">Finds and runs apt.</param>
    /// <param name="folder">A folder of ours for apt's caches.</param>
    /// <param name="privateLists">Whether to keep package lists of our own instead of reading the system's.</param>
    /// <param name="architecture">The architecture of the packages; null for the host's. The folder is for one of them only.</param>
    public static AptRepository Open(CommandRunner runner, string folder, bool privateLists, string? architecture = null)
    {
        string state = Path.Combine(folder, "state");
        string cache = Path.Combine(folder, "cache");
        Directory.CreateDirectory(Path.Combine(state, "lists", "partial"));
        Directory.CreateDirectory(Path.Combine(cache, "archives", "partial"));
        string status = Path.Combine(folder, "status");
        File.WriteAllText(status, "");

        // -c is read after the system's own configuration, so proxies set there stay in force and these lines win.
        // The two #clear lines drop hooks that would delete from or write to the system's caches; the binary caches are
        // switched off because they would take a hundred megabytes; unsandboxed, because apt's own user cannot write here.
        List<string> lines =
        [
            $"Dir::Cache \"{cache}\";",
            "Dir::Cache::archives \"archives/\";",
            "Dir::Cache::pkgcache \"\";",
            "Dir::Cache::srcpkgcache \"\";",
            $"Dir::State::status \"{status}\";",
            "APT::Sandbox::User \"root\";",
            "Acquire::Languages \"none\";",
            "Acquire::GzipIndexes \"true\";",
            "#clear APT::Update::Pre-Invoke;",
            "#clear APT::Update::Post-Invoke;",
            "#clear APT::Update::Post-Invoke-Success;",
        ];
        if (architecture is not null)
            lines.AddRange([$"APT::Architecture \"{architecture}\";", "#clear APT::Architectures;", $"APT::Architectures:: \"{architecture}\";"]);
        if (privateLists)
            lines.Add($"Dir::State \"{state}\";");
        string configuration = Path.Combine(folder, privateLists ? "private.conf" : "system.conf");
        File.WriteAllLines(configuration, lines);
        return new AptRepository(runner, configuration);
    }

    /// <summary>The candidate version of a package, or null when the lists do not have it.</summary>
    /// <exception cref="CommandNotFoundException">There is no apt here.</exception>
    public async Task<AptPackage?> ShowAsync(string package, CancellationToken cancellation)
    {
        CommandResult shown = await RunAsync("apt-cache", null, null, cancellation, "show", "--no-all-versions", package)
            .ConfigureAwait(false);
        if (shown.ExitCode != 0)
            return null;

        Dictionary<string, string> fields = [];
        foreach (string line in shown.Output.Split('\n').TakeWhile(line => line.Length != 0))
        {
            int colon = line.IndexOf(':', StringComparison.Ordinal);
            if (colon > 0 && line[0] != ' ')
                fields.TryAdd(line[..colon], line[(colon + 1)..].Trim());
        }
        if (fields.GetValueOrDefault("Package") != package || !fields.TryGetValue("Version", out string? version))
            return null;
        long? size = long.TryParse(fields.GetValueOrDefault("Size"), CultureInfo.InvariantCulture, out long bytes) ? bytes : null;
        return new AptPackage(package, version, fields.GetValueOrDefault("Depends", ""), size);
    }

    /// <summary>Packages with all that they depend on, as if none were installed; recommended packages are left out.</summary>
    /// <returns>The packages with their sizes and without their dependencies, or null and apt's complaint.</returns>
    /// <exception cref="CommandNotFoundException">There is no apt here.</exception>
    public async Task<(IReadOnlyList<AptPackage>? Packages, string Complaint)> ResolveAsync(
        IReadOnlyList<string> packages, CancellationToken cancellation)
    {
        // Only printing what would be fetched takes no lock and no root. The empty status file of the configuration makes every
        // package a new one.
        CommandResult listed = await RunAsync(
            "apt-get", null, null, cancellation,
            ["install", "--print-uris", "--yes", "--no-install-recommends", .. packages]).ConfigureAwait(false);
        if (listed.ExitCode != 0)
            return (null, Complaint(listed));

        // 'URI' NAME_VERSION_ARCHITECTURE.deb SIZE HASH, with the version's colon as %3a.
        List<AptPackage> resolved = [];
        foreach (string line in listed.Output.Split('\n').Where(line => line.StartsWith('\'')))
        {
            string[] fields = line.Split(' ');
            string[] name = fields.Length > 2 ? fields[1].Split('_') : [];
            if (name.Length != 3 || !long.TryParse(fields[2], CultureInfo.InvariantCulture, out long size))
                return (null, $"apt-get printed \"{line}\" where a package's address was expected.");
            resolved.Add(new AptPackage(name[0], Uri.UnescapeDataString(name[1]), "", size));
        }
        return (resolved, "");
    }

    /// <summary>Fetches the lists anew; only for private lists.</summary>
    /// <returns>apt's complaint, or null when it had none.</returns>
    /// <exception cref="CommandNotFoundException">There is no apt here.</exception>
    public async Task<string?> UpdateAsync(Action<double> onFraction, CancellationToken cancellation)
    {
        CommandResult updated = await RunAsync("apt-get", null, onFraction, cancellation, "update").ConfigureAwait(false);
        return updated.ExitCode == 0 ? null : Complaint(updated);
    }

    /// <summary>Downloads packages in the versions given into a folder.</summary>
    /// <returns>The package files in the packages' order, or null and apt's complaint.</returns>
    /// <exception cref="CommandNotFoundException">There is no apt here.</exception>
    public async Task<(IReadOnlyList<string>? Files, string Complaint)> DownloadAsync(
        IReadOnlyList<AptPackage> packages, string folder, Action<double> onFraction, CancellationToken cancellation)
    {
        Directory.CreateDirectory(folder);
        CommandResult downloaded = await RunAsync(
            "apt-get", folder, onFraction, cancellation,
            ["download", .. packages.Select(package => $"{package.Name}={package.Version}")]).ConfigureAwait(false);
        if (downloaded.ExitCode != 0)
            return (null, Complaint(downloaded));
        List<string> files = [];
        foreach (AptPackage package in packages)
        {
            if (Directory.EnumerateFiles(folder, $"{package.Name}_*.deb").FirstOrDefault() is not { } file)
                return (null, $"apt-get download ended well but left no {package.Name} package.");
            files.Add(file);
        }
        return (files, "");
    }

    Task<CommandResult> RunAsync(
        string program, string? folder, Action<double>? onFraction, CancellationToken cancellation, params string[] arguments)
    {
        // Progress lines look like dlstatus:FILES:PERCENT:TEXT (apt's README.progress-reporting).
        void ReadProgress(string line)
        {
            string[] fields = line.Split(':', 4);
            if (fields.Length == 4 && fields[0] == "dlstatus"
                && double.TryParse(fields[2], CultureInfo.InvariantCulture, out double percent))
                onFraction?.Invoke(Math.Clamp(percent / 100, 0, 1));
        }

        string[] progress = onFraction is null ? [] : ["-q", "-o", "APT::Status-Fd=1"];
        return runner.RunAsync(
            new Command(program, ["-c", configuration, .. progress, .. arguments])
            {
                WorkingDirectory = folder,
                OnOutputLine = onFraction is null ? null : ReadProgress,
            },
            cancellation);
    }

    static string Complaint(CommandResult result)
    {
        string[] errors = [.. result.Error.Split('\n').Where(line => line.StartsWith("E: ", StringComparison.Ordinal))
            .Select(line => line[3..].TrimEnd())];
        return errors.Length != 0 ? string.Join(" ", errors) : $"exit status {result.ExitCode}.";
    }
}
