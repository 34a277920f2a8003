// A client connected by a byte stream: cuts the stream into messages, has them served, and delivers replies and events.
namespace XenSharp.Devices.Xenstore;

/// <summary>
/// One connection over an <see cref="IXenstoreTransport"/>, served by one task on the thread pool. Whatever the client sends
/// harms its own connection at most.
/// </summary>
public sealed class XenstoreConnection
{
    // After so many steps the loop lets others use its thread, so that one busy guest does not starve the pool.
    private const int StepsPerTurn = 64;

    // With so many messages waiting no further request is read, whoever the client is: even a trusted one that never reads its
    // replies must not make the manager grow.
    private const int MessagesAhead = 1024;

    private readonly XenstoreRequests _requests;
    private readonly IXenstoreTransport _transport;
    private readonly XenstoreSignal _signal = new();
    private readonly CancellationTokenSource _stop = new();

    // Held while the loop touches the transport; taken before the store's lock, never after it.
    private readonly Lock _stepping = new();
    private readonly byte[] _input = new byte[XenstoreWire.HeaderSize + XenstoreWire.PayloadMaximum];
    private int _inputFilled;
    private XenstoreMessage? _current;
    private byte[] _output = [];
    private int _outputSent;
    private bool _resetDemanded;
    private bool _quiesced;
    private volatile bool _ended;

    internal XenstoreConnection(
        XenstoreDatabase database, XenstoreRequests requests, XenstoreDomain domain, bool privileged, IXenstoreTransport transport)
    {
        _requests = requests;
        _transport = transport;
        Session = new WireSession(this, database, domain, privileged);
    }

    /// <summary>The domain at the other end; 0 for connections of the host.</summary>
    public ushort DomainId => Session.Domain.Id;

    /// <summary>Why the connection is no longer served, <see cref="XenstoreConnectionError.None"/> while it is.</summary>
    public XenstoreConnectionError Error { get; private set; }

    /// <summary>What made the service itself stumble, which is a defect of it; <see langword="null"/> otherwise.</summary>
    public Exception? Fault { get; private set; }

    /// <summary>Completes when the transport is no longer used: the connection was stopped or its carrier ended.</summary>
    public Task Completion { get; private set; } = Task.CompletedTask;

    /// <summary>Replies and events waiting for the client to make room.</summary>
    public int QueuedMessages
    {
        get
        {
            lock (Session.Database.Gate)
                return Session.QueuedMessages;
        }
    }

    internal XenstoreSession Session { get; }

    /// <summary>Starts the service loop.</summary>
    /// <param name="reset">Whether the transport is emptied first, as XS_INTRODUCE does.</param>
    /// <param name="after">What must have ended before the loop waits for the carrier.</param>
    internal void Start(bool reset, Task after)
    {
        // Now and not in the loop: a guest that is started next may use the ring before the loop gets a thread.
        if (reset)
            _transport.Reset();
        Completion = Task.Run(async () =>
        {
            await after.ConfigureAwait(false);
            await RunAsync(_stop.Token).ConfigureAwait(false);
        });
    }

    /// <summary>Asks the loop to start the client over, as a second XS_INTRODUCE does. Does not block.</summary>
    internal void DemandReset()
    {
        Volatile.Write(ref _resetDemanded, true);
        _signal.Set();
    }

    /// <summary>Asks the loop to end; <see cref="Completion"/> says when it has. Does not block.</summary>
    internal void Stop() => _ = _stop.CancelAsync();

    /// <summary>
    /// Ends the loop; when this returns, nothing is read or written any longer, though a wait may still be under way. Not with the
    /// store's lock held.
    /// </summary>
    internal void Quiesce()
    {
        lock (_stepping)
            _quiesced = true;
        Stop();
    }

    /// <summary>Serves the client until the token is signalled or the carrier ends.</summary>
    internal async Task RunAsync(CancellationToken cancellation)
    {
        Task listener = ListenAsync(cancellation);
        try
        {
            while (!cancellation.IsCancellationRequested)
            {
                bool more = Turn();
                if (more)
                    await Task.Yield();
                else if (_ended)
                    break;
                else
                    await _signal.WaitAsync(cancellation).ConfigureAwait(false);
            }
        }
        catch (OperationCanceledException) when (cancellation.IsCancellationRequested)
        {
            // Stopped: nothing is owed to anyone.
        }
        catch (Exception exception)
        {
            // A defect of the service or of the carrier. It is this connection's end, not the manager's.
            Fault = exception;
            GiveUp(XenstoreConnectionError.Communication);
        }
        finally
        {
            lock (Session.Database.Gate)
            {
                ForgetCurrent();
                Session.Database.Close(Session);
            }
            await _stop.CancelAsync().ConfigureAwait(false);
            await listener.ConfigureAwait(false);
        }
    }

    private async Task ListenAsync(CancellationToken cancellation)
    {
        try
        {
            while (await _transport.WaitAsync(cancellation).ConfigureAwait(false))
                _signal.Set();
        }
        catch (OperationCanceledException)
        {
            // Stopped.
        }
        catch (Exception exception)
        {
            Fault = exception;
        }
        _ended = true;
        _signal.Set();
    }

    private bool Turn()
    {
        bool more = true;
        for (int step = 0; more && step < StepsPerTurn; step++)
        {
            lock (_stepping)
                more = !_quiesced && Step();
        }
        lock (_stepping)
        {
            if (!_quiesced)
                _transport.Flush();
        }
        return more;
    }

    // Does one piece of work; false when there is none until the next signal.
    private bool Step()
    {
        if (Volatile.Read(ref _resetDemanded) || _transport.ResetRequested)
        {
            Volatile.Write(ref _resetDemanded, false);
            lock (Session.Database.Gate)
            {
                ForgetCurrent();
                Session.Database.Reset(Session);
            }
            _inputFilled = 0;
            Error = XenstoreConnectionError.None;
            _transport.Reset();
            return true;
        }
        if (Error != XenstoreConnectionError.None)
            return false;
        bool sent = Send();
        return Receive() || sent;
    }

    private bool Send()
    {
        if (_current is null)
        {
            lock (Session.Database.Gate)
                _current = Session.Dequeue();
            if (_current is null)
                return false;
            _output = _current.Encode();
            _outputSent = 0;
        }
        if (!_transport.TryWrite(_output.AsSpan(_outputSent), out int count))
        {
            GiveUp(XenstoreConnectionError.RingIndex);
            return false;
        }
        _outputSent += count;
        if (_outputSent == _output.Length)
        {
            lock (Session.Database.Gate)
                ForgetCurrent();
        }
        return count > 0;
    }

    private bool Receive()
    {
        if (Error != XenstoreConnectionError.None)
            return false;
        lock (Session.Database.Gate)
        {
            if (Session.Throttled || Session.QueuedMessages >= MessagesAhead)
                return false;
        }

        int wanted = XenstoreWire.HeaderSize;
        if (_inputFilled >= XenstoreWire.HeaderSize)
            wanted += (int)XenstoreHeader.Decode(_input).Length;
        if (!_transport.TryRead(_input.AsSpan(_inputFilled, wanted - _inputFilled), out int count))
        {
            GiveUp(XenstoreConnectionError.RingIndex);
            return false;
        }
        if (count == 0)
            return false;
        bool headerCompleted = _inputFilled < XenstoreWire.HeaderSize && _inputFilled + count == XenstoreWire.HeaderSize;
        _inputFilled += count;
        if (_inputFilled < XenstoreWire.HeaderSize)
            return true;

        XenstoreHeader header = XenstoreHeader.Decode(_input);
        if (headerCompleted && header.Length > XenstoreWire.PayloadMaximum)
        {
            GiveUp(XenstoreConnectionError.Protocol);
            return false;
        }
        if (_inputFilled == XenstoreWire.HeaderSize + (int)header.Length)
        {
            _inputFilled = 0;
            _requests.Serve(Session, header, _input.AsSpan(XenstoreWire.HeaderSize, (int)header.Length));
        }
        return true;
    }

    // Stops serving the client but keeps listening: it may ask for a reconnection.
    private void GiveUp(XenstoreConnectionError error)
    {
        Error = error;
        lock (Session.Database.Gate)
        {
            ForgetCurrent();
            Session.Database.Reset(Session);
        }
        _inputFilled = 0;
        try
        {
            _transport.Fail(error);
        }
        catch (Exception exception)
        {
            Fault ??= exception;
        }
    }

    private void ForgetCurrent()
    {
        if (_current is not null)
            Session.Delivered(_current);
        _current = null;
        _output = [];
    }

    private sealed class WireSession(XenstoreConnection connection, XenstoreDatabase database, XenstoreDomain domain, bool privileged)
        : XenstoreSession(database, domain, privileged)
    {
        // A guest's are bounded by its memory quota.
        protected override int EventLimit => Privileged ? Database.Options.EventBacklog : int.MaxValue;

        public override void Wake() => connection._signal.Set();

        protected override void Overrun()
        {
            connection.Error = XenstoreConnectionError.Communication;
            connection.Stop();
        }
    }
}

/// <summary>An auto-reset event to await: any number of signals before a wait let exactly one wait pass.</summary>
internal sealed class XenstoreSignal
{
    private readonly SemaphoreSlim _semaphore = new(0);
    private int _set;

    public void Set()
    {
        if (Interlocked.Exchange(ref _set, 1) == 0)
            _semaphore.Release();
    }

    public async ValueTask WaitAsync(CancellationToken cancellation)
    {
        await _semaphore.WaitAsync(cancellation).ConfigureAwait(false);
        Interlocked.Exchange(ref _set, 0);
    }
}
