// Traces as files: written by several vCPUs, read back, broken off and damaged in every place.
using System.Buffers.Binary;
using CsCheck;
using XenSharp.Core.Trace;

namespace XenSharp.Core.Tests.Trace;

[CancelAfter(60_000)]
public sealed class TraceFileTests
{
    private static readonly TraceHeader Header = new(
        2_000_000, 1_000_000, new DateTimeOffset(2026, 7, 1, 12, 30, 0, 123, TimeSpan.Zero), "Gast – guest", "4.17", "1.2.3");

    [Test]
    public void What_was_recorded_is_read() => TraceRecords.Any.Array[0, 400].Sample(records =>
    {
        foreach (TraceRecord record in records)
            record.Flags &= ~TraceFlags.Nested;
        using TraceFile file = TraceFile.Open(new MemoryStream(Record(records)));
        Assert.That(file.Header, Is.EqualTo(Header));
        Assert.That(file.Damage, Is.Null);
        Assert.That(file.Count, Is.EqualTo((ulong)records.Length));
        Assert.That(file.Records().Select(TraceRecords.Show), Is.EqualTo(records.Select(TraceRecords.Show)));
    }, iter: 50);

    [Test]
    public void A_long_trace_has_many_blocks_and_loses_nothing()
    {
        const int count = 50_000;
        byte[] bytes = Record(Enumerable.Range(0, count).Select(i => TraceRecords.Hypercall(1_000_000 + ((ulong)i * 50))));
        using TraceFile file = TraceFile.Open(new MemoryStream(bytes));
        ulong next = 1_000_000;
        foreach (TraceRecord record in file.Records())
        {
            Assert.That(record.Start, Is.EqualTo(next));
            next += 50;
        }

        Assert.That(next, Is.EqualTo(1_000_000 + (count * 50UL)));
        Assert.That(bytes.Length, Is.InRange(4 * 65536, count * 20), "several blocks, of short records");
    }

    [Test]
    public void Calls_of_a_multicall_come_behind_it()
    {
        TraceFlags nested = TraceFlags.KernelMode | TraceFlags.Nested;
        using TraceFile file = TraceFile.Open(new MemoryStream(Record(
            [
                TraceRecords.Hypercall(10, number: 1),
                TraceRecords.Hypercall(21, number: 3, flags: nested), TraceRecords.Hypercall(22, number: 10, flags: nested), TraceRecords.Hypercall(20, number: 13),
                TraceRecords.Hypercall(30, number: 2),

                // A multicall that a defect of ours ended.
                TraceRecords.Hypercall(40, number: 3, flags: nested), TraceRecords.Hypercall(50, number: 4),
                TraceRecords.Hypercall(60, number: 5, flags: nested),
            ])));
        Assert.That(file.Records().Select(record => record.Number), Is.EqualTo(new ulong[] { 1, 13, 3, 10, 2, 3, 4, 5 }));
    }

    [Test]
    public void Several_vCPUs_are_merged_by_time()
    {
        var bytes = new MemoryStream();
        using (var recorder = new TraceRecorder(bytes, Header))
        {
            for (ulong i = 0; i < 20_000; i++)
                recorder.Stream((ushort)(i % 3)).Append(TraceRecords.Hypercall(1000 + i));
        }

        using TraceFile file = TraceFile.Open(new MemoryStream(bytes.ToArray()));
        Assert.That(file.Records().Select(record => (record.Start, record.Vcpu)), Is.EqualTo(Enumerable.Range(0, 20_000).Select(i => (1000 + (ulong)i, (ushort)(i % 3)))));
    }

    [Test]
    public void vCPUs_record_at_the_same_time()
    {
        const int each = 30_000;
        var bytes = new MemoryStream();
        using (var recorder = new TraceRecorder(bytes, Header))
        {
            Thread[] vcpus = [.. Enumerable.Range(0, 4).Select(vcpu => new Thread(() =>
            {
                TraceStream stream = recorder.Stream((ushort)vcpu);
                for (ulong i = 0; i < each; i++)
                    stream.Append(TraceRecords.Hypercall(i));
            }))];
            foreach (Thread vcpu in vcpus)
                vcpu.Start();
            foreach (Thread vcpu in vcpus)
                vcpu.Join();
        }

        using TraceFile file = TraceFile.Open(new MemoryStream(bytes.ToArray()));
        Assert.That(file.Damage, Is.Null);
        var next = new ulong[4];
        foreach (TraceRecord record in file.Records())
            Assert.That(record.Start, Is.EqualTo(next[record.Vcpu]++));
        Assert.That(next, Is.All.EqualTo(each));
    }

    [Test]
    public void A_slow_disk_makes_vCPUs_wait_and_nothing_is_dropped()
    {
        var slow = new SlowStream(TimeSpan.FromMilliseconds(20));
        using (var recorder = new TraceRecorder(slow, Header))
        {
            TraceStream stream = recorder.Stream(0);
            for (ulong i = 0; i < 200_000; i++)
                stream.Append(TraceRecords.Hypercall(i));
            Assert.That(slow.Writes, Is.GreaterThan(20), "the disk was waited for");
        }

        using TraceFile file = TraceFile.Open(new MemoryStream(slow.ToArray()));
        Assert.That(file.Damage, Is.Null);
        Assert.That(file.Count, Is.EqualTo(200_000));
    }

    [Test]
    public void What_a_killed_process_leaves_is_not_old()
    {
        string path = Path.GetTempFileName();
        try
        {
            using var recorder = new TraceRecorder(new FileStream(path, FileMode.Create, FileAccess.Write, FileShare.ReadWrite, bufferSize: 0), Header);
            recorder.Stream(0).Append(TraceRecords.Hypercall(1));
            Assert.That(SpinWait.SpinUntil(() => Count(path) == 1, 60_000), "it is in the file though its block is not full");
            recorder.Stream(0).Append(TraceRecords.Hypercall(2));
            recorder.Stream(0).Append(TraceRecords.Hypercall(3));
            Assert.That(SpinWait.SpinUntil(() => Count(path) == 3, 60_000));
            using TraceFile file = TraceFile.Open(Reading(path));
            Assert.That(file.Damage, Does.Contain("was killed, or goes on still"));
        }
        finally
        {
            File.Delete(path);
        }

        static ulong Count(string path)
        {
            using TraceFile file = TraceFile.Open(Reading(path));
            return file.Count;
        }

        static FileStream Reading(string path) => new(path, FileMode.Open, FileAccess.Read, FileShare.ReadWrite);
    }

    [Test]
    public void Nothing_is_allocated_a_record()
    {
        using var recorder = new TraceRecorder(new SlowStream(TimeSpan.Zero), Header);
        TraceStream stream = recorder.Stream(0);
        TraceRecord record = TraceRecords.Hypercall(1);
        Append(20_000);
        long before = GC.GetAllocatedBytesForCurrentThread();
        Append(200_000);
        Assert.That(GC.GetAllocatedBytesForCurrentThread() - before, Is.LessThan(1000), "over 200,000 records");

        void Append(int count)
        {
            for (int i = 0; i < count; i++)
            {
                record.Start += 100;
                stream.Append(record);
            }
        }
    }

    [TestCase(0)]
    [TestCase(100)]
    [TestCase(70_000)]
    public void A_full_disk_ends_the_recording_and_nothing_else(int room)
    {
        var full = new FullStream(room);
        TraceRecorder? recorder = null;
        try
        {
            recorder = new TraceRecorder(full, Header);
        }
        catch (IOException failure)
        {
            Assert.That(room, Is.Zero);
            Assert.That(failure.Message, Does.Contain("No space"));
            Assert.That(full.IsDisposed, Is.True);
            return;
        }

        Assert.That(room, Is.Not.Zero);
        using (recorder)
        {
            TraceStream stream = recorder.Stream(0);
            for (ulong i = 0; i < 300_000; i++)
                stream.Append(TraceRecords.Hypercall(i));
        }

        Assert.That(recorder.Failure, Does.Contain("No space"));
        Assert.That(full.IsDisposed, Is.True);
        using TraceFile file = TraceFile.Open(new MemoryStream(full.ToArray()));
        Assert.That(file.Damage, Does.Contain("breaks off").Or.Contain("has no end"));
        Assert.That(file.Records().Count(), Is.EqualTo((int)file.Count));
    }

    [Test]
    public void Broken_off_anywhere_it_is_read_up_to_its_last_whole_block()
    {
        byte[] whole = RecordInBlocks(blocks: 3, records: 4);
        int headerLength = TraceFormat.WriteHeader(Header).Length;
        ulong[] blocksEndAt = [.. BlockEnds(whole, headerLength)];
        for (int length = 0; length < whole.Length; length++)
        {
            var cut = new MemoryStream(whole[..length]);
            if (length < headerLength)
            {
                TraceFormatException failure = Assert.Throws<TraceFormatException>(() => TraceFile.Open(cut))!;
                Assert.That(failure.Message, Does.Contain(length == 0 ? "is empty" : "breaks off within its header"), $"{length} bytes");
                continue;
            }

            using TraceFile file = TraceFile.Open(cut);
            int blocks = blocksEndAt.Count(end => end <= (ulong)length);
            Assert.That(file.Count, Is.EqualTo((ulong)Math.Min(blocks, 3) * 4), $"{length} bytes");
            Assert.That(file.Records().Count(), Is.EqualTo((int)file.Count));
            Assert.That(file.Damage, Does.Contain(blocksEndAt.Contains((ulong)length) || length == headerLength ? "has no end" : "breaks off within the block"));
        }
    }

    [Test]
    public void A_changed_byte_is_noticed_wherever_it_is()
    {
        byte[] whole = RecordInBlocks(blocks: 2, records: 3);
        for (int i = 0; i < whole.Length; i++)
        {
            byte[] changed = [.. whole];
            changed[i] ^= (byte)(1 << (i % 8));
            try
            {
                using TraceFile file = TraceFile.Open(new MemoryStream(changed));
                Assert.That(file.Damage, Is.Not.Null, $"byte {i}");
                Assert.That(file.Records().Count(), Is.EqualTo((int)file.Count));
                Assert.That(file.Count, Is.LessThanOrEqualTo(6));
            }
            catch (TraceFormatException failure)
            {
                Assert.That(failure.Message, Does.EndWith("."));
                Assert.That(i, Is.LessThan(TraceFormat.WriteHeader(Header).Length), "in the header");
            }
        }
    }

    [Test]
    public void Blocks_that_are_missing_or_too_many_are_noticed()
    {
        byte[] whole = RecordInBlocks(blocks: 3, records: 4);
        int headerLength = TraceFormat.WriteHeader(Header).Length;
        int[] ends = [.. BlockEnds(whole, headerLength).Select(end => (int)end)];
        byte[] without = [.. whole[..ends[0]], .. whole[ends[1]..]];
        using (TraceFile file = TraceFile.Open(new MemoryStream(without)))
        {
            Assert.That(file.Damage, Does.Contain("of 12 records 8 are there"));
            Assert.That(file.Count, Is.EqualTo(8));
        }

        byte[] longer = [.. whole, 0];
        using (TraceFile file = TraceFile.Open(new MemoryStream(longer)))
            Assert.That(file.Damage, Does.Contain($"goes on behind its end, at byte {whole.Length}"));
    }

    [Test]
    public void Another_version_is_refused_with_both_numbers()
    {
        byte[] bytes = Record([]);
        BinaryPrimitives.WriteUInt16LittleEndian(bytes.AsSpan(8), 77);
        Assert.That(() => TraceFile.Open(new MemoryStream(bytes)), Throws.TypeOf<TraceFormatException>().With.Message.Contains("version 77").And.Message.Contains("version 1"));
    }

    [Test]
    public void Any_file_is_a_trace_or_none() => Gen.Select(Gen.Byte.Array[0, 5000], Gen.Int[0, 2]).Sample((garbage, start) =>
    {
        byte[] header = TraceFormat.WriteHeader(Header);
        byte[] bytes = start switch { 0 => garbage, 1 => [.. TraceFormat.Magic, .. garbage], _ => [.. header, .. garbage] };
        try
        {
            using TraceFile file = TraceFile.Open(new MemoryStream(bytes));
            Assert.That(file.Damage, Is.Not.Null);
            Assert.That(file.Records(), Is.Empty);
        }
        catch (TraceFormatException failure)
        {
            Assert.That(failure.Message, Does.EndWith("."));
        }
    });

    [Test]
    public void A_block_that_is_whole_but_holds_no_records_is_refused() => Gen.Byte.Array[1, 300].Sample(contents =>
    {
        contents[0] |= 0x80;
        byte[] block = new byte[TraceFormat.BlockHeaderSize + contents.Length];
        contents.CopyTo(block, TraceFormat.BlockHeaderSize);
        TraceFormat.WriteBlockHeader(block, TraceBlockKind.Records, 0, 1, 0);
        using TraceFile file = TraceFile.Open(new MemoryStream([.. TraceFormat.WriteHeader(Header), .. block]));
        Assert.That(() => file.Records().Count(), Throws.TypeOf<TraceFormatException>());
    });

    [Test]
    public void A_name_of_any_length_is_written()
    {
        var header = Header with { GuestName = new string('ö', 5000) };
        byte[] bytes = TraceFormat.WriteHeader(header);
        Assert.That(bytes.Length, Is.LessThanOrEqualTo(TraceFormat.MaxHeaderSize));
        Assert.That(TraceFormat.ReadHeader(bytes)!.GuestName, Does.StartWith("ööö"));
    }

    private static byte[] Record(IEnumerable<TraceRecord> records)
    {
        var bytes = new MemoryStream();
        using (var recorder = new TraceRecorder(bytes, Header))
        {
            TraceStream stream = recorder.Stream(0);
            foreach (TraceRecord record in records)
                stream.Append(record);
        }

        return bytes.ToArray();
    }

    /// <summary>A trace of small blocks, as flushes make them.</summary>
    private static byte[] RecordInBlocks(int blocks, int records)
    {
        using var bytes = new MemoryStream();
        bytes.Write(TraceFormat.WriteHeader(Header));
        for (int b = 0; b < blocks; b++)
        {
            byte[] block = new byte[4096];
            int length = TraceFormat.BlockHeaderSize;
            ulong baseTime = (ulong)b * 1000;
            var state = new TraceState(baseTime, 0);
            for (int i = 0; i < records; i++)
                length += TraceEncoding.Write(TraceRecords.Hypercall(baseTime + (ulong)i), ref state, block.AsSpan(length));
            TraceFormat.WriteBlockHeader(block.AsSpan(0, length), TraceBlockKind.Records, 0, (uint)records, baseTime);
            bytes.Write(block, 0, length);
        }

        byte[] end = new byte[TraceFormat.BlockHeaderSize + TraceFormat.EndLength];
        BinaryPrimitives.WriteUInt64LittleEndian(end.AsSpan(TraceFormat.BlockHeaderSize), (ulong)(blocks * records));
        TraceFormat.WriteBlockHeader(end, TraceBlockKind.End, 0, 0, 0);
        bytes.Write(end);
        return bytes.ToArray();
    }

    private static IEnumerable<ulong> BlockEnds(byte[] trace, int offset)
    {
        while (offset < trace.Length)
        {
            Assert.That(TraceFormat.TryReadBlockHeader(trace.AsSpan(offset, TraceFormat.BlockHeaderSize), out TraceBlockHeader header), Is.True);
            offset += TraceFormat.BlockHeaderSize + header.Length;
            yield return (ulong)offset;
        }
    }

    private sealed class SlowStream(TimeSpan delay) : MemoryStream
    {
        public int Writes { get; private set; }

        public override void Write(ReadOnlySpan<byte> buffer)
        {
            Writes++;
            if (delay > TimeSpan.Zero)
                Thread.Sleep(delay);
            base.Write(buffer);
        }
    }

    /// <summary>Takes what fits, and fails as a full file system does.</summary>
    private sealed class FullStream(int room) : MemoryStream
    {
        public bool IsDisposed { get; private set; }

        public override void Write(ReadOnlySpan<byte> buffer)
        {
            int fits = (int)Math.Min(buffer.Length, room - Length);
            base.Write(buffer[..fits]);
            if (fits < buffer.Length)
                throw new IOException("No space left on device");
        }

        protected override void Dispose(bool disposing)
        {
            IsDisposed = true;
            base.Dispose(disposing);
        }
    }
}
