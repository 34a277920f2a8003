// One domain of an ABI script: its image, what lies where in it, and its steps in the probe's language.
using System.Runtime.InteropServices;
using Iced.Intel;
using XenSharp.Guests.Assembly;

namespace XenSharp.Guests.Probe;

/// <summary>Which domain of a pair; "b" is the one that was made right after "a", and has the next number.</summary>
internal enum PairSide
{
    A,
    B,
}

/// <summary>The probe guest of one domain while its script is being written.</summary>
internal sealed class ScriptGuest
{
    private const int TurnWords = 7;

    private readonly PvAssembler _guest = new();
    private readonly PvConsole _console;
    private readonly PairSide? _side;
    private int _nextPage;
    private int _nextNote;
    private int _turnHeader;

    /// <param name="side">Which of a pair; null for a domain alone.</param>
    public ScriptGuest(PairSide? side)
    {
        _side = side;
        _console = new PvConsole(_guest);
        Variables = new ProbeVariables(_guest, side is not null);
        Symbols.Add(ProbeLayout.SharedInfoPage, ProbeLayout.PageSize, "shared_info");
        Symbols.Add(ProbeLayout.UserStackPage, ProbeLayout.PageSize, "user stack");
        Symbols.Add(ProbeLayout.Regions, ProbeLayout.End - ProbeLayout.Regions, "probe stack");
    }

    /// <summary>Steps of vCPU 0.</summary>
    public List<ulong> Code { get; } = [];

    /// <summary>Names of addresses.</summary>
    public AddressMap Symbols { get; } = new();

    public ProbeVariables Variables { get; }

    /// <summary>Holds the address of start_info.</summary>
    public ulong StartInfoVariable => _console.StartInfoVariable;

    /// <summary>How transcripts call the domain, and the other one of its pair.</summary>
    public (string Own, string Peer) Names => _side switch
    {
        PairSide.A => ("a", "b"),
        PairSide.B => ("b", "a"),
        _ => throw new InvalidOperationException("A domain alone has no name."),
    };

    /// <summary>Stands before the domain's steps in transcripts.</summary>
    public string Prefix => _side is null ? "" : $"{Names.Own}: ";

    /// <summary>Whether a step ended the domain.</summary>
    public bool HasEnded { get; set; }

    public ulong Reserve(int bytes, int alignment) => _guest.Reserve(bytes, alignment);

    public ScratchPage TakePage(string? name)
    {
        if (_nextPage == ProbeLayout.ScratchPages)
            throw new InvalidOperationException($"A script takes more than {ProbeLayout.ScratchPages} scratch pages.");
        var page = new ScratchPage(_nextPage++, name);
        Symbols.Add(page.Address, ProbeLayout.PageSize, page.Name);
        return page;
    }

    /// <summary>Takes a place of 8 bytes in the page that both domains of a pair have at one address.</summary>
    public ulong TakeNote()
    {
        if (_nextNote == ProbeLayout.Notes)
            throw new InvalidOperationException($"A side of a script has more than {ProbeLayout.Notes} values for the other.");
        return ProbeLayout.NotesOf(_side == PairSide.B) + ((ulong)_nextNote++ * 8);
    }

    /// <summary>Puts code into the image; data is executable there.</summary>
    public AddressRange DefineCode(Action<Assembler> emit)
    {
        ulong start = _guest.Reserve(0, 16);
        var assembler = new Assembler(64);
        emit(assembler);
        var bytes = new MemoryStream();
        assembler.Assemble(new StreamCodeWriter(bytes), start);
        _ = _guest.Define(bytes.GetBuffer().AsSpan(0, (int)bytes.Length), 16);
        return new AddressRange(start, start + (ulong)bytes.Length);
    }

    /// <summary>Puts steps into the image.</summary>
    /// <param name="code">The steps.</param>
    /// <param name="number">A number that no step has.</param>
    public ulong DefineSteps(List<ulong> code, int number)
    {
        code.Add(StepHeader(StepOperation.End, StepFlags.None, number, 1));
        return _guest.Define(MemoryMarshal.AsBytes(CollectionsMarshal.AsSpan(code)));
    }

    /// <summary>Emits a change of turns, whose number is not known yet.</summary>
    /// <param name="pass">The turn that the other domain waits for; 0 if it is not to go on.</param>
    /// <param name="wait">The turn that this one waits for then; 0 for none.</param>
    public void EmitTurn(ulong pass, ulong wait)
    {
        _turnHeader = Code.Count;
        Code.AddRange([0, (ulong)Token.Constant, pass, (ulong)Token.End, (ulong)Token.Constant, wait, (ulong)Token.End]);
    }

    /// <summary>Gives the last change of turns its number.</summary>
    public void NumberTurn(int number) => Code[_turnHeader] = StepHeader(StepOperation.Turn, StepFlags.Quiet, number, TurnWords);

    /// <summary>The guest, an ELF image.</summary>
    /// <param name="steps">How many steps the script has.</param>
    public byte[] Build(int steps)
    {
        ulong script = DefineSteps(Code, steps);
        new ProbeInterpreter(_guest, _console, Variables, _side).Emit(script);
        _guest.ReserveRange(ProbeLayout.ScratchBase, ProbeLayout.End);
        return _guest.Build(new GuestIdentity("xensharp-probe"));
    }

    public static ulong StepHeader(StepOperation operation, StepFlags flags, int number, int words)
        => (ulong)operation | ((ulong)flags << 8) | ((ulong)number << 16) | ((ulong)words << 32);
}
