// The steps that a case is written of.
using Iced.Intel;
using XenSharp.Guests.Assembly;

namespace XenSharp.Guests.Probe;

/// <summary>A general register, or RFLAGS, by the number that instructions encode.</summary>
public enum Register64
{
    Rax, Rcx, Rdx, Rbx, Rsp, Rbp, Rsi, Rdi, R8, R9, R10, R11, R12, R13, R14, R15, Rflags,
}

/// <summary>Memory that a script passes to hypercalls.</summary>
/// <param name="Address">Virtual address.</param>
/// <param name="Size">Bytes.</param>
/// <param name="Name">Name in transcripts.</param>
public sealed record ScriptBuffer(ulong Address, int Size, string Name)
{
    /// <summary>Its address, by name.</summary>
    public Value At => Value.Constant(Address, Name);

    /// <summary>A place in it.</summary>
    public Value this[int offset] => At + offset;

    public static implicit operator Value(ScriptBuffer buffer)
    {
        ArgumentNullException.ThrowIfNull(buffer);
        return buffer.At;
    }
}

/// <summary>
/// Writes the steps of one case. A step's exceptions and upcalls are in its own line of the transcript. Quiet steps are there only when
/// something of that kind came.
/// </summary>
public sealed partial class AbiCase
{
    private const int MaxArguments = 6;

    private readonly AbiScript _script;
    private readonly ScriptGuest _guest;
    private readonly List<ulong> _code;

    internal AbiCase(AbiScript script, ScriptGuest guest, List<ulong> code)
    {
        _script = script;
        _guest = guest;
        _code = code;
    }

    /// <summary>Takes a scratch page: mapped present, writable, with nothing but zeros in it.</summary>
    public ScratchPage Page(string? name = null) => _guest.TakePage(name);

    /// <summary>Takes scratch pages.</summary>
    public ScratchPage[] Pages(int count) => [.. Enumerable.Range(0, count).Select(_ => _guest.TakePage(null))];

    /// <summary>Reserves zeroed memory.</summary>
    public ScriptBuffer Buffer(string name, int bytes, int alignment = 8)
    {
        var buffer = new ScriptBuffer(_guest.Reserve(bytes, alignment), bytes, name);
        _guest.Symbols.Add(buffer.Address, (ulong)bytes, name);
        return buffer;
    }

    /// <summary>Reserves memory and, quietly, puts values there.</summary>
    /// <param name="name">Name in transcripts.</param>
    /// <param name="bytes">Its size.</param>
    /// <param name="fields">Offset, size in bytes and value of each field that is not 0.</param>
    public ScriptBuffer Structure(string name, int bytes, params (int Offset, int Size, Value Value)[] fields)
    {
        ScriptBuffer buffer = Buffer(name, bytes);
        foreach ((int offset, int size, Value value) in fields)
            Put(buffer[offset], size, value);
        return buffer;
    }

    /// <summary>The address of the handler that the probe has for a vector, or for a <see cref="ProbeEntry"/>.</summary>
    public Value Handler(int vector) => Value.Load(_guest.Variables.Handler(vector), $"handler(0x{vector:x})");

    /// <summary>The address of the probe's event callback.</summary>
    public Value UpcallHandler => Value.Load(_guest.Variables.UpcallHandler, "upcall handler");

    /// <summary>Machine frame of the kernel's L4.</summary>
    public Value Root => Value.Load(_guest.Variables.Root, "root");

    /// <summary>Machine frame of the user mode's L4.</summary>
    public Value UserRoot => Value.Load(_guest.Variables.UserRoot, "user root");

    /// <summary>Address of start_info.</summary>
    public Value StartInfo => Value.Load(_guest.StartInfoVariable, "start_info");

    /// <summary>Address of the machine-to-physical table.</summary>
    public Value MachineToPhys => Value.Load(_guest.Variables.MachineToPhys, "m2p");

    /// <summary>Virtual address of the boot L4.</summary>
    public Value RootAddress => Value.Load(_guest.Variables.RootAddress, "root table");

    /// <summary>Quietly names another frame as the one where <see cref="Value.EntryAddress"/> starts.</summary>
    public void SetRoot(Value mfn) => Put(_guest.Variables.Root, 8, mfn);

    /// <summary>Quietly tells the probe where the vCPU's vcpu_info is now.</summary>
    public void SetVcpuInfo(Value address, int vcpu = 0) => Put(ProbeLayout.VcpuInfoPointer(vcpu), 8, address);

    /// <summary>A hypercall.</summary>
    /// <param name="number">Which.</param>
    /// <param name="arguments">Up to six.</param>
    /// <returns>Its result.</returns>
    public Value Hypercall(GuestHypercall number, params Value[] arguments)
        => Hypercall((ulong)number, $"{HypercallNames.Of(number)}({Join(arguments)})", AnswerFormat.Result, arguments);

    /// <summary>A hypercall by any number, with a text of one's own and a form for the answer.</summary>
    public Value Hypercall(Value number, string text, AnswerFormat format, params Value[] arguments)
    {
        ArgumentNullException.ThrowIfNull(arguments);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(arguments.Length, MaxArguments);
        ulong result = _guest.Reserve(8, 8);
        Value[] all = [number, .. arguments, .. Enumerable.Repeat((Value)0, MaxArguments - arguments.Length)];
        Step(StepOperation.Hypercall, text, format, [result], all);
        return Value.Load(result, "result");
    }

    /// <summary>Stores bytes, with an ordinary MOV at kernel privilege.</summary>
    /// <param name="address">Where.</param>
    /// <param name="size">1, 2, 4 or 8.</param>
    /// <param name="value">What.</param>
    public void Store(Value address, int size, Value value)
    {
        RequireSize(size);
        Step(StepOperation.Store, $"store{size * 8} {Text(address)} := {Text(value)}", AnswerFormat.None, [(ulong)size], [address, value]);
    }

    /// <summary><see cref="Store"/> without a line of its own.</summary>
    public void Put(Value address, int size, Value value)
    {
        RequireSize(size);
        string text = $"put{size * 8} {Text(address)} := {Text(value)}";
        Step(StepOperation.Store, text, AnswerFormat.None, [(ulong)size], [address, value], quiet: true);
    }

    /// <summary>Loads bytes at kernel privilege.</summary>
    /// <returns>What was there, zero-extended.</returns>
    public Value Load(Value address, int size = 8, AnswerFormat format = AnswerFormat.Number)
    {
        RequireSize(size);
        ulong result = _guest.Reserve(8, 8);
        Step(StepOperation.Load, $"load{size * 8} {Text(address)}", format, [(ulong)size, result], [address]);
        return Value.Load(result, $"loaded from {Text(address)}");
    }

    /// <summary>Loads bytes without a line of its own.</summary>
    public Value Get(Value address, int size = 8)
    {
        RequireSize(size);
        ulong result = _guest.Reserve(8, 8);
        Step(StepOperation.Load, $"get{size * 8} {Text(address)}", AnswerFormat.None, [(ulong)size, result], [address], quiet: true);
        return Value.Load(result, $"was at {Text(address)}");
    }

    /// <summary>Shows a value.</summary>
    public void Show(Value value, AnswerFormat format = AnswerFormat.Number) => Step(StepOperation.Show, Text(value), format, [], [value]);

    /// <summary>Evaluates an expression now, quietly, for later.</summary>
    public Value Keep(Value value, string name)
    {
        ulong place = _guest.Reserve(8, 8);
        Put(place, 8, value);
        return Value.Load(place, name);
    }

    /// <summary>Quietly stores a row of 64-bit words.</summary>
    /// <param name="address">Of the first.</param>
    /// <param name="count">How many.</param>
    /// <param name="stride">Bytes from one to the next.</param>
    /// <param name="value">The first word.</param>
    /// <param name="increment">By how much each is more than the one before.</param>
    public void Fill(Value address, Value count, Value stride, Value value, Value? increment = null)
    {
        string text = $"fill {Text(count)} words from {Text(address)}";
        Step(StepOperation.Fill, text, AnswerFormat.None, [], [address, count, stride, value, increment ?? 0], quiet: true);
    }

    /// <summary>Runs instructions at kernel privilege.</summary>
    /// <param name="text">What they are, for the transcript.</param>
    /// <param name="emit">Emits them; a RET follows.</param>
    /// <param name="show">Registers to show afterwards.</param>
    /// <param name="with">Registers to start with; the others are 0, RFLAGS is 2.</param>
    /// <param name="resumes">Exceptions to come back from by iret; the next one ends the step.</param>
    /// <returns>The registers afterwards, for later steps up to the next run.</returns>
    public RunRegisters Kernel(
        string text, Action<Assembler> emit, Register64[]? show = null, (Register64 Register, Value Value)[]? with = null, int resumes = 0)
    {
        ArgumentNullException.ThrowIfNull(emit);
        AddressRange code = _guest.DefineCode(assembler =>
        {
            emit(assembler);
            assembler.ret();
        });
        Run(StepOperation.RunKernel, $"kernel: {text}", code, show, with, resumes, 0);
        return new RunRegisters(0);
    }

    /// <summary>Runs instructions at user privilege, in user mode's tables, which show the probe's image and nothing else.</summary>
    /// <param name="text">What they are, for the transcript.</param>
    /// <param name="emit">Emits them; a SYSCALL follows, which loses RCX and R11.</param>
    /// <param name="show">Registers to show afterwards.</param>
    /// <param name="with">Registers to start with; the others are 0, RFLAGS is 2, RSP <see cref="ProbeLayout.UserStackTop"/>.</param>
    /// <param name="resumes">Exceptions to come back from by iret; the next one ends the step.</param>
    /// <returns>The registers afterwards, for later steps up to the next run.</returns>
    public RunRegisters User(
        string text, Action<Assembler> emit, Register64[]? show = null, (Register64 Register, Value Value)[]? with = null, int resumes = 0)
    {
        ArgumentNullException.ThrowIfNull(emit);
        AddressRange code = _guest.DefineCode(assembler =>
        {
            emit(assembler);
            assembler.syscall();
        });
        Run(StepOperation.RunUser, $"user: {text}", code, show, with, resumes, code.End);
        return new RunRegisters(0);
    }

    /// <summary>Waits, yielding, until upcalls came.</summary>
    /// <param name="count">How many, those of the step included.</param>
    /// <param name="timeout">At most so long.</param>
    public void WaitUpcalls(int count, TimeSpan timeout)
    {
        string text = $"wait for {count} upcall{(count == 1 ? "" : "s")}, {timeout.TotalMilliseconds:0} ms at most";
        Step(StepOperation.WaitUpcalls, text, AnswerFormat.None, [], [count, (ulong)timeout.TotalNanoseconds]);
    }

    /// <summary>Sets evtchn_upcall_mask; no hypervisor looks before the next hypercall.</summary>
    public void MaskUpcalls(bool masked) => Put(Value.Load(ProbeLayout.VcpuInfoPointer(0)) + 1, 1, masked ? 1 : 0);

    private static string Text(Value value)
    {
        ArgumentNullException.ThrowIfNull(value);
        return value.Text;
    }

    private static string Join(Value[] values) => string.Join(", ", values.Select(Text));

    private static void RequireSize(int size)
    {
        if (size is not (1 or 2 or 4 or 8))
            throw new ArgumentOutOfRangeException(nameof(size), size, "The size must be 1, 2, 4 or 8 bytes.");
    }

    private void Run(
        StepOperation operation, string text, AddressRange code, Register64[]? show, (Register64 Register, Value Value)[]? with, int resumes,
        ulong userEnd)
    {
        ulong shown = 0;
        foreach (Register64 register in show ?? [])
            shown |= 1UL << (int)register;
        (Register64 Register, Value Value)[] given = [.. (with ?? []).OrderBy(static pair => pair.Register)];
        if (given.DistinctBy(static pair => pair.Register).Count() != given.Length)
            throw new ArgumentException("A register is given twice.", nameof(with));
        ulong set = 0;
        foreach ((Register64 register, _) in given)
            set |= 1UL << (int)register;
        string inputs = string.Concat(given.Select(static pair => $", {pair.Register.ToString().ToLowerInvariant()} {Text(pair.Value)}"));
        ReadOnlySpan<ulong> words = [code.Start, set, shown, (ulong)resumes, userEnd];
        Step(operation, text + inputs, AnswerFormat.None, words, [.. given.Select(static pair => pair.Value)], code: code);
    }

    private void Step(
        StepOperation operation, string text, AnswerFormat format, ReadOnlySpan<ulong> words, Value[] expressions, bool quiet = false,
        AddressRange? code = null)
    {
        // Other vCPUs' steps are done beside those of vCPU 0, which alone takes turns.
        if (_code == _guest.Code)
            _script.TakeTurn(_guest);
        Emit(operation, text, format, words, expressions, quiet, code);
    }

    private void Emit(
        StepOperation operation, string text, AnswerFormat format, ReadOnlySpan<ulong> words, Value[] expressions, bool quiet,
        AddressRange? code)
    {
        int number = _script.AddStep(_guest, text, format, quiet, code);
        int header = _code.Count;
        _code.Add(0);
        _code.AddRange(words);
        foreach (Value expression in expressions)
        {
            _code.AddRange(expression.Code);
            _code.Add((ulong)Token.End);
        }

        _code[header] = ScriptGuest.StepHeader(operation, quiet ? StepFlags.Quiet : StepFlags.None, number, _code.Count - header);
    }
}

/// <summary>The registers that the last run of code left, of one vCPU.</summary>
public readonly record struct RunRegisters(int Vcpu)
{
    public Value this[Register64 register]
        => Value.Load(ProbeLayout.Region(Vcpu) + ProbeLayout.RegistersOut + ((ulong)register * 8), register.ToString().ToLowerInvariant());
}
