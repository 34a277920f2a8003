// One step of an ABI script: what it is called in transcripts, and how its outcome is written there.
using System.Text;

namespace XenSharp.Guests.Probe;

/// <summary>How the number that a step gives is written.</summary>
public enum AnswerFormat
{
    /// <summary>A negative errno by its name, else the number.</summary>
    Result,

    /// <summary>The number; scratch pages and buffers by name.</summary>
    Number,

    /// <summary>Only whether it is an error, a negative errno, zero or positive: for numbers that the ABI does not define.</summary>
    Sign,

    /// <summary>Nothing: the ABI does not define it.</summary>
    None,
}

/// <summary>A step as transcripts show it.</summary>
/// <param name="Number">Its place in the script, from 0; the probe prints it.</param>
/// <param name="Text">What it does; without " = ", which comes before the answer.</param>
/// <param name="Format">How its number is written.</param>
/// <param name="Quiet">Whether it is in the transcript only when an exception or an upcall came.</param>
/// <param name="Symbols">Names of the addresses of the domain that does it.</param>
/// <param name="Code">The code that it runs, if it does: addresses in it are written relative to it.</param>
public sealed record AbiStep(int Number, string Text, AnswerFormat Format, bool Quiet, AddressMap Symbols, AddressRange? Code = null)
{
    private static readonly string[] RegisterNames =
        ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rflags"];

    // The resume flag of a fault's frame is the processor's own business: emulated ones do not set it.
    private const ulong UndefinedFlags = 1 << 16;

    private const int PageFault = 14;

    private static readonly Dictionary<int, string> Mnemonics = new()
    {
        [0] = "#DE", [1] = "#DB", [2] = "NMI", [3] = "#BP", [4] = "#OF", [5] = "#BR", [6] = "#UD", [7] = "#NM", [8] = "#DF", [10] = "#TS",
        [11] = "#NP", [12] = "#SS", [13] = "#GP", [14] = "#PF", [16] = "#MF", [17] = "#AC", [18] = "#MC", [19] = "#XM", [21] = "#CP",
        [(int)ProbeEntry.Syscall] = "syscall", [(int)ProbeEntry.Failsafe] = "failsafe", [(int)ProbeEntry.Syscall32] = "syscall32",
        [(int)ProbeEntry.Sysenter] = "sysenter", [(int)ProbeEntry.Nmi] = "nmi",
    };

    /// <summary>The outcome in one line.</summary>
    /// <param name="line">What the probe printed.</param>
    public string Answer(ProbeLine line)
    {
        ArgumentNullException.ThrowIfNull(line);
        List<string> parts = [];
        if ((line.Result ?? line.Value) is { } number && FormatNumber(number) is { Length: > 0 } text)
            parts.Add(text);
        foreach ((int register, ulong value) in line.Registers)
            parts.Add($"{RegisterNames[register]} {FormatRegister(register, value)}");
        foreach (ProbeException exception in line.Exceptions)
            parts.Add(FormatException(exception));
        foreach (ProbeUpcall upcall in line.Upcalls)
            parts.Add(FormatUpcall(upcall));
        if (line.Unlogged != 0)
            parts.Add($"and {line.Unlogged} more");
        return parts.Count == 0 ? "done" : string.Join(", ", parts);
    }

    private static string FormatUpcall(ProbeUpcall upcall)
    {
        var ports = new StringBuilder();
        int word = upcall.Selector == 0 ? 0 : System.Numerics.BitOperations.TrailingZeroCount(upcall.Selector);
        for (int bit = 0; bit < 64; bit++)
        {
            if ((upcall.Ports >> bit & 1) != 0)
                ports.Append(ports.Length == 0 ? "" : " ").Append((word * 64) + bit);
        }

        string pending = upcall.Pending == 1 ? "" : $", pending flag {upcall.Pending}";
        return $"upcall{{ports {(ports.Length == 0 ? "none" : ports)}, selector 0x{upcall.Selector:x}{pending}, mask {upcall.SavedMask}->{upcall.Mask}}}";
    }

    private string FormatNumber(ulong number)
    {
        bool error = number >= unchecked((ulong)-4095);
        return Format switch
        {
            AnswerFormat.Result when error => ErrorNames.Of((int)(0 - number)),
            AnswerFormat.Result or AnswerFormat.Number => Symbols.Format(number, Code),
            AnswerFormat.Sign when error => ErrorNames.Of((int)(0 - number)),
            AnswerFormat.Sign => number == 0 ? "0" : "positive",
            _ => "",
        };
    }

    private string FormatRegister(int register, ulong value)
        => register == 16 ? $"0x{value & ~UndefinedFlags:x}" : Symbols.Format(value, Code);

    private string FormatException(ProbeException exception)
    {
        var text = new StringBuilder();
        text.Append(Mnemonics.GetValueOrDefault(exception.Vector) ?? $"vector 0x{exception.Vector:x}");
        if (ProbeVariables.WithErrorCode.Contains(exception.Vector))
            text.Append($"({exception.ErrorCode:x})");
        text.Append('{');
        if (exception.Vector == PageFault)
            text.Append($"cr2 {Symbols.Format(exception.FaultAddress, Code)}, ");
        if (exception.Vector == (int)ProbeEntry.Failsafe)
        {
            for (int i = 0; i < 4; i++)
                text.Append($"{"defg"[i]}s {(ushort)(exception.ErrorCode >> (16 * i)):x}, ");
        }

        text.Append($"rip {Symbols.FormatCode(exception.Rip, Code)}, cs {exception.Cs:x}, rflags {exception.Rflags & ~UndefinedFlags:x}, ");
        // Only where the frame went is defined by the ABI, not where the probe's own stack was.
        string stack = exception.FrameEnd % ProbeLayout.RegionSize == 0 ? "kernel stack"
            : exception.FrameEnd == (exception.Rsp & ~15UL) ? "same stack"
            : $"stack {Symbols.Format(exception.FrameEnd, Code)} for {Symbols.Format(exception.Rsp, Code)}";
        text.Append($"{stack}, ss {exception.Ss:x}, mask {exception.SavedMask}->{exception.Mask}}}");
        return text.ToString();
    }
}
