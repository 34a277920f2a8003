// What becomes of a domain whose guest has ended: on_poweroff, on_reboot, on_crash and the like.

using System.Globalization;
using XenSharp.Api;
using XenSharp.Configuration;
using XenSharp.Domains;
using XenSharp.Domains.Migration;

namespace XenSharp.Toolstack.Management;

/// <content>The part of xl that stays behind after "create", and waits for the domain's end (xl_vmcontrol.c's handle_domain_death).</content>
public sealed partial class DomainToolstack
{
    /// <summary>Sees to what becomes of a domain from here on.</summary>
    private void Follow(ManagedDomain domain)
    {
        Task following = Task.Run(() => FollowAsync(domain));
        lock (_lock)
            _ = _followers.Add(following);
        _ = following.ContinueWith(
            ended =>
            {
                lock (_lock)
                    _ = _followers.Remove(ended);
            },
            CancellationToken.None, TaskContinuationOptions.ExecuteSynchronously, TaskScheduler.Default);
    }

    private async Task FollowAsync(ManagedDomain domain)
    {
        try
        {
            DomainExit? exit = await AwaitEndAsync(domain).ConfigureAwait(false);
            if (exit is null || domain.Ending.IsCancellationRequested)
                return;
            Log.Write(
                $"The domain {domain.Name} (number {domain.Id}) has shut down: {exit.Reason.ToString().ToLowerInvariant()}."
                + (exit.Report is { } report ? $"\n{report.TrimEnd()}" : string.Empty));
            ShutdownAction action = IsClosing ? ShutdownAction.Destroy : domain.ActionFor(exit.Reason);
            if (action is ShutdownAction.CoredumpDestroy or ShutdownAction.CoredumpRestart)
            {
                await DumpAsync(domain).ConfigureAwait(false);
                action = action == ShutdownAction.CoredumpRestart ? ShutdownAction.Restart : ShutdownAction.Destroy;
            }

            switch (action)
            {
                case ShutdownAction.Destroy:
                    await DestroyAsync(domain).ConfigureAwait(false);
                    break;
                case ShutdownAction.Restart:
                    await RestartAsync(domain).ConfigureAwait(false);
                    break;
                case ShutdownAction.RenameRestart:
                    await RenameRestartAsync(domain).ConfigureAwait(false);
                    break;
                case ShutdownAction.Preserve:
                    Log.Write($"The domain {domain.Name} (number {domain.Id}) is kept as it is; destroy it when it is no longer of use.");
                    break;
            }
        }
        catch (Exception defect)
        {
            // The domain stays listed as it is, to be destroyed by whoever looks.
            Log.Write($"What was to become of the domain {domain.Name} (number {domain.Id}) could not be done: {defect}");
        }
    }

    private bool IsClosing
    {
        get
        {
            lock (_lock)
                return _closing;
        }
    }

    /// <summary>Waits for the guest's end; one that has suspended may go on.</summary>
    /// <returns>Null where the domain is taken apart.</returns>
    private async Task<DomainExit?> AwaitEndAsync(ManagedDomain domain)
    {
        while (true)
        {
            Task resumption = domain.NextResumption;
            DomainExit exit = await domain.Running.Stopped.ConfigureAwait(false);
            if (domain.Ending.IsCancellationRequested)
                return null;
            Tell(DomainEventKind.Shutdown, domain, exit.Reason);
            if (exit.Reason != ShutdownReason.Suspend)
            {
                // The console has everything when this completes.
                return await domain.Running.Completion.ConfigureAwait(false);
            }

            if (await Task.WhenAny(resumption, domain.Gone).ConfigureAwait(false) != resumption)
                return null;
        }
    }

    /// <summary>Ends a domain and takes it out of the list.</summary>
    /// <param name="domain">The domain.</param>
    /// <param name="keepReserved">Its name and UUID are kept for the next.</param>
    /// <returns>False where somebody else does it.</returns>
    private async Task<bool> TakeDownAsync(ManagedDomain domain, bool keepReserved)
    {
        if (!domain.BeginEnd())
            return false;
        domain.Console.Connect(null);
        await domain.EndAsync().ConfigureAwait(false);
        lock (_lock)
        {
            _ = _domains.Remove(domain.Id);
            if (keepReserved)
            {
                _ = _reservedNames.Add(domain.Name);
                ReserveUuid(domain.Uuid);
            }
            else
            {
                _state.Remove(domain.Uuid);
            }
        }

        domain.SetGone();
        return true;
    }

    private async Task RestartAsync(ManagedDomain domain)
    {
        if (!await TakeDownAsync(domain, keepReserved: true).ConfigureAwait(false))
            return;
        await MakeSuccessorAsync(domain, domain.Configuration with { Name = domain.Name, Uuid = domain.Uuid }, replaces: true).ConfigureAwait(false);
    }

    private async Task RenameRestartAsync(ManagedDomain domain)
    {
        DomainConfiguration configuration = domain.Configuration with { Name = domain.Name, Uuid = domain.Uuid };
        lock (_lock)
        {
            string kept = domain.Name;
            for (int number = 1; _reservedNames.Contains(kept) || FindByName(kept) is not null; number++)
                kept = string.Create(CultureInfo.InvariantCulture, $"{domain.Name}-{number}");
            _ = _reservedNames.Add(domain.Name);
            ReserveUuid(domain.Uuid);
            domain.WriteName(kept);
            (domain.Name, domain.Uuid) = (kept, Guid.NewGuid());
        }

        domain.Reconfigure(old => old with { Name = domain.Name, Uuid = domain.Uuid });
        Tell(DomainEventKind.Renamed, domain);
        Log.Write($"The domain {configuration.Name} (number {domain.Id}) is kept as {domain.Name}.");
        await MakeSuccessorAsync(domain, configuration, replaces: false).ConfigureAwait(false);
    }

    /// <summary>Makes the next incarnation, whose name and UUID are reserved.</summary>
    /// <param name="domain">The one before.</param>
    /// <param name="configuration">What the next is made from.</param>
    /// <param name="replaces">The one before is gone, and its console goes over.</param>
    private async Task MakeSuccessorAsync(ManagedDomain domain, DomainConfiguration configuration, bool replaces)
    {
        ManagedDomain? successor = null;
        try
        {
            TimeSpan lived = DateTimeOffset.UtcNow - domain.StartTime;
            if (lived < _options.RestartInterval)
                await Task.Delay(_options.RestartInterval - lived).ConfigureAwait(false);
            successor = await MakeAsync(
                configuration, new Making(BuildFromImageAsync) { Console = replaces ? domain.Console : null }, CancellationToken.None).ConfigureAwait(false);
        }
        catch (Exception failure)
        {
            Log.Write($"The domain {configuration.Name} could not be made again: {(failure is ToolstackException ? failure.Message : failure.ToString())}");
        }

        if (!replaces)
            return;
        Tell(DomainEventKind.Destroyed, domain, successor: successor?.Id ?? 0);
        if (successor is not null)
            return;
        await EndConsoleAsync(domain.Console).ConfigureAwait(false);
        lock (_lock)
            _state.Remove(configuration.Uuid!.Value);
    }

    /// <summary>Writes a core to the state folder; that it cannot be is no reason to keep the domain.</summary>
    private async Task DumpAsync(ManagedDomain domain)
    {
        string path = Path.Combine(
            StateFolder, "dump", string.Create(CultureInfo.InvariantCulture, $"{domain.Name}-{DateTimeOffset.UtcNow:yyyyMMdd-HHmmss}.core"));
        try
        {
            _ = Directory.CreateDirectory(Path.GetDirectoryName(path)!, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
            await domain.DumpCoreAsync(path, null, domain.Ending).ConfigureAwait(false);
            Log.Write($"The core of the domain {domain.Name} (number {domain.Id}) is in {path}.");
        }
        catch (Exception failure) when (failure is ToolstackException or MigrationException or IOException or UnauthorizedAccessException or OperationCanceledException)
        {
            Log.Write($"The core of the domain {domain.Name} (number {domain.Id}) could not be written: {failure.Message}");
        }
    }
}
