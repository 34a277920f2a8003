// The states of the two ends of a PV device: enum xenbus_state of xen/include/public/io/xenbus.h.
namespace XenSharp.Devices.Xenbus;

/// <summary>What one end of a device says in its "state" node, as a decimal number.</summary>
public enum XenbusState
{
    /// <summary>No state: the node is missing.</summary>
    Unknown = 0,
    Initialising = 1,

    /// <summary>Ready, and waiting for what the other end says of itself.</summary>
    InitWait = 2,

    /// <summary>Has said all of itself, and waits for the other end to connect.</summary>
    Initialised = 3,
    Connected = 4,

    /// <summary>Being closed, because of an error or because the device is unplugged.</summary>
    Closing = 5,
    Closed = 6,
    Reconfiguring = 7,
    Reconfigured = 8,
}
