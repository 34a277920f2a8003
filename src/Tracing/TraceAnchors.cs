// Places that two runs have in common beyond doubt, so that what lies between them can be aligned by itself.

namespace XenSharp.Tracing;

/// <summary>
/// Finds stretches of records that occur once in each run, and of these the longest sequence that is in the same order in both
/// (the idea of the patience diff, on stretches: single records are hardly ever unique in a trace).
/// </summary>
internal static class TraceAnchors
{
    /// <summary>Records of a stretch.</summary>
    internal const int Length = 16;

    /// <summary>The starts of the stretches in both runs, ascending in both.</summary>
    internal static List<(int A, int B)> Find(IReadOnlyList<ComparedRecord> a, IReadOnlyList<ComparedRecord> b)
    {
        var numbers = new Dictionary<string, int>();
        int[] numbersA = Number(a, numbers);
        int[] numbersB = Number(b, numbers);
        Dictionary<ulong, int> uniqueA = Unique(numbersA);
        Dictionary<ulong, int> uniqueB = Unique(numbersB);
        var common = new List<(int A, int B)>();
        foreach ((ulong hash, int startA) in uniqueA)
        {
            if (startA >= 0 && uniqueB.TryGetValue(hash, out int startB) && startB >= 0
                && numbersA.AsSpan(startA, Length).SequenceEqual(numbersB.AsSpan(startB, Length)))
            {
                common.Add((startA, startB));
            }
        }

        common.Sort();
        return LongestAscending(common);
    }

    private static int[] Number(IReadOnlyList<ComparedRecord> records, Dictionary<string, int> numbers)
    {
        var list = new int[records.Count];
        for (int i = 0; i < list.Length; i++)
        {
            if (!numbers.TryGetValue(records[i].Text, out list[i]))
                numbers.Add(records[i].Text, list[i] = numbers.Count);
        }

        return list;
    }

    /// <summary>The start of each stretch by its hash; -1 for those that occur more than once.</summary>
    private static Dictionary<ulong, int> Unique(int[] numbers)
    {
        const ulong prime = 0x100_0000_01b3; // FNV-1a
        var starts = new Dictionary<ulong, int>();
        for (int i = 0; i + Length <= numbers.Length; i++)
        {
            ulong hash = 0xcbf2_9ce4_8422_2325;
            foreach (int number in numbers.AsSpan(i, Length))
                hash = (hash ^ (uint)number) * prime;
            starts[hash] = starts.ContainsKey(hash) ? -1 : i;
        }

        return starts;
    }

    /// <summary>Of pairs sorted by A, the most whose B ascend as well.</summary>
    private static List<(int A, int B)> LongestAscending(List<(int A, int B)> pairs)
    {
        // ends[n] is the pair that ends the sequence of n + 1 pairs with the least B; before[i] the one that stands before pair i.
        var ends = new List<int>();
        int[] before = new int[pairs.Count];
        for (int i = 0; i < pairs.Count; i++)
        {
            int low = 0;
            int high = ends.Count;
            while (low < high)
            {
                int middle = (low + high) / 2;
                if (pairs[ends[middle]].B < pairs[i].B)
                    low = middle + 1;
                else
                    high = middle;
            }

            before[i] = low > 0 ? ends[low - 1] : -1;
            if (low == ends.Count)
                ends.Add(i);
            else
                ends[low] = i;
        }

        var result = new List<(int A, int B)>();
        for (int i = ends.Count > 0 ? ends[^1] : -1; i >= 0; i = before[i])
            result.Add(pairs[i]);
        result.Reverse();
        return result;
    }
}
