// One user's sitting at a domain's console: keys to the guest, its output to the screen, the terminal put back at the end.

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
/// <para>A session is with one domain; <see cref="TerminalAttachment"/> keeps the terminal for several.</para>
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
        using var attachment = new TerminalAttachment(input, output);
        return await attachment.ServeAsync(console, domainCompletion, log, cancellation).ConfigureAwait(false);
    }
}
