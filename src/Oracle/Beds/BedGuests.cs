// Checks guests before they go to a bed.
namespace XenSharp.Oracle.Beds;

/// <summary>What <see cref="BedGuest"/> promises, checked.</summary>
static class BedGuests
{
    const int LongestName = 40;

    /// <exception cref="ArgumentException">A guest is not as <see cref="BedGuest"/> says; the message says which.</exception>
    public static void Check(IReadOnlyList<BedGuest> guests)
    {
        ArgumentNullException.ThrowIfNull(guests);
        HashSet<string> names = [];
        bool second = false;
        foreach ((int index, BedGuest guest) in guests.Index())
        {
            if (guest.WithNext && (second || index == guests.Count - 1))
                throw Bad(guest, "a pair is a guest and the next one");
            second = guest.WithNext;
            if (guest.Name.Length is 0 or > LongestName || !guest.Name.All(c => char.IsAsciiLetterLower(c) || char.IsAsciiDigit(c) || c is '-' or '_'))
                throw Bad(guest, $"its name must be 1 to {LongestName} of a–z, 0–9, '-' and '_'");
            if (!names.Add(guest.Name))
                throw Bad(guest, "another guest has that name");
            if (guest.Kernel.IsEmpty)
                throw Bad(guest, "it has no kernel");
            if (guest.MemoryMiB < 1 || guest.Vcpus < 1 || guest.Timeout <= TimeSpan.Zero)
                throw Bad(guest, "it needs at least 1 MiB of memory, 1 vCPU, and time to run");
            if (guest.CommandLine.Any(char.IsControl))
                throw Bad(guest, "its command line has a control character");
        }
    }

    /// <summary>Refuses pairs, for beds that cannot run them.</summary>
    /// <exception cref="ArgumentException">There is one; the message names it.</exception>
    public static void CheckAlone(IReadOnlyList<BedGuest> guests, string bed)
    {
        if (guests.FirstOrDefault(static guest => guest.WithNext) is { } first)
            throw Bad(first, $"{bed} has one domain at a time, and it is one of a pair");
    }

    static ArgumentException Bad(BedGuest guest, string why) => new($"Guest \"{guest.Name}\" cannot be run: {why}.", "guests");
}
