// The groups that a guest listens to, as it says by extra infos (feature-multicast-control).
namespace XenSharp.Devices.Network;

/// <summary>The list that a front end keeps in its back end. Any thread.</summary>
internal sealed class MulticastFilter
{
    /// <summary>Groups of one guest, as many as Linux's netback keeps (XEN_NETBK_MCAST_MAX).</summary>
    public const int MaximumGroups = 64;

    private readonly Lock _lock = new();
    private MacAddress[] _groups = [];

    /// <summary>Whether the list counts (request-multicast-control).</summary>
    public bool IsActive { get; init; }

    /// <summary>Whether the guest wants a frame to an address.</summary>
    public bool Wants(MacAddress destination)
        => !IsActive || !destination.IsMulticast || destination == MacAddress.Broadcast || Volatile.Read(ref _groups).Contains(destination);

    /// <summary>Adds a group.</summary>
    /// <returns>False if the list is full.</returns>
    public bool Add(MacAddress group)
    {
        lock (_lock)
        {
            if (_groups.Length == MaximumGroups)
                return false;
            Volatile.Write(ref _groups, [.. _groups, group]);
            return true;
        }
    }

    /// <summary>Removes a group once, if it is there.</summary>
    public void Delete(MacAddress group)
    {
        lock (_lock)
        {
            int index = Array.IndexOf(_groups, group);
            if (index >= 0)
                Volatile.Write(ref _groups, [.. _groups[..index], .. _groups[(index + 1)..]]);
        }
    }
}
