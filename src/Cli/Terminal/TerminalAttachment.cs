// The user's terminal, or what stands in for it, attached to the console of one domain after another.

using System.IO.Pipelines;
using XenSharp.Devices.Console;

namespace XenSharp.Cli.Terminal;

/// <summary>
/// Holds an input and an output descriptor for as long as a command lasts: the terminal stays raw, and no key is lost, while
/// a domain that reboots is replaced by the next. <see cref="TerminalSession"/> says what it does with them.
/// </summary>
public sealed class TerminalAttachment : IDisposable
{
    private readonly FileDescriptorSink _screen;
    private readonly TerminalMode? _mode;
    private readonly InputReader _reader;
    private bool _inputEnded;

    /// <param name="input">A descriptor open for reading. It stays open.</param>
    /// <param name="output">A descriptor open for writing. It stays open, and its open file is not made non-blocking.</param>
    /// <exception cref="IOException">The output is not open, or there are no descriptors left.</exception>
    public TerminalAttachment(int input = 0, int output = 1)
    {
        _screen = new FileDescriptorSink(output);
        try
        {
            _mode = TerminalMode.TryEnterRaw(input);
            _reader = new InputReader(input, IsTerminal);
        }
        catch
        {
            _mode?.Dispose();
            _screen.Dispose();
            throw;
        }

        _reader.Start();
    }

    /// <summary>Whether a person types: the input is a terminal, raw by now.</summary>
    public bool IsTerminal => _mode is not null;

    /// <summary>Serves one domain's console until it ends or the user leaves.</summary>
    /// <param name="console">A console without a reader.</param>
    /// <param name="domainCompletion">Completes, in whatever way, when the domain's vCPUs have stopped for good.</param>
    /// <param name="log">A sink that gets a copy of what the output gets, and stays the caller's.</param>
    /// <param name="cancellation">Ends the call.</param>
    /// <remarks>Input that an earlier domain was given is gone with it. An input that has ended has ended for every domain:
    /// each is given its ^D.</remarks>
    /// <exception cref="OperationCanceledException"><paramref name="cancellation"/> was signalled.</exception>
    public async Task<SessionEnd> ServeAsync(
        ConsoleBackend console, Task domainCompletion, IConsoleSink? log = null, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(console);
        ArgumentNullException.ThrowIfNull(domainCompletion);
        using var stop = CancellationTokenSource.CreateLinkedTokenSource(cancellation);

        Task showing = console.RunAsync(log is null ? _screen : new TeeSink(_screen, log), stop.Token);
        Task typing = PassInputAsync(console, stop.Token);
        try
        {
            SessionEndReason reason = await WaitForEndAsync(console, domainCompletion, showing).ConfigureAwait(false);
            cancellation.ThrowIfCancellationRequested();
            OutputClosed? closed = reason == SessionEndReason.OutputClosed ? await _screen.Closed.ConfigureAwait(false) : null;
            return new SessionEnd(reason, closed, _reader.Failure);
        }
        finally
        {
            // Both are over before what they use goes away.
            await stop.CancelAsync().ConfigureAwait(false);
            await EndAsync(showing).ConfigureAwait(false);
            await EndAsync(typing).ConfigureAwait(false);
        }
    }

    /// <summary>Serves the console of a domain that runs elsewhere until it ends or the user leaves.</summary>
    /// <param name="console">What is read from it was printed, what is written to it is typed; it ends with the domain.</param>
    /// <param name="cancellation">Ends the call.</param>
    /// <exception cref="OperationCanceledException"><paramref name="cancellation"/> was signalled.</exception>
    public async Task<SessionEnd> ServeAsync(Stream console, CancellationToken cancellation = default)
    {
        ArgumentNullException.ThrowIfNull(console);
        using var stop = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        Task showing = ShowAsync(console, stop.Token);
        Task typing = PassInputAsync(console, stop.Token);
        try
        {
            Task first = await Task.WhenAny(showing, _reader.DetachRequested, _screen.Closed).ConfigureAwait(false);
            cancellation.ThrowIfCancellationRequested();
            if (first == _reader.DetachRequested)
                return new SessionEnd(SessionEndReason.Detached, null, _reader.Failure);
            if (first == _screen.Closed)
                return new SessionEnd(SessionEndReason.OutputClosed, await _screen.Closed.ConfigureAwait(false), _reader.Failure);
            await showing.ConfigureAwait(false);
            return new SessionEnd(SessionEndReason.DomainEnded, null, _reader.Failure);
        }
        finally
        {
            await stop.CancelAsync().ConfigureAwait(false);
            await EndAsync(showing).ConfigureAwait(false);
            await EndAsync(typing).ConfigureAwait(false);
        }
    }

    /// <summary>Puts the terminal back, after the last byte is out. Not to be called while a domain is served.</summary>
    public void Dispose()
    {
        _reader.Dispose();
        _mode?.Dispose();
        _screen.Dispose();
    }

    private async Task<SessionEndReason> WaitForEndAsync(ConsoleBackend console, Task domainCompletion, Task showing)
    {
        Task detach = _reader.DetachRequested;
        Task outputClosed = _screen.Closed;
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

    /// <summary>Copies what is printed to the screen, until the stream ends or the screen is closed.</summary>
    private async Task ShowAsync(Stream console, CancellationToken cancellation)
    {
        byte[] buffer = new byte[4096];
        while (true)
        {
            int count;
            try
            {
                count = await console.ReadAsync(buffer, cancellation).ConfigureAwait(false);
            }
            catch (IOException)
            {
                // The other side is gone, with the domain or before it: there is no more.
                return;
            }

            if (count == 0)
                return;

            // Writing blocks while a terminal is stopped, and then the detach key still works.
            int shown = await Task.Run(() => WriteAll(buffer.AsSpan(0, count)), CancellationToken.None).ConfigureAwait(false);
            if (shown < count)
                return;
        }

        int WriteAll(ReadOnlySpan<byte> bytes)
        {
            int done = 0;
            while (done < bytes.Length && _screen.Write(bytes[done..], cancellation) is > 0 and var written)
                done += written;
            return done;
        }
    }

    private async Task PassInputAsync(Stream console, CancellationToken cancellation)
    {
        while (!_inputEnded)
        {
            ReadResult read = await _reader.Input.ReadAsync(cancellation).ConfigureAwait(false);
            _inputEnded = read.IsCompleted && !IsTerminal;
            try
            {
                foreach (ReadOnlyMemory<byte> part in read.Buffer)
                    await console.WriteAsync(part, cancellation).ConfigureAwait(false);
                await console.FlushAsync(cancellation).ConfigureAwait(false);
            }
            catch (IOException)
            {
                // Nobody takes it any more; the other direction says when it is over.
                return;
            }
            finally
            {
                _reader.Input.AdvanceTo(read.Buffer.End);
            }

            if (read.IsCompleted)
                return;
        }
    }

    private async Task PassInputAsync(ConsoleBackend console, CancellationToken cancellation)
    {
        if (_inputEnded)
        {
            _ = await console.WriteAsync(new[] { InputReader.EndOfFile }, cancellation).ConfigureAwait(false);
            return;
        }

        bool taken = true;
        while (taken && !_inputEnded)
        {
            ReadResult read = await _reader.Input.ReadAsync(cancellation).ConfigureAwait(false);
            _inputEnded = read.IsCompleted && !IsTerminal;
            try
            {
                foreach (ReadOnlyMemory<byte> part in read.Buffer)
                    taken = taken && await console.WriteAsync(part, cancellation).ConfigureAwait(false);
            }
            finally
            {
                _reader.Input.AdvanceTo(read.Buffer.End);
            }
            if (read.IsCompleted)
                return;
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
