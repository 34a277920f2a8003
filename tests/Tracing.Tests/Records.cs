// Records and traces for the tests, as short as they can be said.
using XenSharp.Core;
using XenSharp.Core.Trace;

namespace XenSharp.Tracing.Tests;

internal static class Records
{
    /// <summary>A tick is a nanosecond.</summary>
    public static readonly TraceHeader Header = new(1_000_000, 1_000, DateTimeOffset.UnixEpoch, "test", "4.17", "0");

    public static TraceRecord Hypercall(HypercallNumber number, params ulong[] arguments)
    {
        ulong Argument(int index) => index < arguments.Length ? arguments[index] : 0;
        return new TraceRecord
        {
            Kind = TraceKind.Hypercall,
            Flags = TraceFlags.KernelMode,
            Start = Header.StartTsc,
            Number = (ulong)number,
            ArgumentCount = arguments.Length,
            Arguments = new HypercallArguments { A0 = Argument(0), A1 = Argument(1), A2 = Argument(2), A3 = Argument(3), A4 = Argument(4), A5 = Argument(5) },
        };
    }

    public static TraceRecord Result(this TraceRecord record, long result)
    {
        record.Result = result;
        return record;
    }

    public static TraceRecord At(this TraceRecord record, ulong nanoseconds, ulong duration = 100)
    {
        record.Start = Header.StartTsc + nanoseconds;
        record.Duration = duration;
        return record;
    }

    public static TraceRecord With(this TraceRecord record, TraceFlags flags)
    {
        record.Flags |= flags;
        return record;
    }

    public static TraceRecord With(this TraceRecord record, params byte[] data)
    {
        data.CopyTo((Span<byte>)record.Data);
        record.DataLength = data.Length;
        return record.With(TraceFlags.HasData);
    }

    public static TraceRecord Trap(TraceKind kind, ExceptionVector vector, TraceOutcome outcome, string instruction = "") => new TraceRecord
    {
        Kind = kind,
        Flags = TraceFlags.KernelMode,
        Start = Header.StartTsc,
        Vector = (byte)vector,
        DeliveredVector = (byte)vector,
        Outcome = outcome,
        Rip = 0xffff_ffff_8100_0000,
    }.Executing(instruction);

    public static TraceRecord Before(this TraceRecord record, int register, ulong value)
    {
        record.RegistersRead |= (ushort)(1 << register);
        record.Before[register] = value;
        return record;
    }

    public static TraceRecord After(this TraceRecord record, int register, ulong value)
    {
        record.RegistersWritten |= (ushort)(1 << register);
        record.After[register] = value;
        return record;
    }

    /// <summary>The trace that holds these records.</summary>
    public static TraceFile Trace(params IEnumerable<TraceRecord> records)
    {
        var bytes = new MemoryStream();
        using (var recorder = new TraceRecorder(bytes, Header))
        {
            foreach (TraceRecord record in records)
                recorder.Stream(record.Vcpu).Append(record);
        }

        return TraceFile.Open(new MemoryStream(bytes.ToArray()));
    }

    private static TraceRecord Executing(this TraceRecord record, string instruction)
    {
        byte[] bytes = Convert.FromHexString(instruction);
        bytes.CopyTo((Span<byte>)record.Instruction);
        record.InstructionLength = bytes.Length;
        return record;
    }
}
