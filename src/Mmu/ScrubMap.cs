// Which free frames still hold what their last owner left in them, so that the host can have their memory back.
using System.Numerics;
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>
/// One bit a frame: it became free, and its contents are still there (PGC_need_scrub). A frame is scrubbed by giving its page back
/// to the host, after which it reads as zeroes and takes no memory, or by being cleared when it is taken again before that. Blittable.
/// </summary>
/// <remarks>
/// Bits are set by whoever drops the last reference, without a lock. Who clears one holds the lock while it does what makes the bit
/// untrue, so that no page is given back that somebody has begun to use.
/// </remarks>
public unsafe struct ScrubMap
{
    private const int WordBits = 64;

    private ulong* _words;
    private ulong _frameCount;

    /// <summary>No bit is set in a word before this one.</summary>
    private ulong _firstWord;
    private long _pending;
    private int _locked;
    private int _holds;

    /// <summary>Bytes that the bits of so many frames take.</summary>
    public static nuint SizeOf(ulong frameCount) => (nuint)((frameCount + WordBits - 1) / WordBits * sizeof(ulong));

    /// <summary>Makes the map of frames that hold nothing but zeroes.</summary>
    /// <param name="words">Zeroed, <see cref="SizeOf"/> bytes.</param>
    /// <param name="frameCount">The frames.</param>
    public void Initialize(ulong* words, ulong frameCount)
    {
        _words = words;
        _frameCount = frameCount;
        _firstWord = ulong.MaxValue;
    }

    /// <summary>Frames to be scrubbed.</summary>
    public readonly long Pending => Volatile.Read(in _pending);

    /// <summary>Notes that the frame of an index became free with contents.</summary>
    public void Mark(ulong index)
    {
        if ((Interlocked.Or(ref _words[index / WordBits], BitOf(index)) & BitOf(index)) != 0)
            return;
        _ = Interlocked.Increment(ref _pending);
        LowerFirstWord(index / WordBits);
    }

    /// <summary>Takes note that the frame of an index is used again.</summary>
    /// <returns>True if its contents are those of its earlier life; false if it holds nothing but zeroes.</returns>
    public bool Take(ulong index)
    {
        // A frame that is being scrubbed is marked until that is done.
        if (!IsMarked(index))
            return false;
        Lock();
        bool marked = IsMarked(index);
        if (marked)
            Unmark(index, 1);
        Unlock();
        return marked;
    }

    /// <summary>Frames that become free keep their contents until <see cref="Release"/>: they may yet be returned as they were.</summary>
    public void Hold()
    {
        Lock();
        _holds++;
        Unlock();
    }

    /// <summary>Ends a <see cref="Hold"/>.</summary>
    public void Release()
    {
        Lock();
        _holds--;
        Unlock();
    }

    /// <summary>Chooses neighbouring frames to be scrubbed. On success the map is locked until <see cref="EndRun"/>.</summary>
    /// <param name="longest">Most frames in the run.</param>
    /// <param name="first">Index of its first.</param>
    /// <param name="count">How many they are.</param>
    /// <returns>False where nothing is to be scrubbed, or not now.</returns>
    public bool TryBeginRun(ulong longest, out ulong first, out ulong count)
    {
        first = count = 0;
        Lock();
        if (_holds == 0)
        {
            // A frame that is marked meanwhile, before the place that the search has come to, lowers this again.
            ulong word = Interlocked.Exchange(ref _firstWord, ulong.MaxValue);
            for (; word < (_frameCount + WordBits - 1) / WordBits; word++)
            {
                ulong bits = Volatile.Read(ref _words[word]);
                if (bits == 0)
                    continue;
                first = (word * WordBits) + (ulong)BitOperations.TrailingZeroCount(bits);
                while (count < longest && first + count < _frameCount && IsMarked(first + count))
                    count++;
                LowerFirstWord(word);
                return true;
            }
        }

        Unlock();
        return false;
    }

    /// <summary>The frames of the run that <see cref="TryBeginRun"/> chose hold nothing but zeroes.</summary>
    public void EndRun(ulong first, ulong count)
    {
        Unmark(first, count);
        Unlock();
    }

    /// <summary>Whether the frame of an index is to be scrubbed.</summary>
    internal readonly bool IsMarked(ulong index) => (Volatile.Read(ref _words[index / WordBits]) & BitOf(index)) != 0;

    private static ulong BitOf(ulong index) => 1UL << (int)(index % WordBits);

    private void Unmark(ulong first, ulong count)
    {
        for (ulong index = first; index < first + count; index++)
            _ = Interlocked.And(ref _words[index / WordBits], ~BitOf(index));
        _ = Interlocked.Add(ref _pending, -(long)count);
    }

    private void LowerFirstWord(ulong word)
    {
        ulong first = Volatile.Read(in _firstWord);
        while (word < first)
        {
            ulong found = Interlocked.CompareExchange(ref _firstWord, word, first);
            if (found == first)
                return;
            first = found;
        }
    }

    private void Lock() => SpinWord.Enter(ref _locked);

    private void Unlock() => SpinWord.Exit(ref _locked);
}
