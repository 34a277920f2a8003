// What the back end of one kind of device does, apart from what all kinds share.
using XenSharp.Devices.Xenstore;

namespace XenSharp.Devices.Xenbus;

/// <summary>
/// The part of a back end that knows the device. One call at a time, from the device's own loop. It is disposed with the device, when nothing
/// of the guest's is in use any more, and with it what the device stands for on the host: an image, a port, a terminal.
/// </summary>
public interface IXenbusDriver : IAsyncDisposable
{
    /// <summary>Says what the back end can do, before the front end is asked; written together with <see cref="XenbusState.InitWait"/>.</summary>
    /// <param name="store">The transaction; it may be run again.</param>
    /// <param name="folder">The back end's folder.</param>
    void Announce(XenstoreTransaction store, string folder);

    /// <summary>
    /// Connects to a front end that has said all of itself: reads its nodes, maps its rings, binds its event channels, and serves it
    /// from here on.
    /// </summary>
    /// <param name="frontEnd">Its nodes.</param>
    /// <param name="cancellation">The device is going away.</param>
    /// <exception cref="XenbusException">What it says makes no sense, or cannot be done. Nothing is left mapped or bound.</exception>
    ValueTask<IXenbusConnection> ConnectAsync(XenbusFrontEnd frontEnd, CancellationToken cancellation);
}

/// <summary>
/// A device in use. Disposing it ends all use of the guest's memory and event channels: once that has completed nothing is mapped, bound
/// or under way. It may take as long as the host needs for requests under way.
/// </summary>
public interface IXenbusConnection : IAsyncDisposable
{
    /// <summary>Completes only if the connection cannot go on: with a <see cref="XenbusException"/> for what the front end did.</summary>
    Task Failure { get; }

    /// <summary>Says of the device what a front end reads once connected; written together with <see cref="XenbusState.Connected"/>.</summary>
    /// <param name="store">The transaction; it may be run again.</param>
    /// <param name="folder">The back end's folder.</param>
    void Publish(XenstoreTransaction store, string folder);
}
