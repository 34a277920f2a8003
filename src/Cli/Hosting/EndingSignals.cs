// The signals that ask a program to end, as a token: what it has made is taken apart before it goes.

using System.Runtime.InteropServices;

namespace XenSharp.Cli.Hosting;

/// <summary>Turns the first SIGINT, SIGTERM, SIGHUP or SIGQUIT into a cancellation. A second one has its usual effect at once,
/// for a program that does not get to its end.</summary>
internal sealed class EndingSignals : IDisposable
{
    private readonly CancellationTokenSource _source = new();
    private readonly PosixSignalRegistration[] _registrations;
    private int _received;

    internal EndingSignals()
    {
        _registrations =
        [
            Register(PosixSignal.SIGHUP, 1), Register(PosixSignal.SIGINT, 2),
            Register(PosixSignal.SIGQUIT, 3), Register(PosixSignal.SIGTERM, 15),
        ];
    }

    /// <summary>Signalled by the first signal.</summary>
    internal CancellationToken Token => _source.Token;

    /// <summary>Linux's number of the first signal, or 0.</summary>
    internal int Received => Volatile.Read(ref _received);

    public void Dispose()
    {
        foreach (PosixSignalRegistration registration in _registrations)
            registration.Dispose();
        _source.Dispose();
    }

    private PosixSignalRegistration Register(PosixSignal signal, int number) => PosixSignalRegistration.Create(
        signal,
        context =>
        {
            if (Interlocked.CompareExchange(ref _received, number, 0) != 0)
                return;
            context.Cancel = true;
            _source.Cancel();
        });
}
