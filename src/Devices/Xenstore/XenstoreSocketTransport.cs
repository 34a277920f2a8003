// The byte stream of a client on a Unix socket, for the service loop: never blocks, needs no thread of its own.
using System.Net.Sockets;
using System.Runtime.InteropServices;
using Tmds.Linux;

namespace XenSharp.Devices.Xenstore;

/// <summary>
/// A connected stream socket as a carrier. What the socket has no room for is kept, at most one message, and sent when there is.
/// </summary>
/// <remarks>
/// The service loop reads and writes with recv(2) and send(2); only waiting is left to the runtime's own engine, which is asked when
/// one of them would have blocked.
/// </remarks>
internal sealed class XenstoreSocketTransport(Socket socket) : IXenstoreTransport, IDisposable
{
    private readonly int _descriptor = (int)socket.Handle;
    private readonly XenstoreSignal _signal = new();
    private volatile bool _ended;
    private volatile bool _waitingToRead;
    private volatile bool _sending;

    /// <inheritdoc/>
    public bool ResetRequested => false;

    /// <inheritdoc/>
    public unsafe bool TryRead(Span<byte> destination, out int count)
    {
        count = 0;
        if (_ended || _waitingToRead)
            return true;
        nint received;
        fixed (byte* start = destination)
            received = (nint)LibC.recv(_descriptor, start, destination.Length, LibC.MSG_DONTWAIT);
        if (received > 0)
        {
            count = (int)received;
        }
        else if (received < 0 && IsTransient(Marshal.GetLastPInvokeError()))
        {
            _waitingToRead = true;
            _ = AwaitReadableAsync();
        }
        else
        {
            End();
        }
        return true;
    }

    /// <inheritdoc/>
    public unsafe bool TryWrite(ReadOnlySpan<byte> source, out int count)
    {
        count = 0;
        if (_ended || _sending)
            return true;
        nint sent;
        fixed (byte* start = source)
            sent = (nint)LibC.send(_descriptor, start, source.Length, LibC.MSG_DONTWAIT | LibC.MSG_NOSIGNAL);
        if (sent >= 0)
        {
            count = (int)sent;
        }
        else if (IsTransient(Marshal.GetLastPInvokeError()))
        {
            count = source.Length;
            _sending = true;
            _ = SendAsync(source.ToArray());
        }
        else
        {
            End();
        }
        return true;
    }

    /// <inheritdoc/>
    public void Flush()
    {
    }

    /// <inheritdoc/>
    public ValueTask<bool> WaitAsync(CancellationToken cancellation) => _ended ? new(false) : WaitForSignalAsync(cancellation);

    /// <inheritdoc/>
    public void Reset()
    {
    }

    /// <summary>The client learns by the end of the stream that it has broken the protocol.</summary>
    public void Fail(XenstoreConnectionError error) => End();

    /// <summary>Closes the socket. Only when the service loop has ended.</summary>
    public void Dispose()
    {
        _ended = true;
        socket.Dispose();
    }

    private static bool IsTransient(int error) => error == LibC.EAGAIN || error == LibC.EINTR;

    private async Task AwaitReadableAsync()
    {
        // Of no bytes: completes when there is something to receive, or the stream has ended.
        if (!await CompletesAsync(socket.ReceiveAsync(Memory<byte>.Empty, SocketFlags.None)).ConfigureAwait(false))
            _ended = true;
        _waitingToRead = false;
        _signal.Set();
    }

    private async Task SendAsync(ReadOnlyMemory<byte> rest)
    {
        if (!await CompletesAsync(socket.SendAsync(rest, SocketFlags.None)).ConfigureAwait(false))
            _ended = true;
        _sending = false;
        _signal.Set();
    }

    private static async ValueTask<bool> CompletesAsync(ValueTask<int> operation)
    {
        try
        {
            _ = await operation.ConfigureAwait(false);
            return true;
        }
        catch (Exception failure) when (failure is SocketException or ObjectDisposedException or OperationCanceledException)
        {
            return false;
        }
    }

    private async ValueTask<bool> WaitForSignalAsync(CancellationToken cancellation)
    {
        await _signal.WaitAsync(cancellation).ConfigureAwait(false);
        return !_ended;
    }

    private void End()
    {
        _ended = true;
        _signal.Set();
    }
}
