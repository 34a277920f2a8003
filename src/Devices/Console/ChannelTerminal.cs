// A channel that leads to a pseudo-terminal: connection=pty in xl.cfg(5).

using Tmds.Linux;

namespace XenSharp.Devices.Console;

/// <summary>Holds the master of a pseudo-terminal; whoever opens the slave is connected to the guest.</summary>
/// <remarks>A thread waits for what is typed, as nothing else can wait for a terminal. While nobody has the slave open the system
/// says no more than that, so it is looked for twice a second, as QEMU does once.</remarks>
internal sealed class ChannelTerminal : ChannelEndpoint
{
    private const int Batch = 1024;
    private const int LookInterval = 500;

    private readonly CancellationTokenSource _stop = new();
    private readonly PseudoTerminal _terminal = new("the channel");
    private Thread? _thread;

    /// <summary>The slave's path.</summary>
    internal override string Terminal => _terminal.Path;

    internal override void Start()
    {
        _thread = new Thread(Listen) { IsBackground = true, Name = "channel terminal" };
        _thread.Start();
    }

    /// <inheritdoc/>
    public override int Write(ReadOnlySpan<byte> bytes, CancellationToken cancellation)
    {
        using CancellationTokenRegistration registration =
            cancellation.UnsafeRegister(static terminal => ((PseudoTerminal)terminal!).Wake(), _terminal);
        bool wait = false;
        while (true)
        {
            cancellation.ThrowIfCancellationRequested();
            short events = _terminal.Poll(LibC.POLLOUT, wait ? LookInterval : 0);
            if ((events & LibC.POLLHUP) != 0)
                return bytes.Length;
            int count = _terminal.Write(bytes);
            if (count > 0)
                return count;
            if (count is not 0 && -count != LibC.EAGAIN && -count != LibC.EINTR)
                return bytes.Length;
            wait = true;
        }
    }

    /// <inheritdoc/>
    public override ValueTask DisposeAsync()
    {
        _stop.Cancel();
        _terminal.Wake();
        _thread?.Join();
        _terminal.Dispose();
        _stop.Dispose();
        return ValueTask.CompletedTask;
    }

    private void Listen()
    {
        Span<byte> batch = stackalloc byte[Batch];
        while (!_stop.IsCancellationRequested)
        {
            short events = _terminal.Poll(LibC.POLLIN, -1);
            if ((events & LibC.POLLIN) != 0)
            {
                int count = _terminal.Read(batch);
                if (count > 0)
                    Type(batch[..count].ToArray());
            }
            else if ((events & (LibC.POLLHUP | LibC.POLLERR)) != 0)
            {
                // Nobody is there.
                _ = _stop.Token.WaitHandle.WaitOne(LookInterval);
            }
        }
    }

    private void Type(byte[] input)
    {
        try
        {
            TypeAsync(input, _stop.Token).AsTask().GetAwaiter().GetResult();
        }
        catch (OperationCanceledException)
        {
            // The channel is going away.
        }
    }
}
