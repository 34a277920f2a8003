// What the measuring guests print, found on their consoles.
using System.Text;

namespace XenSharp.Guests.Benchmark;

/// <summary>Finds bytes that a guest wrote behind a marker.</summary>
public static class GuestResults
{
    /// <summary>Finds them, if they are all there.</summary>
    /// <param name="console">All that the guest printed.</param>
    /// <param name="marker">What precedes them; ASCII.</param>
    /// <param name="length">How many.</param>
    /// <param name="results">The bytes.</param>
    public static bool TryFind(ReadOnlySpan<byte> console, string marker, int length, out ReadOnlySpan<byte> results)
    {
        int start = console.IndexOf(Encoding.ASCII.GetBytes(marker));
        bool found = start >= 0 && console.Length - start - marker.Length >= length;
        results = found ? console.Slice(start + marker.Length, length) : default;
        return found;
    }

    /// <summary>Finds them.</summary>
    /// <exception cref="InvalidDataException">The guest did not print them all.</exception>
    public static ReadOnlySpan<byte> Find(ReadOnlySpan<byte> console, string marker, int length)
        => TryFind(console, marker, length, out ReadOnlySpan<byte> results)
            ? results
            : throw new InvalidDataException($"A guest that measures did not print all of its results ({marker.Trim()}).");
}
