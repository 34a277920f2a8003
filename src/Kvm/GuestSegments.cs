// Segments as the processor would load them from a vCPU's descriptor tables, for entries that load them without an instruction.
using XenSharp.Core;

namespace XenSharp.Kvm;

/// <summary>
/// Reads descriptors of one vCPU's tables in its window: the guest's GDT frames, the reserved page behind them, and the LDT. The
/// rules are those of IRET to CPL 3 (Intel SDM volume 2, IRET; volume 3, 5.8) and of data-segment loads at CPL 3.
/// </summary>
internal readonly unsafe struct GuestSegments(KvmVirtualMachine machine, DescriptorWindow window, KvmSregs* sregs)
{
    /// <summary>TI: the selector is one of the local table.</summary>
    public const int LocalTable = 1 << 2;

    private const int RequestedLevelMask = 3;
    private const int SelectorErrorMask = ~3;
    private const int TableIndexMask = ~7 & 0xffff;
    private const int EntriesPerPage = (int)Paging.PageSize / sizeof(ulong);

    private const ulong Present = 1UL << 47;
    private const ulong LongCode = 1UL << 53;
    private const ulong DefaultBig = 1UL << 54;
    private const ulong Granular = 1UL << 55;

    // Bits of a code or data descriptor's type.
    private const int TypeAccessed = 1;
    private const int TypeReadableOrWritable = 2;
    private const int TypeConforming = 4;
    private const int TypeCode = 8;

    /// <summary>A code segment to be run at CPL 3.</summary>
    /// <param name="selector">Its selector.</param>
    /// <param name="segment">The segment.</param>
    /// <param name="refusal">
    /// The exception that IRET would raise: with the selector as error code, or where the descriptor's page is not mapped in the window
    /// the page fault, whose address is in CR2.
    /// </param>
    public bool TryLoadCode(ushort selector, out KvmSegment segment, out VcpuExit refusal)
    {
        segment = default;
        if (!TryReadOrFault(selector, out ulong descriptor, out refusal))
            return false;
        if ((selector & RequestedLevelMask) != 3 || !IsCodeOrData(descriptor) || (Type(descriptor) & TypeCode) == 0
            || (Level(descriptor) != 3 && (Type(descriptor) & TypeConforming) == 0)
            || (descriptor & (LongCode | DefaultBig)) == (LongCode | DefaultBig))
        {
            refusal = Refuse(ExceptionVector.GeneralProtection, selector);
            return false;
        }

        if ((descriptor & Present) == 0)
        {
            refusal = Refuse(ExceptionVector.SegmentNotPresent, selector);
            return false;
        }

        segment = Unpack(selector, descriptor);
        segment.Dpl = 3;
        return true;
    }

    /// <summary>A stack segment for CPL 3.</summary>
    /// <inheritdoc cref="TryLoadCode"/>
    public bool TryLoadStack(ushort selector, out KvmSegment segment, out VcpuExit refusal)
    {
        segment = default;
        if (!TryReadOrFault(selector, out ulong descriptor, out refusal))
            return false;
        if ((selector & RequestedLevelMask) != 3 || !IsCodeOrData(descriptor) || Level(descriptor) != 3
            || (Type(descriptor) & (TypeCode | TypeReadableOrWritable)) != TypeReadableOrWritable)
        {
            refusal = Refuse(ExceptionVector.GeneralProtection, selector);
            return false;
        }

        if ((descriptor & Present) == 0)
        {
            refusal = Refuse(ExceptionVector.StackFault, selector);
            return false;
        }

        segment = Unpack(selector, descriptor);
        return true;
    }

    /// <summary>A data segment; one that CPL 3 cannot load is unusable, as after a null selector.</summary>
    public KvmSegment LoadData(ushort selector)
    {
        bool usable = TryRead(selector, out ulong descriptor) == Found.Descriptor && IsCodeOrData(descriptor) && Level(descriptor) == 3
            && (descriptor & Present) != 0
            && (Type(descriptor) & (TypeCode | TypeReadableOrWritable)) != TypeCode;
        return usable ? Unpack(selector, descriptor) : Null(selector);
    }

    /// <summary>The selector of a data segment by its base, among the first of the guest's global table; 0 where there is none.</summary>
    public ushort FindData(ulong segmentBase)
    {
        const int considered = 32;
        for (int index = 1; index < considered; index++)
        {
            ushort selector = (ushort)((index << 3) | RequestedLevelMask);
            if (LoadData(selector) is { Unusable: 0 } found && found.Base == segmentBase)
                return selector;
        }

        return 0;
    }

    private static KvmSegment Null(ushort selector)
        => new() { Limit = uint.MaxValue, Selector = selector, Type = 3, Present = 1, Dpl = 3, Db = 1, S = 1, G = 1, Unusable = 1 };

    private static bool IsCodeOrData(ulong descriptor) => (descriptor & (1UL << 44)) != 0;

    private static int Type(ulong descriptor) => (int)(descriptor >> 40) & 0xf;

    private static int Level(ulong descriptor) => (int)(descriptor >> 45) & 3;

    private static VcpuExit Refuse(ExceptionVector vector, ushort selector)
        => new(VcpuExitKind.Exception, vector, (uint)(selector & SelectorErrorMask));

    private static KvmSegment Unpack(ushort selector, ulong descriptor)
    {
        uint limit = (uint)((descriptor & 0xffff) | ((descriptor >> 32) & 0xf_0000));
        bool granular = (descriptor & Granular) != 0;
        return new KvmSegment
        {
            Base = ((descriptor >> 16) & 0xff_ffff) | ((descriptor >> 32) & 0xff00_0000),
            Limit = granular ? (limit << Paging.PageShift) | (uint)Paging.PageOffsetMask : limit,
            Selector = selector,
            Type = (byte)(Type(descriptor) | TypeAccessed),
            Present = 1,
            Dpl = (byte)Level(descriptor),
            Db = (byte)((descriptor & DefaultBig) != 0 ? 1 : 0),
            S = 1,
            L = (byte)((descriptor & LongCode) != 0 ? 1 : 0),
            G = (byte)(granular ? 1 : 0),
            Avl = (byte)((descriptor >> 52) & 1),
        };
    }

    private enum Found
    {
        Descriptor,

        /// <summary>A null selector, one past the table's end, and one in a page that set_gdt did not install.</summary>
        Nothing,

        /// <summary>The LDT's page is not mapped yet.</summary>
        NoPage,
    }

    private bool TryReadOrFault(ushort selector, out ulong descriptor, out VcpuExit refusal)
    {
        refusal = default;
        switch (TryRead(selector, out descriptor))
        {
            case Found.Descriptor:
                return true;
            case Found.NoPage:
                sregs->Cr2 = window.Ldt.Value + (ulong)(selector & TableIndexMask);
                refusal = new VcpuExit(VcpuExitKind.Exception, ExceptionVector.PageFault);
                return false;
            default:
                refusal = Refuse(ExceptionVector.GeneralProtection, selector);
                return false;
        }
    }

    private Found TryRead(ushort selector, out ulong descriptor)
    {
        descriptor = 0;
        bool local = (selector & LocalTable) != 0;
        if ((selector & ~RequestedLevelMask) == 0
            || (local && (sregs->Ldt.Unusable != 0 || (selector & TableIndexMask) + sizeof(ulong) - 1 > sregs->Ldt.Limit)))
        {
            return Found.Nothing;
        }

        int index = selector >> 3;
        int page = index / EntriesPerPage;
        PageTableEntry entry = ((PageTableEntry*)window.Entries)[(local ? DescriptorWindow.GdtPages : 0) + page];
        bool reserved = !local && page >= MonitorLayout.ReservedGdtPage;
        if (local && !entry.IsPresent)
            return Found.NoPage;
        if (!reserved && !machine.Memory.Contains(entry.Frame))
            return Found.Nothing;
        ulong* descriptors = reserved ? machine.ReservedDescriptors : (ulong*)machine.Memory.Page(entry.Frame);
        descriptor = Volatile.Read(ref descriptors[index % EntriesPerPage]);
        return Found.Descriptor;
    }
}
