// Making domains from files that others were saved to.

using XenSharp.Api;
using XenSharp.Configuration;
using XenSharp.Devices.Console;
using XenSharp.Devices.Network;
using XenSharp.Domains.Migration;

namespace XenSharp.Toolstack.Management;

/// <content>xl save and restore, as far as they are about which domains there are.</content>
public sealed partial class DomainToolstack
{
    /// <summary>The switches and bridges that domains' interfaces are plugged into.</summary>
    internal HostNetwork Network { get; } = new();

    internal TimeSpan SuspendTimeout => _options.SuspendTimeout;

    internal TimeSpan DetachTimeout => _options.DetachTimeout;

    /// <summary>Saves a domain to a file; unless it is to be kept, it is destroyed when all is written.</summary>
    /// <param name="domain">The domain.</param>
    /// <param name="path">Absolute path of the file.</param>
    /// <param name="keep">It goes on afterwards.</param>
    /// <param name="paused">It stays, paused.</param>
    /// <param name="configuration">What is written of how it is made, in place of how it was; null for that.</param>
    /// <param name="progress">Is told how far the writing is; on the thread that writes.</param>
    /// <param name="cancellation">Gives up: the domain goes on.</param>
    public async Task SaveAsync(
        ManagedDomain domain, string path, bool keep, bool paused, DomainConfiguration? configuration = null, IProgress<PageProgress>? progress = null,
        CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(domain);
        ArgumentNullException.ThrowIfNull(path);
        if (domain.Configuration.NoMigrate)
            throw new ToolstackException(ProblemKind.WrongState, $"The domain {domain.Name} has nomigrate in its configuration, and so is not saved.");
        await domain.SaveAsync(path, keep || paused, paused, configuration, progress, cancellation).ConfigureAwait(false);
        Log.Write($"The domain {domain.Name} (number {domain.Id}) was saved to {path}.");
        if (!keep && !paused)
            await DestroyAsync(domain).ConfigureAwait(false);
    }

    /// <summary>Makes a domain from a file that one was saved to; it goes on where that one stopped.</summary>
    /// <param name="path">Absolute path of the file.</param>
    /// <param name="configuration">In place of what was saved with it, as for disks that are elsewhere now; null for that.</param>
    /// <param name="paused">It waits until it is unpaused.</param>
    /// <param name="progress">Is told how far the reading is; on the thread that reads.</param>
    /// <param name="cancellation">Gives up: there will be no domain.</param>
    public async Task<ManagedDomain> RestoreAsync(
        string path, DomainConfiguration? configuration = null, bool paused = false, IProgress<PageProgress>? progress = null,
        CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(path);
        await using FileStream file = OpenSaved(path);
        DomainConfiguration saved;
        try
        {
            saved = SavedDomainFile.ReadHeader(file, path);
        }
        catch (IOException failure)
        {
            throw new ToolstackException(ProblemKind.HostCannot, $"{path} cannot be read: {failure.Message}", failure);
        }

        configuration = ManagedDomain.Complete(configuration ?? saved) with { Uuid = configuration?.Uuid ?? saved.Uuid ?? Guid.NewGuid() };
        foreach (string warning in DomainLoader.Check(configuration))
            Log.Write($"{configuration.Name}: {warning}");
        Reserve(configuration.Name, configuration.Uuid.Value);
        return await MakeAsync(configuration, new Making(BuildAsync) { Paused = paused }, cancellation).ConfigureAwait(false);

        Task<RunningDomain> BuildAsync(DomainConfiguration described, ConsoleHub console, IConsoleSink log, CancellationToken ending) => Task.Run(
            () => RunningDomain.Restore(Context, DomainLoader.Describe(described, DomainImage.None), file, console, log, progress, ending), ending);
    }

    private static FileStream OpenSaved(string path)
    {
        if (!Path.IsPathRooted(path))
            throw new ToolstackException(ProblemKind.BadRequest, $"\"{path}\" is a relative path; the daemon needs the whole one.");
        try
        {
            return Directory.Exists(path)
                ? throw new ToolstackException(ProblemKind.BadRequest, $"{path} is a folder; give the name of a file.")
                : new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read, bufferSize: 1 << 16);
        }
        catch (Exception failure) when (failure is FileNotFoundException or DirectoryNotFoundException)
        {
            throw new ToolstackException(ProblemKind.BadRequest, $"There is no file {path}.", failure);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new ToolstackException(ProblemKind.BadRequest, $"{path} cannot be read: {failure.Message.Split(" : '")[0].TrimEnd('.')}.", failure);
        }
    }
}
