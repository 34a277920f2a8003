using XenSharp.EventChannels;

namespace XenSharp.Domains;

/// <summary>
/// The numbers for physical interrupts that a domain can set aside (PHYSDEVOP_get_free_pirq). None is ever connected to anything.
/// </summary>
internal sealed class PhysicalInterrupts
{
    /// <summary>The first lines are those of the old interrupt controllers, never free.</summary>
    private const int FirstFreeLine = 16;

    private readonly Lock _lock = new();
    private readonly bool[] _taken = new bool[EventChannelDomain.PirqCount];

    /// <summary>The frame in which the guest wants to see which interrupts need an end-of-interrupt; null for none.</summary>
    public ulong? EoiFrame { get; set; }

    /// <summary>Sets a number aside.</summary>
    /// <param name="line">Whether it is to be that of an interrupt line (MAP_PIRQ_TYPE_GSI), if one is free.</param>
    /// <returns>The number; null when none is free.</returns>
    public uint? Take(bool line)
    {
        lock (_lock)
        {
            for (uint i = FirstFreeLine; line && i < EventChannelDomain.LineCount; i++)
            {
                if (TryTake(i))
                    return i;
            }

            for (uint i = EventChannelDomain.PirqCount - 1; i >= EventChannelDomain.LineCount; i--)
            {
                if (TryTake(i))
                    return i;
            }

            return null;
        }
    }

    /// <summary>Whether a number was set aside.</summary>
    public bool IsTaken(uint number)
    {
        lock (_lock)
            return number < EventChannelDomain.PirqCount && _taken[number];
    }

    private bool TryTake(uint number)
    {
        if (_taken[number])
            return false;
        _taken[number] = true;
        return true;
    }
}
