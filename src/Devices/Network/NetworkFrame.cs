// Frames on their way between ports, and the buffers they are made of.
namespace XenSharp.Devices.Network;

/// <summary>
/// An Ethernet frame (without frame check sequence) in a buffer of a <see cref="FramePool"/>, with what is left to do on it. Whoever
/// made it fills it in and hands it on; from then on nobody writes to it, and several may hold it.
/// </summary>
public sealed class NetworkFrame
{
    /// <summary>Bytes of an Ethernet header, which every frame has.</summary>
    public const int HeaderSize = 14;

    /// <summary>Longest frame: 64 KiB of an IP packet that is still to be cut, and headers with two VLAN tags around it.</summary>
    public const int MaximumLength = 65535 + HeaderSize + 8;

    private readonly FramePool _pool;
    private readonly byte[] _buffer;
    private int _references;

    internal NetworkFrame(FramePool pool, byte[] buffer, int sizeClass)
    {
        _pool = pool;
        _buffer = buffer;
        SizeClass = sizeClass;
    }

    /// <summary>Bytes in it.</summary>
    public int Length { get; private set; }

    /// <summary>Bytes that there is room for; what a frame costs in memory.</summary>
    public int Capacity => _buffer.Length;

    /// <summary>What is left to do on it.</summary>
    public FrameOffload Offload { get; set; }

    /// <summary>The frame, beginning with the destination's address.</summary>
    public ReadOnlySpan<byte> Data => _buffer.AsSpan(0, Length);

    /// <summary>The frame, for the one that makes it.</summary>
    public Span<byte> Writable => _buffer.AsSpan(0, Length);

    public MacAddress Destination => MacAddress.Read(_buffer);

    public MacAddress Source => MacAddress.Read(_buffer.AsSpan(MacAddress.Size));

    /// <summary>Which of the pool's buffers it is.</summary>
    internal int SizeClass { get; }

    /// <summary>All that the buffer has room for.</summary>
    internal Span<byte> Room => _buffer;

    /// <summary>Says how much of the buffer is the frame.</summary>
    internal void SetLength(int length)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan((uint)length, (uint)_buffer.Length, nameof(length));
        Length = length;
    }

    /// <summary>Holds the frame for one user more, who has to <see cref="Release"/> it.</summary>
    public void Hold() => _ = Interlocked.Increment(ref _references);

    /// <summary>Lets go of the frame. The last one to do so gives the buffer back.</summary>
    /// <exception cref="InvalidOperationException">Nobody held it.</exception>
    public void Release()
    {
        int left = Interlocked.Decrement(ref _references);
        if (left < 0)
            throw new InvalidOperationException("A frame was let go of more often than it was held.");
        if (left == 0)
            _pool.Return(this);
    }

    internal void Reset(int length)
    {
        Length = length;
        Offload = default;
        Volatile.Write(ref _references, 1);
    }
}

/// <summary>
/// Gives out frames, and keeps some for the next time, so that traffic makes no garbage. Any thread.
/// </summary>
/// <remarks>A buffer is not cleared in between: whoever takes a frame writes all of its <see cref="NetworkFrame.Length"/>.</remarks>
public sealed class FramePool
{
    /// <summary>An ordinary frame, a few of jumbo size together, and one that is to be cut.</summary>
    private static readonly int[] Sizes = [2048, 16384, 67584];

    /// <summary>How many of each are kept: 2, 4 and 8 MiB.</summary>
    private static readonly int[] Kept = [1024, 256, 128];

    private readonly Stack[] _free = [new(Kept[0]), new(Kept[1]), new(Kept[2])];

    /// <summary>The process's.</summary>
    public static FramePool Shared { get; } = new();

    /// <summary>A frame that the caller holds, of unspecified contents.</summary>
    /// <param name="length">Its length, 0 to <see cref="NetworkFrame.MaximumLength"/>.</param>
    public NetworkFrame Take(int length)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan((uint)length, (uint)Sizes[^1], nameof(length));
        int sizeClass = length <= Sizes[0] ? 0 : length <= Sizes[1] ? 1 : 2;
        NetworkFrame frame = _free[sizeClass].Pop()
            ?? new NetworkFrame(this, GC.AllocateUninitializedArray<byte>(Sizes[sizeClass], pinned: true), sizeClass);
        frame.Reset(length);
        return frame;
    }

    internal void Return(NetworkFrame frame) => _free[frame.SizeClass].Push(frame);

    private sealed class Stack(int kept)
    {
        private readonly Lock _lock = new();
        private readonly NetworkFrame?[] _frames = new NetworkFrame?[kept];
        private int _count;

        public NetworkFrame? Pop()
        {
            lock (_lock)
            {
                if (_count == 0)
                    return null;
                NetworkFrame frame = _frames[--_count]!;
                _frames[_count] = null;
                return frame;
            }
        }

        public void Push(NetworkFrame frame)
        {
            lock (_lock)
            {
                if (_count < _frames.Length)
                    _frames[_count++] = frame;
            }
        }
    }
}
