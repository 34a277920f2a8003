// The probe guest's own variables, which scripts read by their addresses.
using System.Buffers.Binary;
using XenSharp.Guests.Assembly;

namespace XenSharp.Guests.Probe;

/// <summary>Addresses of the variables, and the trap table that the probe installs.</summary>
internal sealed class ProbeVariables
{
    private const int TrapEntrySize = 16;

    /// <summary>Selector of the kernel's code segment (FLAT_KERNEL_CS of public arch-x86/xen-x86_64.h).</summary>
    private const ushort FlatKernelCs = 0xe033;

    private readonly Dictionary<int, ulong> _handlers = [];

    /// <param name="guest">The image.</param>
    /// <param name="isOfPair">Whether the domain is one of a pair.</param>
    public ProbeVariables(PvAssembler guest, bool isOfPair)
    {
        MachphysMapping = guest.Reserve(24);
        MachineToPhys = guest.Reserve(8);
        PhysToMachine = guest.Reserve(8);
        Root = guest.Reserve(8);
        RootAddress = guest.Reserve(8);
        UserRoot = guest.Reserve(8);
        UpcallHandler = guest.Reserve(8);
        SecondaryEntry = guest.Reserve(8);
        if (isOfPair)
        {
            OwnDomain = guest.Reserve(8);
            PeerDomain = guest.Reserve(8);
        }

        foreach (int vector in Vectors)
            _handlers[vector] = guest.Reserve(8);
        foreach (ProbeEntry entry in Enum.GetValues<ProbeEntry>())
            _handlers[(int)entry] = guest.Reserve(8);
        TrapTable = guest.Define(MakeTrapTable());
    }

    /// <summary>Vectors that have a handler: the processor's exceptions and some for software interrupts.</summary>
    public static IReadOnlyList<int> Vectors { get; } = [.. Enumerable.Range(0, 32), 0x80, 0x81, 0x82];

    /// <summary>Vectors whose frame has an error code (AMD64 manual volume 2, 8.2).</summary>
    public static IReadOnlyList<int> WithErrorCode { get; } = [8, 10, 11, 12, 13, 14, 17, 21];

    public ulong MachphysMapping { get; }

    /// <summary>Holds the address of the machine-to-physical table.</summary>
    public ulong MachineToPhys { get; }

    /// <summary>Holds the address of the p2m list.</summary>
    public ulong PhysToMachine { get; }

    /// <summary>Holds the machine frame of the kernel's L4, where the walk of <see cref="Token.EntryAddress"/> starts.</summary>
    public ulong Root { get; }

    /// <summary>Holds the address of the boot L4.</summary>
    public ulong RootAddress { get; }

    /// <summary>Holds the machine frame of user mode's L4.</summary>
    public ulong UserRoot { get; }

    /// <summary>Holds the address of the event callback.</summary>
    public ulong UpcallHandler { get; }

    /// <summary>Holds the address where another vCPU starts, with its script in RDI.</summary>
    public ulong SecondaryEntry { get; }

    /// <summary>Holds the number of the domain, if it is one of a pair.</summary>
    public ulong OwnDomain { get; }

    /// <summary>Holds the number of the other domain of the pair.</summary>
    public ulong PeerDomain { get; }

    /// <summary>Address of the array of struct trap_info.</summary>
    public ulong TrapTable { get; }

    /// <summary>Address of the variable that holds a handler's address.</summary>
    /// <param name="vector">One of <see cref="Vectors"/>, or a <see cref="ProbeEntry"/>.</param>
    public ulong Handler(int vector) => _handlers[vector];

    /// <summary>Address of a vector's struct trap_info; null for what is no vector.</summary>
    public ulong? TrapEntry(int vector)
    {
        for (int i = 0; i < Vectors.Count; i++)
        {
            if (Vectors[i] == vector)
                return TrapTable + (ulong)(i * TrapEntrySize);
        }

        return null;
    }

    // struct trap_info: vector, flags (bits 0-1 the DPL, bit 2 "events masked"), cs, address at 8; the addresses are filled in at start.
    private static byte[] MakeTrapTable()
    {
        const byte UserMayRaise = 3;
        const byte MasksEvents = 4;
        byte[] table = new byte[(Vectors.Count + 1) * TrapEntrySize];
        foreach ((int index, int vector) in Vectors.Index())
        {
            Span<byte> entry = table.AsSpan(index * TrapEntrySize);
            entry[0] = (byte)vector;
            entry[1] = vector switch
            {
                3 or 4 or 0x80 => UserMayRaise,
                0x81 => UserMayRaise | MasksEvents,
                _ => 0,
            };
            BinaryPrimitives.WriteUInt16LittleEndian(entry[2..], FlatKernelCs);
        }

        return table;
    }
}
