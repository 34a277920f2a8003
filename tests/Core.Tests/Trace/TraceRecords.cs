// Records of every kind, made up at random, and what makes two of them the same.
using CsCheck;
using XenSharp.Core.Trace;

namespace XenSharp.Core.Tests.Trace;

internal static class TraceRecords
{
    /// <summary>Numbers of all magnitudes, and kernel addresses.</summary>
    private static readonly Gen<ulong> AnyNumber = Gen.OneOf(
        Gen.ULong, Gen.UInt.Select(static value => (ulong)value), Gen.ULong[0, 300], Gen.ULong[0xffff_8000_0000_0000, ulong.MaxValue],
        Gen.Int[0, 5].Select(static index => ((ulong[])[0, 127, 128, ulong.MaxValue, long.MaxValue, 1UL << 63])[index]));

    private static readonly Gen<ulong[]> Registers = AnyNumber.Array[TraceRecord.RegisterCount];

    /// <summary>Any record that the recording side could write.</summary>
    public static readonly Gen<TraceRecord> Any =
        from kind in Gen.Enum<TraceKind>()
        from flags in Gen.Byte[0, 127]
        from numbers in AnyNumber.Array[16]
        from small in Gen.Select(Gen.Int[0, TraceRecord.MaxArguments], Gen.Int[0, TraceRecord.MaxDataBytes], Gen.Int[0, TraceRecord.MaxInstructionBytes])
        from bytes in Gen.Byte.Array[TraceRecord.MaxDataBytes + TraceRecord.MaxInstructionBytes]
        from trap in Gen.Select(Gen.Byte, Gen.UInt, Gen.Enum<TraceOutcome>(), Gen.Byte, Gen.UInt)
        from masks in Gen.Select(Gen.UShort, Gen.UShort)
        from before in Registers
        from after in Registers
        select Make(kind, (TraceFlags)flags, numbers, small, bytes, trap, masks, before, after);

    /// <summary>What of a record counts, as text.</summary>
    public static string Show(TraceRecord record)
    {
        var parts = new List<string> { $"{record.Kind} {record.Flags} {record.Vcpu} {record.Start} {record.Duration} {record.Rip}" };
        if (record.Kind is TraceKind.Hypercall or TraceKind.SystemCall)
        {
            HypercallArguments a = record.Arguments;
            parts.Add($"{record.Number}({string.Join(",", ((ulong[])[a.A0, a.A1, a.A2, a.A3, a.A4, a.A5])[..record.ArgumentCount])})");
            if (record.Kind == TraceKind.Hypercall)
                parts.Add($"{record.Result}");
            if (record.Kind == TraceKind.Hypercall && record.Has(TraceFlags.HasData))
                parts.Add(Convert.ToHexString(((ReadOnlySpan<byte>)record.Data)[..record.DataLength]));
        }

        if (record.Kind == TraceKind.Upcall)
            parts.Add($"{record.Outcome} {record.Address}");
        if (record.Kind is TraceKind.Exception or TraceKind.Emulation)
        {
            parts.Add($"{record.Vector} {record.ErrorCode} {record.Outcome}");
            if (record.Vector == 14)
                parts.Add($"{record.Address}");
            if (record.Outcome == TraceOutcome.Delivered)
                parts.Add($"{record.DeliveredVector} {record.DeliveredErrorCode}");
            if (record.InstructionLength > 0)
            {
                parts.Add(Convert.ToHexString(((ReadOnlySpan<byte>)record.Instruction)[..record.InstructionLength]));
                parts.Add(ShowRegisters(record.RegistersRead, record.Before));
                parts.Add(ShowRegisters(record.RegistersWritten, record.After));
            }

            if (record.Has(TraceFlags.HasEntry))
                parts.Add($"{record.EntryBefore} {record.EntryAfter}");
        }

        return string.Join(" ", parts);
    }

    /// <summary>A hypercall at a time.</summary>
    public static TraceRecord Hypercall(ulong start, ulong number = 29, long result = 0, TraceFlags flags = TraceFlags.KernelMode) => new()
    {
        Kind = TraceKind.Hypercall,
        Flags = flags,
        Start = start,
        Duration = 7,
        Rip = 0xffff_ffff_8100_0000,
        Number = number,
        ArgumentCount = 2,
        Arguments = new HypercallArguments { A0 = 1, A1 = start },
        Result = result,
    };

    private static string ShowRegisters(ushort mask, ReadOnlySpan<ulong> values)
    {
        string text = $"{mask:x}";
        for (int i = 0; i < TraceRecord.RegisterCount; i++)
            text += (mask & (1 << i)) != 0 ? $" {values[i]}" : "";
        return text;
    }

    private static TraceRecord Make(
        TraceKind kind, TraceFlags flags, ulong[] numbers, (int Arguments, int Data, int Instruction) lengths, byte[] bytes,
        (byte Vector, uint Error, TraceOutcome Outcome, byte Delivered, uint DeliveredError) trap, (ushort Read, ushort Written) masks, ulong[] before, ulong[] after)
    {
        var record = new TraceRecord
        {
            Kind = kind,
            Flags = flags,
            Start = numbers[0],
            Duration = numbers[1],
            Rip = numbers[2],
            Number = numbers[3],
            ArgumentCount = lengths.Arguments,
            Arguments = new HypercallArguments { A0 = numbers[4], A1 = numbers[5], A2 = numbers[6], A3 = numbers[7], A4 = numbers[8], A5 = numbers[9] },
            Result = (long)numbers[10],
            DataLength = lengths.Data,

            // Half of them page faults, which have an address.
            Vector = (trap.Vector & 1) != 0 ? (byte)14 : trap.Vector,
            ErrorCode = trap.Error,
            Address = numbers[11],
            Outcome = trap.Outcome,
            DeliveredVector = trap.Delivered,
            DeliveredErrorCode = trap.DeliveredError,
            InstructionLength = lengths.Instruction,
            RegistersRead = masks.Read,
            RegistersWritten = masks.Written,
            EntryBefore = numbers[12],
            EntryAfter = numbers[13],
        };
        bytes.AsSpan(0, TraceRecord.MaxDataBytes).CopyTo(record.Data);
        bytes.AsSpan(TraceRecord.MaxDataBytes).CopyTo(record.Instruction);
        before.CopyTo((Span<ulong>)record.Before);
        after.CopyTo((Span<ulong>)record.After);
        return record;
    }
}
