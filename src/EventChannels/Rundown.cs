namespace XenSharp.EventChannels;

/// <summary>
/// Keeps a domain's unmanaged memory and processors in place for threads that come from outside of it: back ends, other domains.
/// </summary>
internal struct Rundown
{
    private const int Closed = 1;
    private const int User = 2;

    private int _state;

    /// <summary>Starts a use.</summary>
    /// <returns>False when there is nothing left to use; then no <see cref="Exit"/> is due.</returns>
    internal bool TryEnter()
    {
        if ((Interlocked.Add(ref _state, User) & Closed) == 0)
            return true;
        Exit();
        return false;
    }

    internal void Exit() => Interlocked.Add(ref _state, -User);

    /// <summary>Lets nobody in any more and waits until the last has left.</summary>
    internal void Close()
    {
        _ = Interlocked.Or(ref _state, Closed);
        SpinWait wait = default;
        while (Volatile.Read(ref _state) != Closed)
            wait.SpinOnce();
    }
}
