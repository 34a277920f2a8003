// The writing side of an ABI trace: a file, a thread that writes to it, and a stream of records for each vCPU.
using System.Buffers.Binary;

namespace XenSharp.Core.Trace;

/// <summary>
/// Writes a trace. vCPUs fill buffers; the recorder's own thread takes them to the file, full ones at once and others every
/// half second, so that what a killed process leaves behind is at most so old.
/// </summary>
/// <remarks>
/// No record is dropped: a vCPU whose buffers are all on their way to the file waits for one. If the file cannot be written any
/// more, recording ends with <see cref="Failure"/>, and the guests run on without it.
/// </remarks>
public sealed class TraceRecorder : IDisposable
{
    private const int BufferSize = 64 << 10;
    private const int BuffersPerStream = 8;
    private static readonly TimeSpan FlushPeriod = TimeSpan.FromMilliseconds(500);

    private readonly Lock _streamsLock = new();
    private readonly List<TraceStream> _streams = [];
    private readonly object _gate = new();
    private readonly Queue<TraceBuffer> _full = new(BuffersPerStream * 2);
    private readonly Stack<TraceBuffer> _free = new(BuffersPerStream * 2);
    private readonly Stream _file;
    private readonly Thread _thread;
    private ulong _records;
    private bool _closing;
    private bool _disposed;
    private string? _failure;

    /// <summary>Begins a trace.</summary>
    /// <param name="file">Where to; the recorder's to dispose from here on.</param>
    /// <param name="header">What it begins with.</param>
    /// <exception cref="IOException">Not even the header can be written; the file is closed.</exception>
    public TraceRecorder(Stream file, TraceHeader header)
    {
        ArgumentNullException.ThrowIfNull(file);
        _file = file;
        try
        {
            file.Write(TraceFormat.WriteHeader(header));
            file.Flush();
        }
        catch
        {
            file.Dispose();
            throw;
        }

        _thread = new Thread(WriteBlocks) { Name = "trace", IsBackground = true };
        _thread.Start();
    }

    /// <summary>Why recording ended early, in the system's words; null while all is well. Final after <see cref="Dispose"/>.</summary>
    public string? Failure => Volatile.Read(ref _failure);

    /// <summary>The records of one vCPU. Domains that follow each other in one trace get the same stream for the same number.</summary>
    public TraceStream Stream(ushort vcpu)
    {
        lock (_streamsLock)
        {
            TraceStream? stream = _streams.Find(candidate => candidate.Vcpu == vcpu);
            if (stream != null)
                return stream;
            lock (_gate)
            {
                for (int i = 1; i < BuffersPerStream; i++)
                    _free.Push(new TraceBuffer(BufferSize));
            }

            _streams.Add(stream = new TraceStream(this, vcpu, new TraceBuffer(BufferSize)));
            return stream;
        }
    }

    /// <summary>Writes what is left, and the end. No vCPU may record any more.</summary>
    public void Dispose()
    {
        if (_disposed)
            return;
        _disposed = true;
        lock (_streamsLock)
        {
            foreach (TraceStream stream in _streams)
                stream.Flush();
        }

        lock (_gate)
        {
            _closing = true;
            Monitor.PulseAll(_gate);
        }

        _thread.Join();
        WriteEnd();
    }

    /// <summary>Takes a buffer with records and gives an empty one, for which it waits if it must.</summary>
    internal TraceBuffer Exchange(TraceBuffer full)
    {
        lock (_gate)
        {
            _full.Enqueue(full);
            Monitor.PulseAll(_gate);
            while (_free.Count == 0)
                _ = Monitor.Wait(_gate);
            return _free.Pop();
        }
    }

    /// <summary>The same for the recorder's own thread, which must not wait for itself.</summary>
    /// <returns>Null when there is no empty buffer; then nothing was taken.</returns>
    internal TraceBuffer? TryExchange(TraceBuffer full)
    {
        lock (_gate)
        {
            if (!_free.TryPop(out TraceBuffer? empty))
                return null;
            _full.Enqueue(full);
            return empty;
        }
    }

    private void WriteBlocks()
    {
        long nextFlush = Environment.TickCount64;
        while (TakeFull(nextFlush) is var (buffer, closing))
        {
            if (buffer != null)
            {
                Write(buffer);
                buffer.Clear();
                lock (_gate)
                {
                    _free.Push(buffer);
                    Monitor.PulseAll(_gate);
                }
            }
            else if (closing)
            {
                return;
            }

            if (Environment.TickCount64 < nextFlush)
                continue;
            nextFlush = Environment.TickCount64 + (long)FlushPeriod.TotalMilliseconds;
            FlushStreams();
        }
    }

    /// <summary>The next full buffer; none when it is time to flush, or when the end has come.</summary>
    private (TraceBuffer? Buffer, bool Closing) TakeFull(long until)
    {
        lock (_gate)
        {
            while (_full.Count == 0)
            {
                long left = until - Environment.TickCount64;
                if (_closing || left <= 0)
                    return (null, _closing);
                _ = Monitor.Wait(_gate, (int)left);
            }

            return (_full.Dequeue(), false);
        }
    }

    private void FlushStreams()
    {
        // Dispose holds the lock while it waits for this thread, and flushes by itself.
        if (!_streamsLock.TryEnter())
            return;
        try
        {
            foreach (TraceStream stream in _streams)
                stream.TryFlush();
        }
        finally
        {
            _streamsLock.Exit();
        }
    }

    private void Write(TraceBuffer buffer)
    {
        if (_failure != null)
            return;
        try
        {
            _file.Write(buffer.Finish());
            _records += buffer.Count;
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            Fail(failure.Message);
        }
    }

    private void WriteEnd()
    {
        try
        {
            if (_failure == null)
            {
                Span<byte> end = stackalloc byte[TraceFormat.BlockHeaderSize + TraceFormat.EndLength];
                BinaryPrimitives.WriteUInt64LittleEndian(end[TraceFormat.BlockHeaderSize..], _records);
                TraceFormat.WriteBlockHeader(end, TraceBlockKind.End, 0, 0, 0);
                _file.Write(end);
                _file.Flush();
            }
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            Fail(failure.Message);
        }

        try
        {
            _file.Dispose();
        }
        catch (IOException failure)
        {
            // A file system may say only here that there was no room.
            if (_failure == null)
                Fail(failure.Message);
        }
    }

    private void Fail(string message) => Volatile.Write(ref _failure, message);
}
