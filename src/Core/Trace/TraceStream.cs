// One vCPU's part of a trace while it is recorded.

namespace XenSharp.Core.Trace;

/// <summary>Takes the records of one vCPU. Nothing is allocated a record.</summary>
public sealed class TraceStream
{
    private readonly Lock _lock = new();
    private readonly TraceRecorder _recorder;
    private TraceBuffer _buffer;

    internal TraceStream(TraceRecorder recorder, ushort vcpu, TraceBuffer buffer)
    {
        _recorder = recorder;
        _buffer = buffer;
        Vcpu = vcpu;
    }

    /// <summary>The vCPU's number.</summary>
    public ushort Vcpu { get; }

    /// <summary>Appends a record; waits while all buffers are on their way to the file. One thread at a time.</summary>
    public void Append(TraceRecord record)
    {
        lock (_lock)
        {
            if (!_buffer.HasRoom)
                Exchange();
            _buffer.Append(record);
        }
    }

    /// <summary>Sends what there is on its way to the file.</summary>
    internal void Flush()
    {
        lock (_lock)
        {
            if (_buffer.Count > 0)
                Exchange();
        }
    }

    /// <summary>The same, for the thread that writes the file: not while a record is being appended, since that may wait for this thread.</summary>
    internal void TryFlush()
    {
        if (!_lock.TryEnter())
            return;
        try
        {
            if (_buffer.Count == 0)
                return;
            _buffer.Vcpu = Vcpu;
            _buffer = _recorder.TryExchange(_buffer) ?? _buffer;
        }
        finally
        {
            _lock.Exit();
        }
    }

    private void Exchange()
    {
        _buffer.Vcpu = Vcpu;
        _buffer = _recorder.Exchange(_buffer);
    }
}

/// <summary>A block in the making: room for its header, then records.</summary>
internal sealed class TraceBuffer(int size)
{
    private readonly byte[] _bytes = new byte[size];
    private int _length = TraceFormat.BlockHeaderSize;
    private TraceState _state;
    private ulong _baseTime;

    /// <summary>Records in it.</summary>
    public uint Count { get; private set; }

    public ushort Vcpu { get; set; }

    /// <summary>Whether any record fits.</summary>
    public bool HasRoom => _bytes.Length - _length >= TraceEncoding.MaxRecordSize;

    public void Append(TraceRecord record)
    {
        if (Count == 0)
        {
            _baseTime = record.Start;
            _state = new TraceState(_baseTime, 0);
        }

        _length += TraceEncoding.Write(record, ref _state, _bytes.AsSpan(_length));
        Count++;
    }

    /// <summary>The block as it goes to the file.</summary>
    public ReadOnlySpan<byte> Finish()
    {
        Span<byte> block = _bytes.AsSpan(0, _length);
        TraceFormat.WriteBlockHeader(block, TraceBlockKind.Records, Vcpu, Count, _baseTime);
        return block;
    }

    public void Clear()
    {
        _length = TraceFormat.BlockHeaderSize;
        Count = 0;
    }
}
