// The user's terminal in raw mode, and back as it was on every way out.

using System.Runtime.InteropServices;
using Tmds.Linux;

namespace XenSharp.Cli.Terminal;

/// <summary>
/// Keeps a terminal in raw mode: every key goes to the guest as it is, and what the guest prints is not altered.
/// </summary>
/// <remarks>
/// <para>The terminal is put back by <see cref="Dispose"/>, at the end of the process (also one by an unhandled exception)
/// and by SIGINT, SIGTERM, SIGHUP and SIGQUIT, whose further effect is left alone: without another handler they end the
/// process as usual. SIGTSTP puts it back for the time the process is stopped, and SIGCONT makes it raw again. In raw mode
/// the terminal itself sends none of these; they come from kill(1) and from the system.</para>
/// <para>A process in the background leaves the terminal alone: changing it would stop the process (SIGTTOU), and the mode
/// is the foreground's business. SIGCONT, which the shell sends when it brings a stopped job to the foreground, is the time
/// to look again.</para>
/// </remarks>
internal sealed class TerminalMode : IDisposable
{
    private static readonly PosixSignal[] EndingSignals = [PosixSignal.SIGINT, PosixSignal.SIGTERM, PosixSignal.SIGHUP, PosixSignal.SIGQUIT];

    private readonly int _terminal;
    private readonly Lock _lock = new();
    private readonly List<PosixSignalRegistration> _signals = [];
    private termios _original;
    private bool _raw;
    private bool _ended;

    private TerminalMode(int terminal)
    {
        _terminal = terminal;
        AppDomain.CurrentDomain.ProcessExit += OnExit;
        AppDomain.CurrentDomain.UnhandledException += OnExit;
        foreach (PosixSignal signal in EndingSignals)
            _signals.Add(PosixSignalRegistration.Create(signal, _ => Restore(forGood: true)));
#pragma warning disable CA1416 // The signals of job control, which one of .NET's platforms lacks: XenSharp runs on Linux only.
        _signals.Add(PosixSignalRegistration.Create(PosixSignal.SIGTSTP, Stop));
        _signals.Add(PosixSignalRegistration.Create(PosixSignal.SIGCONT, Continue));
#pragma warning restore CA1416
        MakeRaw();
    }

    /// <summary>Puts a terminal into raw mode.</summary>
    /// <returns><see langword="null"/> if the descriptor is no terminal.</returns>
    internal static TerminalMode? TryEnterRaw(int descriptor) => LibC.isatty(descriptor) == 1 ? new TerminalMode(descriptor) : null;

    public void Dispose()
    {
        Restore(forGood: true);
        AppDomain.CurrentDomain.ProcessExit -= OnExit;
        AppDomain.CurrentDomain.UnhandledException -= OnExit;
        foreach (PosixSignalRegistration signal in _signals)
            signal.Dispose();
    }

    private void OnExit(object? sender, EventArgs arguments) => Restore(forGood: true);

    private void Stop(PosixSignalContext context)
    {
        Restore(forGood: false);

        // A handled SIGTSTP no longer stops a .NET process, cancelled or not: the stop is made here.
        context.Cancel = true;
        _ = LibC.kill(LibC.getpid(), LibC.SIGSTOP);
    }

    private void Continue(PosixSignalContext context)
    {
        // Otherwise .NET sets the terminal that is its standard input to what it was at the start, after this handler.
        context.Cancel = true;
        MakeRaw();
    }

    private unsafe void MakeRaw()
    {
        lock (_lock)
        {
            if (_ended || InBackground())
                return;

            termios mode;
            if (LibC.tcgetattr(_terminal, &mode) != 0)
                return; // The terminal has gone away: there is nothing to set, and reading it will say so.
            if (!_raw)
                _original = mode;

            // What cfmakeraw(3) does, and reads that return with the first byte.
            mode.c_iflag &= ~(LibC.IGNBRK | LibC.BRKINT | LibC.PARMRK | LibC.ISTRIP | LibC.INLCR | LibC.IGNCR | LibC.ICRNL | LibC.IXON);
            mode.c_oflag &= ~LibC.OPOST;
            mode.c_lflag &= ~(LibC.ECHO | LibC.ECHONL | LibC.ICANON | LibC.ISIG | LibC.IEXTEN);
            mode.c_cflag = (mode.c_cflag & ~(LibC.CSIZE | LibC.PARENB)) | LibC.CS8;
            mode.c_cc[LibC.VMIN] = 1;
            mode.c_cc[LibC.VTIME] = 0;
            _raw = Set(mode);
        }
    }

    private void Restore(bool forGood)
    {
        lock (_lock)
        {
            _ended |= forGood;
            if (_raw && !InBackground())
                _raw = !Set(_original);
        }
    }

    private unsafe bool Set(termios mode)
    {
        int result;
        do
        {
            result = LibC.tcsetattr(_terminal, (int)LibC.TCSANOW, &mode);
        }
        while (result != 0 && Marshal.GetLastPInvokeError() == LibC.EINTR);
        return result == 0;
    }

    /// <summary>Whether another process group has the terminal. A terminal that is not the controlling one has none.</summary>
    private bool InBackground()
    {
        pid_t foreground = LibC.tcgetpgrp(_terminal);
        return (int)foreground > 0 && (int)foreground != (int)LibC.getpgrp();
    }
}
