// The 8254 timer and the speaker port that every PV domain has: counters to look at, no interrupts.
namespace XenSharp.Domains.Emulation;

/// <summary>
/// An 8254 programmable interval timer (Intel 8254 data sheet) at 1.193182 MHz with the gate and speaker bits of port 0x61, as
/// Xen gives it to a PV domain: ports 0x42, 0x43 and 0x61 reach it, channel 0 raises no interrupt. Kernels calibrate their TSC by
/// it, so the counters follow the clock. Any thread.
/// </summary>
/// <param name="nanoseconds">A clock that never goes back, in nanoseconds.</param>
public sealed class VirtualPit(Func<long> nanoseconds)
{
    /// <summary>Input clock of the counters in Hz.</summary>
    public const uint Frequency = 1_193_182;

    private const int Channels = 3;
    private const int SpeakerChannel = 2;
    private const byte UnprogrammedMode = 0xff;

    private readonly Lock _lock = new();
    private readonly Channel[] _channels =
    [
        new() { Count = 0x10000, Mode = UnprogrammedMode, Gate = true },
        new() { Count = 0x10000, Mode = UnprogrammedMode, Gate = true },
        new() { Count = 0x10000, Mode = UnprogrammedMode },
    ];

    private bool _speakerData;

    // How a two-byte count is being transferred.
    private enum Access : byte
    {
        None,
        Low,
        High,
        LowThenHigh,
        HighOfBoth,
    }

    private struct Channel
    {
        public uint Count;
        public byte Mode;
        public bool Bcd;
        public bool Gate;
        public Access Programmed;
        public Access ReadState;
        public Access WriteState;
        public Access CountLatched;
        public bool StatusLatched;
        public byte Status;
        public ushort LatchedCount;
        public byte LowByte;
        public long LoadTime;
    }

    /// <summary>Writes the mode and command register, port 0x43.</summary>
    public void WriteCommand(byte value)
    {
        lock (_lock)
        {
            int number = value >> 6;
            if (number == Channels)
            {
                ReadBack(value);
                return;
            }

            ref Channel channel = ref _channels[number];
            var access = (Access)((value >> 4) & 3);
            if (access == Access.None)
            {
                LatchCount(ref channel);
                return;
            }

            channel.Programmed = access;
            channel.ReadState = access;
            channel.WriteState = access;
            int mode = (value >> 1) & 7;
            channel.Mode = (byte)(mode > 5 ? mode - 4 : mode);
            channel.Bcd = (value & 1) != 0;
        }
    }

    /// <summary>Writes a count byte to a channel, 0–2 (ports 0x40–0x42).</summary>
    public void WriteCounter(int number, byte value)
    {
        lock (_lock)
        {
            ref Channel channel = ref _channels[number];
            switch (channel.WriteState)
            {
                case Access.High:
                    Load(ref channel, (uint)value << 8);
                    break;
                case Access.LowThenHigh:
                    channel.LowByte = value;
                    channel.WriteState = Access.HighOfBoth;
                    break;
                case Access.HighOfBoth:
                    Load(ref channel, channel.LowByte | ((uint)value << 8));
                    channel.WriteState = Access.LowThenHigh;
                    break;
                default:
                    Load(ref channel, value);
                    break;
            }
        }
    }

    /// <summary>Reads a latched status, a latched count byte or the running count's next byte of a channel, 0–2.</summary>
    public byte ReadCounter(int number)
    {
        lock (_lock)
        {
            ref Channel channel = ref _channels[number];
            if (channel.StatusLatched)
            {
                channel.StatusLatched = false;
                return channel.Status;
            }

            switch (channel.CountLatched)
            {
                case Access.None:
                    break;
                case Access.LowThenHigh:
                    channel.CountLatched = Access.High;
                    return (byte)channel.LatchedCount;
                case Access.High:
                    channel.CountLatched = Access.None;
                    return (byte)(channel.LatchedCount >> 8);
                default:
                    channel.CountLatched = Access.None;
                    return (byte)channel.LatchedCount;
            }

            ushort count = CountOf(channel);
            switch (channel.ReadState)
            {
                case Access.High:
                    return (byte)(count >> 8);
                case Access.LowThenHigh:
                    channel.ReadState = Access.HighOfBoth;
                    return (byte)count;
                case Access.HighOfBoth:
                    channel.ReadState = Access.LowThenHigh;
                    return (byte)(count >> 8);
                default:
                    return (byte)count;
            }
        }
    }

    /// <summary>Writes port 0x61: bit 0 gates channel 2, bit 1 lets it through to the speaker.</summary>
    public void WriteSpeaker(byte value)
    {
        lock (_lock)
        {
            _speakerData = (value & 2) != 0;
            ref Channel channel = ref _channels[SpeakerChannel];
            bool gate = (value & 1) != 0;

            // In these modes a rising gate starts the count over; in the others it would pause it, which nothing relies on.
            if (gate && !channel.Gate && channel.Mode is 1 or 2 or 3 or 5)
                channel.LoadTime = nanoseconds();
            channel.Gate = gate;
        }
    }

    /// <summary>Reads port 0x61: gate (0), speaker data (1), the toggling refresh clock (4), output of channel 2 (5).</summary>
    public byte ReadSpeaker()
    {
        lock (_lock)
        {
            ref Channel channel = ref _channels[SpeakerChannel];

            // DRAM refresh toggles about every 15 µs; 2^14 ns is near enough.
            int refresh = (int)(nanoseconds() >> 14) & 1;
            return (byte)((channel.Gate ? 1 : 0) | (_speakerData ? 2 : 0) | (refresh << 4) | (OutputOf(channel) ? 0x20 : 0));
        }
    }

    private void ReadBack(byte value)
    {
        for (int i = 0; i < Channels; i++)
        {
            if ((value & (2 << i)) == 0)
                continue;
            ref Channel channel = ref _channels[i];
            if ((value & 0x20) == 0)
                LatchCount(ref channel);
            if ((value & 0x10) == 0 && !channel.StatusLatched)
            {
                channel.Status = (byte)((OutputOf(channel) ? 0x80 : 0)
                    | (((int)channel.Programmed & 3) << 4) | ((channel.Mode & 7) << 1) | (channel.Bcd ? 1 : 0));
                channel.StatusLatched = true;
            }
        }
    }

    private void LatchCount(ref Channel channel)
    {
        if (channel.CountLatched != Access.None)
            return;
        channel.LatchedCount = CountOf(channel);
        channel.CountLatched = channel.Programmed;
    }

    // A count of 0 stands for 65536.
    private void Load(ref Channel channel, uint count)
    {
        channel.Count = count == 0 ? 0x10000 : count;
        channel.LoadTime = nanoseconds();
    }

    private ulong TicksSinceLoad(in Channel channel)
    {
        long elapsed = Math.Max(0, nanoseconds() - channel.LoadTime);
        return (ulong)((UInt128)(ulong)elapsed * Frequency / 1_000_000_000);
    }

    private ushort CountOf(in Channel channel)
    {
        ulong ticks = TicksSinceLoad(channel);
        ulong count = channel.Mode switch
        {
            0 or 1 or 4 or 5 => channel.Count - ticks,
            3 => channel.Count - (2 * ticks % channel.Count),
            _ => channel.Count - (ticks % channel.Count),
        };
        return (ushort)count;
    }

    private bool OutputOf(in Channel channel)
    {
        ulong ticks = TicksSinceLoad(channel);
        return channel.Mode switch
        {
            1 => ticks < channel.Count,
            2 => ticks != 0 && ticks % channel.Count == 0,
            3 => ticks % channel.Count < (channel.Count + 1) >> 1,
            4 or 5 => ticks == channel.Count,
            _ => ticks >= channel.Count,
        };
    }
}
