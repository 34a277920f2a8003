// A domain that a command is making: if the command is asked to end before it is whole, nothing of it stays.

using XenSharp.Api;

namespace XenSharp.Cli.Management;

/// <summary>Takes back what create and restore have begun, when a signal ends them.</summary>
/// <param name="daemon">Makes the domain.</param>
/// <param name="uuid">The domain's UUID, which is known before the domain is there.</param>
/// <param name="name">Its name, for people.</param>
internal sealed class DomainMaking(DaemonClient daemon, Guid uuid, string name)
{
    /// <summary>How long the daemon may take for that: it can be in the middle of unpacking a kernel. A second signal ends the wait.</summary>
    private static readonly TimeSpan s_patience = TimeSpan.FromSeconds(30);

    /// <summary>The domain's UUID.</summary>
    internal Guid Uuid { get; } = uuid;

    /// <summary>Does what makes the domain.</summary>
    /// <exception cref="OperationCanceledException">It was cancelled, and there is no such domain.</exception>
    internal async Task<T> UndoneIfCancelledAsync<T>(Func<Task<T>> make)
    {
        try
        {
            return await make().ConfigureAwait(false);
        }
        catch (OperationCanceledException)
        {
            await UndoAsync().ConfigureAwait(false);
            throw;
        }
    }

    private async Task UndoAsync()
    {
        // The daemon gives up by itself when the one who asked has gone. But it may have been done just before that, and by its answer nobody
        // would know that it was not heard any more; so it is asked, and answers when there is nothing of the domain, or nothing more.
        using var patience = new CancellationTokenSource(s_patience);
        try
        {
            await daemon.DestroyAsync(Uuid.ToString("D"), patience.Token).ConfigureAwait(false);
        }
        catch (DaemonException failure) when (failure.Kind == ProblemKind.NoSuchDomain)
        {
            // As it should be.
        }
        catch (Exception failure) when (failure is DaemonException or OperationCanceledException)
        {
            ManagementCommand.Say($"The domain {name} may have been made all the same; {Commands.Tool.Name} list shows whether it was.");
            return;
        }

        ManagementCommand.Say($"The domain {name} was not made, as a signal asked to end.");
    }
}
