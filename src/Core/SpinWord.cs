namespace XenSharp.Core;

/// <summary>
/// A lock that is one word of somebody's state: 0 when it is free. For what takes a few dozen instructions; not to be entered twice.
/// </summary>
public static class SpinWord
{
    private const int SpinsBeforeYield = 64;

    /// <summary>Waits until the word is free and takes it.</summary>
    public static void Enter(ref int word)
    {
        for (int spins = 1; Interlocked.CompareExchange(ref word, 1, 0) != 0; spins++)
        {
            // Where it takes longer the holder's thread was taken from its processor.
            if (spins % SpinsBeforeYield == 0)
                _ = Thread.Yield();
            else
                Thread.SpinWait(1);
        }
    }

    /// <summary>Frees the word.</summary>
    public static void Exit(ref int word) => Volatile.Write(ref word, 0);
}
