// An ABI script: cases of steps, what becomes a probe guest, and the way from its console back to a transcript.
using XenSharp.Guests.Assembly;

namespace XenSharp.Guests.Probe;

/// <summary>
/// A script for the probe guest. All its cases run in one domain, in order; what one leaves behind the next one finds, so cases take fresh
/// scratch pages, and a case that ends the domain comes last. A script of a pair runs in two domains at once, "a" and "b", which take turns:
/// their steps are done in the order in which they are written, each when the one before is done, whichever domain it is in.
/// </summary>
public sealed class AbiScript
{
    private readonly ScriptGuest[] _guests;
    private readonly List<AbiStep> _steps = [];
    private readonly List<(string Name, int FirstStep)> _cases = [];

    /// <summary>Whose turn it is after the steps so far, and how often it has changed.</summary>
    private ScriptGuest _turn;
    private ulong _turns;
    private bool _built;

    /// <summary>A script of one subject, for one domain.</summary>
    /// <param name="name">Of a–z, 0–9, '-' and '_'; unique, and the name of its file.</param>
    /// <param name="subject">The row of the ABI that it is about, for summaries: "mmu_update", "exceptions".</param>
    /// <param name="cases">Writes the cases.</param>
    public AbiScript(string name, string subject, Action<AbiScript> cases)
        : this(name, subject, cases, [new ScriptGuest(null)])
    {
    }

    private AbiScript(string name, string subject, Action<AbiScript> cases, ScriptGuest[] guests)
    {
        ArgumentException.ThrowIfNullOrEmpty(name);
        ArgumentNullException.ThrowIfNull(cases);
        Name = name;
        Subject = subject;
        _guests = guests;
        _turn = guests[0];
        if (IsPair)
        {
            // "b" passes the first turn when it has mapped the page that both write turns to.
            guests[0].EmitTurn(0, 1);
            NumberTurn(guests[0]);
            guests[1].EmitTurn(1, 2);
            _turns = 1;
        }

        cases(this);
    }

    /// <summary>A script of one subject, for a pair of domains.</summary>
    /// <param name="name">Likewise.</param>
    /// <param name="subject">Likewise.</param>
    /// <param name="cases">Writes the cases.</param>
    public static AbiScript OfPair(string name, string subject, Action<AbiScript> cases)
        => new(name, subject, cases, [new ScriptGuest(PairSide.A), new ScriptGuest(PairSide.B)]);

    public string Name { get; }

    public string Subject { get; }

    /// <summary>Whether it is for a pair of domains.</summary>
    public bool IsPair => _guests.Length == 2;

    /// <summary>vCPUs that each domain must have.</summary>
    public int Vcpus { get; private set; } = 1;

    /// <summary>The cases' names, in order.</summary>
    public IReadOnlyList<string> Cases => [.. _cases.Select(static c => c.Name)];

    /// <summary>All steps, in order.</summary>
    public IReadOnlyList<AbiStep> Steps => _steps;

    /// <summary>Names of addresses; of a pair, those of "a".</summary>
    public AddressMap Symbols => _guests[0].Symbols;

    /// <summary>Writes a case.</summary>
    /// <param name="name">What it is about, as a phrase.</param>
    /// <param name="steps">Writes its steps.</param>
    /// <exception cref="InvalidOperationException">The script is for a pair.</exception>
    public void Case(string name, Action<AbiCase> steps)
    {
        ArgumentNullException.ThrowIfNull(steps);
        if (IsPair)
            throw new InvalidOperationException($"A case of the script {Name}, which is for a pair, has two sides.");
        BeginCase(name);
        steps(new AbiCase(this, _guests[0], _guests[0].Code));
    }

    /// <summary>Writes a case of a pair.</summary>
    /// <param name="name">What it is about, as a phrase.</param>
    /// <param name="steps">Writes its steps, of "a" and of "b" in the order in which they are to be done.</param>
    /// <exception cref="InvalidOperationException">The script is for one domain.</exception>
    public void Case(string name, Action<AbiCase, AbiCase> steps)
    {
        ArgumentNullException.ThrowIfNull(steps);
        if (!IsPair)
            throw new InvalidOperationException($"A case of the script {Name}, which is for one domain, has one side.");
        BeginCase(name);
        steps(new AbiCase(this, _guests[0], _guests[0].Code), new AbiCase(this, _guests[1], _guests[1].Code));
    }

    /// <summary>The guest of a script for one domain, an ELF image.</summary>
    public byte[] Build() => BuildAll().Single();

    /// <summary>The guests, ELF images: one, or those of "a" and "b".</summary>
    public IReadOnlyList<byte[]> BuildAll()
    {
        if (_built)
            throw new InvalidOperationException($"The script {Name} was built before.");
        _built = true;

        // Neither is gone before the other has done its last step.
        if (IsPair && !Other(_turn).HasEnded)
            PassTurn(forGood: true);
        return [.. _guests.Select(guest => guest.Build(_steps.Count))];
    }

    /// <summary>The transcript of a run of a script for one domain.</summary>
    /// <param name="console">What the guest printed.</param>
    /// <param name="ending">How the domain ended, as a word.</param>
    public Transcript Read(string console, string ending) => Read([(console, ending)]);

    /// <summary>The transcript of a run.</summary>
    /// <param name="runs">What each guest printed and how its domain ended, as a word.</param>
    public Transcript Read(IReadOnlyList<(string Console, string Ending)> runs)
    {
        ArgumentNullException.ThrowIfNull(runs);
        ArgumentOutOfRangeException.ThrowIfNotEqual(runs.Count, _guests.Length);
        Dictionary<int, ProbeLine> lines = [];
        List<string> endings = [];
        foreach ((ScriptGuest guest, (string console, string ending)) in _guests.Zip(runs))
        {
            string[] printed = console.Split('\n');
            foreach (ProbeLine line in printed.Select(ProbeLine.TryParse).OfType<ProbeLine>())
                lines.TryAdd(line.Step, line);
            bool complete = guest.HasEnded || printed.Any(static line => line.TrimEnd('\r') == ".");
            endings.Add($"{guest.Prefix}{ending}{(complete ? "" : ", before the script's end")}");
        }

        List<CaseTranscript> cases = [];
        for (int i = 0; i < _cases.Count; i++)
        {
            int end = i + 1 < _cases.Count ? _cases[i + 1].FirstStep : _steps.Count;
            List<TranscriptLine> transcript = [];
            for (int number = _cases[i].FirstStep; number < end; number++)
            {
                AbiStep step = _steps[number];
                if (lines.TryGetValue(number, out ProbeLine? line))
                    transcript.Add(new TranscriptLine(step.Text, step.Answer(line)));
                else if (!step.Quiet)
                    transcript.Add(new TranscriptLine(step.Text, null));
            }

            cases.Add(new CaseTranscript(_cases[i].Name, transcript));
        }

        return new Transcript(Name, cases, string.Join("; ", endings));
    }

    internal int AddStep(ScriptGuest guest, string text, AnswerFormat format, bool quiet, AddressRange? code)
    {
        if (text.Contains(" = ", StringComparison.Ordinal) || text.Contains('\n') || text.StartsWith('#')
            || text.StartsWith("==", StringComparison.Ordinal))
            throw new ArgumentException($"\"{text}\" would not be told apart in a transcript.");
        if (_steps.Count > ushort.MaxValue)
            throw new InvalidOperationException($"The script {Name} has too many steps.");
        _steps.Add(new AbiStep(_steps.Count, guest.Prefix + text, format, quiet, guest.Symbols, code));
        return _steps.Count - 1;
    }

    internal void RequireVcpus(int count) => Vcpus = Math.Max(Vcpus, count);

    /// <summary>Puts another vCPU's steps into the image.</summary>
    internal ulong DefineScript(ScriptGuest guest, Action<AbiCase> steps)
    {
        List<ulong> code = [];
        steps(new AbiCase(this, guest, code));
        return guest.DefineSteps(code, _steps.Count);
    }

    /// <summary>Before a step of a guest: it waits until the other's steps before it are done.</summary>
    internal void TakeTurn(ScriptGuest guest)
    {
        if (guest.HasEnded)
            throw new InvalidOperationException($"In the script {Name} a domain has a step after its end.");
        if (guest != _turn)
            PassTurn(forGood: false);
    }

    /// <summary>Before the step with which a guest ends: the other goes on.</summary>
    internal void LeaveToOther(ScriptGuest guest)
    {
        TakeTurn(guest);
        guest.HasEnded = true;
        if (IsPair && !Other(guest).HasEnded)
            PassTurn(forGood: true);
    }

    private void PassTurn(bool forGood)
    {
        ScriptGuest next = Other(_turn);
        _turns++;
        _turn.EmitTurn(_turns, forGood ? 0 : _turns + 1);
        if (forGood)
            NumberTurn(_turn);
        NumberTurn(next);
        _turn = next;
    }

    // What comes to a guest while it waits stands in the transcript where its turn begins.
    private void NumberTurn(ScriptGuest guest) => guest.NumberTurn(AddStep(guest, "turn", AnswerFormat.None, quiet: true, null));

    private ScriptGuest Other(ScriptGuest guest) => guest == _guests[0] ? _guests[1] : _guests[0];

    private void BeginCase(string name)
    {
        if (_cases.Any(c => c.Name == name))
            throw new ArgumentException($"The script {Name} has two cases named \"{name}\".", nameof(name));
        _cases.Add((name, _steps.Count));
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
