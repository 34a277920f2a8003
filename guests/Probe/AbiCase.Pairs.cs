// Steps of one of two domains.
using Iced.Intel;
using XenSharp.Guests.Assembly;

namespace XenSharp.Guests.Probe;

public sealed partial class AbiCase
{
    /// <summary>Number of the domain, by its name.</summary>
    public Value Own => Value.Load(_guest.Variables.OwnDomain, _guest.Names.Own);

    /// <summary>Number of the other domain, by its name.</summary>
    public Value Peer => Value.Load(_guest.Variables.PeerDomain, _guest.Names.Peer);

    /// <summary>Quietly tells the other domain a value, as it is now.</summary>
    /// <param name="value">What only this domain can evaluate.</param>
    /// <param name="name">How transcripts call it.</param>
    /// <returns>The same for either domain.</returns>
    public Value Tell(Value value, string name)
    {
        ulong note = _guest.TakeNote();
        Put(note, 8, value);
        return Value.Load(note, name);
    }

    /// <summary>Ends the domain, whose last step this is; the other one goes on meanwhile.</summary>
    public void Shutdown(GuestShutdownReason reason)
    {
        const int Shutdown = 2;
        ScriptBuffer argument = Structure("shutdown", 8, (0, 4, (int)reason));
        _script.LeaveToOther(_guest);
        Value[] arguments = [(int)GuestHypercall.SchedOp, Shutdown, argument, 0, 0, 0, 0];
        Emit(StepOperation.Hypercall, $"sched_op(shutdown, {reason})", AnswerFormat.Result, [0], arguments, quiet: false, null);
    }

    /// <summary>Runs instructions at kernel privilege that end the domain, as its last step; the other one goes on meanwhile.</summary>
    /// <param name="text">What they are, for the transcript.</param>
    /// <param name="emit">Emits them.</param>
    public void End(string text, Action<Assembler> emit)
    {
        ArgumentNullException.ThrowIfNull(emit);
        AddressRange code = _guest.DefineCode(emit);
        _script.LeaveToOther(_guest);
        Emit(StepOperation.RunKernel, $"kernel: {text}", AnswerFormat.None, [code.Start, 0, 0, 0, 0], [], quiet: false, code);
    }
}
