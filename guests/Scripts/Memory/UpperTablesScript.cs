// Tables of levels 2 to 4: what their entries may name, page types and their conflicts, linear page tables.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Memory;

internal static class UpperTablesScript
{
    public static AbiScript Create() => new("upper-tables", "mmu_update", script =>
    {
        WriteEntries(script);
        WriteTypes(script);
        WriteRoot(script);
        WriteLinear(script);
    });

    private static void WriteEntries(AbiScript script)
    {
        for (int level = 2; level <= 4; level++)
        {
            int own = level;
            script.Case($"an L{own} entry gets a table, and another", c =>
            {
                ScratchPage upper = c.PinnedTable(own, "upper");
                ScratchPage[] lower = c.Pages(2);
                c.ReadOnly(lower);
                c.MmuUpdate(MmuRequest.Normal(upper, 0, lower[0].Entry(Pte.Table)));
                c.ShowEntry(upper, 0);
                c.UpdateVa(lower[0], lower[0].Entry(Pte.ReadWrite));
                c.MmuUpdate(MmuRequest.Normal(upper, 0, lower[1].Entry(Pte.Present)));
                c.ShowAllFlags(upper, 0);
                c.UpdateVa(lower[0], lower[0].Entry(Pte.ReadWrite));
                c.UpdateVa(lower[1], lower[1].Entry(Pte.ReadWrite));
                c.MmuUpdate(MmuRequest.Normal(upper, 0, 0));
                c.UpdateVa(lower[1], lower[1].Entry(Pte.ReadWrite));
            });
            script.Case($"an L{own} entry of a page that is mapped writable", c =>
            {
                ScratchPage upper = c.PinnedTable(own, "upper");
                ScratchPage page = c.Page();
                c.MmuUpdate(MmuRequest.Normal(upper, 0, page.Entry(Pte.Table)));
                c.Load(upper.At);
            });
            script.Case($"flags that an L{own} entry may not have", c =>
            {
                ScratchPage upper = c.PinnedTable(own, "upper");
                ScratchPage lower = c.Page("lower");
                c.ReadOnly(lower);
                foreach (ulong flag in (ulong[])[Pte.LargePage, Pte.Global, Pte.WriteThrough, Pte.CacheDisable])
                    c.MmuUpdate(MmuRequest.Normal(upper, 0, lower.Entry(Pte.Table | flag)));
                c.MmuUpdate(MmuRequest.Normal(upper, 0, lower.Entry(Pte.Table | Pte.Available0 | Pte.AvailableHigh | Pte.NoExecute | Pte.GuestKernel)));
                c.ShowAllFlags(upper, 0);
            });
            script.Case($"an L{own} entry of frames that are none, and one that is not present", c =>
            {
                ScratchPage upper = c.PinnedTable(own, "upper");
                c.MmuUpdate(MmuRequest.Normal(upper, 0, ((Value)Bad.Frame << 12) | Pte.Table));
                c.MmuUpdate(MmuRequest.Normal(upper, 0, ((Value)Bad.InvalidFrame << 12) | Pte.Table));
                c.MmuUpdate(MmuRequest.Normal(upper, 0, Pte.Table));
                c.MmuUpdate(MmuRequest.Normal(upper, 0, Pte.LargePage | Pte.Global | 0x1000UL));
                c.Load(upper.At);
            });
            script.Case($"an L{own} entry's Accessed and Dirty, and an entry that changes only flags", c =>
            {
                ScratchPage upper = c.PinnedTable(own, "upper");
                ScratchPage lower = c.Page("lower");
                c.ReadOnly(lower);
                c.MmuUpdate(MmuRequest.Normal(upper, 7, lower.Entry(Pte.Table)));
                c.MmuUpdate(MmuRequest.With(MmuCommand.PtUpdatePreserveAd, upper, 7, lower.Entry(Pte.Present | Pte.Writable)));
                c.ShowAllFlags(upper, 7);
                c.MmuUpdate(MmuRequest.Normal(upper, 7, lower.Entry(Pte.Present)));
                c.ShowAllFlags(upper, 7);
            });
        }
    }

    private static void WriteTypes(AbiScript script)
    {
        script.Case("a table is of one level only", c =>
        {
            for (int level = 1; level <= 4; level++)
            {
                ScratchPage table = c.PinnedTable(level, $"level{level}");
                for (int as_ = 2; as_ <= 4; as_++)
                {
                    ScratchPage upper = c.PinnedTable(as_, $"of{level}as{as_ - 1}");
                    c.MmuUpdate(MmuRequest.Normal(upper, 0, table.Entry(Pte.Table)));
                }
            }
        });
        script.Case("tables inside a table are checked with it", c =>
        {
            ScratchPage[] tables = [c.Page("t1"), c.Page("t2"), c.Page("t3")];
            ScratchPage data = c.Page("data");
            c.Put(tables[0].At, 8, data.Entry(Pte.ReadWrite));
            c.Put(tables[1].At, 8, tables[0].Entry(Pte.Table));
            c.Put(tables[2].At, 8, tables[1].Entry(Pte.Table));
            c.ReadOnly(tables[1], tables[2]);
            c.Pin(3, tables[2]);
            c.ReadOnly(tables[0]);
            c.Pin(3, tables[2]);
            c.ShowEntry(tables[0], 0);
            c.UpdateVa(tables[0], tables[0].Entry(Pte.ReadWrite));
            c.Unpin(tables[2]);
            c.UpdateVa(tables[0], tables[0].Entry(Pte.ReadWrite));
        });
        script.Case("a fault deep in the last entry leaves nothing behind", c =>
        {
            ScratchPage[] tables = [c.Page("t1"), c.Page("t2")];
            ScratchPage data = c.Page("data");
            c.Put(tables[0].At, 8, data.Entry(Pte.ReadWrite));
            c.Put(tables[0][511 * 8], 8, tables[0].Entry(Pte.ReadWrite));
            c.Put(tables[1][511 * 8], 8, tables[0].Entry(Pte.Table));
            c.ReadOnly(tables);
            c.Pin(2, tables[1]);
            c.UpdateVa(tables[0], tables[0].Entry(Pte.ReadWrite));
            c.UpdateVa(tables[1], tables[1].Entry(Pte.ReadWrite));
            c.UpdateVa(data, data.Entry(Pte.ReadWrite));
            // What the walk reached before the fault was adjusted.
            c.ShowEntry(tables[0], 0);
            c.ShowEntry(tables[0], 511);
        });
        script.Case("a table that maps itself writable cannot be pinned, one that maps itself read-only can", c =>
        {
            ScratchPage table = c.Page("t1");
            c.Put(table.At, 8, table.Entry(Pte.ReadWrite));
            c.ReadOnly(table);
            c.Pin(1, table);
            c.UpdateVa(table, table.Entry(Pte.ReadWrite));
            c.Put(table.At, 8, table.Entry(Pte.ReadOnly));
            c.ReadOnly(table);
            c.Pin(1, table);
            c.ShowEntry(table, 0);
            c.Unpin(table);
        });
        script.Case("segment descriptors are no page table, and no page table holds descriptors", c =>
        {
            ScratchPage upper = c.PinnedTable(2, "upper");
            ScratchPage page = c.Page("descriptors");
            c.ReadOnly(page);
            ScriptBuffer frames = c.Structure("frames", 8, (0, 8, page.Mfn));
            c.Hypercall(GuestHypercall.SetGdt, frames.At, 512);
            c.Pin(1, page);
            c.MmuUpdate(MmuRequest.Normal(upper, 0, page.Entry(Pte.Table)));
            c.UpdateVa(page, page.Entry(Pte.ReadWrite));
            c.Hypercall(GuestHypercall.SetGdt, 0, 0);
            c.Pin(1, page);
            c.Hypercall(GuestHypercall.SetGdt, frames.At, 512);
        });
        script.Case("one L1 under two L2s is freed by the last", c =>
        {
            ScratchPage[] upper = [c.PinnedTable(2, "a"), c.PinnedTable(2, "b")];
            ScratchPage lower = c.Page("lower");
            c.ReadOnly(lower);
            c.MmuUpdate(MmuRequest.Normal(upper[0], 0, lower.Entry(Pte.Table)), MmuRequest.Normal(upper[1], 0, lower.Entry(Pte.Table)));
            c.Unpin(upper[0]);
            c.UpdateVa(lower, lower.Entry(Pte.ReadWrite));
            c.Unpin(upper[1]);
            c.UpdateVa(lower, lower.Entry(Pte.ReadWrite));
        });
        script.Case("an L2's entries go with it", c =>
        {
            ScratchPage upper = c.Page("upper");
            ScratchPage lower = c.Page("lower");
            c.Put(upper.At, 8, lower.Entry(Pte.Table));
            c.ReadOnly(upper, lower);
            c.Pin(2, upper);
            c.Pin(1, lower);
            c.Unpin(upper);
            c.UpdateVa(lower, lower.Entry(Pte.ReadWrite));
            c.Unpin(lower);
            c.UpdateVa(lower, lower.Entry(Pte.ReadWrite));
        });
    }

    private static void WriteRoot(AbiScript script)
    {
        script.Case("the hypervisor's slots of an L4", c =>
        {
            ScratchPage table = c.PinnedTable(4, "l4");
            ScratchPage lower = c.Page("l3");
            c.ReadOnly(lower);
            foreach (int slot in (int[])[255, 256, 260, 271, 272])
            {
                c.MmuUpdate(MmuRequest.Normal(table, slot, lower.Entry(Pte.Table)));
                c.MmuUpdate(MmuRequest.Normal(table, slot, 0));
            }
        });
        script.Case("what a guest has put into the hypervisor's slots is not looked at", c =>
        {
            ScratchPage table = c.Page("l4");
            c.Put(table[256 * 8], 8, table.Entry(Pte.ReadWrite));
            c.Put(table[271 * 8], 8, ((Value)Bad.Frame << 12) | Pte.Table);
            c.ReadOnly(table);
            c.Pin(4, table);
            c.Unpin(table);
            c.UpdateVa(table, table.Entry(Pte.ReadWrite));
        });
        script.Case("new addresses come and go with a slot of the running L4", c =>
        {
            ScratchPage data = c.Page("data");
            c.Put(data.At, 8, 0x4711);
            AddressWindow window = AddressWindow.Create(c, 5, data.Entry(Pte.ReadWrite));
            c.Load(window.At(0));
            c.Store(window.At(0) + 8, 8, 0x4712);
            c.Load(data[8]);
            c.Load(window.At(1));
            c.MmuUpdate(MmuRequest.Normal(window.L1, 1, data.Entry(Pte.ReadOnly)));
            c.Load(window.At(1));
            c.Store(window.At(1), 8, 1);
            window.Remove(c);
            c.Load(window.At(0));
            c.UpdateVa(window.L3, window.L3.Entry(Pte.ReadWrite));
            c.UpdateVa(window.L1, window.L1.Entry(Pte.ReadWrite));
        });
        script.Case("an upper entry without Writable forbids stores below it", c =>
        {
            ScratchPage data = c.Page("data");
            AddressWindow window = AddressWindow.Create(c, 6, data.Entry(Pte.ReadWrite));
            c.MmuUpdate(MmuRequest.Normal(window.L2, 0, window.L1.Entry(Pte.ReadOnly)));
            c.Load(window.At(0));
            c.Store(window.At(0), 8, 1);
            c.MmuUpdate(MmuRequest.Normal(window.L2, 0, window.L1.Entry(Pte.ReadWrite)));
            c.Store(window.At(0), 8, 1);
            c.Load(data.At);
        });
        script.Case("an upper entry with no-execute forbids execution below it", c =>
        {
            ScratchPage data = c.Page("data");
            c.Put(data.At, 1, 0xc3);
            AddressWindow window = AddressWindow.Create(c, 7, data.Entry(Pte.ReadWrite));
            c.Kernel("call rax", static a => a.call(Iced.Intel.AssemblerRegisters.rax), with: [(Register64.Rax, window.At(0))]);
            c.MmuUpdate(MmuRequest.Normal(window.L3, 0, window.L2.Entry(Pte.Table | Pte.NoExecute)));
            c.Kernel("call rax", static a => a.call(Iced.Intel.AssemblerRegisters.rax), with: [(Register64.Rax, window.At(0))]);
        });
    }

    private static void WriteLinear(AbiScript script)
    {
        for (int level = 2; level <= 4; level++)
        {
            int own = level;
            script.Case($"an L{own} names itself: read-only yes, writable no", c =>
            {
                ScratchPage table = c.PinnedTable(own, "table");
                c.MmuUpdate(MmuRequest.Normal(table, 1, table.Entry(Pte.Table)));
                c.MmuUpdate(MmuRequest.Normal(table, 1, table.Entry(Pte.ReadOnly)));
                c.ShowEntry(table, 1);
                c.MmuUpdate(MmuRequest.Normal(table, 1, table.Entry(Pte.Table)));
                c.ShowEntry(table, 1);
                c.Unpin(table);
                c.UpdateVa(table, table.Entry(Pte.ReadWrite));
            });
            script.Case($"an L{own} names another L{own}, but not in chains", c =>
            {
                ScratchPage[] tables = [c.PinnedTable(own, "a"), c.PinnedTable(own, "b"), c.PinnedTable(own, "c")];
                c.MmuUpdate(MmuRequest.Normal(tables[0], 1, tables[1].Entry(Pte.ReadOnly)));
                c.MmuUpdate(MmuRequest.Normal(tables[1], 1, tables[2].Entry(Pte.ReadOnly)));
                c.MmuUpdate(MmuRequest.Normal(tables[2], 1, tables[0].Entry(Pte.ReadOnly)));
                c.MmuUpdate(MmuRequest.Normal(tables[2], 1, tables[1].Entry(Pte.ReadOnly)));
                c.MmuUpdate(MmuRequest.Normal(tables[0], 1, 0));
                c.MmuUpdate(MmuRequest.Normal(tables[1], 1, tables[0].Entry(Pte.ReadOnly)));
                c.MmuUpdate(MmuRequest.Normal(tables[2], 1, 0));
                c.MmuUpdate(MmuRequest.Normal(tables[1], 1, tables[0].Entry(Pte.ReadOnly)));
            });
        }

        script.Case("an L4 that maps itself shows its tables as one array", c =>
        {
            ScratchPage data = c.Page("data");
            const int Slot = 9;
            AddressWindow window = AddressWindow.Create(c, Slot, data.Entry(Pte.ReadWrite));
            const int Linear = 10;
            c.MmuUpdate(new MmuRequest(AddressWindow.Root(c, Linear), ((c.Root << 12) | Pte.ReadOnly).Named("root|0x61")));
            const ulong L1Array = (ulong)Linear << 39;
            const ulong L2Array = L1Array | ((ulong)Linear << 30);
            const ulong L3Array = L2Array | ((ulong)Linear << 21);
            const ulong L4Array = L3Array | ((ulong)Linear << 12);
            c.ShowEntry(Value.Constant(L1Array | ((ulong)Slot << 30), "linear l1e"), "l1e");
            c.ShowEntry(Value.Constant(L2Array | ((ulong)Slot << 21), "linear l2e"), "l2e");
            c.ShowEntry(Value.Constant(L3Array | ((ulong)Slot << 12), "linear l3e"), "l3e");
            c.ShowEntry(Value.Constant(L4Array | ((ulong)Slot << 3), "linear l4e"), "l4e");
            c.Store(Value.Constant(L4Array | ((ulong)Slot << 3), "linear l4e"), 8, 0);
            c.Store(Value.Constant(L2Array | ((ulong)Slot << 21), "linear l2e"), 8, 0);
            c.Store(Value.Constant(L1Array | ((ulong)Slot << 30), "linear l1e"), 8, data.Entry(Pte.ReadOnly));
            c.ShowEntry(window.L1, 0);
            c.MmuUpdate(new MmuRequest(AddressWindow.Root(c, Linear), 0));
            window.Remove(c);
        });
    }
}
