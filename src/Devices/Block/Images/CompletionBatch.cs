// Operations that an image completes one after the other, whose front ends are told once.
namespace XenSharp.Devices.Block.Images;

/// <summary>Somebody whose operations are completed, and who may tell others of several at once.</summary>
internal interface ICompletionListener
{
    /// <summary>No more of its operations are completed at the moment.</summary>
    void CompletionsEnd();
}

/// <summary>
/// Completions of one thread's, from the first to <see cref="End"/>. Who has operations among them is told of the end, if it asked for that.
/// </summary>
internal sealed class CompletionBatch
{
    private readonly List<ICompletionListener> _listeners = [];

    /// <summary>Has a listener told of the end.</summary>
    /// <returns>False if it will be already.</returns>
    internal bool Add(ICompletionListener listener)
    {
        // As many as a disk has rings, at most.
        if (_listeners.Contains(listener))
            return false;
        _listeners.Add(listener);
        return true;
    }

    /// <summary>Tells all of them.</summary>
    internal void End()
    {
        foreach (ICompletionListener listener in _listeners)
            listener.CompletionsEnd();
        _listeners.Clear();
    }
}
