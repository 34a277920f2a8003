// How much a guest may send: xl's rate=, counted as Linux's netback counts it.
namespace XenSharp.Devices.Network;

/// <summary>
/// The rate of a network interface: so many bytes in each interval of time (the back end's node <c>rate</c>, "bytes,microseconds").
/// </summary>
/// <param name="Bytes">Bytes in an interval, at least 1.</param>
/// <param name="Interval">The interval, at least one microsecond.</param>
public readonly record struct TransmitRate(ulong Bytes, TimeSpan Interval)
{
    /// <summary>The longest interval: the node has 32 bits of microseconds.</summary>
    public static TimeSpan MaximumInterval { get; } = TimeSpan.FromMicroseconds(uint.MaxValue);

    /// <summary>As the node has it.</summary>
    public override string ToString()
        => string.Create(System.Globalization.CultureInfo.InvariantCulture, $"{Bytes},{(ulong)Interval.TotalMicroseconds}");
}

/// <summary>Counts a guest's frames against its rate. Any thread: the queues of an interface share it.</summary>
/// <remarks>
/// Each interval adds the rate's bytes to what is left, up to the larger of those and of 128 KiB, so that a frame of any size goes
/// through in the end (as tx_add_credit of netback sees to). A frame that there is no credit for waits for the interval's end.
/// </remarks>
internal sealed class TransmitLimit
{
    private const ulong MinimumBurst = 128 << 10;

    private readonly Lock _lock = new();
    private readonly TransmitRate _rate;
    private readonly TimeProvider _time;
    private ulong _left;
    private long _windowStart;

    public TransmitLimit(in TransmitRate rate, TimeProvider time)
    {
        _rate = rate;
        _time = time;
        _left = rate.Bytes;
        _windowStart = time.GetTimestamp();
    }

    /// <summary>Whether a frame may go now.</summary>
    /// <param name="bytes">Its length.</param>
    /// <param name="wait">How long to wait before asking again, if not; more than zero.</param>
    public bool TryTake(int bytes, out TimeSpan wait)
    {
        lock (_lock)
        {
            wait = TimeSpan.Zero;
            TimeSpan passed = _time.GetElapsedTime(_windowStart);
            if (passed >= _rate.Interval)
            {
                // Whole intervals, however late it is looked: a timer that comes late costs the guest nothing.
                long intervals = passed.Ticks / _rate.Interval.Ticks;
                passed -= intervals * _rate.Interval;
                _windowStart = _time.GetTimestamp() - (long)(passed.TotalSeconds * _time.TimestampFrequency);
                UInt128 burst = Math.Max(MinimumBurst, _rate.Bytes);
                _left = (ulong)UInt128.Min(burst, _left + ((UInt128)intervals * _rate.Bytes));
            }

            if ((ulong)bytes <= _left)
            {
                _left -= (ulong)bytes;
                return true;
            }

            wait = _rate.Interval - passed;
            return false;
        }
    }
}
