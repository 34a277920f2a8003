// Saving a domain to a file, and dumping its core.

using XenSharp.Api;
using XenSharp.Configuration;
using XenSharp.Domains;
using XenSharp.Domains.Migration;

namespace XenSharp.Toolstack.Management;

/// <content>What takes long, and ends when the domain does.</content>
public sealed partial class ManagedDomain
{
    /// <summary>Has the guest suspend itself, and writes it to a file.</summary>
    /// <param name="path">The file; one that is there is replaced when all is written.</param>
    /// <param name="keep">The domain goes on afterwards, or stays paused; otherwise it is left suspended, to be destroyed.</param>
    /// <param name="paused">With <paramref name="keep"/>: it stays paused.</param>
    /// <param name="configuration">What it is to be made from again, for its devices and names; null for what it is made from now.</param>
    /// <param name="progress">Is told how far the writing is.</param>
    /// <param name="cancellation">Gives up: the domain goes on.</param>
    public Task SaveAsync(
        string path, bool keep, bool paused, DomainConfiguration? configuration, IProgress<PageProgress>? progress, CancellationToken cancellation)
        => WithTurnAsync(
            async ending =>
            {
                // Before the guest is disturbed: whether there can be such a file at all.
                await using var file = new UnfinishedFile(path);
                await SuspendAsync(ending).ConfigureAwait(false);
                bool saved = false;
                try
                {
                    await Task.Run(
                        () =>
                        {
                            SavedDomainFile.WriteHeader(
                                file.Stream, configuration is null ? RetrieveConfiguration() : Complete(configuration) with { Uuid = configuration.Uuid ?? Uuid });
                            Running.Domain.Save(file.Stream, progress, ending);
                        },
                        ending).ConfigureAwait(false);
                    file.Finish();
                    saved = true;
                }
                catch (MigrationException failure)
                {
                    throw new ToolstackException(ProblemKind.Failed, failure.Message, failure);
                }
                finally
                {
                    if ((keep || !saved) && !_dying)
                        Resume(saved && paused);
                }
            },
            cancellation);

    /// <summary>Writes the domain's memory and registers to a file; a domain that runs is paused meanwhile.</summary>
    /// <param name="path">The file; one that is there is replaced when all is written.</param>
    /// <param name="progress">Is told how far the writing is.</param>
    /// <param name="cancellation">Gives up.</param>
    public Task DumpCoreAsync(string path, IProgress<PageProgress>? progress, CancellationToken cancellation)
        => WithTurnAsync(
            async ending =>
            {
                await using var file = new UnfinishedFile(path);
                try
                {
                    await Task.Run(() => Running.Domain.DumpCore(file.Stream, progress, ending), ending).ConfigureAwait(false);
                    file.Finish();
                }
                catch (MigrationException failure)
                {
                    throw new ToolstackException(ProblemKind.Failed, failure.Message, failure);
                }
            },
            cancellation);

    /// <summary>
    /// The configuration with what the domain is now (libxl_retrieve_domain_configuration), from which it is to be made again for what its
    /// guest knows of it: it may have been replaced by one for the next incarnation. What libxl takes from the running domain, the
    /// configuration is not asked for: name, UUID, vCPUs, the balloon's target, the memory that it was made for, and which of the devices
    /// are plugged in. A limit that was set by mem-max is lost, as with xl.
    /// </summary>
    internal DomainConfiguration RetrieveConfiguration()
    {
        lock (_gate)
        {
            DomainConfiguration configuration = Configuration;
            return configuration with
            {
                Name = Name,
                Uuid = Uuid,
                Vcpus = _onlineVcpus,
                MaxVcpus = Running.Specification.Vcpus,

                // The configuration has whole MiB; a guest that is left a part of one more has what it needs.
                MemoryMiB = (int)((_targetKiB + 1023) >> 10),
                MaxMemoryMiB = Running.Specification.MaxMemoryMiB,
                Disks = [.. configuration.Disks.Where(disk => _disks.Any(plugged => plugged.Device.Number == disk.DeviceId))],
                Vifs = [.. configuration.Vifs.Where(vif => _interfaces.Any(plugged => (int)plugged.Options.DeviceId == vif.DeviceId))],
            };
        }
    }

    /// <summary>Completes when nothing of the domain is left.</summary>
    internal Task Gone => _goneCompletion.Task;

    private readonly TaskCompletionSource _goneCompletion = new(TaskCreationOptions.RunContinuationsAsynchronously);

    internal void SetGone() => _ = _goneCompletion.TrySetResult();

    /// <summary>Asks the guest to suspend itself, and waits until it has.</summary>
    private async Task SuspendAsync(CancellationToken cancellation)
    {
        Task<DomainExit> stopped;
        lock (_gate)
        {
            if (_gone || _dying)
                throw IsGone();
            stopped = Running.Stopped;
            if (_pauses != 0)
                throw Wrong($"The domain {Name} is paused, and so cannot suspend itself: unpause it first.");
            if (Exit is { Reason: ShutdownReason.Suspend })
                return;
            CheckAlive("saved");
            Store.Write($"{Folder}/control/shutdown", "suspend");
        }

        try
        {
            DomainExit exit = await stopped.WaitAsync(_toolstack.SuspendTimeout, cancellation).ConfigureAwait(false);
            if (exit.Reason != ShutdownReason.Suspend)
                throw Wrong($"The domain {Name} did not suspend: it has shut down ({exit.Reason.ToString().ToLowerInvariant()}).");
        }
        catch (Exception failure) when (failure is TimeoutException or OperationCanceledException && !stopped.IsCompleted)
        {
            TakeRequestBack();
            if (failure is OperationCanceledException)
                throw;
            throw new ToolstackException(
                ProblemKind.GuestTimeout,
                $"The domain {Name} did not suspend itself within {_toolstack.SuspendTimeout.TotalSeconds:0} s: its kernel may not be able to, or is not up yet.", failure);
        }
    }

    /// <summary>A guest that has not taken the request yet is not to suspend later, when nobody waits for it.</summary>
    private void TakeRequestBack()
    {
        lock (_gate)
        {
            if (!_gone)
            {
                Store.Transact(store =>
                {
                    if (store.Read($"{Folder}/control/shutdown") == "suspend")
                        store.Write($"{Folder}/control/shutdown", string.Empty);
                });
            }
        }
    }

    private void Resume(bool paused)
    {
        lock (_gate)
        {
            if (_gone || _dying || Exit is not { Reason: ShutdownReason.Suspend })
                return;
            if (paused)
            {
                _pauses = 1;
                Running.Domain.Pause();
            }

            Running.Resume();
        }

        Interlocked.Exchange(ref _resumed, new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously)).SetResult();
    }

    private async Task WithTurnAsync(Func<CancellationToken, Task> work, CancellationToken cancellation)
    {
        using var ending = CancellationTokenSource.CreateLinkedTokenSource(cancellation, _ending.Token);
        try
        {
            await _turn.WaitAsync(ending.Token).ConfigureAwait(false);
        }
        catch (OperationCanceledException) when (_ending.IsCancellationRequested)
        {
            throw IsGone();
        }

        try
        {
            lock (_gate)
            {
                if (_gone || _dying)
                    throw IsGone();
            }

            await work(ending.Token).ConfigureAwait(false);
        }
        catch (OperationCanceledException) when (_ending.IsCancellationRequested && !cancellation.IsCancellationRequested)
        {
            throw IsGone();
        }
        finally
        {
            _ = _turn.Release();
        }
    }
}
