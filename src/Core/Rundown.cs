namespace XenSharp.Core;

/// <summary>
/// Keeps a domain's unmanaged memory and processors in place for threads that come from outside of it: back ends, other domains.
/// </summary>
public struct Rundown
{
    private const int Closed = 1;
    private const int User = 2;

    private int _state;

    /// <summary>Starts a use.</summary>
    /// <returns>False when there is nothing left to use; then no <see cref="Exit"/> is due.</returns>
    public bool TryEnter()
    {
        if ((Interlocked.Add(ref _state, User) & Closed) == 0)
            return true;
        Exit();
        return false;
    }

    /// <summary>Ends a use.</summary>
    public void Exit() => Interlocked.Add(ref _state, -User);

    /// <summary>Lets nobody in any more and waits until the last has left.</summary>
    public void Close()
    {
        _ = Interlocked.Or(ref _state, Closed);
        SpinWait wait = default;
        while (Volatile.Read(ref _state) != Closed)
            wait.SpinOnce();
    }
}
