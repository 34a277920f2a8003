// memory_op: frames that the domain gives back and takes (decrease_reservation, increase_reservation, populate_physmap).
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Memory;

internal static class ReservationScript
{
    public static AbiScript Create() => new("reservation", "memory_op", script =>
    {
        script.Case("a page is given back, and another is taken for its pfn", c =>
        {
            ScratchPage page = c.Page("page");
            Value before = Current(c, "before");
            c.UpdateVa(page, 0);
            ScriptBuffer extents = c.Structure("extents", 8, (0, 8, page.Mfn));
            c.MemoryOp("decrease, 1", Xenmem.DecreaseReservation, Reservation(c, extents, 1));
            c.Show((Current(c, "after") - before).Named("change of the reservation"));
            c.Load((c.MachineToPhys + (page.Mfn << 3)).Named("m2p[page]"));
            c.UpdateVa(page, page.Entry(Pte.ReadOnly));
            c.Put(extents.At, 8, page.Pfn);
            c.MemoryOp("populate, 1", Xenmem.PopulatePhysmap, Reservation(c, extents, 1));
            c.Show((Current(c, "at the end") - before).Named("change of the reservation"));
            c.Show(Value.Pfn(Value.Load(extents.At)).Named("pfn of the new frame"));
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, ((Value.Load(extents.At) << 12) | Pte.ReadWrite).Named("new frame|0x63"), Uvmf.Invlpg);
            c.Store(page.At, 8, 0x88);
            c.Load(page.At);
        });
        script.Case("several extents, and one that cannot be given back", c =>
        {
            ScratchPage[] pages = c.Pages(3);
            foreach (ScratchPage page in pages)
                c.UpdateVa(page, 0);
            ScriptBuffer extents = c.Structure("extents", 32, (0, 8, pages[0].Mfn), (8, 8, pages[1].Mfn), (16, 8, Bad.Frame), (24, 8, pages[2].Mfn));
            Value before = Current(c, "before");
            c.MemoryOp("decrease, 4, the third of them bad", Xenmem.DecreaseReservation, Reservation(c, extents, 4));
            c.Show((Current(c, "after") - before).Named("change of the reservation"));
            c.UpdateVa(pages[2], pages[2].Entry(Pte.ReadWrite));
            c.UpdateVa(pages[1], pages[1].Entry(Pte.ReadWrite));
            c.MemoryOp("the same again", Xenmem.DecreaseReservation, Reservation(c, extents, 4));
        });
        script.Case("a page that is still mapped is given back when its last mapping goes", c =>
        {
            ScratchPage page = c.Page("page");
            Value entry = (c.MachineToPhys + (page.Mfn << 3)).Named("m2p[page]");
            c.Put(page.At, 8, 0x5a5a);
            ScriptBuffer extents = c.Structure("extents", 8, (0, 8, page.Mfn));
            Value before = Current(c, "before");
            c.MemoryOp("decrease, 1", Xenmem.DecreaseReservation, Reservation(c, extents, 1));
            c.Show((Current(c, "after") - before).Named("change of the reservation"));
            c.Load(page.At);
            c.Show((c.Get(entry) - page.Pfn).Named("m2p[page], from its pfn"));
            c.MemoryOp("decrease, the same page", Xenmem.DecreaseReservation, Reservation(c, extents, 1));
            c.Show((Current(c, "after") - before).Named("change of the reservation"));
            ScratchPage other = c.Page("other");
            c.UpdateVa(other, page.Entry(Pte.ReadWrite));
            c.UpdateVa(page, 0);
            c.Load(other.At);
            c.UpdateVa(other, 0);
            c.Show((Current(c, "unmapped") - before).Named("change of the reservation"));
            c.Load(entry);
            c.UpdateVa(page, page.Entry(Pte.ReadWrite));
        });
        script.Case("a page table is given back", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScriptBuffer extents = c.Structure("extents", 8, (0, 8, table.Mfn));
            Value before = Current(c, "before");
            c.MemoryOp("decrease, 1", Xenmem.DecreaseReservation, Reservation(c, extents, 1));
            c.Show((Current(c, "after") - before).Named("change of the reservation"));
            c.Unpin(table);
            c.UpdateVa(table, 0);
            c.Show((Current(c, "at the end") - before).Named("change of the reservation"));
        });
        script.Case("frames are taken without a pfn, and with none to tell", c =>
        {
            GiveBack(c, 3);
            ScriptBuffer extents = c.Buffer("extents", 16);
            Value before = Current(c, "before");
            c.MemoryOp("increase, 2", Xenmem.IncreaseReservation, Reservation(c, extents, 2));
            c.Show((Current(c, "after") - before).Named("change of the reservation"));
            c.Load((c.MachineToPhys + (Value.Load(extents.At) << 3)).Named("m2p of the first"));
            c.Show(((Value.Load(extents.At) ^ Value.Load(extents[8])) - 1 >> 63).Named("the same twice"));
            c.MemoryOp("increase, 1, told nowhere", Xenmem.IncreaseReservation, Reservation(c, 0, 1));
            c.Show((Current(c, "at the end") - before).Named("change of the reservation"));
            c.MemoryOp("decrease, the 2", Xenmem.DecreaseReservation, Reservation(c, extents, 2));
        });
        script.Case("extents of two pages are aligned", c =>
        {
            GiveBack(c, 2);
            ScratchPage page = c.Page("page");
            ScriptBuffer extents = c.Structure("extents", 8, (0, 8, 0x10000));
            c.MemoryOp("populate, 1 of order 1", Xenmem.PopulatePhysmap, Reservation(c, extents, 1, order: 1));
            Value frame = Value.Load(extents.At);
            c.Show((frame & 1).Named("frame's lowest bit"));
            c.Show(Value.Pfn(frame).Named("pfn of the first"));
            c.Show(Value.Pfn(frame + 1).Named("pfn of the second"));
            c.UpdateVa(page, ((frame + 1 << 12) | Pte.ReadWrite).Named("second|0x63"));
            c.Store(page.At, 8, 3);
            c.Load(page.At);
            c.UpdateVa(page, page.Entry(Pte.ReadWrite));
            c.MemoryOp("decrease, 1 of order 1", Xenmem.DecreaseReservation, Reservation(c, extents, 1, order: 1));
            c.UpdateVa(page, (frame << 12 | Pte.ReadOnly).Named("first|0x61"));
        });
        script.Case("counts and orders", c =>
        {
            ScriptBuffer extents = c.Structure("extents", 8, (0, 8, Bad.Frame));
            foreach ((string name, ulong command) in Commands)
            {
                c.MemoryOp($"{name}, 0", command, Reservation(c, extents, 0));
                c.MemoryOp($"{name}, more than can be continued", command, Reservation(c, extents, 0x400_0000));
                c.MemoryOp($"{name}, 2^64-1", command, Reservation(c, extents, ~0UL));
                c.MemoryOp($"{name}, order 19", command, Reservation(c, extents, 1, order: 19));
                c.MemoryOp($"{name}, order 255", command, Reservation(c, extents, 1, order: 255));
                c.MemoryOp($"{name}, order 2^31", command, Reservation(c, extents, 1, order: 1U << 31));
            }
        });
        script.Case("domains", c =>
        {
            ScriptBuffer extents = c.Structure("extents", 8, (0, 8, Bad.Frame));
            foreach ((string name, ulong command) in Commands)
            {
                c.MemoryOp($"{name}, no such domain", command, Reservation(c, extents, 1, domain: Domid.Absent));
                c.MemoryOp($"{name}, DOMID_IO", command, Reservation(c, extents, 1, domain: Domid.Io));
            }
        });
        script.Case("arguments and extents that cannot be used", c =>
        {
            ScratchPage page = c.Page();
            c.ReadOnly(page);
            foreach ((string name, ulong command) in Commands)
            {
                foreach (ulong address in (ulong[])[0, Bad.Unmapped, Bad.HypervisorStart, Bad.NonCanonical])
                    c.MemoryOp($"{name}, argument at 0x{address:x}", command, address);
                foreach (ulong address in (ulong[])[Bad.HypervisorStart, Bad.NonCanonical])
                    c.MemoryOp($"{name}, extents at 0x{address:x}", command, Reservation(c, address, 1));
            }

            c.MemoryOp("decrease, extents at 0", Xenmem.DecreaseReservation, Reservation(c, 0, 1));
            c.MemoryOp("decrease, extents nowhere", Xenmem.DecreaseReservation, Reservation(c, Bad.Unmapped, 1));
            c.MemoryOp("populate, extents at 0", Xenmem.PopulatePhysmap, Reservation(c, 0, 1));
            c.MemoryOp("populate, extents nowhere", Xenmem.PopulatePhysmap, Reservation(c, Bad.Unmapped, 1));
        });
        script.Case("a frame that cannot be told is taken all the same", c =>
        {
            GiveBack(c, 2);
            ScratchPage page = c.Page();
            c.Put(page.At, 8, 0x20000);
            c.ReadOnly(page);
            Value before = Current(c, "before");
            c.MemoryOp("populate, extents read-only", Xenmem.PopulatePhysmap, Reservation(c, page.At, 1));
            c.Show((Current(c, "after") - before).Named("change of the reservation"));
            c.MemoryOp("increase, extents read-only", Xenmem.IncreaseReservation, Reservation(c, page.At, 1));
            c.Show((Current(c, "at the end") - before).Named("change of the reservation"));
        });
        script.Case("continued calls begin with what is done", c =>
        {
            ScratchPage[] pages = c.Pages(2);
            foreach (ScratchPage page in pages)
                c.UpdateVa(page, 0);
            ScriptBuffer extents = c.Structure("extents", 16, (0, 8, pages[0].Mfn), (8, 8, pages[1].Mfn));
            Value before = Current(c, "before");
            c.MemoryOp("decrease, 2, continued from 1", Xenmem.DecreaseReservation | (1UL << Xenmem.ExtentShift), Reservation(c, extents, 2));
            c.Show((Current(c, "after") - before).Named("change of the reservation"));
            c.UpdateVa(pages[0], pages[0].Entry(Pte.ReadWrite));
            c.MemoryOp("decrease, 2, continued from 2", Xenmem.DecreaseReservation | (2UL << Xenmem.ExtentShift), Reservation(c, extents, 2));
            c.MemoryOp("decrease, 2, continued from 9", Xenmem.DecreaseReservation | (9UL << Xenmem.ExtentShift), Reservation(c, extents, 2));
            c.MemoryOp("decrease, argument nowhere, continued from 9", Xenmem.DecreaseReservation | (9UL << Xenmem.ExtentShift), Bad.Unmapped);
        });
        script.Case("flags: address bits, nodes, populate on demand", c =>
        {
            GiveBack(c, 4);
            ScriptBuffer extents = c.Structure("extents", 8, (0, 8, 0x30000));
            c.MemoryOp("populate, 64 address bits", Xenmem.PopulatePhysmap, Reservation(c, extents, 1, flags: 64));
            c.Put(extents.At, 8, 0x30001);
            c.MemoryOp("populate, 1 address bit", Xenmem.PopulatePhysmap, Reservation(c, extents, 1, flags: 1));
            c.MemoryOp("populate, 12 address bits", Xenmem.PopulatePhysmap, Reservation(c, extents, 1, flags: 12));
            c.MemoryOp("populate, on demand", Xenmem.PopulatePhysmap, Reservation(c, extents, 1, flags: Xenmem.PopulateOnDemand));
            c.MemoryOp("populate, on node 0", Xenmem.PopulatePhysmap, Reservation(c, extents, 1, flags: Xenmem.NodeZero));
            c.Put(extents.At, 8, 0x30002);
            c.MemoryOp("populate, on a node of 200", Xenmem.PopulatePhysmap, Reservation(c, extents, 1, flags: 201 << 8));
            c.MemoryOp("populate, on a node of 200 and no other", Xenmem.PopulatePhysmap, Reservation(c, extents, 1, flags: (201 << 8) | Xenmem.ExactNodeRequest));
            c.MemoryOp("decrease, 12 address bits", Xenmem.DecreaseReservation, Reservation(c, extents, 1, flags: 12));
        });
        script.Case("more than the domain may have", c =>
        {
            ScriptBuffer extents = c.Buffer("extents", 8);
            ScriptBuffer self = c.Structure("domid", 8, (0, 2, Domid.Self));
            Value maximum = c.Keep(c.MemoryOp("maximum reservation", Xenmem.MaximumReservation, self, AnswerFormat.Sign), "maximum");
            // Takes what there is without being told where, up to one more than may be; that many come as the domain had still to come.
            Value before = Current(c, "before");
            ScriptBuffer many = c.Structure("many", 32, (8, 8, (maximum - before + 1).Named("missing+1")), (24, 2, Domid.Self));
            Value taken = c.MemoryOp("increase, one more than may be", Xenmem.IncreaseReservation, many, AnswerFormat.None);
            c.Show((taken - (maximum - before)).Named("taken, less what was missing"));
            c.MemoryOp("increase, 1", Xenmem.IncreaseReservation, Reservation(c, extents, 1));
            c.Put(extents.At, 8, 5);
            c.MemoryOp("populate, 1", Xenmem.PopulatePhysmap, Reservation(c, extents, 1));
            c.Load(extents.At);
        });
    });

    private static (string Name, ulong Command)[] Commands =>
        [("increase", Xenmem.IncreaseReservation), ("decrease", Xenmem.DecreaseReservation), ("populate", Xenmem.PopulatePhysmap)];

    /// <summary>A struct xen_memory_reservation.</summary>
    private static ScriptBuffer Reservation(AbiCase c, Value extents, Value count, ulong order = 0, ulong flags = 0, ulong domain = Domid.Self)
        => c.Structure("reservation", 32, (0, 8, extents), (8, 8, count), (16, 4, order), (20, 4, flags), (24, 2, domain));

    /// <summary>Pages of the domain, quietly kept.</summary>
    private static Value Current(AbiCase c, string name)
    {
        ScriptBuffer self = c.Structure("domid", 8, (0, 2, Domid.Self));
        return c.Keep(c.MemoryOp($"current reservation, {name}", Xenmem.CurrentReservation, self, AnswerFormat.Sign), name);
    }

    /// <summary>Gives back pages, so that as many can be taken.</summary>
    private static void GiveBack(AbiCase c, int count)
    {
        ScratchPage[] pages = c.Pages(count);
        foreach (ScratchPage page in pages)
            c.UpdateVa(page, 0);
        ScriptBuffer extents = c.Structure("extents", count * 8, [.. pages.Select(static (page, i) => (i * 8, 8, page.Mfn))]);
        c.MemoryOp($"decrease, {count}", Xenmem.DecreaseReservation, Reservation(c, extents, count));
    }
}
