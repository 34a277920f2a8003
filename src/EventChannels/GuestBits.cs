// Atomic bits in words that a guest changes at the same time, and would gladly change for ever.
namespace XenSharp.EventChannels;

/// <summary>Bit operations on memory shared with a guest. Each is a full barrier.</summary>
/// <remarks>
/// To learn the old bit takes a compare-and-exchange, which other processors of the guest can make fail. After a bounded number
/// of tries the bit is changed by one instruction that cannot fail and the answer is the one that costs a guest no event:
/// at worst an upcall that finds nothing.
/// </remarks>
internal static unsafe class GuestBits
{
    private const int Tries = 64;

    /// <summary>Sets a bit.</summary>
    /// <returns>True when it was set already.</returns>
    internal static bool TestAndSet(ulong* word, ulong bit)
    {
        ulong seen = Volatile.Read(ref *word);
        for (int i = 0; i < Tries; i++)
        {
            // Exchanged even when the bit is set: what the sender wrote before has to be visible to who clears it next.
            ulong found = Interlocked.CompareExchange(ref *word, seen | bit, seen);
            if (found == seen)
                return (found & bit) != 0;
            seen = found;
        }

        _ = Interlocked.Or(ref *word, bit);
        return false;
    }

    /// <summary>Clears a bit.</summary>
    /// <returns>True when it was set.</returns>
    internal static bool TestAndClear(ulong* word, ulong bit)
    {
        ulong seen = Volatile.Read(ref *word);
        for (int i = 0; i < Tries; i++)
        {
            ulong found = Interlocked.CompareExchange(ref *word, seen & ~bit, seen);
            if (found == seen)
                return (found & bit) != 0;
            seen = found;
        }

        _ = Interlocked.And(ref *word, ~bit);
        return true;
    }

    /// <inheritdoc cref="TestAndSet(ulong*, ulong)"/>
    internal static bool TestAndSet(uint* word, uint bit)
    {
        uint seen = Volatile.Read(ref *word);
        for (int i = 0; i < Tries; i++)
        {
            uint found = Interlocked.CompareExchange(ref *word, seen | bit, seen);
            if (found == seen)
                return (found & bit) != 0;
            seen = found;
        }

        _ = Interlocked.Or(ref *word, bit);
        return false;
    }

    internal static bool Test(uint* word, uint bit) => (Volatile.Read(ref *word) & bit) != 0;

    internal static bool Test(ulong* word, ulong bit) => (Volatile.Read(ref *word) & bit) != 0;
}
