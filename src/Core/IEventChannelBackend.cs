namespace XenSharp.Core;

/// <summary>
/// The backend's end of an interdomain event channel whose other end is in a guest: what a device implemented in C# holds
/// to ring the guest and to be rung by it.
/// </summary>
/// <remarks>Any thread may call any member; at most one <see cref="WaitAsync"/> may be under way at a time.</remarks>
public interface IEventChannelBackend
{
    /// <summary>Sets the guest's port pending and wakes or kicks its vCPU, as EVTCHNOP_send from the remote end does.</summary>
    void Notify();

    /// <summary>
    /// Waits until the guest has sent on the channel since the last completed wait; sends in between coalesce into one.
    /// </summary>
    /// <returns><see langword="true"/> for a notification; <see langword="false"/> when the channel is closed for good
    /// (the domain is gone, or this end was closed). A guest that closes its port may bind another one to this end.</returns>
    /// <exception cref="OperationCanceledException"><paramref name="cancellation"/> was signalled first.</exception>
    ValueTask<bool> WaitAsync(CancellationToken cancellation = default);
}
