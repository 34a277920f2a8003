// Whether it is worth while to keep answers back for those that may follow.
namespace XenSharp.Devices.Block;

/// <summary>
/// Learns from what came of it: a front end that goes on to ask without having been answered is waited for, one that waits for each of its
/// answers is not, but now and then, as it may have changed.
/// </summary>
internal sealed class AnswerHold
{
    private const int MostCredit = 8;

    /// <summary>What a try that was of use begins with.</summary>
    private const int FirstCredit = 4;
    private const int CostOfMiss = 2;

    /// <summary>The next try, in occasions; a prime, as what it looks at may come in bursts.</summary>
    private const int Pause = 61;

    private int _credit;
    private int _passed;

    /// <summary>There are answers to keep back.</summary>
    /// <returns>Whether to do so; <see cref="End"/> follows.</returns>
    public bool Begin()
    {
        if (_credit == 0 && ++_passed < Pause)
            return false;
        _passed = 0;
        return true;
    }

    /// <summary>It was done.</summary>
    /// <param name="asked">Whether the front end asked for more meanwhile.</param>
    public void End(bool asked)
        => _credit = !asked ? Math.Max(_credit - CostOfMiss, 0) : _credit == 0 ? FirstCredit : Math.Min(_credit + 1, MostCredit);
}
