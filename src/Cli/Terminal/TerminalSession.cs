// One user's sitting at a domain's console: keys to the guest, its output to the screen, the terminal put back at the end.

using System.Buffers;
using System.IO.Pipelines;
using XenSharp.Devices.Console;

namespace XenSharp.Cli.Terminal;

/// <summary>
/// Connects a domain's console with an input and an output descriptor, normally 0 and 1.
/// </summary>
/// <remarks>
/// <para>If the input is a terminal, it is raw while the session lasts (<see cref="TerminalMode"/>), and ^] leaves. Anything
/// else (a pipe, a file) is passed on byte by byte, with one ^D at its end, so that <c>echo uname -a | xensharp run …</c>
/// ends the guest's shell. An input that ends does not end the session.</para>
/// <para>Piped input is in the guest's ring before the guest has booted, and is read when something in the guest opens the
/// console. What it does then is the guest's affair: a getty or shell that sets up its terminal may flush input that came
/// before, the kernel echoes it when it comes in and not at the prompt, and a line longer than 4095 bytes is cut by a
/// Linux terminal in canonical mode. A ^D after an unfinished line only ends that line; end the input with a newline.</para>
/// <para>The PV console has no notion of a window size.</para>
/// <para>While a session runs, System.Console is not to be used; text for the user goes to standard error after it.</para>
/// </remarks>
/// <param name="input">A descriptor open for reading. It stays open.</param>
/// <param name="output">A descriptor open for writing. It stays open, and its open file is not made non-blocking.</param>
public sealed class TerminalSession(int input = 0, int output = 1)
{
    /// <summary>The name of the key that leaves, for messages to the user.</summary>
    public const string DetachKeyName = "Ctrl-]";

    /// <summary>Runs the session to its end.</summary>
    /// <param name="console">A console without a reader.</param>
    /// <param name="domainCompletion">Completes, in whatever way, when the domain's vCPUs have stopped for good.</param>
    /// <param name="log">A sink that gets a copy of what the output gets, and stays the caller's.</param>
    /// <param name="cancellation">Ends the session; the terminal is put back first.</param>
    /// <returns>Why the session ended. Unless the domain has ended, the console can be given to another reader, which goes
    /// on with the first byte that was not shown.</returns>
    /// <exception cref="IOException">The output is not open, or there are no descriptors left.</exception>
    /// <exception cref="OperationCanceledException"><paramref name="cancellation"/> was signalled.</exception>
    public async Task<SessionEnd> RunAsync(
        ConsoleBackend console, Task domainCompletion, IConsoleSink? log = null, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(console);
        ArgumentNullException.ThrowIfNull(domainCompletion);

        using var screen = new FileDescriptorSink(output);
        using TerminalMode? mode = TerminalMode.TryEnterRaw(input);
        using var reader = new InputReader(input, isTerminal: mode is not null);
        using var stop = CancellationTokenSource.CreateLinkedTokenSource(cancellation);

        Task showing = console.RunAsync(log is null ? screen : new TeeSink(screen, log), stop.Token);
        Task typing = PassInputAsync(reader.Input, console, stop.Token);
        reader.Start();
        try
        {
            SessionEndReason reason = await WaitForEndAsync(console, domainCompletion, showing, reader.DetachRequested, screen.Closed)
                .ConfigureAwait(false);
            cancellation.ThrowIfCancellationRequested();
            OutputClosed? closed = reason == SessionEndReason.OutputClosed ? await screen.Closed.ConfigureAwait(false) : null;
            return new SessionEnd(reason, closed, reader.Failure);
        }
        finally
        {
            // The threads end before what they use goes away, and the terminal is put back after the last byte is out.
            await stop.CancelAsync().ConfigureAwait(false);
            await EndAsync(showing).ConfigureAwait(false);
            await EndAsync(typing).ConfigureAwait(false);
        }
    }

    private static async Task<SessionEndReason> WaitForEndAsync(
        ConsoleBackend console, Task domainCompletion, Task showing, Task detach, Task outputClosed)
    {
        Task first = await Task.WhenAny(domainCompletion, showing, detach, outputClosed).ConfigureAwait(false);
        if (first == domainCompletion)
        {
            // What is still in the ring is shown. An output that is stuck meanwhile can still be left with the key.
            _ = console.CompleteAsync(CancellationToken.None);
            first = await Task.WhenAny(showing, detach).ConfigureAwait(false);
        }
        if (first == detach)
            return SessionEndReason.Detached;
        if (first == outputClosed)
            return SessionEndReason.OutputClosed;

        // The end of the run: by the domain's, by cancellation, or by a failure of the log, which is the caller's to hear of.
        await showing.ConfigureAwait(false);
        return SessionEndReason.DomainEnded;
    }

    private static async Task PassInputAsync(PipeReader input, ConsoleBackend console, CancellationToken cancellation)
    {
        try
        {
            ReadResult read;
            do
            {
                read = await input.ReadAsync(cancellation).ConfigureAwait(false);
                foreach (ReadOnlyMemory<byte> part in read.Buffer)
                {
                    if (!await console.WriteAsync(part, cancellation).ConfigureAwait(false))
                        return;
                }
                input.AdvanceTo(read.Buffer.End);
            }
            while (!read.IsCompleted);
        }
        finally
        {
            await input.CompleteAsync().ConfigureAwait(false);
        }
    }

    /// <summary>Waits for a task that was cancelled; any other failure of it is thrown.</summary>
    private static async Task EndAsync(Task task)
    {
        try
        {
            await task.ConfigureAwait(false);
        }
        catch (OperationCanceledException)
        {
        }
    }
}
