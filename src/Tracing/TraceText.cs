// Records in words: as a line for a person, as the name they are counted under, and as what two runs have in common.
using System.Buffers.Binary;
using System.Globalization;
using System.Runtime.InteropServices;
using System.Text;
using Iced.Intel;
using XenSharp.Core;
using XenSharp.Core.Trace;
using Decoder = Iced.Intel.Decoder;

namespace XenSharp.Tracing;

/// <summary>Writes records. Holds a disassembler, so: one thread at a time.</summary>
public sealed class TraceText
{
    private const int ForcedEmulationLength = 5;
    private const ulong ContinuationFlag = 0x8000_0000;
    private const ulong EntryFlags = 0xfff | (0xfffUL << 52);
    private const int LargestErrno = 4095;
    private const string Something = "*";

    private static readonly string[] RegisterNames =
        ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

    private readonly StringOutput _output = new();
    private readonly IntelFormatter _formatter = new();
    private readonly Dictionary<(ulong, ulong), string> _names = [];

    public TraceText()
    {
        _formatter.Options.HexPrefix = "0x";
        _formatter.Options.HexSuffix = string.Empty;
        _formatter.Options.UppercaseHex = false;
        _formatter.Options.SpaceAfterOperandSeparator = true;
    }

    /// <summary>The names of all hypercalls.</summary>
    public static IEnumerable<string> HypercallNames => HypercallSignature.Names;

    /// <summary>The kind, as filters and lists have it.</summary>
    public static string KindName(TraceKind kind) => kind switch
    {
        TraceKind.SystemCall => "syscall",
        _ => kind.ToString().ToLowerInvariant(),
    };

    /// <summary>The name of a hypercall: "mmu_update", or "hypercall_50" for a number that Xen does not use.</summary>
    public static string HypercallName(ulong number) => HypercallSignature.Find(number)?.Name ?? $"hypercall_{number}";

    /// <summary>Whether the guest was refused something, or the domain ended by it.</summary>
    public static bool IsError(TraceRecord record)
    {
        ArgumentNullException.ThrowIfNull(record);
        return record.Kind switch
        {
            TraceKind.Hypercall => ErrorOf(record) != null,
            TraceKind.Exception or TraceKind.Emulation or TraceKind.Upcall => record.Outcome == TraceOutcome.Crashed,
            _ => false,
        };
    }

    /// <summary>The name of the error that a hypercall returned, or null. The result of iret is the guest's own RAX.</summary>
    public static string? ErrorOf(TraceRecord record)
    {
        ArgumentNullException.ThrowIfNull(record);
        if (record.Kind != TraceKind.Hypercall || record.Has(TraceFlags.Continued) || record.Number == (ulong)HypercallNumber.Iret
            || record.Result is >= 0 or < -LargestErrno)
        {
            return null;
        }

        var error = (Errno)(-record.Result);
        return Enum.IsDefined(error) ? error.ToString() : $"error {-record.Result}";
    }

    /// <summary>What the record is counted under: hypercalls with their command ("sched_op/block"), exceptions by their vector, instructions
    /// by their mnemonic.</summary>
    public string Name(TraceRecord record)
    {
        ArgumentNullException.ThrowIfNull(record);
        switch (record.Kind)
        {
            case TraceKind.Hypercall:
                HypercallSignature? signature = HypercallSignature.Find(record.Number);
                ulong command = CommandOf(record, signature);
                if (_names.TryGetValue((record.Number, command), out string? name))
                    return name;
                name = HypercallName(record.Number) + (command == ulong.MaxValue ? string.Empty : "/" + signature!.CommandName(command));

                // A guest can name any number of commands.
                if (_names.Count < 4096)
                    _names.Add((record.Number, command), name);
                return name;
            case TraceKind.Exception:
                return VectorName(record.Vector);
            case TraceKind.Emulation:
                return EmulationName(record);
            case TraceKind.SystemCall:
                return "system call";
            default:
                return KindName(record.Kind);
        }
    }

    /// <summary>The record as one line, without time and place: "mmu_update([{…}], 1, NULL, self) = 0".</summary>
    public string Describe(TraceRecord record)
    {
        ArgumentNullException.ThrowIfNull(record);
        var text = new StringBuilder();
        switch (record.Kind)
        {
            case TraceKind.Hypercall:
                DescribeHypercall(text, record, normalised: false);
                break;
            case TraceKind.SystemCall:
                _ = text.Append(CultureInfo.InvariantCulture, $"system call {record.Number}(").AppendJoin(", ", ArgumentsOf(record).Select(Hex)).Append(')');
                break;
            case TraceKind.Upcall:
                _ = text.Append(CultureInfo.InvariantCulture, $"upcall to {Hex(record.Address)}{Outcome(record)}");
                break;
            case TraceKind.Exception:
                DescribeException(text, record);
                break;
            case TraceKind.Emulation:
                DescribeEmulation(text, record);
                break;
            default:
                _ = text.Append("the domain starts");
                break;
        }

        return text.ToString();
    }

    /// <summary>
    /// What two runs of the same guest have in common of the record: its name and arguments, without addresses, machine frames,
    /// times, and other values that are another's in each run.
    /// </summary>
    public string Normalise(TraceRecord record)
    {
        ArgumentNullException.ThrowIfNull(record);
        var text = new StringBuilder();
        switch (record.Kind)
        {
            case TraceKind.Hypercall:
                DescribeHypercall(text, record, normalised: true);
                break;
            case TraceKind.SystemCall:
                _ = text.Append(CultureInfo.InvariantCulture, $"system call {record.Number}");
                break;
            case TraceKind.Exception:
                _ = text.Append(VectorName(record.Vector)).Append(CultureInfo.InvariantCulture, $"(error {Hex(record.ErrorCode)})");
                if (record.InstructionLength > 0)
                    _ = text.Append(' ').Append(EmulatedMnemonic(record));
                _ = text.Append(Outcome(record));
                break;
            case TraceKind.Emulation:
                NormaliseEmulation(text, record);
                break;
            default:
                _ = text.Append(Name(record)).Append(Outcome(record));
                break;
        }

        return text.ToString();
    }

    /// <summary>The instruction of an exception or emulation: disassembled, or its bytes where they are no instruction; null for none.</summary>
    public string? Disassemble(TraceRecord record)
    {
        ArgumentNullException.ThrowIfNull(record);
        if (record.InstructionLength == 0)
            return null;
        Instruction instruction = Decode(record, out bool forced);
        if (instruction.IsInvalid)
            return "db " + string.Join(", ", ((ReadOnlySpan<byte>)record.Instruction)[..record.InstructionLength].ToArray().Select(static value => $"0x{value:x2}"));
        _formatter.Format(instruction, _output);
        string text = _output.ToStringAndReset();
        return forced ? "xen " + text : text;
    }

    /// <summary>Registers as "rax=0x1 rcx=0x2".</summary>
    /// <param name="mask">Which of them.</param>
    /// <param name="values">Their values.</param>
    public static IEnumerable<(string Name, ulong Value)> Registers(ushort mask, ReadOnlySpan<ulong> values)
    {
        var list = new List<(string, ulong)>();
        for (int i = 0; i < TraceRecord.RegisterCount; i++)
        {
            if ((mask & (1 << i)) != 0)
                list.Add((RegisterNames[i], values[i]));
        }

        return list;
    }

    /// <summary>The arguments of a hypercall or system call.</summary>
    public static ulong[] ArgumentsOf(TraceRecord record)
    {
        ArgumentNullException.ThrowIfNull(record);
        return MemoryMarshal.Cast<HypercallArguments, ulong>(new ReadOnlySpan<HypercallArguments>(in record.Arguments))[..record.ArgumentCount].ToArray();
    }

    /// <summary>The processor's short name of a vector: "#PF".</summary>
    public static string VectorName(byte vector) => (ExceptionVector)vector switch
    {
        ExceptionVector.DivideError => "#DE",
        ExceptionVector.Debug => "#DB",
        ExceptionVector.Nmi => "NMI",
        ExceptionVector.Breakpoint => "#BP",
        ExceptionVector.Overflow => "#OF",
        ExceptionVector.BoundRange => "#BR",
        ExceptionVector.InvalidOpcode => "#UD",
        ExceptionVector.DeviceNotAvailable => "#NM",
        ExceptionVector.DoubleFault => "#DF",
        ExceptionVector.InvalidTss => "#TS",
        ExceptionVector.SegmentNotPresent => "#NP",
        ExceptionVector.StackFault => "#SS",
        ExceptionVector.GeneralProtection => "#GP",
        ExceptionVector.PageFault => "#PF",
        ExceptionVector.X87Error => "#MF",
        ExceptionVector.AlignmentCheck => "#AC",
        ExceptionVector.MachineCheck => "#MC",
        ExceptionVector.SimdError => "#XM",
        ExceptionVector.ControlProtection => "#CP",
        _ => $"int 0x{vector:x}",
    };

    private static string Hex(ulong value) => value < 10 ? $"{value}" : $"0x{value:x}";

    private static ulong CommandOf(TraceRecord record, HypercallSignature? signature)
        => signature is { Arguments: [ArgumentForm.Command, ..] } && record.ArgumentCount > 0 ? record.Arguments.A0 & signature.CommandMask : ulong.MaxValue;

    private static string Outcome(TraceRecord record) => record.Outcome switch
    {
        TraceOutcome.Crashed => " -> crashed",
        TraceOutcome.Retried when record.Kind == TraceKind.Exception => " -> retried",
        TraceOutcome.Delivered when record.Kind == TraceKind.Exception && record.DeliveredVector == record.Vector => " -> delivered",
        TraceOutcome.Delivered when record.Kind == TraceKind.Exception => $" -> {VectorName(record.DeliveredVector)} delivered",
        _ => string.Empty,
    };

    private static void DescribeHypercall(StringBuilder text, TraceRecord record, bool normalised)
    {
        if (record.Has(TraceFlags.Resumed))
            _ = text.Append("(resumed) ");
        HypercallSignature? signature = HypercallSignature.Find(record.Number);
        _ = text.Append(HypercallName(record.Number)).Append('(');
        ulong[] arguments = ArgumentsOf(record);
        for (int i = 0; i < arguments.Length; i++)
        {
            if (i > 0)
                _ = text.Append(", ");

            // What is not a hypercall has no arguments either, only what was in the registers.
            ArgumentForm form = signature != null && i < signature.Arguments.Length ? signature.Arguments[i] : signature != null ? ArgumentForm.Number : ArgumentForm.Varying;
            if (form == ArgumentForm.Pointer && record.Has(TraceFlags.HasData) && i == (record.Number == (ulong)HypercallNumber.EventChannelOp ? 1 : 0))
                AppendData(text, record, normalised);
            else
                AppendArgument(text, signature, form, arguments[i], normalised);
        }

        _ = text.Append(") = ");
        if (record.Has(TraceFlags.Continued))
            _ = text.Append("continued");
        else if (ErrorOf(record) is { } error)
            _ = text.Append('-').Append(error);
        else if (normalised && (record.Number is (ulong)HypercallNumber.Iret or (ulong)HypercallNumber.GetDebugreg))
            _ = text.Append(Something);
        else
            _ = text.Append(record.Result is >= 0 and < 65536 ? $"{record.Result}" : $"0x{record.Result:x}");
    }

    private static void AppendArgument(StringBuilder text, HypercallSignature? signature, ArgumentForm form, ulong value, bool normalised)
    {
        _ = form switch
        {
            ArgumentForm.Command when signature!.CommandMask != ulong.MaxValue && (value & ~signature.CommandMask) != 0
                => text.Append(signature.CommandName(value)).Append(CultureInfo.InvariantCulture, $" from {value / (signature.CommandMask + 1)}"),
            ArgumentForm.Command => text.Append(signature!.CommandName(value)),
            ArgumentForm.Pointer or ArgumentForm.Varying when value == 0 => text.Append(form == ArgumentForm.Pointer ? "NULL" : "0"),
            ArgumentForm.Pointer or ArgumentForm.Varying when normalised => text.Append(Something),
            ArgumentForm.Entry when normalised => text.Append("flags ").Append(Hex(value & EntryFlags)),
            ArgumentForm.Count when value < 2 * ContinuationFlag && (value & ContinuationFlag) != 0
                => text.Append(CultureInfo.InvariantCulture, $"{value & ~ContinuationFlag} more"),
            ArgumentForm.Count when value < ContinuationFlag => text.Append(CultureInfo.InvariantCulture, $"{value}"),
            ArgumentForm.Domain when value == DomainId.Self.Value => text.Append("self"),
            ArgumentForm.Domain when value == DomainId.Io.Value => text.Append("io"),
            ArgumentForm.Domain when value == DomainId.Xen.Value => text.Append("xen"),
            _ => text.Append(Hex(value)),
        };
    }

    /// <summary>The first element of a list, or a structure, as it was found in the guest's memory.</summary>
    private static void AppendData(StringBuilder text, TraceRecord record, bool normalised)
    {
        ReadOnlySpan<byte> data = ((ReadOnlySpan<byte>)record.Data)[..record.DataLength];
        bool more = (record.Arguments.A1 & ~ContinuationFlag) > 1;
        switch ((HypercallNumber)record.Number)
        {
            case HypercallNumber.MmuUpdate when data.Length >= 16:
                ulong pointer = BinaryPrimitives.ReadUInt64LittleEndian(data);
                ulong value = BinaryPrimitives.ReadUInt64LittleEndian(data[8..]);
                _ = text.Append("[{").Append(HypercallSignature.MmuUpdateType(pointer));
                if (!normalised)
                    _ = text.Append(CultureInfo.InvariantCulture, $" {Hex(pointer & ~3UL)}: {Hex(value)}");
                else if ((pointer & 3) != 1)
                    _ = text.Append(" flags ").Append(Hex(value & EntryFlags));
                _ = text.Append('}').Append(more ? ", ...]" : "]");
                break;
            case HypercallNumber.MmuextOp when data.Length >= 24:
                uint command = BinaryPrimitives.ReadUInt32LittleEndian(data);
                _ = text.Append("[{").Append(HypercallSignature.MmuextCommand(command));
                if (!normalised)
                {
                    _ = text.Append(CultureInfo.InvariantCulture, $" {Hex(BinaryPrimitives.ReadUInt64LittleEndian(data[8..]))}")
                        .Append(CultureInfo.InvariantCulture, $" {Hex(BinaryPrimitives.ReadUInt64LittleEndian(data[16..]))}");
                }

                _ = text.Append('}').Append(more ? ", ...]" : "]");
                break;
            case HypercallNumber.EventChannelOp:
                AppendEventChannelData(text, record.Arguments.A0, data);
                break;
            default:
                _ = text.Append('{').Append(Convert.ToHexStringLower(data)).Append('}');
                break;
        }
    }

    private static void AppendEventChannelData(StringBuilder text, ulong command, ReadOnlySpan<byte> data)
    {
        uint Word(int index, ReadOnlySpan<byte> bytes) => BinaryPrimitives.ReadUInt32LittleEndian(bytes[(index * 4)..]);
        uint first = data.Length >= 4 ? Word(0, data) : 0;
        uint second = data.Length >= 8 ? Word(1, data) : 0;
        _ = command switch
        {
            0 => text.Append(CultureInfo.InvariantCulture, $"{{domain {(ushort)first}, port {second}}}"),
            1 => text.Append(CultureInfo.InvariantCulture, $"{{virq {first}, vcpu {second}}}"),
            2 => text.Append(CultureInfo.InvariantCulture, $"{{pirq {first}, flags {second}}}"),
            5 => text.Append(CultureInfo.InvariantCulture, $"{{domain {(ushort)first}, port {second}}}"),
            6 => text.Append(CultureInfo.InvariantCulture, $"{{domain {(ushort)first}, remote {first >> 16}}}"),
            7 => text.Append(CultureInfo.InvariantCulture, $"{{vcpu {first}}}"),
            8 => text.Append(CultureInfo.InvariantCulture, $"{{port {first}, vcpu {second}}}"),
            _ => text.Append(CultureInfo.InvariantCulture, $"{{port {first}}}"),
        };
    }

    private void DescribeException(StringBuilder text, TraceRecord record)
    {
        _ = text.Append(VectorName(record.Vector));
        var vector = (ExceptionVector)record.Vector;
        if (vector == ExceptionVector.PageFault)
            _ = text.Append(CultureInfo.InvariantCulture, $"(error {Hex(record.ErrorCode)}: {Access((PageFaultError)record.ErrorCode)}, address {Hex(record.Address)})");
        else if (vector.PushesErrorCode())
            _ = text.Append(CultureInfo.InvariantCulture, $"(error {Hex(record.ErrorCode)})");
        if (Disassemble(record) is { } instruction)
            _ = text.Append(" at \"").Append(instruction).Append('"');
        _ = text.Append(Outcome(record));
        if (record.Outcome == TraceOutcome.Delivered && record.DeliveredVector == record.Vector && record.DeliveredErrorCode != record.ErrorCode)
            _ = text.Append(CultureInfo.InvariantCulture, $" with error {Hex(record.DeliveredErrorCode)}");
    }

    private static string Access(PageFaultError error)
    {
        string access = (error & PageFaultError.InstructionFetch) != 0 ? "fetch" : (error & PageFaultError.Write) != 0 ? "write" : "read";
        return access + ((error & PageFaultError.ReservedBit) != 0 ? ", reserved bit" : (error & PageFaultError.Present) != 0 ? ", protection" : ", not present");
    }

    private void DescribeEmulation(StringBuilder text, TraceRecord record)
    {
        _ = text.Append(Disassemble(record) ?? "?");
        AppendRegisters(text, " [", record.RegistersRead, record.Before);
        AppendRegisters(text, " -> [", record.RegistersWritten, record.After);
        if (record.Vector == (byte)ExceptionVector.PageFault)
        {
            _ = text.Append(CultureInfo.InvariantCulture, $" at {Hex(record.Address)}");
            if (record.Has(TraceFlags.HasEntry))
                _ = text.Append(CultureInfo.InvariantCulture, $": {Hex(record.EntryBefore)} -> {Hex(record.EntryAfter)}");
        }
    }

    private static void AppendRegisters(StringBuilder text, string before, ushort mask, ReadOnlySpan<ulong> values)
    {
        if (mask != 0)
            _ = text.Append(before).AppendJoin(' ', Registers(mask, values).Select(static register => $"{register.Name}={Hex(register.Value)}")).Append(']');
    }

    private string EmulationName(TraceRecord record)
    {
        string name = EmulatedMnemonic(record);
        return record.Vector != (byte)ExceptionVector.PageFault ? name : record.Has(TraceFlags.HasEntry) ? "page-table " + name : "M2P " + name;
    }

    private static string EmulatedMnemonic(TraceRecord record)
    {
        Instruction instruction = Decode(record, out bool forced);
        string name = instruction.IsInvalid ? "?" : instruction.Mnemonic.ToString().ToLowerInvariant();
        if (instruction.Mnemonic == Mnemonic.Mov && instruction.OpCount == 2)
        {
            // Of all that mov can be, these three are privileged, and differ.
            foreach (Register register in (ReadOnlySpan<Register>)[instruction.Op0Register, instruction.Op1Register])
            {
                if (register.IsCR())
                    name = "mov cr";
                else if (register.IsDR())
                    name = "mov dr";
                else if (register.IsSegmentRegister())
                    name = "mov segment";
            }
        }

        return forced ? "xen " + name : name;
    }

    private void NormaliseEmulation(StringBuilder text, TraceRecord record)
    {
        _ = text.Append(EmulationName(record));
        Instruction instruction = Decode(record, out _);
        ulong Register(int number) => (record.RegistersRead & (1 << number)) != 0 ? record.Before[number] : 0;
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Rdmsr or Mnemonic.Wrmsr:
                _ = text.Append(' ').Append(Hex((uint)Register(1)));
                break;
            case Mnemonic.Cpuid:
                _ = text.Append(CultureInfo.InvariantCulture, $" {Hex((uint)Register(0))}.{Hex((uint)Register(1))}");
                break;
            case Mnemonic.In or Mnemonic.Out:
                int port = instruction.Mnemonic == Mnemonic.In ? 1 : 0;
                _ = text.Append(' ').Append(Hex(instruction.GetOpKind(port) == OpKind.Register ? (ushort)Register(2) : instruction.GetImmediate(port)));
                break;
            case Mnemonic.Mov when instruction.Op0Register.IsCR() || instruction.Op0Register.IsDR():
                _ = text.Append(CultureInfo.InvariantCulture, $" to {instruction.Op0Register.ToString().ToLowerInvariant()}");
                break;
            case Mnemonic.Mov when instruction.Op1Register.IsCR() || instruction.Op1Register.IsDR():
                _ = text.Append(CultureInfo.InvariantCulture, $" from {instruction.Op1Register.ToString().ToLowerInvariant()}");
                break;
        }

        if (record.Has(TraceFlags.HasEntry))
            _ = text.Append(CultureInfo.InvariantCulture, $" flags {Hex(record.EntryBefore & EntryFlags)} -> {Hex(record.EntryAfter & EntryFlags)}");
    }

    private static Instruction Decode(TraceRecord record, out bool forced)
    {
        forced = false;
        if (record.InstructionLength == 0)
            return default;
        byte[] bytes = ((ReadOnlySpan<byte>)record.Instruction)[..record.InstructionLength].ToArray();
        forced = bytes.AsSpan().StartsWith("\u000f\u000bxen"u8) && bytes.Length > ForcedEmulationLength;
        int prefix = forced ? ForcedEmulationLength : 0;
        var decoder = Decoder.Create(record.Has(TraceFlags.Code32) ? 32 : 64, bytes.AsSpan(prefix).ToArray(), record.Rip + (ulong)prefix);
        decoder.Decode(out Instruction instruction);
        return instruction;
    }
}
