// Whether it is worth while to wait for what a front end may ask for next.
namespace XenSharp.Devices.Block;

/// <summary>
/// Learns from what came of it: a front end that goes on to ask is waited for, one that first wants an answer to what it has asked is not, but
/// now and then, as it may have changed.
/// </summary>
internal sealed class Anticipation
{
    private const int MostCredit = 8;

    /// <summary>What a try that was of use begins with.</summary>
    private const int FirstCredit = 4;
    private const int CostOfMiss = 2;

    /// <summary>The next try, in occasions; a prime, as what it looks at may come in bursts.</summary>
    private const int Pause = 61;

    private int _credit;
    private int _passed;

    /// <summary>There is something that would be better done along with more of it.</summary>
    /// <returns>Whether to wait; <see cref="End"/> follows.</returns>
    public bool Begin()
    {
        if (_credit == 0 && ++_passed < Pause)
            return false;
        _passed = 0;
        return true;
    }

    /// <summary>It was waited for.</summary>
    /// <param name="asked">Whether the front end asked for more meanwhile.</param>
    public void End(bool asked)
        => _credit = !asked ? Math.Max(_credit - CostOfMiss, 0) : _credit == 0 ? FirstCredit : Math.Min(_credit + 1, MostCredit);
}
