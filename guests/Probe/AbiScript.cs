// An ABI script: cases of steps, what becomes a probe guest, and the way from its console back to a transcript.
using System.Runtime.InteropServices;
using Iced.Intel;
using XenSharp.Guests.Assembly;

namespace XenSharp.Guests.Probe;

/// <summary>
/// A script for the probe guest. All its cases run in one domain, in order; what one leaves behind the next one finds, so cases take fresh
/// scratch pages, and a case that ends the domain comes last.
/// </summary>
public sealed class AbiScript
{
    private readonly PvAssembler _guest = new();
    private readonly PvConsole _console;
    private readonly List<ulong> _code = [];
    private readonly List<AbiStep> _steps = [];
    private readonly List<(string Name, int FirstStep)> _cases = [];
    private int _nextPage;
    private bool _built;

    /// <summary>A script of one subject.</summary>
    /// <param name="name">Of a–z, 0–9, '-' and '_'; unique, and the name of its file.</param>
    /// <param name="subject">The row of the ABI that it is about, for summaries: "mmu_update", "exceptions".</param>
    /// <param name="cases">Writes the cases.</param>
    public AbiScript(string name, string subject, Action<AbiScript> cases)
    {
        ArgumentException.ThrowIfNullOrEmpty(name);
        ArgumentNullException.ThrowIfNull(cases);
        Name = name;
        Subject = subject;
        _console = new PvConsole(_guest);
        Variables = new ProbeVariables(_guest);
        Symbols.Add(ProbeLayout.SharedInfoPage, ProbeLayout.PageSize, "shared_info");
        Symbols.Add(ProbeLayout.UserStackPage, ProbeLayout.PageSize, "user stack");
        Symbols.Add(ProbeLayout.Regions, ProbeLayout.End - ProbeLayout.Regions, "probe stack");
        cases(this);
    }

    public string Name { get; }

    public string Subject { get; }

    /// <summary>vCPUs that the domain must have.</summary>
    public int Vcpus { get; private set; } = 1;

    /// <summary>The cases' names, in order.</summary>
    public IReadOnlyList<string> Cases => [.. _cases.Select(static c => c.Name)];

    /// <summary>All steps, in order.</summary>
    public IReadOnlyList<AbiStep> Steps => _steps;

    /// <summary>Names of addresses.</summary>
    public AddressMap Symbols { get; } = new();

    internal ProbeVariables Variables { get; }

    /// <summary>Holds the address of start_info.</summary>
    internal ulong StartInfoVariable => _console.StartInfoVariable;

    /// <summary>Writes a case.</summary>
    /// <param name="name">What it is about, as a phrase.</param>
    /// <param name="steps">Writes its steps.</param>
    public void Case(string name, Action<AbiCase> steps)
    {
        ArgumentNullException.ThrowIfNull(steps);
        if (_cases.Any(c => c.Name == name))
            throw new ArgumentException($"The script {Name} has two cases named \"{name}\".", nameof(name));
        _cases.Add((name, _steps.Count));
        steps(new AbiCase(this, _code));
    }

    /// <summary>The guest, an ELF image.</summary>
    public byte[] Build()
    {
        if (_built)
            throw new InvalidOperationException($"The script {Name} was built before.");
        _built = true;
        _code.Add(StepHeader(StepOperation.End, StepFlags.None, _steps.Count, 1));
        ulong script = _guest.Define(MemoryMarshal.AsBytes(CollectionsMarshal.AsSpan(_code)));
        new ProbeInterpreter(_guest, _console, Variables).Emit(script);
        _guest.ReserveRange(ProbeLayout.ScratchBase, ProbeLayout.End);
        return _guest.Build(new GuestIdentity("xensharp-probe"));
    }

    /// <summary>The transcript of a run.</summary>
    /// <param name="console">What the guest printed.</param>
    /// <param name="ending">How the domain ended, as a word.</param>
    public Transcript Read(string console, string ending)
    {
        ArgumentNullException.ThrowIfNull(console);
        Dictionary<int, ProbeLine> lines = [];
        foreach (string line in console.Split('\n'))
        {
            if (ProbeLine.TryParse(line) is { } parsed)
                lines.TryAdd(parsed.Step, parsed);
        }

        bool complete = console.Split('\n').Any(static line => line.TrimEnd('\r') == ".");
        List<CaseTranscript> cases = [];
        for (int i = 0; i < _cases.Count; i++)
        {
            int end = i + 1 < _cases.Count ? _cases[i + 1].FirstStep : _steps.Count;
            List<TranscriptLine> transcript = [];
            for (int number = _cases[i].FirstStep; number < end; number++)
            {
                AbiStep step = _steps[number];
                if (lines.TryGetValue(number, out ProbeLine? line))
                    transcript.Add(new TranscriptLine(step.Text, step.Answer(line, Symbols)));
                else if (!step.Quiet)
                    transcript.Add(new TranscriptLine(step.Text, null));
            }

            cases.Add(new CaseTranscript(_cases[i].Name, transcript));
        }

        return new Transcript(Name, cases, complete ? ending : $"{ending}, before the script's end");
    }

    internal static ulong StepHeader(StepOperation operation, StepFlags flags, int number, int words)
        => (ulong)operation | ((ulong)flags << 8) | ((ulong)number << 16) | ((ulong)words << 32);

    internal int AddStep(string text, AnswerFormat format, bool quiet, AddressRange? code)
    {
        if (text.Contains(" = ", StringComparison.Ordinal) || text.Contains('\n') || text.StartsWith('#')
            || text.StartsWith("==", StringComparison.Ordinal))
            throw new ArgumentException($"\"{text}\" would not be told apart in a transcript.");
        if (_steps.Count > ushort.MaxValue)
            throw new InvalidOperationException($"The script {Name} has too many steps.");
        _steps.Add(new AbiStep(_steps.Count, text, format, quiet, code));
        return _steps.Count - 1;
    }

    internal ulong Reserve(int bytes, int alignment) => _guest.Reserve(bytes, alignment);

    internal void RequireVcpus(int count) => Vcpus = Math.Max(Vcpus, count);

    internal ScratchPage TakePage(string? name)
    {
        if (_nextPage == ProbeLayout.ScratchPages)
            throw new InvalidOperationException($"The script {Name} takes more than {ProbeLayout.ScratchPages} scratch pages.");
        var page = new ScratchPage(_nextPage++, name);
        Symbols.Add(page.Address, ProbeLayout.PageSize, page.Name);
        return page;
    }

    /// <summary>Puts code into the image; data is executable there.</summary>
    internal AddressRange DefineCode(Action<Assembler> emit)
    {
        ulong start = _guest.Reserve(0, 16);
        var assembler = new Assembler(64);
        emit(assembler);
        var bytes = new MemoryStream();
        assembler.Assemble(new StreamCodeWriter(bytes), start);
        _ = _guest.Define(bytes.GetBuffer().AsSpan(0, (int)bytes.Length), 16);
        return new AddressRange(start, start + (ulong)bytes.Length);
    }

    /// <summary>Puts another vCPU's steps into the image.</summary>
    internal ulong DefineScript(Action<AbiCase> steps)
    {
        List<ulong> code = [];
        steps(new AbiCase(this, code));
        code.Add(StepHeader(StepOperation.End, StepFlags.None, _steps.Count, 1));
        return _guest.Define(MemoryMarshal.AsBytes(CollectionsMarshal.AsSpan(code)));
    }
}

/// <summary>A page of the probe's that a script may do anything with.</summary>
public sealed class ScratchPage
{
    internal ScratchPage(int index, string? name)
    {
        Name = name ?? $"page{index}";
        Address = ProbeLayout.ScratchBase + ((ulong)index * ProbeLayout.PageSize);
        ulong pfn = (Address - PvAssembler.VirtBase) / ProbeLayout.PageSize;
        At = Value.Constant(Address, Name);
        Pfn = Value.Constant(pfn, $"pfn({Name})");
        Mfn = Value.Mfn(pfn).Named($"mfn({Name})");
        EntryAddress = Value.EntryAddress(At);
    }

    public string Name { get; }

    /// <summary>Its virtual address.</summary>
    public ulong Address { get; }

    /// <summary>Its virtual address, by name.</summary>
    public Value At { get; }

    public Value Pfn { get; }

    public Value Mfn { get; }

    /// <summary>Machine address of the L1 entry that maps it.</summary>
    public Value EntryAddress { get; }

    /// <summary>A page-table entry for it with these flags.</summary>
    public Value Entry(ulong flags) => ((Mfn << 12) | flags).Named($"{Name}|0x{flags:x}");

    /// <summary>A place in it.</summary>
    public Value this[int offset] => At + offset;
}
