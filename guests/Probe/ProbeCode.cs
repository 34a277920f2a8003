// The language that the probe guest interprets: 64-bit words, a header for each step, expressions in postfix order.
namespace XenSharp.Guests.Probe;

/// <summary>
/// What a step does. A step is a header (bits 0–7 the operation, 8–15 <see cref="StepFlags"/>, 16–31 its number, 32–63 its length in
/// words) and its operands: expressions, closed by <see cref="Token.End"/>, and plain words.
/// </summary>
internal enum StepOperation : byte
{
    /// <summary>The script of this vCPU is done.</summary>
    End,

    /// <summary>Word: address for the result or 0. Expressions: number, six arguments.</summary>
    Hypercall,

    /// <summary>Word: size in bytes. Expressions: address, value.</summary>
    Store,

    /// <summary>Words: size in bytes, address for what is read. Expression: address.</summary>
    Load,

    /// <summary>Expression.</summary>
    Show,

    /// <summary>Expressions: address, count, stride, first value, increment; stores 64-bit words.</summary>
    Fill,

    /// <summary>
    /// Words: address of the code, set of registers given, set of registers shown, exceptions to return from. Expressions: the
    /// registers given, in order. The code ends with RET.
    /// </summary>
    RunKernel,

    /// <summary>As <see cref="RunKernel"/>, at user privilege; the code ends with SYSCALL, whose end is one more word at the end.</summary>
    RunUser,

    /// <summary>Expressions: number of upcalls to wait for, nanoseconds to wait at most.</summary>
    WaitUpcalls,

    /// <summary>
    /// Expression: nanoseconds to wait, yielding, from when the console's other end has taken all that was printed. It yields so often
    /// at least that the other end gets to say so as well, where both share a processor that has much else to do.
    /// </summary>
    Pause,

    /// <summary>Expressions: vCPU, nanoseconds to wait at most: for the end of its script, then prints what it printed.</summary>
    Join,

    /// <summary>Expressions: turn to pass to the other domain of a pair, turn to wait for, yielding; 0 for neither.</summary>
    Turn,
}

/// <summary>Properties of a step.</summary>
[Flags]
internal enum StepFlags : byte
{
    None = 0,

    /// <summary>Prints only what is out of order: an exception, an upcall.</summary>
    Quiet = 1,
}

/// <summary>Parts of an expression, which work on a stack of 64-bit values.</summary>
internal enum Token : ulong
{
    End,

    /// <summary>Next word: the value.</summary>
    Constant,

    /// <summary>Takes an address, leaves the 64 bits there.</summary>
    Load,
    Add,
    Subtract,
    And,
    Or,
    Xor,

    /// <summary>Next word: the distance.</summary>
    ShiftLeft,

    /// <summary>Next word: the distance.</summary>
    ShiftRight,

    /// <summary>Takes a pseudo-physical frame number, leaves the machine frame number, by the p2m list.</summary>
    Mfn,

    /// <summary>Takes a machine frame number, leaves the pseudo-physical one, by the machine-to-physical table.</summary>
    Pfn,

    /// <summary>Next word: level 1 to 4. Takes a virtual address, leaves the machine address of its entry at that level.</summary>
    EntryAddress,

    /// <summary>Leaves the system time in ns.</summary>
    SystemTime,
}

/// <summary>Pseudo vectors in the probe's log, for entries that are no exceptions.</summary>
public enum ProbeEntry
{
    Syscall = 0x100,
    Failsafe = 0x101,
    Syscall32 = 0x102,
    Sysenter = 0x103,
    Nmi = 0x104,
}
