// Attempts to use one frame as two things: stale translations, reuse after a failed or an undone validation, frames given away while in use.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Memory;

internal static class HostileTypesScript
{
    // A flat data segment of privilege 3, and a TSS.
    private const ulong FlatData = 0x00cf_f200_0000_ffff;
    private const ulong TaskState = 0x0000_8900_0000_0067;

    public static AbiScript Create() => new("hostile-types", "hostile guest", script =>
    {
        WriteStale(script);
        WriteFailed(script);
        WriteReuse(script);
        WriteShared(script);
        WriteGivenAway(script);
    });

    /// <summary>A translation is used after the frame became something else, with no flush asked for (XSA-241, XSA-286, XSA-401).</summary>
    private static void WriteStale(AbiScript script)
    {
        for (int level = 1; level <= 4; level++)
        {
            int own = level;
            script.Case($"a page that was written a moment ago becomes an L{own}", c =>
            {
                ScratchPage target = c.Page("target");
                AddressWindow window = AddressWindow.Create(c, 50 + own, target.Entry(Pte.ReadWrite));
                c.UpdateVa(target, target.Entry(Pte.ReadOnly));
                c.Store(window.At(0), 8, 0);
                c.MmuUpdate(MmuRequest.Normal(window.L1, 0, 0));
                c.Pin(own, target);
                c.Store(window.At(0), 8, ((c.Root << 12) | Pte.Table).Named("root|0x67"));
                c.Load(window.At(0));
                c.Load(target.At);
                c.Unpin(target);
                window.Remove(c);
            });
            script.Case($"a page that was written through an entry that only loses Writable becomes an L{own}", c =>
            {
                ScratchPage target = c.Page("target");
                AddressWindow window = AddressWindow.Create(c, 54 + own, target.Entry(Pte.ReadWrite));
                c.UpdateVa(target, target.Entry(Pte.ReadOnly));
                c.Store(window.At(0), 8, 0);
                c.MmuUpdate(MmuRequest.With(MmuCommand.PtUpdatePreserveAd, window.L1, 0, target.Entry(Pte.ReadOnly)));
                c.Pin(own, target);
                c.Store(window.At(0) + 8, 8, ((c.Root << 12) | Pte.Table).Named("root|0x67"));
                c.Load(window.At(0) + 8);
                window.Remove(c);
                c.Unpin(target);
            });
        }

        script.Case("a page that was written a moment ago becomes a GDT", c =>
        {
            ScratchPage target = c.Page("target");
            AddressWindow window = AddressWindow.Create(c, 60, target.Entry(Pte.ReadWrite));
            c.UpdateVa(target, target.Entry(Pte.ReadOnly));
            c.Store(window.At(0), 8, 0);
            c.MmuUpdate(MmuRequest.Normal(window.L1, 0, 0));
            SetGdt(c, target);
            c.Store(window.At(0) + 8, 8, TaskState);
            c.Load(target[8]);
            c.Hypercall(GuestHypercall.SetGdt, 0, 0);
            window.Remove(c);
        });
        script.Case("an L1 in use leaves its L2 and is written", c =>
        {
            ScratchPage data = c.Page("data");
            AddressWindow window = AddressWindow.Create(c, 61, data.Entry(Pte.ReadOnly));
            c.Load(window.At(0));
            c.MmuUpdate(MmuRequest.Normal(window.L2, 0, 0));
            c.UpdateVa(window.L1, window.L1.Entry(Pte.ReadWrite), Uvmf.None);
            c.Store(window.L1.At, 8, ((c.Root << 12) | Pte.Table).Named("root|0x67"));
            c.Store(window.L1[8], 8, ((c.Root << 12) | Pte.Table).Named("root|0x67"));
            c.Load(window.At(0));
            c.Store(window.At(0), 8, 0);
            c.Store(window.At(1), 8, 0);
            c.Load(data.At);
            window.Remove(c);
        });
        script.Case("an L2 in use leaves its L3 and becomes an L1", c =>
        {
            ScratchPage data = c.Page("data");
            AddressWindow window = AddressWindow.Create(c, 62, data.Entry(Pte.ReadWrite));
            c.Store(window.At(0), 8, 0x17);
            c.MmuUpdate(MmuRequest.Normal(window.L3, 0, 0));
            // As an L1 its entry for the L1 would map a page table.
            c.Pin(1, window.L2);
            c.Store(window.At(0), 8, 0x18);
            c.Load(data.At);
            c.UpdateVa(window.L2, window.L2.Entry(Pte.ReadWrite));
            c.UpdateVa(window.L1, window.L1.Entry(Pte.ReadWrite));
            window.Remove(c);
        });
        script.Case("the slot of an L3 goes, and its tables become pages", c =>
        {
            ScratchPage data = c.Page("data");
            AddressWindow window = AddressWindow.Create(c, 63, data.Entry(Pte.ReadWrite));
            c.Store(window.At(0), 8, 0x17);
            window.Remove(c);
            foreach (ScratchPage table in window.Tables[1..])
            {
                c.UpdateVa(table, table.Entry(Pte.ReadWrite), Uvmf.None);
                c.Store(table.At, 8, ((c.Root << 12) | Pte.Table).Named("root|0x67"));
            }

            c.Store(window.At(0), 8, 0x18);
            c.Load(window.At(0));
            c.Load(data.At);
        });
        script.Case("a slot gets another L3: the old way is gone", c =>
        {
            ScratchPage[] data = c.Pages(2);
            AddressWindow[] windows = [AddressWindow.Create(c, 64, data[0].Entry(Pte.ReadWrite)), AddressWindow.Create(c, 65, data[1].Entry(Pte.ReadWrite))];
            c.Store(windows[0].At(0), 8, 1);
            c.Store(windows[1].At(0), 8, 2);
            c.MmuUpdate(new MmuRequest(AddressWindow.Root(c, 64), windows[1].L3.Entry(Pte.Table)));
            c.Load(windows[0].At(0));
            c.Store(windows[0].At(0), 8, 3);
            c.Load(data[0].At);
            c.Load(data[1].At);
            windows[0].Remove(c);
            windows[1].Remove(c);
        });
    }

    /// <summary>A validation fails on the way; what it had reached must be nothing again, and not be taken for done.</summary>
    private static void WriteFailed(AbiScript script)
    {
        script.Case("each table of a tree whose last entry is bad, as each other thing", c =>
        {
            ScratchPage data = c.Page("data");
            ScratchPage[] tables = [c.Page("t1"), c.Page("t2"), c.Page("t3"), c.Page("t4")];
            c.Put(tables[0].At, 8, data.Entry(Pte.ReadWrite));
            for (int i = 1; i < tables.Length; i++)
                c.Put(tables[i].At, 8, tables[i - 1].Entry(Pte.Table));
            c.Put(tables[3][4088], 8, data.Entry(Pte.Table));
            c.ReadOnly(tables);
            for (int attempt = 0; attempt < 2; attempt++)
                c.Pin(4, tables[3]);
            c.One("new baseptr t4", Mmuext.NewBaseptr, tables[3].Mfn);
            c.One("new user baseptr t4", Mmuext.NewUserBaseptr, tables[3].Mfn);

            // Only a table that does not count as one can be pinned as another level, or written.
            c.Pin(2, tables[0]);
            c.Pin(1, tables[1]);
            c.Pin(2, tables[2]);
            c.Unpin(tables[3]);
            foreach (ScratchPage table in tables)
            {
                c.UpdateVa(table, table.Entry(Pte.ReadWrite));
                c.Store(table[16], 8, 0);
            }

            c.ReadOnly(data);
            foreach (ScratchPage table in tables)
                c.ReadOnly(table);
            c.Pin(1, data);
        });
        for (int level = 2; level <= 4; level++)
        {
            int own = level;
            script.Case($"an L{own} entry whose table is bad: the old one stays, and counts", c =>
            {
                ScratchPage upper = c.PinnedTable(own, "upper");
                ScratchPage good = c.Page("good");
                ScratchPage bad = c.Page("bad");
                ScratchPage data = c.Page("data");
                c.Put(bad.At, 8, own == 2 ? data.Entry(Pte.ReadWrite) : 0);
                c.Put(bad[4088], 8, own == 2 ? bad.Entry(Pte.ReadWrite) : data.Entry(Pte.Table));
                c.ReadOnly(good, bad);
                c.MmuUpdate(MmuRequest.Normal(upper, 0, good.Entry(Pte.Table)));
                c.MmuUpdate(MmuRequest.Normal(upper, 0, bad.Entry(Pte.Table)));
                c.UpdateVa(good, good.Entry(Pte.ReadWrite));
                c.UpdateVa(bad, bad.Entry(Pte.ReadWrite));
                c.Store(bad[4088], 8, 0);
                c.ReadOnly(bad);
                c.MmuUpdate(MmuRequest.Normal(upper, 0, bad.Entry(Pte.Table)));
                c.UpdateVa(good, good.Entry(Pte.ReadWrite));
                c.UpdateVa(bad, bad.Entry(Pte.ReadWrite));
            });
        }

        script.Case("a batch that fails in its middle keeps what was before, each with its counts", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage[] data = c.Pages(3);
            c.MmuUpdate(
                MmuRequest.Normal(table, 0, data[0].Entry(Pte.ReadWrite)), MmuRequest.Normal(table, 1, table.Entry(Pte.ReadWrite)),
                MmuRequest.Normal(table, 2, data[1].Entry(Pte.ReadWrite)));
            foreach (ScratchPage page in data)
            {
                c.ReadOnly(page);
                c.Pin(1, page);
            }

            c.MmuUpdate(MmuRequest.Normal(table, 0, 0));
            c.Pin(1, data[0]);
        });
        script.Case("GDT frames of which the last is bad", c =>
        {
            ScratchPage[] pages = c.Pages(3);
            c.Put(pages[2][4088], 8, TaskState);
            c.ReadOnly(pages);
            SetGdt(c, pages);
            foreach (ScratchPage page in pages)
            {
                c.UpdateVa(page, page.Entry(Pte.ReadWrite));
                c.Store(page[8], 8, TaskState);
            }
        });
        script.Case("a table that is pinned as what it is not, in every order", c =>
        {
            ScratchPage data = c.Page("data");
            ScratchPage table = c.Page("table");
            ScratchPage lower = c.Page("lower");
            c.Put(table.At, 8, lower.Entry(Pte.ReadOnly));
            c.ReadOnly(table, lower);
            for (int first = 1; first <= 4; first++)
            {
                c.Pin(first, table);
                for (int second = 1; second <= 4; second++)
                {
                    if (second != first)
                        c.Pin(second, table);
                }

                c.UpdateVa(lower, lower.Entry(Pte.ReadWrite));
                c.ReadOnly(lower);
                c.Unpin(table);
                c.Unpin(table);
            }

            c.UpdateVa(table, table.Entry(Pte.ReadWrite));
            c.Store(table.At, 8, data.Entry(Pte.ReadOnly));
        });
    }

    private static void WriteReuse(AbiScript script)
    {
        script.Case("a wide tree is pinned, used, unpinned, and every frame is a page again", c =>
        {
            ScratchPage data = c.Page("data");
            ScratchPage[] tables = [c.Page("t1"), c.Page("t2"), c.Page("t3")];
            c.Fill(tables[0].At, 512, 8, data.Entry(Pte.ReadWrite));
            c.Fill(tables[1].At, 512, 8, tables[0].Entry(Pte.Table));
            c.Fill(tables[2].At, 512, 8, tables[1].Entry(Pte.Table));
            c.ReadOnly(tables);
            c.Pin(3, tables[2]);
            const int slot = 70;
            c.MmuUpdate(new MmuRequest(AddressWindow.Root(c, slot), tables[2].Entry(Pte.Table)));
            foreach (ulong address in (ulong[])[0, 0x7f_ffff_f000, 0x40_0020_3000])
                c.Store(Value.Constant(((ulong)slot << 39) + address, $"tree+0x{address:x}"), 8, address);
            c.Load(data.At);
            c.Unpin(tables[2]);
            c.ReadOnly(data);
            c.Pin(1, data);
            c.MmuUpdate(new MmuRequest(AddressWindow.Root(c, slot), 0));
            c.Pin(1, data);
            foreach (ScratchPage table in tables)
            {
                c.UpdateVa(table, table.Entry(Pte.ReadWrite));
                c.Store(table.At, 8, 0);
            }

            c.Load(Value.Constant((ulong)slot << 39, "tree"));
        });
        script.Case("a pin is taken back in the middle of its own batch, and the frame is used anew", c =>
        {
            ScratchPage table = c.Page("table");
            ScratchPage data = c.Page("data");
            c.Put(table.At, 8, data.Entry(Pte.ReadWrite));
            c.ReadOnly(table);
            c.MmuextOp("pin L1, unpin, clear, pin L4, unpin, clear, unpin",
                new MmuextRequest(Mmuext.PinL1Table, table.Mfn), new MmuextRequest(Mmuext.UnpinTable, table.Mfn), new MmuextRequest(Mmuext.ClearPage, table.Mfn),
                new MmuextRequest(Mmuext.PinL4Table, table.Mfn), new MmuextRequest(Mmuext.UnpinTable, table.Mfn), new MmuextRequest(Mmuext.ClearPage, table.Mfn),
                new MmuextRequest(Mmuext.UnpinTable, table.Mfn));
            c.Load(table.At);
            c.MmuextOp("pin L1, clear, copy onto it",
                new MmuextRequest(Mmuext.PinL1Table, table.Mfn), new MmuextRequest(Mmuext.ClearPage, table.Mfn), new MmuextRequest(Mmuext.CopyPage, table.Mfn, data.Mfn));
            c.MmuextOp("copy onto it", new MmuextRequest(Mmuext.CopyPage, table.Mfn, data.Mfn));
            c.Unpin(table);
        });
        script.Case("a root is written while it is one, and after", c =>
        {
            ScratchPage root = c.Page("root 2");
            c.Put(root[511 * 8], 8, Value.Load(c.RootAddress + (511 * 8)));
            c.ReadOnly(root);
            c.One("new user baseptr, root 2", Mmuext.NewUserBaseptr, root.Mfn);
            c.UpdateVa(root, root.Entry(Pte.ReadWrite));
            c.Pin(3, root);
            c.MmuextOp("clear", new MmuextRequest(Mmuext.ClearPage, root.Mfn));
            c.Store(root.At, 8, ((c.Root << 12) | Pte.Table).Named("root|0x67"));
            c.One("new user baseptr", Mmuext.NewUserBaseptr, c.UserRoot);
            c.UpdateVa(root, root.Entry(Pte.ReadWrite));
            c.Store(root.At, 8, 0);
        });
        script.Case("a GDT's page is written after it was one, before its selectors are used again", c =>
        {
            ScratchPage page = c.Page("gdt");
            c.Put(page[8], 8, FlatData);
            c.ReadOnly(page);
            SetGdt(c, page);
            LoadSegment(c, 0xb);
            c.UpdateVa(page, page.Entry(Pte.ReadWrite));
            c.MmuUpdate(MmuRequest.Normal(page, 1, TaskState));
            c.MmuextOp("clear", new MmuextRequest(Mmuext.ClearPage, page.Mfn));
            c.Hypercall(GuestHypercall.UpdateDescriptor, ((page.Mfn << 12) + 8).Named("gdt[1]"), TaskState);
            c.Store(page[8], 8, TaskState);
            c.Load(page[8]);
            c.Hypercall(GuestHypercall.SetGdt, 0, 0);
            c.UpdateVa(page, page.Entry(Pte.ReadWrite));
            c.Store(page[8], 8, TaskState);
            LoadSegment(c, 0xb);
            c.ReadOnly(page);
            SetGdt(c, page);
        });
    }

    /// <summary>Pages that others than the guest write to, without asking for its tables: never anything but writable.</summary>
    private static void WriteShared(AbiScript script)
    {
        script.Case("shared_info, which the guest need not map", c =>
        {
            Value mapping = MemoryCalls.EntryInBootMapping(Value.Constant(ProbeLayout.SharedInfoPage, "shared_info"), 1);
            Value frame = c.Keep((c.Get(mapping) & Pte.Frame) >> 12, "shared_info's frame");
            c.Hypercall(GuestHypercall.UpdateVaMapping, ProbeLayout.SharedInfoPage, ((frame << 12) | Pte.ReadOnly).Named("shared_info|0x61"), Uvmf.Invlpg);
            TryAll(c, frame, "shared_info");
            c.Hypercall(GuestHypercall.UpdateVaMapping, ProbeLayout.SharedInfoPage, ((frame << 12) | Pte.ReadWrite).Named("shared_info|0x63"), Uvmf.Invlpg);
        });
        script.Case("the page of the xenstore ring", c =>
        {
            Value frame = c.Keep(Value.Load(c.StartInfo + StartInfoOffset.StoreMfn), "store's frame");
            Value page = c.Keep((Value.Pfn(frame) << 12) + PvAssembler.VirtBase, "store page");
            c.Hypercall(GuestHypercall.UpdateVaMapping, page, ((frame << 12) | Pte.ReadOnly).Named("store|0x61"), Uvmf.Invlpg);
            TryAll(c, frame, "store");
            c.Hypercall(GuestHypercall.UpdateVaMapping, page, 0, Uvmf.Invlpg);
            TryAll(c, frame, "store");
            c.Hypercall(GuestHypercall.UpdateVaMapping, page, ((frame << 12) | Pte.ReadWrite).Named("store|0x63"), Uvmf.Invlpg);
        });
        script.Case("a page that became vcpu_info", c =>
        {
            const int registerVcpuInfo = 10;
            ScratchPage page = c.Page("info");
            ScriptBuffer argument = c.Structure("argument", 16, (0, 8, page.Mfn));
            c.Hypercall((ulong)GuestHypercall.VcpuOp, "vcpu_op(register_vcpu_info, 0)", AnswerFormat.Result, registerVcpuInfo, 0, argument);
            c.SetVcpuInfo(page.At);
            c.ReadOnly(page);
            TryAll(c, page.Mfn, "info");
            c.UpdateVa(page, page.Entry(Pte.ReadWrite));
        });
    }

    /// <summary>Every use but writing.</summary>
    private static void TryAll(AbiCase c, Value frame, string name)
    {
        for (int level = 1; level <= 4; level++)
            c.One($"pin L{level} {name}", Mmuext.PinL1Table + (ulong)(level - 1), frame);
        c.One($"new user baseptr {name}", Mmuext.NewUserBaseptr, frame);
        ScriptBuffer frames = c.Structure("frames", 8, (0, 8, frame));
        c.Hypercall((ulong)GuestHypercall.SetGdt, $"set_gdt({name})", AnswerFormat.Result, frames, 512);
        ScratchPage upper = c.PinnedTable(2, "upper");
        c.MmuUpdate(MmuRequest.Normal(upper, 0, ((frame << 12) | Pte.Table).Named($"{name}|0x67")));
    }

    /// <summary>Frames leave the domain while something still uses them (XSA-212's call, XSA-287).</summary>
    private static void WriteGivenAway(AbiScript script)
    {
        script.Case("a table is given back while it is used; what it maps, too", c =>
        {
            ScratchPage data = c.Page("data");
            AddressWindow window = AddressWindow.Create(c, 72, data.Entry(Pte.ReadWrite));
            c.Put(data.At, 8, 0x77);
            c.UpdateVa(data, 0);
            GiveBack(c, data, window.L1, window.L2, window.L3);
            c.Load(window.At(0));
            c.Store(window.At(0), 8, 0x78);
            c.MmuUpdate(MmuRequest.Normal(window.L1, 0, 0));
            c.One("flush", Mmuext.TlbFlushLocal, 0);
            c.Load(window.At(0));
            // The frame is nobody's now.
            c.MmuUpdate(MmuRequest.Normal(window.L1, 0, data.Entry(Pte.ReadWrite)));
            c.MmuUpdate(MmuRequest.Normal(window.L1, 0, data.Entry(Pte.ReadOnly)));
            c.Load(window.At(0));
            window.Remove(c);
            c.UpdateVa(window.L1, 0);
            c.UpdateVa(window.L1, window.L1.Entry(Pte.ReadOnly));
        });
        script.Case("a page that was written a moment ago is given back, taken again, and becomes a table", c =>
        {
            ScratchPage page = c.Page("page");
            AddressWindow window = AddressWindow.Create(c, 74, page.Entry(Pte.ReadWrite));
            c.UpdateVa(page, 0);
            c.Store(window.At(0), 8, 0);
            c.MmuUpdate(MmuRequest.Normal(window.L1, 0, 0));
            GiveBack(c, page);
            Value taken = Take(c, page);
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, ((taken << 12) | Pte.ReadWrite).Named("taken|0x63"), Uvmf.None);
            c.Fill(page.At, 512, 8, 0);
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, ((taken << 12) | Pte.ReadOnly).Named("taken|0x61"), Uvmf.None);
            c.One("pin L1 taken", Mmuext.PinL1Table, taken);
            c.Store(window.At(0), 8, ((c.Root << 12) | Pte.Table).Named("root|0x67"));
            c.Store(page.At, 8, ((c.Root << 12) | Pte.ReadWrite).Named("root|0x63"));
            c.Load(page.At);
            c.One("unpin taken", Mmuext.UnpinTable, taken);
            window.Remove(c);
        });
        script.Case("a pinned table is given back, unpinned, and pinned again", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            c.UpdateVa(table, 0);
            GiveBack(c, table);
            c.Unpin(table);
            c.Pin(1, table);
            c.UpdateVa(table, table.Entry(Pte.ReadWrite));
        });
        script.Case("tables, descriptors and a pinned page are exchanged", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage page = c.Page("gdt");
            c.ReadOnly(page);
            SetGdt(c, page);
            foreach (ScratchPage given in (ScratchPage[])[table, page])
            {
                c.UpdateVa(given, 0);
                Exchange(c, given.Mfn, given.Pfn);
                c.UpdateVa(given, given.Entry(Pte.ReadOnly));
            }

            c.Hypercall(GuestHypercall.SetGdt, 0, 0);
            Exchange(c, c.Root, page.Pfn);
        });
        script.Case("a page goes out of the tables, is given back, and is named by its old number", c =>
        {
            ScratchPage page = c.Page("page");
            AddressWindow window = AddressWindow.Create(c, 73, page.Entry(Pte.ReadWrite));
            c.Store(window.At(0), 8, 5);
            c.UpdateVa(page, 0);
            c.MmuUpdate(MmuRequest.Normal(window.L1, 0, 0));
            ScratchPage other = c.Page("other");
            GiveBack(c, page);
            c.One("flush", Mmuext.TlbFlushLocal, 0);
            c.Store(window.At(0), 8, 6);
            c.MmuUpdate(MmuRequest.Normal(window.L1, 0, page.Entry(Pte.ReadWrite)), MmuRequest.Normal(window.L1, 1, other.Entry(Pte.ReadWrite)));
            c.MmuextOp("clear", new MmuextRequest(Mmuext.ClearPage, page.Mfn));
            c.MmuextOp("copy from", new MmuextRequest(Mmuext.CopyPage, other.Mfn, page.Mfn));
            c.Pin(1, page);
            c.MmuUpdate(MmuRequest.Normal(page, 0, 0));
            c.MmuUpdate(MmuRequest.Machphys(page, 0));
            window.Remove(c);
        });
    }

    /// <summary>Takes a frame for a page's pfn.</summary>
    private static Value Take(AbiCase c, ScratchPage page)
    {
        ScriptBuffer extents = c.Structure("extents", 8, (0, 8, page.Pfn));
        ScriptBuffer reservation = c.Structure("reservation", 32, (0, 8, extents), (8, 8, 1), (24, 2, Domid.Self));
        c.MemoryOp($"populate, {page.Name}", Xenmem.PopulatePhysmap, reservation);
        return Value.Load(extents.At);
    }

    private static void SetGdt(AbiCase c, params ScratchPage[] pages)
    {
        ScriptBuffer frames = c.Structure("frames", pages.Length * 8, [.. pages.Select(static (page, i) => (i * 8, 8, page.Mfn))]);
        c.Hypercall((ulong)GuestHypercall.SetGdt, $"set_gdt({string.Join(", ", pages.Select(static page => page.Name))})", AnswerFormat.Result, frames, 512 * pages.Length);
    }

    private static void LoadSegment(AbiCase c, ulong selector) => c.Kernel("mov ds, ax", static a =>
    {
        a.mov(ds, ax);
        a.xor(eax, eax);
        a.mov(ds, ax);
    }, null, [(Register64.Rax, selector)]);

    private static void GiveBack(AbiCase c, params ScratchPage[] pages)
    {
        ScriptBuffer extents = c.Structure("extents", pages.Length * 8, [.. pages.Select(static (page, i) => (i * 8, 8, page.Mfn))]);
        ScriptBuffer reservation = c.Structure("reservation", 32, (0, 8, extents), (8, 8, pages.Length), (24, 2, Domid.Self));
        c.MemoryOp($"decrease, {string.Join(", ", pages.Select(static page => page.Name))}", Xenmem.DecreaseReservation, reservation);
    }

    private static void Exchange(AbiCase c, Value given, Value taken)
    {
        ScriptBuffer frames = c.Structure("given", 16, (0, 8, given), (8, 8, taken));
        ScriptBuffer exchange = c.Structure("exchange", 72,
            (0, 8, frames), (8, 8, 1), (24, 2, Domid.Self), (32, 8, frames[8]), (40, 8, 1), (56, 2, Domid.Self));
        c.MemoryOp($"exchange, {given.Text}", Xenmem.Exchange, exchange);
    }
}
