// Attempts to get a page table writable, or a mapping beyond one page, out of the tables above L1: superpages, fast paths, linear tables.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Memory;

internal static class HostileTablesScript
{
    private const ulong Superpage = Pte.Table | Pte.LargePage;

    public static AbiScript Create() => new("hostile-tables", "hostile guest", script =>
    {
        WriteSuperpages(script);
        WriteFastPaths(script);
        WriteLinear(script);
    });

    /// <summary>A superpage maps 512 frames, or 512 times as many, of which only the first would be looked at (XSA-148).</summary>
    private static void WriteSuperpages(AbiScript script)
    {
        script.Case("a running L2 entry becomes a superpage, keeping its frame", c =>
        {
            AddressWindow window = AddressWindow.CreateWithData(c, 20, out ScratchPage data);
            foreach (ulong command in (ulong[])[MmuCommand.NormalPtUpdate, MmuCommand.PtUpdatePreserveAd, MmuCommand.PtUpdateNoTranslate])
                c.MmuUpdate(MmuRequest.With(command, window.L2, 0, window.L1.Entry(Superpage)));
            c.MmuUpdate(MmuRequest.Normal(window.L2, 0, window.L1.Entry(Superpage & ~Pte.Writable)));
            c.MmuUpdate(MmuRequest.Normal(window.L2, 0, data.Entry(Superpage)));
            c.MmuUpdate(MmuRequest.Normal(window.L3, 0, window.L2.Entry(Superpage)));
            c.ShowFlags(c.Get(window.L2.At), "l2[0]");
            ShowOnlyData(c, window);
        });
        script.Case("a superpage comes in two steps: not present, then present", c =>
        {
            AddressWindow window = AddressWindow.CreateWithData(c, 21, out ScratchPage data);
            c.MmuUpdate(MmuRequest.Normal(window.L2, 1, data.Entry(Superpage & ~Pte.Present)));
            c.Load(window.At(512));
            c.MmuUpdate(MmuRequest.Normal(window.L2, 1, data.Entry(Superpage)));
            c.Store(window.L2[8], 1, Superpage);
            c.Store(window.L2[8], 8, data.Entry(Superpage));
            c.ShowFlags(c.Get(window.L2[8]), "l2[1]");
            c.Load(window.At(512));
            c.Store(window.At(513), 8, 1);
            window.Remove(c);
        });
        script.Case("a superpage stands in a table when it is pinned, linked, or made a root", c =>
        {
            ScratchPage data = c.Page("data");
            ScratchPage table = c.Page("table");
            AddressWindow window = AddressWindow.CreateWithData(c, 22, out _);
            c.Put(table[8 * 511], 8, data.Entry(Superpage));
            c.ReadOnly(table);
            for (int level = 2; level <= 4; level++)
                c.Pin(level, table);
            c.MmuUpdate(MmuRequest.Normal(window.L3, 1, table.Entry(Pte.Table)));
            c.MmuUpdate(new MmuRequest(AddressWindow.Root(c, 23), table.Entry(Pte.Table)));
            c.One("new baseptr table", Mmuext.NewBaseptr, table.Mfn);
            c.One("new user baseptr table", Mmuext.NewUserBaseptr, table.Mfn);
            c.UpdateVa(table, table.Entry(Pte.ReadWrite));
            window.Remove(c);
        });
        script.Case("a superpage in the last of a table's entries, after good ones", c =>
        {
            ScratchPage data = c.Page("data");
            ScratchPage[] tables = [c.Page("t1"), c.Page("t2")];
            c.Put(tables[0].At, 8, data.Entry(Pte.ReadWrite));
            c.Put(tables[1].At, 8, tables[0].Entry(Pte.Table));
            c.Put(tables[1][8 * 511], 8, tables[0].Entry(Superpage));
            c.ReadOnly(tables);
            c.Pin(2, tables[1]);
            foreach (ScratchPage table in tables)
            {
                c.UpdateVa(table, table.Entry(Pte.ReadWrite));
                c.Store(table[8], 8, 0);
            }

            c.UpdateVa(data, data.Entry(Pte.ReadOnly));
            c.UpdateVa(tables[0], tables[0].Entry(Pte.ReadOnly));
            c.Pin(1, data);
        });
        script.Case("cache attributes that memory may not have", c =>
        {
            AddressWindow window = AddressWindow.CreateWithData(c, 24, out ScratchPage data);
            foreach (ulong flag in (ulong[])[Pte.WriteThrough, Pte.CacheDisable, Pte.LargePage])
            {
                c.MmuUpdate(MmuRequest.Normal(window.L1, 0, data.Entry(Pte.ReadWrite | flag)));
                c.MmuUpdate(MmuRequest.With(MmuCommand.PtUpdatePreserveAd, window.L1, 0, data.Entry(Pte.ReadOnly | flag)));
                c.MmuUpdate(MmuRequest.Normal(window.L2, 0, window.L1.Entry(Pte.Table | flag)));
                c.UpdateVa(data, data.Entry(Pte.ReadWrite | flag));
            }

            ShowOnlyData(c, window);
        });
    }

    /// <summary>An entry that changes only in flags is not looked at anew: Writable may not be one of these flags (XSA-182).</summary>
    private static void WriteFastPaths(AbiScript script)
    {
        for (int level = 2; level <= 4; level++)
        {
            int own = level;
            script.Case($"an L{own} that names itself read-only gets Writable", c =>
            {
                AddressWindow window = AddressWindow.CreateWithData(c, 26 + own, out ScratchPage data);
                int slot = window.Slot;
                const int linear = 3;
                int index = own == 4 ? slot + 10 : linear;
                Value table = own switch { 2 => window.L2.Mfn, 3 => window.L3.Mfn, _ => c.Root };
                Value place = ((table << 12) + (index * 8)).Named($"own[{index}]");
                foreach (ulong command in (ulong[])[MmuCommand.NormalPtUpdate, MmuCommand.PtUpdatePreserveAd, MmuCommand.PtUpdateNoTranslate])
                {
                    Value Entry(ulong flags) => ((table << 12) | flags).Named($"own|0x{flags:x}");
                    Value Place() => (place + command).Named($"own[{index}]|{command}");
                    c.MmuUpdate(new MmuRequest(Place(), Entry(Pte.ReadOnly)));
                    c.MmuUpdate(new MmuRequest(Place(), Entry(Pte.ReadWrite)));
                    c.MmuUpdate(new MmuRequest(Place(), Entry(Pte.ReadOnly | Pte.User | Pte.Available0)));
                    c.MmuUpdate(new MmuRequest(Place(), Entry(Pte.Table | Pte.Available0)));
                    c.MmuUpdate(new MmuRequest(Place(), 0), new MmuRequest(Place(), Entry(Pte.ReadWrite)));
                }

                c.MmuUpdate(new MmuRequest(place, ((table << 12) | Pte.ReadOnly).Named("own|0x61")));

                // The own table as a page: a table's entry for itself ends the walk one level early.
                ulong view = own switch
                {
                    2 => ((ulong)slot << 39) | ((ulong)linear << 21) | ((ulong)linear << 12),
                    3 => ((ulong)slot << 39) | ((ulong)linear << 30) | ((ulong)linear << 21) | ((ulong)linear << 12),
                    _ => ((ulong)index << 39) | ((ulong)index << 30) | ((ulong)index << 21) | ((ulong)index << 12),
                };
                Value itself = Value.Constant(view + ((ulong)index * 8), "own entry in the view of itself");
                c.ShowFlags(c.Load(itself, 8, AnswerFormat.None), "own entry");
                c.Store(itself, 8, ((table << 12) | Pte.Table).Named("own|0x67"));
                c.Store(itself, 1, Pte.Table);
                c.Kernel("lock bts [rdi], 1", static a => a.@lock.bts(__qword_ptr[rdi], 1), null, [(Register64.Rdi, itself)]);
                c.ShowFlags(c.Load(itself, 8, AnswerFormat.None), "own entry");
                c.MmuUpdate(new MmuRequest(place, 0));
                c.Load(window.At(0));
                window.Remove(c);
            });
        }

        script.Case("an L1 entry for a table gets Writable with nothing else changed", c =>
        {
            AddressWindow window = AddressWindow.CreateWithData(c, 34, out ScratchPage data);
            for (int level = 1; level <= 3; level++)
            {
                ScratchPage table = window.Tables[level];
                c.MmuUpdate(MmuRequest.Normal(window.L1, level, table.Entry(Pte.ReadOnly)));
                foreach (ulong command in (ulong[])[MmuCommand.NormalPtUpdate, MmuCommand.PtUpdatePreserveAd, MmuCommand.PtUpdateNoTranslate])
                    c.MmuUpdate(MmuRequest.With(command, window.L1, level, table.Entry(Pte.ReadWrite)));
                c.Hypercall(GuestHypercall.UpdateVaMapping, window.At(level), table.Entry(Pte.ReadWrite), Uvmf.Invlpg);
                c.MmuUpdate(MmuRequest.Normal(window.L1, level, table.Entry(Pte.ReadOnly & ~Pte.Present)));
                c.MmuUpdate(MmuRequest.Normal(window.L1, level, table.Entry(Pte.ReadWrite)));
                c.MmuUpdate(MmuRequest.Normal(window.L1, level, table.Entry(Pte.ReadOnly)));
                c.Store(window.At(level) + 4080, 8, data.Entry(Pte.ReadWrite));
            }

            window.Remove(c);
        });
        script.Case("the running root and what is above the image, as pages to write to", c =>
        {
            ScratchPage page = c.Page("page");
            foreach ((string name, Value frame) in (ReadOnlySpan<(string, Value)>)
                [
                    ("root", c.Root), ("user root", c.UserRoot), ("the image's L3", FrameOf(c, 4)), ("the image's L2", FrameOf(c, 3)),
                    ("the image's L1", FrameOf(c, 2)),
                ])
            {
                c.UpdateVa(page, ((frame << 12) | Pte.ReadWrite).Named($"{name}|0x63"));
                c.UpdateVa(page, ((frame << 12) | Pte.ReadOnly).Named($"{name}|0x61"));
                c.UpdateVa(page, ((frame << 12) | Pte.ReadWrite).Named($"{name}|0x63"));
                c.Store(page[8 * 300], 8, 0);
            }

            c.UpdateVa(page, page.Entry(Pte.ReadWrite));
        });
    }

    /// <summary>Linear tables show tables as data, and hold references that must outlive what they name (XSA-240, XSA-286).</summary>
    private static void WriteLinear(AbiScript script)
    {
        script.Case("a linear view after the slot that it showed is gone", c =>
        {
            const int slot = 40;
            const int linear = 41;
            AddressWindow window = AddressWindow.CreateWithData(c, slot, out ScratchPage data);
            c.MmuUpdate(new MmuRequest(AddressWindow.Root(c, linear), ((c.Root << 12) | Pte.ReadOnly).Named("root|0x61")));
            Value l1e = Value.Constant(((ulong)linear << 39) | ((ulong)slot << 30), "linear l1e");
            Value l2e = Value.Constant(((ulong)linear << 39) | ((ulong)linear << 30) | ((ulong)slot << 21), "linear l2e");
            c.ShowFlags(c.Load(l1e, 8, AnswerFormat.None), "l1e");
            c.ShowFlags(c.Load(l2e, 8, AnswerFormat.None), "l2e");
            c.Load(window.At(0));

            // No flush is asked for: whatever the processor kept of the way through the slot must not be used.
            window.Remove(c);
            c.Load(l1e);
            c.Load(l2e);
            c.Load(window.At(0));
            c.UpdateVa(window.L1, window.L1.Entry(Pte.ReadWrite));
            c.Put(window.L1.At, 8, ((c.Root << 12) | Pte.Table).Named("root|0x67"));
            c.Load(l1e);
            c.Load(window.At(0));
            c.Store(window.At(0), 8, 0);
            c.MmuUpdate(new MmuRequest(AddressWindow.Root(c, linear), 0));
        });
        for (int level = 2; level <= 4; level++)
        {
            int own = level;
            script.Case($"an L{own} is unpinned while another names it linearly", c =>
            {
                ScratchPage[] tables = [c.PinnedTable(own, "a"), c.PinnedTable(own, "b")];
                c.MmuUpdate(MmuRequest.Normal(tables[0], 1, tables[1].Entry(Pte.ReadOnly)));
                c.Unpin(tables[1]);
                c.UpdateVa(tables[1], tables[1].Entry(Pte.ReadWrite));
                c.Store(tables[1].At, 8, 1);
                c.Pin(own == 4 ? 3 : own + 1, tables[1]);
                c.Pin(own, tables[1]);
                c.Unpin(tables[1]);
                c.MmuUpdate(MmuRequest.Normal(tables[0], 1, 0));
                c.UpdateVa(tables[1], tables[1].Entry(Pte.ReadWrite));
                c.Store(tables[1].At, 8, 0);
            });
            script.Case($"a linear entry of an L{own} that fails further on leaves no count behind", c =>
            {
                ScratchPage[] tables = [c.Page("a"), c.PinnedTable(own, "b"), c.PinnedTable(own, "c")];
                c.Put(tables[0][8], 8, tables[1].Entry(Pte.ReadOnly));
                c.Put(tables[0][16], 8, tables[0].Entry(Pte.ReadOnly));
                c.Put(tables[0][4088], 8, ((Value)Bad.Frame << 12) | Pte.Table);
                c.ReadOnly(tables[0]);
                c.Pin(own, tables[0]);
                c.MmuUpdate(MmuRequest.Normal(tables[1], 1, tables[2].Entry(Pte.ReadOnly)));
                c.MmuUpdate(MmuRequest.Normal(tables[1], 1, 0));
                c.UpdateVa(tables[0], tables[0].Entry(Pte.ReadWrite));
                c.Put(tables[0][4088], 8, 0);
                c.ReadOnly(tables[0]);
                c.Pin(own, tables[0]);
                c.MmuUpdate(MmuRequest.Normal(tables[1], 1, tables[2].Entry(Pte.ReadOnly)));
                c.Unpin(tables[0]);
                c.MmuUpdate(MmuRequest.Normal(tables[1], 1, tables[2].Entry(Pte.ReadOnly)));
            });
        }

        script.Case("a linear entry for the own table, in another's place, is a way through two levels and no more", c =>
        {
            const int slot = 44;
            AddressWindow window = AddressWindow.CreateWithData(c, slot, out ScratchPage data);
            ScratchPage other = c.PinnedTable(3, "other");
            c.MmuUpdate(MmuRequest.Normal(other, 0, window.L3.Entry(Pte.ReadOnly)));
            c.MmuUpdate(new MmuRequest(AddressWindow.Root(c, slot + 1), other.Entry(Pte.Table)));
            // L4 to the other L3, which names an L3 as an L2, whose L2 is an L1 then, whose L1 is the page.
            Value view = Value.Constant((ulong)(slot + 1) << 39, "window's L1 as a page");
            c.ShowFlags(c.Load(view, 8, AnswerFormat.None), "l1[0]");
            c.Store(view, 8, ((c.Root << 12) | Pte.ReadWrite).Named("root|0x63"));
            c.Store(view + 8, 8, data.Entry(Pte.ReadWrite));
            c.Load(window.At(0));
            c.MmuUpdate(new MmuRequest(AddressWindow.Root(c, slot + 1), 0));
            window.Remove(c);
        });
    }

    /// <summary>Shows that the window maps its data and nothing else, and removes it.</summary>
    private static void ShowOnlyData(AbiCase c, AddressWindow window)
    {
        c.Load(window.At(0));
        c.Load(window.At(1));
        c.Store(window.At(1), 8, 0x0bad);
        c.Store(window.At(511), 8, 0x0bad);
        window.Remove(c);
    }

    /// <summary>The frame that the image's entry at a level, 2 to 4, names.</summary>
    private static Value FrameOf(AbiCase c, int level)
        => c.Keep(Value.EntryAddress(ProbeLayout.ScratchBase, level - 1) >> 12, $"table of the image, level {level - 1}");
}
