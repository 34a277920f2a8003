// The reading side of an ABI trace.

namespace XenSharp.Core.Trace;

/// <summary>A file is no trace, or nothing of it can be read; the message goes on after the file's name and says what to do.</summary>
public sealed class TraceFormatException(string message) : Exception(message);

/// <summary>
/// A trace that was checked as a whole when it was opened: what is behind its last whole block is left out, and
/// <see cref="Damage"/> says so.
/// </summary>
public sealed class TraceFile : IDisposable
{
    private readonly Stream _stream;
    private readonly SortedDictionary<ushort, List<Block>> _vcpus = [];

    private readonly record struct Block(long Offset, TraceBlockHeader Header);

    private TraceFile(Stream stream, TraceHeader header)
    {
        _stream = stream;
        Header = header;
    }

    /// <summary>What the trace says of itself.</summary>
    public TraceHeader Header { get; }

    /// <summary>Records that can be read.</summary>
    public ulong Count { get; private set; }

    /// <summary>What is wrong with the file's end, as the rest of a sentence that begins with its name; null for nothing.</summary>
    public string? Damage { get; private set; }

    /// <summary>Opens a trace.</summary>
    /// <param name="stream">Its bytes; must be seekable. The trace's to dispose, also when this throws.</param>
    /// <exception cref="TraceFormatException">It is no trace, or of another version, or too short for one.</exception>
    /// <exception cref="IOException">It cannot be read.</exception>
    public static TraceFile Open(Stream stream)
    {
        ArgumentNullException.ThrowIfNull(stream);
        try
        {
            var file = new TraceFile(stream, ReadHeader(stream));
            file.FindBlocks();
            return file;
        }
        catch
        {
            stream.Dispose();
            throw;
        }
    }

    public void Dispose() => _stream.Dispose();

    /// <summary>
    /// All records by their start, a multicall before the calls in it. Each is an object of its own. One enumeration at a time.
    /// </summary>
    /// <exception cref="TraceFormatException">A block that is whole holds what no recorder writes.</exception>
    public IEnumerable<TraceRecord> Records()
    {
        IEnumerator<TraceRecord>[] vcpus = [.. _vcpus.Select(pair => InOrder(pair.Value).GetEnumerator())];
        if (vcpus.Length == 1)
        {
            while (vcpus[0].MoveNext())
                yield return vcpus[0].Current;
            yield break;
        }

        var next = new PriorityQueue<IEnumerator<TraceRecord>, (ulong Start, ushort Vcpu)>();
        foreach (IEnumerator<TraceRecord> vcpu in vcpus)
            Advance(vcpu);
        while (next.TryDequeue(out IEnumerator<TraceRecord>? vcpu, out _))
        {
            yield return vcpu.Current;
            Advance(vcpu);
        }

        void Advance(IEnumerator<TraceRecord> vcpu)
        {
            if (vcpu.MoveNext())
                next.Enqueue(vcpu, (vcpu.Current.Start, vcpu.Current.Vcpu));
        }
    }

    private static TraceHeader ReadHeader(Stream stream)
    {
        byte[] bytes = new byte[TraceFormat.MaxHeaderSize];
        int read = stream.ReadAtLeast(bytes.AsSpan(0, TraceFormat.PreambleSize), TraceFormat.PreambleSize, throwOnEndOfStream: false);
        if (read == 0)
            throw new TraceFormatException("is empty: the run that was to write it did not get as far as that; make it anew with --trace.");
        int compared = Math.Min(read, TraceFormat.Magic.Length);
        if (!bytes.AsSpan(0, compared).SequenceEqual(TraceFormat.Magic[..compared]))
            throw new TraceFormatException("is no trace of XenSharp's; name a file that run --trace has written.");
        if (read == TraceFormat.PreambleSize)
        {
            (ushort version, int length) = TraceFormat.ReadPreamble(bytes);
            if (version != TraceFormat.Version)
            {
                throw new TraceFormatException(
                    $"is a trace of version {version}, and this build reads version {TraceFormat.Version}; use the XenSharp that wrote it, or make it anew.");
            }

            if (length is < TraceFormat.PreambleSize or > TraceFormat.MaxHeaderSize)
                throw new TraceFormatException("is damaged in its header, so nothing of it can be read; make it anew with --trace.");
            int rest = length - TraceFormat.PreambleSize;
            if (stream.ReadAtLeast(bytes.AsSpan(TraceFormat.PreambleSize, rest), rest, throwOnEndOfStream: false) == rest)
            {
                return TraceFormat.ReadHeader(bytes.AsSpan(0, length))
                    ?? throw new TraceFormatException("is damaged in its header, so nothing of it can be read; make it anew with --trace.");
            }
        }

        throw new TraceFormatException("breaks off within its header, so nothing of it can be read; make it anew with --trace.");
    }

    private void FindBlocks()
    {
        byte[] header = new byte[TraceFormat.BlockHeaderSize];
        byte[] contents = new byte[TraceFormat.MaxBlockLength];
        while (true)
        {
            long offset = _stream.Position;
            int read = _stream.ReadAtLeast(header, header.Length, throwOnEndOfStream: false);
            if (read == 0)
            {
                Damage = "has no end: the run that wrote it was killed, or goes on still. It is shown as far as it was written.";
                return;
            }

            if (read < header.Length)
            {
                BreaksOff(offset);
                return;
            }

            if (!TraceFormat.TryReadBlockHeader(header, out TraceBlockHeader block))
            {
                IsDamaged(offset);
                return;
            }

            Span<byte> body = contents.AsSpan(0, block.Length);
            if (_stream.ReadAtLeast(body, body.Length, throwOnEndOfStream: false) < body.Length)
            {
                BreaksOff(offset);
                return;
            }

            if (!TraceFormat.IsIntact(header, body))
            {
                IsDamaged(offset);
                return;
            }

            if (block.Kind == TraceBlockKind.End)
            {
                ulong written = BitConverter.ToUInt64(body);
                if (written != Count)
                    Damage = $"lacks blocks: of {written} records {Count} are there. They are shown.";
                else if (_stream.ReadByte() >= 0)
                    Damage = $"goes on behind its end, at byte {offset + header.Length + body.Length}. That part is left out.";
                return;
            }

            if (!_vcpus.TryGetValue(block.Vcpu, out List<Block>? blocks))
                _vcpus[block.Vcpu] = blocks = [];
            blocks.Add(new Block(offset + header.Length, block));
            Count += block.Count;
        }
    }

    private void BreaksOff(long offset) => Damage = $"breaks off within the block at byte {offset}. It is shown up to there.";

    private void IsDamaged(long offset) => Damage = $"is damaged in the block at byte {offset}. It is shown up to there.";

    /// <summary>One vCPU's records by their start: calls in a multicall were recorded before it, since they ended before it.</summary>
    private IEnumerable<TraceRecord> InOrder(List<Block> blocks)
    {
        List<TraceRecord> nested = [];
        foreach (TraceRecord record in AsRecorded(blocks))
        {
            if (record.Has(TraceFlags.Nested))
            {
                nested.Add(record);
                continue;
            }

            // Where a defect ended the recording of a multicall, its calls stand alone.
            bool belongs = nested.Count > 0 && record.Start <= nested[0].Start;
            if (belongs)
                yield return record;
            foreach (TraceRecord call in nested)
                yield return call;
            nested.Clear();
            if (!belongs)
                yield return record;
        }

        foreach (TraceRecord call in nested)
            yield return call;
    }

    private IEnumerable<TraceRecord> AsRecorded(List<Block> blocks)
    {
        var contents = new byte[TraceFormat.MaxBlockLength];
        foreach (Block block in blocks)
        {
            _stream.Position = block.Offset;
            _stream.ReadExactly(contents, 0, block.Header.Length);
            int offset = 0;
            var state = new TraceState(block.Header.BaseTime, 0);
            for (uint i = 0; i < block.Header.Count; i++)
            {
                var record = new TraceRecord { Vcpu = block.Header.Vcpu };
                if (!TryReadAt(contents, ref offset, block.Header.Length, ref state, record))
                    throw Unreadable(block);
                yield return record;
            }

            if (offset != block.Header.Length)
                throw Unreadable(block);
        }
    }

    private static bool TryReadAt(byte[] contents, ref int offset, int end, ref TraceState state, TraceRecord record)
    {
        ReadOnlySpan<byte> rest = contents.AsSpan(offset, end - offset);
        if (!TraceEncoding.TryRead(ref rest, ref state, record))
            return false;
        offset = end - rest.Length;
        return true;
    }

    private static TraceFormatException Unreadable(Block block)
        => new($"holds something else than records in the block before byte {block.Offset}; it was not written by XenSharp. Make it anew with --trace.");
}
