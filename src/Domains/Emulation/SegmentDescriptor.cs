// Segment descriptors by selector: Xen's flat ones, and those of the guest's own tables.
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Emulation;

/// <summary>A code or data segment (Intel SDM volume 3, 3.4.5).</summary>
internal readonly unsafe struct SegmentDescriptor
{
    private const ulong CodeFlag = 1UL << 43;
    private const ulong Conforming = 1UL << 42;
    private const int PrivilegeLevelShift = 45;
    private const ulong ReadableOrWritable = 1UL << 41;
    private const ulong NotSystem = 1UL << 44;
    private const ulong PresentFlag = 1UL << 47;
    private const ulong LongFlag = 1UL << 53;
    private const ulong DefaultFlag = 1UL << 54;
    private const ulong GranularityFlag = 1UL << 55;
    private const int EntriesPerFrame = (int)(Paging.PageSize / 8);

    private readonly ulong _value;

    private SegmentDescriptor(ulong value) => _value = value;

    public bool IsPresent => (_value & PresentFlag) != 0;

    /// <summary>Code or data, not a gate or a TSS.</summary>
    public bool IsUser => (_value & NotSystem) != 0;

    /// <summary>The level that a selector may ask for at most (DPL).</summary>
    public int PrivilegeLevel => (int)(_value >> PrivilegeLevelShift) & 3;

    public bool IsConforming => IsCode && (_value & Conforming) != 0;

    public bool IsCode => (_value & CodeFlag) != 0;

    public bool IsReadable => !IsCode || (_value & ReadableOrWritable) != 0;

    public bool IsWritable => !IsCode && (_value & ReadableOrWritable) != 0;

    /// <summary>16, 32 or 64, of a code segment.</summary>
    public int Bitness => (_value & LongFlag) != 0 ? 64 : (_value & DefaultFlag) != 0 ? 32 : 16;

    public uint Base => (uint)((_value >> 16) & 0xff_ffff) | (uint)((_value >> 32) & 0xff00_0000);

    /// <summary>Offset of the last byte; expand-down segments are not told apart, as Xen does not.</summary>
    public uint Limit
    {
        get
        {
            uint limit = (uint)(_value & 0xffff) | (uint)((_value >> 32) & 0xf_0000);
            return (_value & GranularityFlag) != 0 ? (limit << 12) | 0xfff : limit;
        }
    }

    /// <summary>Reads the descriptor that a selector names.</summary>
    /// <returns>
    /// False where it cannot be read. A null selector, and one past the LDT, gives an empty descriptor.
    /// </returns>
    public static bool TryRead(VcpuContext* vcpu, ushort selector, out SegmentDescriptor descriptor)
    {
        descriptor = default;
        switch (selector | 3)
        {
            case FlatSelectors.Ring3Cs32:
                descriptor = new SegmentDescriptor(0x00cf_fb00_0000_ffff);
                return true;
            case FlatSelectors.Ring3Data:
                descriptor = new SegmentDescriptor(0x00cf_f300_0000_ffff);
                return true;
            case FlatSelectors.Ring3Cs64:
                descriptor = new SegmentDescriptor(0x00af_fb00_0000_ffff);
                return true;
            case 3:
                return true;
        }

        uint index = (uint)selector >> 3;
        ulong value;
        if ((selector & 4) != 0)
        {
            if (!DescriptorTables.TryReadLdt(vcpu, index, out value))
                return false;
        }
        else
        {
            if (index >= vcpu->State->GdtEntries)
                return false;
            var frame = new Mfn(vcpu->State->GdtFrames[(int)(index / EntriesPerFrame)]);
            if (!vcpu->Domain->Memory.Contains(frame))
                return false;
            value = Volatile.Read(ref ((ulong*)vcpu->Domain->Memory.Page(frame))[index % EntriesPerFrame]);
        }

        descriptor = new SegmentDescriptor(value);
        return true;
    }
}
