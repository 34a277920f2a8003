// What a front end did that its back end cannot work with.
using XenSharp.Core;

namespace XenSharp.Devices.Xenbus;

/// <summary>
/// The front end said or did something that ends the connection. The guest sees it in its device's error node and by the back end's
/// closing, as with xenbus_dev_fatal of Linux; nothing else happens.
/// </summary>
public sealed class XenbusException(Errno error, string message) : Exception(message)
{
    /// <summary>The error number that the node begins with.</summary>
    public Errno Error { get; } = error;
}
