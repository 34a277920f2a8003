// The lock of a single port or queue, and the order in which the locks of event channels are taken.
using XenSharp.Core;

namespace XenSharp.EventChannels;

/// <summary>A spin lock in the port table, or in a queue of the FIFO ABI.</summary>
/// <remarks>
/// <para>Three kinds of lock guard event channels, taken in this order:</para>
/// <list type="number">
/// <item>A domain's event lock, held by everything that allocates, binds, rebinds or frees a port of it. Of two domains, the
/// one created first is locked first (<see cref="EventLockPair"/>).</item>
/// <item>A port's own lock, held for as long as its state changes, on top of the event lock. An interdomain connection is
/// made and broken with both ends locked, the end in the earlier domain first, then the lower port.</item>
/// <item>A queue's lock, for as long as a port is put on it, in whosever name; of two of a domain, that of the lower vCPU and priority
/// first.</item>
/// </list>
/// <para>Of the first two, who sends takes one lock only, that of the port sent from: the connection cannot go away under it, so neither can the
/// far end's port, its domain's memory, or the right to set it pending. Nothing is waited for, woken or kicked with a port
/// lock held, and no event lock is asked for.</para>
/// </remarks>
public static unsafe class PortLock
{
    public static void Enter(EventChannelPortState* port) => Enter(&port->Lock);

    public static void Exit(EventChannelPortState* port) => Exit(&port->Lock);

    /// <summary>Takes the lock of a port or a queue.</summary>
    internal static void Enter(int* word) => SpinWord.Enter(ref *word);

    internal static void Exit(int* word) => SpinWord.Exit(ref *word);
}
