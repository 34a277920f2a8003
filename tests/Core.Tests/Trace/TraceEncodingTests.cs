// Records to bytes and back.
using CsCheck;
using XenSharp.Core.Trace;

namespace XenSharp.Core.Tests.Trace;

public sealed class TraceEncodingTests
{
    [Test]
    public void Records_come_back_as_they_were() => TraceRecords.Any.Array[1, 20].Sample(records =>
    {
        byte[] bytes = Encode(records, out _);
        ReadOnlySpan<byte> rest = bytes;
        TraceState state = default;
        foreach (TraceRecord record in records)
        {
            // As the reader does, into a record that has had another life.
            TraceRecord read = TraceRecords.Any.Single();
            read.Vcpu = 0;
            Assert.That(TraceEncoding.TryRead(ref rest, ref state, read), Is.True);
            Assert.That(TraceRecords.Show(read), Is.EqualTo(TraceRecords.Show(record)));
        }

        Assert.That(rest.Length, Is.Zero);
    });

    [Test]
    public void No_record_is_longer_than_the_longest()
    {
        var worst = TraceRecords.Any.Single();
        worst.Kind = TraceKind.Emulation;
        worst.Flags = (TraceFlags)127;
        (worst.Start, worst.Duration, worst.Rip, worst.Address) = (1UL << 63, ulong.MaxValue, 1UL << 63, 1UL << 63);
        (worst.Vector, worst.ErrorCode, worst.Outcome, worst.DeliveredErrorCode) = (14, uint.MaxValue, TraceOutcome.Delivered, uint.MaxValue);
        (worst.InstructionLength, worst.RegistersRead, worst.RegistersWritten) = (15, ushort.MaxValue, ushort.MaxValue);
        (worst.EntryBefore, worst.EntryAfter) = (1UL << 63, 1UL << 63);
        ((Span<ulong>)worst.Before).Fill(1UL << 63);
        ((Span<ulong>)worst.After).Fill(1UL << 63);
        int length = Encode([worst], out _).Length;
        TestContext.Out.WriteLine($"{length} bytes");
        Assert.That(length, Is.InRange(400, TraceEncoding.MaxRecordSize));
        TraceRecords.Any.Sample(record => Encode([record], out _).Length <= TraceEncoding.MaxRecordSize);
    }

    [Test]
    public void A_usual_record_is_short()
    {
        // mmu_update of one entry, some 50 µs after the one before and from the same place.
        TraceRecord[] records = [TraceRecords.Hypercall(1_000_000), TraceRecords.Hypercall(1_100_000)];
        _ = Encode(records, out int[] lengths);
        Assert.That(lengths[1], Is.LessThanOrEqualTo(16));
    }

    [Test]
    public void A_record_that_is_cut_off_is_none() => TraceRecords.Any.Sample(record =>
    {
        byte[] bytes = Encode([record], out _);
        for (int length = 0; length < bytes.Length; length++)
        {
            ReadOnlySpan<byte> cut = bytes.AsSpan(0, length);
            TraceState state = default;
            Assert.That(TraceEncoding.TryRead(ref cut, ref state, new TraceRecord()), Is.False, $"{length} of {bytes.Length} bytes");
        }
    });

    [Test]
    public void Any_bytes_are_a_record_or_none() => Gen.Byte.Array[0, 600].Sample(bytes =>
    {
        // Mostly kinds that there are.
        if (bytes.Length > 0)
            bytes[0] &= 7;
        ReadOnlySpan<byte> rest = bytes;
        TraceState state = default;
        int read = 0;
        while (TraceEncoding.TryRead(ref rest, ref state, new TraceRecord()))
            read++;
        return read <= bytes.Length / 5;
    });

    [TestCase(new byte[] { 0, 0, 0, 0, 0 }, TestName = "kind 0")]
    [TestCase(new byte[] { 7, 0, 0, 0, 0 }, TestName = "a kind that there is not")]
    [TestCase(new byte[] { 6, 0, 0, 0, 0, 1, 7, 0, 0, 0, 0, 0, 0, 0 }, TestName = "seven arguments")]
    [TestCase(new byte[] { 4, 0, 0, 0, 0, 0, 0 }, TestName = "no outcome")]
    [TestCase(new byte[] { 4, 0, 0, 0, 0, 5, 0 }, TestName = "an outcome that there is not")]
    [TestCase(new byte[] { 3, 0, 0, 0, 0, 3, 3, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }, TestName = "an instruction of 16 bytes")]
    [TestCase(new byte[] { 3, 0, 0, 0, 0, 3, 3, 0x80, 0x80, 0x80, 0x80, 0x10, 0 }, TestName = "an error code of 33 bits")]
    [TestCase(new byte[] { 1, 0, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 2, 0, 0 }, TestName = "a number of 65 bits")]
    [TestCase(new byte[] { 1, 0, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0, 0, 0 }, TestName = "a number that does not end")]
    public void What_no_recorder_writes_is_no_record(byte[] bytes)
    {
        ReadOnlySpan<byte> rest = bytes;
        TraceState state = default;
        Assert.That(TraceEncoding.TryRead(ref rest, ref state, new TraceRecord()), Is.False);
    }

    private static byte[] Encode(TraceRecord[] records, out int[] lengths)
    {
        byte[] bytes = new byte[records.Length * TraceEncoding.MaxRecordSize];
        int length = 0;
        TraceState state = default;
        lengths = new int[records.Length];
        for (int i = 0; i < records.Length; i++)
        {
            lengths[i] = TraceEncoding.Write(records[i], ref state, bytes.AsSpan(length, TraceEncoding.MaxRecordSize));
            length += lengths[i];
        }

        return bytes[..length];
    }
}
