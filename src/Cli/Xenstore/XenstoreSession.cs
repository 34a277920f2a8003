// What each xenstore command does around its own work: connect, repeat a transaction that met another, print, end.

using XenSharp.Cli.Commands;
using XenSharp.Devices.Xenstore;

namespace XenSharp.Cli.Xenstore;

/// <summary>Runs the work of a command against a store.</summary>
internal static class XenstoreSession
{
    /// <summary>Runs work that needs no transaction.</summary>
    /// <param name="socket">The store's socket.</param>
    /// <param name="work">What to do; <see langword="false"/> for the status that says no.</param>
    /// <param name="cancellation">Ends it.</param>
    /// <returns>The exit status.</returns>
    internal static async Task<int> RunAsync(
        string socket, Func<XenstoreSocketClient, XenstoreOutput, Task<bool>> work, CancellationToken cancellation)
    {
        using XenstoreOutput output = new();
        try
        {
            XenstoreSocketClient client = await XenstoreSocketClient.ConnectAsync(socket, cancellation).ConfigureAwait(false);
            await using (client.ConfigureAwait(false))
            {
                bool yes = await work(client, output).ConfigureAwait(false);
                output.Flush();
                return yes ? ExitStatus.Success : ExitStatus.Different;
            }
        }
        catch (IOException) when (output.ReaderGone)
        {
            return ExitStatus.OutputReaderGone;
        }
        catch (XenstoreException)
        {
            // What was found up to there is worth seeing.
            output.Flush();
            throw;
        }
    }

    /// <summary>Runs work in a transaction, again until it can be committed; then what it has printed appears.</summary>
    /// <param name="socket">The store's socket.</param>
    /// <param name="needed">Whether it takes a transaction: one request alone is one already.</param>
    /// <param name="work">What to do, with the number of the transaction; it must do the same when it is run again.</param>
    /// <param name="cancellation">Ends it.</param>
    /// <returns>The exit status.</returns>
    internal static Task<int> TransactAsync(
        string socket, bool needed, Func<XenstoreSocketClient, uint, XenstoreOutput, Task> work, CancellationToken cancellation) =>
        RunAsync(socket, async (client, output) =>
        {
            while (true)
            {
                uint id = needed ? await client.BeginTransactionAsync(cancellation).ConfigureAwait(false) : 0;

                // A failure ends the connection, and that the transaction.
                await work(client, id, output).ConfigureAwait(false);
                if (id == 0 || await client.EndTransactionAsync(id, commit: true, cancellation).ConfigureAwait(false))
                    return true;
                output.Discard();
            }
        }, cancellation);
}
