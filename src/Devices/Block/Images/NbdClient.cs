// A client of an NBD server on a stream socket, with many requests under way.
using System.Buffers.Binary;
using System.Net.Sockets;
using Tmds.Linux;

namespace XenSharp.Devices.Block.Images;

/// <summary>
/// Sends operations to an NBD server and completes them as the answers come, in any order. Data goes between the socket and the
/// operations' memory directly. When the server is gone, everything comes to EIO.
/// </summary>
/// <remarks>Two threads: sending waits for a server that is slow, and so does receiving; neither must hold up a thread of the pool.</remarks>
internal sealed unsafe class NbdClient : IDisposable
{
    private const uint DiscardChunk = 1u << 30;

    private readonly Socket _socket;
    private readonly int _descriptor;
    private readonly BlockWorkers _sender;
    private readonly Thread _receiver;
    private readonly object _gate = new();

    /// <summary>Held while an operation's memory is being sent, so that none is completed under the sender's hands.</summary>
    private readonly Lock _sending = new();
    private readonly Dictionary<ulong, BlockOperation> _pending = [];
    private ulong _lastCookie;
    private int _outstanding;
    private bool _broken;

    /// <param name="socket">Connected, blocking; the client's from here on.</param>
    /// <param name="export">What was negotiated on it.</param>
    internal NbdClient(Socket socket, NbdExport export)
    {
        _socket = socket;
        _descriptor = (int)socket.SafeHandle.DangerousGetHandle();
        Export = export;
        _sender = new BlockWorkers("nbd send", (operation, _) => Send(operation), maximum: 1);
        _receiver = new Thread(Receive, maxStackSize: 256 << 10) { IsBackground = true, Name = "nbd receive" };
        _receiver.Start();
    }

    internal NbdExport Export { get; }

    /// <summary>Whether the server has gone.</summary>
    internal bool IsBroken
    {
        get
        {
            lock (_gate)
                return _broken;
        }
    }

    /// <summary>As <see cref="IBlockImage.Submit(BlockOperation)"/>.</summary>
    internal void Submit(BlockOperation operation)
    {
        bool isTransfer = operation.Kind is BlockOperationKind.Read or BlockOperationKind.Write;
        lock (_gate)
            _outstanding++;
        operation.Done = 0;
        if (isTransfer && operation.Length > Export.MaximumPayload)
            Complete(operation, LibC.EINVAL);
        else if (operation.Kind == BlockOperationKind.Flush && !Export.Flags.HasFlag(NbdFlags.SendFlush))
            Complete(operation, 0);
        else if (operation.Kind == BlockOperationKind.Discard && !Export.Flags.HasFlag(NbdFlags.SendTrim))
            Complete(operation, LibC.EOPNOTSUPP);
        else
            _sender.Queue(operation);
    }

    /// <summary>Says good-bye, once all that was submitted is complete, and ends the threads.</summary>
    public void Dispose()
    {
        lock (_gate)
        {
            while (_outstanding > 0)
                _ = Monitor.Wait(_gate);
        }

        _sender.Stop();
        byte* header = stackalloc byte[NbdProtocol.RequestSize];
        NbdProtocol.WriteRequest(new Span<byte>(header, NbdProtocol.RequestSize), NbdCommand.Disconnect, 0, 0, 0);
        IoVector vector = new() { Base = header, Length = NbdProtocol.RequestSize };
        _ = TrySendAll(&vector, 1);
        _ = LibC.shutdown(_descriptor, LibC.SHUT_RDWR);
        _receiver.Join();
        _socket.Dispose();
    }

    private static NbdCommand CommandOf(BlockOperationKind kind) => kind switch
    {
        BlockOperationKind.Read => NbdCommand.Read,
        BlockOperationKind.Write => NbdCommand.Write,
        BlockOperationKind.Flush => NbdCommand.Flush,
        _ => NbdCommand.Trim,
    };

    private void Send(BlockOperation operation)
    {
        lock (_sending)
        {
            if (TrySend(operation))
                return;
        }

        Complete(operation, LibC.EIO);
    }

    /// <returns>False if the server is gone and nobody else completes the operation.</returns>
    private bool TrySend(BlockOperation operation)
    {
        ulong cookie;
        lock (_gate)
        {
            if (_broken)
                return false;
            cookie = ++_lastCookie;
            _pending.Add(cookie, operation);
        }

        byte* header = stackalloc byte[NbdProtocol.RequestSize];
        bool isWrite = operation.Kind == BlockOperationKind.Write;
        uint length = (uint)Math.Min(operation.Length - operation.Done, operation.Kind == BlockOperationKind.Discard ? DiscardChunk : uint.MaxValue);
        NbdProtocol.WriteRequest(
            new Span<byte>(header, NbdProtocol.RequestSize), CommandOf(operation.Kind), cookie, operation.Offset + operation.Done, length);

        // Once the last byte is away the answer may come, and the operation be another's: its vectors are not looked at after that.
        int count = isWrite ? operation.VectorCount : 0;
        IoVector* vectors = stackalloc IoVector[BlockOperation.MaxVectors];
        vectors[0] = new IoVector { Base = header, Length = NbdProtocol.RequestSize };
        new ReadOnlySpan<IoVector>(operation.Vectors, count).CopyTo(new Span<IoVector>(vectors + 1, BlockOperation.MaxVectors - 1));
        if (!TrySendAll(vectors, count + 1))
            Break();
        return true;
    }

    private bool TrySendAll(IoVector* vectors, int count)
    {
        while (count > 0)
        {
            msghdr message = default;
            message.msg_iov = (iovec*)vectors;
            message.msg_iovlen = count;
            long sent = (long)LibC.sendmsg(_descriptor, &message, LibC.MSG_NOSIGNAL);
            if (sent < 0)
            {
                if (LibC.errno == LibC.EINTR)
                    continue;
                return false;
            }

            HostIo.Advance(ref vectors, ref count, (ulong)sent);
        }

        return true;
    }

    private void Receive()
    {
        byte* header = stackalloc byte[NbdProtocol.SimpleReplySize];
        while (true)
        {
            IoVector vector = new() { Base = header, Length = NbdProtocol.SimpleReplySize };
            if (!TryReceiveAll(&vector, 1))
                break;
            var reply = new ReadOnlySpan<byte>(header, NbdProtocol.SimpleReplySize);
            int error = (int)Math.Min(BinaryPrimitives.ReadUInt32BigEndian(reply[4..]), int.MaxValue);
            ulong cookie = BinaryPrimitives.ReadUInt64BigEndian(reply[8..]);
            BlockOperation? operation;
            lock (_gate)
            {
                if (BinaryPrimitives.ReadUInt32BigEndian(reply) != NbdProtocol.SimpleReplyMagic || !_pending.TryGetValue(cookie, out operation))
                    break;
            }

            // It stays pending until its data are there: should the server die now, it must not be forgotten.
            if (operation.Kind == BlockOperationKind.Read && error == 0 && !TryReceiveAll(operation.Vectors, operation.VectorCount))
                break;
            lock (_gate)
                _ = _pending.Remove(cookie);

            // A discard goes to the server piece by piece.
            operation.Done += DiscardChunk;
            if (operation.Kind == BlockOperationKind.Discard && error == 0 && operation.Done < operation.Length)
                _sender.Queue(operation);
            else
                Complete(operation, error);
        }

        Break();
        Abandon();
    }

    private void Complete(BlockOperation operation, int error)
    {
        operation.Complete(error);
        lock (_gate)
        {
            _outstanding--;
            Monitor.PulseAll(_gate);
        }
    }

    private bool TryReceiveAll(IoVector* vectors, int count)
    {
        while (count > 0)
        {
            msghdr message = default;
            message.msg_iov = (iovec*)vectors;
            message.msg_iovlen = count;
            long received = (long)LibC.recvmsg(_descriptor, &message, 0);
            if (received < 0 && LibC.errno == LibC.EINTR)
                continue;
            if (received <= 0)
                return false;
            HostIo.Advance(ref vectors, ref count, (ulong)received);
        }

        return true;
    }

    /// <summary>Nothing comes or goes any more; the receiver notices and completes what is pending.</summary>
    private void Break()
    {
        lock (_gate)
            _broken = true;
        _ = LibC.shutdown(_descriptor, LibC.SHUT_RDWR);
    }

    private void Abandon()
    {
        BlockOperation[] lost;
        lock (_sending)
        {
            lock (_gate)
            {
                lost = [.. _pending.Values];
                _pending.Clear();
            }
        }

        foreach (BlockOperation operation in lost)
            Complete(operation, LibC.EIO);
    }
}
