// A range of addresses of a script's own: three tables of scratch pages, under a slot of the kernel's L4.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Memory;

/// <summary>The addresses of one slot of the L4, of which the first L1's are there.</summary>
/// <param name="Slot">0 to 255.</param>
/// <param name="Tables">By level: the L1, L2 and L3 at 1, 2 and 3.</param>
internal sealed record AddressWindow(int Slot, ScratchPage[] Tables)
{
    public ScratchPage L1 => Tables[1];

    public ScratchPage L2 => Tables[2];

    public ScratchPage L3 => Tables[3];

    /// <summary>Address that an entry of the L1 translates; those beyond 511 are for a next L1.</summary>
    public ulong Address(int entry) => ((ulong)Slot << 39) | ((ulong)entry << 12);

    public Value At(int entry) => Value.Constant(Address(entry), $"window{Slot}[{entry}]");

    /// <summary>Makes the tables, links them, and puts them into the slot. Their pages are read-only then.</summary>
    public static AddressWindow Create(AbiCase c, int slot, params Value[] entries)
    {
        ScratchPage[] tables = [c.Page(), c.Page($"l1w{slot}"), c.Page($"l2w{slot}"), c.Page($"l3w{slot}")];
        for (int i = 0; i < entries.Length; i++)
            c.Put(tables[1][i * 8], 8, entries[i]);
        c.Put(tables[2].At, 8, tables[1].Entry(Pte.Table));
        c.Put(tables[3].At, 8, tables[2].Entry(Pte.Table));
        c.ReadOnly(tables[1..]);
        c.MmuUpdate(new MmuRequest(Root(c, slot), tables[3].Entry(Pte.Table)));
        return new AddressWindow(slot, tables);
    }

    /// <summary>Makes a window whose first page is data with a number in it, already looked at.</summary>
    public static AddressWindow CreateWithData(AbiCase c, int slot, out ScratchPage data)
    {
        data = c.Page("data");
        c.Put(data.At, 8, 0x600d);
        AddressWindow window = Create(c, slot, data.Entry(Pte.ReadWrite));
        c.Load(window.At(0));
        return window;
    }

    /// <summary>Takes the slot's entry away.</summary>
    public void Remove(AbiCase c) => c.MmuUpdate(new MmuRequest(Root(c, Slot), 0));

    /// <summary>Machine address of a slot of the kernel's L4.</summary>
    public static Value Root(AbiCase c, int slot) => ((c.Root << 12) + (slot * 8)).Named($"root[{slot}]");
}
