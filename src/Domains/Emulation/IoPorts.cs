// The I/O port space of an unprivileged PV domain.
namespace XenSharp.Domains.Emulation;

/// <summary>
/// What a PV domain without hardware sees at its 65536 ports: channel 2 of the <see cref="VirtualPit"/>, a CMOS index that can be
/// read back, the PCI address register, and nothing else (reads give ones, writes are dropped). Who may access a port is decided
/// before, by IOPL and the I/O bitmap. Any thread.
/// </summary>
/// <param name="nanoseconds">A clock that never goes back, in nanoseconds.</param>
public sealed class IoPorts(Func<long> nanoseconds)
{
    private const uint PitChannel2 = 0x42;
    private const uint PitCommand = 0x43;
    private const uint Speaker = 0x61;
    private const uint RtcIndex = 0x70;
    private const uint PciConfigAddress = 0xcf8;

    private volatile byte _cmosIndex;
    private volatile uint _pciAddress;

    /// <summary>The timer behind ports 0x42, 0x43 and 0x61.</summary>
    public VirtualPit Pit { get; } = new(nanoseconds);

    /// <summary>Reads 1, 2 or 4 bytes; a wider access is the accesses to its bytes.</summary>
    public uint Read(uint port, uint bytes)
    {
        if (port == PciConfigAddress && bytes == 4)
            return _pciAddress;
        uint data = 0;
        for (uint i = 0; i < bytes; i++)
            data |= (uint)ReadByte(port + i) << (int)(i * 8);
        return data;
    }

    /// <summary>Writes 1, 2 or 4 bytes; a wider access is the accesses to its bytes.</summary>
    public void Write(uint port, uint bytes, uint data)
    {
        if (port == PciConfigAddress && bytes == 4)
        {
            _pciAddress = data;
            return;
        }

        for (uint i = 0; i < bytes; i++)
            WriteByte(port + i, (byte)(data >> (int)(i * 8)));
    }

    private byte ReadByte(uint port) => port switch
    {
        PitChannel2 => Pit.ReadCounter(2),
        Speaker => Pit.ReadSpeaker(),
        RtcIndex => _cmosIndex,

        // The command register cannot be read: Xen leaves the 0 that its request started with.
        PitCommand => 0,
        _ => 0xff,
    };

    private void WriteByte(uint port, byte value)
    {
        switch (port)
        {
            case PitChannel2:
                Pit.WriteCounter(2, value);
                break;
            case PitCommand:
                Pit.WriteCommand(value);
                break;
            case Speaker:
                Pit.WriteSpeaker(value);
                break;
            case RtcIndex:
                _cmosIndex = value;
                break;
        }
    }
}
