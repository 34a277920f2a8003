// Records as bytes: numbers of variable length, times and addresses as differences from the record before.
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace XenSharp.Core.Trace;

/// <summary>What one record leaves for the next of its block; a block begins with its base time and address 0.</summary>
/// <param name="Time">TSC of the last record's start.</param>
/// <param name="Rip">RIP of the last record.</param>
public record struct TraceState(ulong Time, ulong Rip);

/// <summary>
/// The form of a record in a block. Kind and flags are a byte each; then start and RIP as signed differences, the duration, and
/// what the kind has. Numbers are LEB128; signed ones and those that may be kernel addresses are zigzag-coded first.
/// </summary>
public static class TraceEncoding
{
    /// <summary>No record is longer, in bytes.</summary>
    public const int MaxRecordSize = 512;

    private const int ShiftOfLastByte = 63;

    /// <summary>Writes a record.</summary>
    /// <param name="record">The record.</param>
    /// <param name="state">The block's state; moves on.</param>
    /// <param name="destination">At least <see cref="MaxRecordSize"/> bytes.</param>
    /// <returns>The bytes written.</returns>
    public static int Write(TraceRecord record, ref TraceState state, Span<byte> destination)
    {
        var writer = new Writer(destination);
        writer.Byte((byte)record.Kind);
        writer.Byte((byte)record.Flags);
        writer.Signed((long)(record.Start - state.Time));
        writer.Signed((long)(record.Rip - state.Rip));
        writer.Unsigned(record.Duration);
        state = new TraceState(record.Start, record.Rip);
        switch (record.Kind)
        {
            case TraceKind.Hypercall:
                WriteCall(ref writer, record);
                writer.Signed(record.Result);
                if (record.Has(TraceFlags.HasData))
                {
                    writer.Byte((byte)record.DataLength);
                    writer.Bytes(((ReadOnlySpan<byte>)record.Data)[..record.DataLength]);
                }

                break;
            case TraceKind.SystemCall:
                WriteCall(ref writer, record);
                break;
            case TraceKind.Upcall:
                writer.Byte((byte)record.Outcome);
                writer.Signed((long)record.Address);
                break;
            case TraceKind.Exception or TraceKind.Emulation:
                WriteTrap(ref writer, record);
                break;
        }

        return writer.Position;
    }

    /// <summary>Reads a record.</summary>
    /// <param name="source">The rest of the block; moves on.</param>
    /// <param name="state">The block's state; moves on.</param>
    /// <param name="record">Filled in; the members that its kind does not have are left alone.</param>
    /// <returns>False when the bytes are no record.</returns>
    public static bool TryRead(ref ReadOnlySpan<byte> source, ref TraceState state, TraceRecord record)
    {
        var reader = new Reader(source);
        record.Kind = (TraceKind)reader.Byte();
        record.Flags = (TraceFlags)reader.Byte();
        record.Start = state.Time + (ulong)reader.Signed();
        record.Rip = state.Rip + (ulong)reader.Signed();
        record.Duration = reader.Unsigned();
        state = new TraceState(record.Start, record.Rip);
        switch (record.Kind)
        {
            case TraceKind.Boot:
                break;
            case TraceKind.Hypercall:
                ReadCall(ref reader, record);
                record.Result = reader.Signed();
                if (record.Has(TraceFlags.HasData))
                {
                    record.DataLength = reader.Length(TraceRecord.MaxDataBytes);
                    reader.Bytes(((Span<byte>)record.Data)[..record.DataLength]);
                }

                break;
            case TraceKind.SystemCall:
                ReadCall(ref reader, record);
                break;
            case TraceKind.Upcall:
                record.Outcome = ReadOutcome(ref reader);
                record.Address = (ulong)reader.Signed();
                break;
            case TraceKind.Exception or TraceKind.Emulation:
                ReadTrap(ref reader, record);
                break;
            default:
                return false;
        }

        if (reader.Failed)
            return false;
        source = reader.Rest;
        return true;
    }

    private static void WriteCall(ref Writer writer, TraceRecord record)
    {
        writer.Unsigned(record.Number);
        writer.Byte((byte)record.ArgumentCount);
        foreach (ulong argument in AsSpan(ref record.Arguments)[..record.ArgumentCount])
            writer.Signed((long)argument);
    }

    private static void ReadCall(ref Reader reader, TraceRecord record)
    {
        record.Number = reader.Unsigned();
        record.ArgumentCount = reader.Length(TraceRecord.MaxArguments);
        foreach (ref ulong argument in AsSpan(ref record.Arguments)[..record.ArgumentCount])
            argument = (ulong)reader.Signed();
    }

    private static void WriteTrap(ref Writer writer, TraceRecord record)
    {
        writer.Byte(record.Vector);
        writer.Byte((byte)record.Outcome);
        writer.Unsigned(record.ErrorCode);
        if (record.Vector == (byte)ExceptionVector.PageFault)
            writer.Signed((long)record.Address);
        if (record.Outcome == TraceOutcome.Delivered)
        {
            writer.Byte(record.DeliveredVector);
            writer.Unsigned(record.DeliveredErrorCode);
        }

        writer.Byte((byte)record.InstructionLength);
        if (record.InstructionLength > 0)
        {
            writer.Bytes(((ReadOnlySpan<byte>)record.Instruction)[..record.InstructionLength]);
            WriteRegisters(ref writer, record.RegistersRead, record.Before);
            WriteRegisters(ref writer, record.RegistersWritten, record.After);
        }

        if (record.Has(TraceFlags.HasEntry))
        {
            writer.Signed((long)record.EntryBefore);
            writer.Signed((long)record.EntryAfter);
        }
    }

    private static void ReadTrap(ref Reader reader, TraceRecord record)
    {
        record.Vector = reader.Byte();
        record.Outcome = ReadOutcome(ref reader);
        record.ErrorCode = reader.Unsigned32();
        if (record.Vector == (byte)ExceptionVector.PageFault)
            record.Address = (ulong)reader.Signed();
        if (record.Outcome == TraceOutcome.Delivered)
        {
            record.DeliveredVector = reader.Byte();
            record.DeliveredErrorCode = reader.Unsigned32();
        }

        record.InstructionLength = reader.Length(TraceRecord.MaxInstructionBytes);
        if (record.InstructionLength > 0)
        {
            reader.Bytes(((Span<byte>)record.Instruction)[..record.InstructionLength]);
            record.RegistersRead = ReadRegisters(ref reader, record.Before);
            record.RegistersWritten = ReadRegisters(ref reader, record.After);
        }

        if (record.Has(TraceFlags.HasEntry))
        {
            record.EntryBefore = (ulong)reader.Signed();
            record.EntryAfter = (ulong)reader.Signed();
        }
    }

    private static void WriteRegisters(ref Writer writer, ushort mask, ReadOnlySpan<ulong> values)
    {
        writer.Unsigned(mask);
        for (int i = 0; i < TraceRecord.RegisterCount; i++)
        {
            if ((mask & (1 << i)) != 0)
                writer.Signed((long)values[i]);
        }
    }

    private static ushort ReadRegisters(ref Reader reader, Span<ulong> values)
    {
        ulong mask = reader.Unsigned();
        if (mask > ushort.MaxValue)
            reader.Fail();
        for (int i = 0; i < TraceRecord.RegisterCount; i++)
        {
            if ((mask & (1UL << i)) != 0)
                values[i] = (ulong)reader.Signed();
        }

        return (ushort)mask;
    }

    private static TraceOutcome ReadOutcome(ref Reader reader)
    {
        var outcome = (TraceOutcome)reader.Byte();
        if (outcome is < TraceOutcome.Delivered or > TraceOutcome.Crashed)
            reader.Fail();
        return outcome;
    }

    private static Span<ulong> AsSpan(ref HypercallArguments arguments)
        => MemoryMarshal.Cast<HypercallArguments, ulong>(new Span<HypercallArguments>(ref arguments));

    /// <summary>Writes where there is known to be room.</summary>
    private ref struct Writer(Span<byte> destination)
    {
        private readonly Span<byte> _destination = destination;

        public int Position { get; private set; }

        public void Byte(byte value) => _destination[Position++] = value;

        public void Bytes(ReadOnlySpan<byte> value)
        {
            value.CopyTo(_destination[Position..]);
            Position += value.Length;
        }

        public void Unsigned(ulong value)
        {
            while (value >= 0x80)
            {
                Byte((byte)(value | 0x80));
                value >>= 7;
            }

            Byte((byte)value);
        }

        public void Signed(long value) => Unsigned((ulong)((value << 1) ^ (value >> 63)));
    }

    /// <summary>Reads what anybody may have written: a failure is kept, and what is read from then on is 0.</summary>
    private ref struct Reader(ReadOnlySpan<byte> source)
    {
        public ReadOnlySpan<byte> Rest { get; private set; } = source;

        public bool Failed { get; private set; }

        public void Fail()
        {
            Failed = true;
            Rest = default;
        }

        public byte Byte()
        {
            if (Rest.IsEmpty)
            {
                Fail();
                return 0;
            }

            byte value = Rest[0];
            Rest = Rest[1..];
            return value;
        }

        public void Bytes(Span<byte> destination)
        {
            if (Rest.Length < destination.Length)
            {
                Fail();
                destination.Clear();
                return;
            }

            Rest[..destination.Length].CopyTo(destination);
            Rest = Rest[destination.Length..];
        }

        /// <summary>A byte that counts something.</summary>
        public int Length(int most)
        {
            byte value = Byte();
            if (value <= most)
                return value;
            Fail();
            return 0;
        }

        public ulong Unsigned()
        {
            ulong value = 0;
            for (int shift = 0; ; shift += 7)
            {
                byte next = Byte();

                // The tenth byte has room for one bit.
                if (shift == ShiftOfLastByte && next > 1)
                {
                    Fail();
                    return 0;
                }

                value |= (ulong)(next & 0x7f) << shift;
                if (next < 0x80)
                    return value;
            }
        }

        public uint Unsigned32()
        {
            ulong value = Unsigned();
            if (value > uint.MaxValue)
                Fail();
            return (uint)value;
        }

        public long Signed()
        {
            ulong value = Unsigned();
            return (long)(value >> 1) ^ -(long)(value & 1);
        }
    }
}
