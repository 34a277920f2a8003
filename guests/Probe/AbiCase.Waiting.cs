// Steps that let time pass.
namespace XenSharp.Guests.Probe;

public sealed partial class AbiCase
{
    /// <summary>
    /// Lets time pass, yielding, without a line of its own: what the line before set going at the console's other end is over then.
    /// </summary>
    /// <param name="time">How long, once the other end has taken the line.</param>
    public void Pause(TimeSpan time)
        => Step(StepOperation.Pause, $"pause {time.TotalMilliseconds:0} ms", AnswerFormat.None, [], [(ulong)time.TotalNanoseconds], quiet: true);
}
