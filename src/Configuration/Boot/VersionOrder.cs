// Which of two kernels is newer.

namespace XenSharp.Configuration.Boot;

/// <summary>Compares versions as people read them: numbers by value, all else by character.</summary>
internal sealed class VersionOrder : IComparer<string>
{
    internal static VersionOrder Instance { get; } = new();

    /// <inheritdoc/>
    public int Compare(string? x, string? y)
    {
        ReadOnlySpan<char> left = x;
        ReadOnlySpan<char> right = y;
        while (!left.IsEmpty && !right.IsEmpty)
        {
            int first = Digits(left);
            int second = Digits(right);
            int order;
            if (first > 0 && second > 0)
            {
                ReadOnlySpan<char> one = left[..first].TrimStart('0');
                ReadOnlySpan<char> other = right[..second].TrimStart('0');
                order = one.Length != other.Length ? one.Length.CompareTo(other.Length) : one.SequenceCompareTo(other);
                left = left[first..];
                right = right[second..];
            }
            else
            {
                // A tilde is before everything, the end included: 6.1~rc1 is older than 6.1.
                order = Weight(left[0]).CompareTo(Weight(right[0]));
                left = left[1..];
                right = right[1..];
            }

            if (order != 0)
                return order;
        }

        return left.IsEmpty ? right.IsEmpty ? 0 : right[0] == '~' ? 1 : -1 : left[0] == '~' ? -1 : 1;
    }

    private static int Digits(ReadOnlySpan<char> text)
    {
        int length = text.IndexOfAnyExceptInRange('0', '9');
        return length < 0 ? text.Length : length;
    }

    private static int Weight(char character) => character == '~' ? -1 : char.IsAsciiDigit(character) ? 0 : character;
}
