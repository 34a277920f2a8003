// mmuext_op: pins, roots, flushes, page contents, the LDT, batches and pointers.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Memory;

internal static class MmuextOpScript
{
    public static AbiScript Create() => new("mmuext-op", "mmuext_op", script =>
    {
        WritePins(script);
        WriteFlushes(script);
        WritePageContents(script);
        WriteLdt(script);
        WriteArguments(script);
    });

    private static void WritePins(AbiScript script)
    {
        script.Case("a page is pinned at each level and unpinned", c =>
        {
            ScratchPage table = c.Page("table");
            c.ReadOnly(table);
            for (int level = 1; level <= 4; level++)
            {
                c.Pin(level, table);
                c.UpdateVa(table, table.Entry(Pte.ReadWrite));
                c.Unpin(table);
            }

            c.UpdateVa(table, table.Entry(Pte.ReadWrite));
        });
        script.Case("pinned twice, unpinned twice", c =>
        {
            for (int level = 1; level <= 4; level++)
            {
                ScratchPage table = c.Page($"level{level}");
                c.ReadOnly(table);
                c.Pin(level, table);
                c.Pin(level, table);
                c.Unpin(table);
                c.Unpin(table);
                c.UpdateVa(table, table.Entry(Pte.ReadWrite));
            }
        });
        script.Case("pinned as one level, then as another", c =>
        {
            ScratchPage table = c.PinnedTable(2, "table");
            foreach (int level in (int[])[1, 3, 4])
                c.Pin(level, table);
            c.Unpin(table);
            c.Pin(3, table);
        });
        script.Case("a page that is mapped writable", c =>
        {
            ScratchPage page = c.Page();
            for (int level = 1; level <= 4; level++)
                c.Pin(level, page);
            c.Unpin(page);
            c.Store(page.At, 8, 1);
        });
        script.Case("frames that cannot be pinned", c =>
        {
            foreach (ulong frame in (ulong[])[0, Bad.Frame, Bad.InvalidFrame, Bad.HugeFrame, ~0UL])
            {
                c.MmuextOp($"pin L1 0x{frame:x}", new MmuextRequest(Mmuext.PinL1Table, frame));
                c.MmuextOp($"pin L4 0x{frame:x}", new MmuextRequest(Mmuext.PinL4Table, frame));
                c.MmuextOp($"unpin 0x{frame:x}", new MmuextRequest(Mmuext.UnpinTable, frame));
            }
        });
        script.Case("a table with an entry that may not be", c =>
        {
            ScratchPage data = c.Page("data");
            (int Level, Value Entry)[] bad =
            [
                (1, ((Value)Bad.Frame << 12) | Pte.ReadOnly), (1, ((Value)Bad.InvalidFrame << 12) | Pte.ReadOnly), (1, data.Entry(Pte.ReadOnly | Pte.CacheDisable)),
                (2, data.Entry(Pte.Table)), (2, data.Entry(Pte.Table | Pte.LargePage)), (3, data.Entry(Pte.Table)),
                (3, data.Entry(Pte.Table | Pte.LargePage)), (4, data.Entry(Pte.Table)), (4, data.Entry(Pte.Table | Pte.Global)),
            ];
            foreach ((int level, Value entry) in bad)
            {
                ScratchPage table = c.Page();
                c.Put(table[8 * 3], 8, entry);
                c.ReadOnly(table);
                c.Pin(level, table);
                c.UpdateVa(table, table.Entry(Pte.ReadWrite));
            }
        });
        script.Case("the entries of a pinned L1 are adjusted, what is not present is left alone", c =>
        {
            ScratchPage table = c.Page("l1");
            ScratchPage data = c.Page();
            c.Put(table.At, 8, data.Entry(Pte.ReadWrite));
            c.Put(table[8], 8, data.Entry(Pte.ReadOnly | Pte.User));
            c.Put(table[16], 8, 0xf0eUL);
            c.Put(table[511 * 8], 8, data.Entry(Pte.Present | Pte.NoExecute | Pte.AvailableHigh));
            c.ReadOnly(table);
            c.Pin(1, table);
            foreach (int index in (int[])[0, 1, 2, 511])
                c.ShowAllFlags(table, index);
            c.Unpin(table);
            foreach (int index in (int[])[0, 1, 2, 511])
                c.ShowAllFlags(table, index);
        });
        script.Case("the entries of a pinned L2, L3 and L4 are adjusted", c =>
        {
            for (int level = 2; level <= 4; level++)
            {
                ScratchPage table = c.Page($"level{level}");
                ScratchPage lower = c.Page();
                c.Put(table.At, 8, lower.Entry(Pte.Present));
                c.Put(table[8], 8, lower.Entry(Pte.Present | Pte.Writable | Pte.NoExecute | Pte.Available0));
                c.Put(table[16], 8, 0x18eUL);
                c.ReadOnly(table, lower);
                c.Pin(level, table);
                for (int index = 0; index < 3; index++)
                    c.ShowAllFlags(table, index);
            }
        });
        script.Case("the running L4 is pinned by the domain builder", c =>
        {
            c.One("pin L4 root", Mmuext.PinL4Table, c.Root);
            c.One("unpin root", Mmuext.UnpinTable, c.Root);
            c.One("unpin root", Mmuext.UnpinTable, c.Root);
            c.One("pin L4 root", Mmuext.PinL4Table, c.Root);
            c.One("unpin user root", Mmuext.UnpinTable, c.UserRoot);
            c.One("pin L4 user root", Mmuext.PinL4Table, c.UserRoot);
        });
    }

    private static void WriteFlushes(AbiScript script)
    {
        script.Case("flushes of the own vCPU and of all", c =>
        {
            ScratchPage page = c.Page();
            c.MmuextOp("flushes",
                new MmuextRequest(Mmuext.TlbFlushLocal), new MmuextRequest(Mmuext.TlbFlushAll), new MmuextRequest(Mmuext.InvlpgLocal, page.At),
                new MmuextRequest(Mmuext.InvlpgAll, page.At));
        });
        script.Case("single addresses that are not the guest's", c =>
        {
            foreach (ulong address in (ulong[])[0, Bad.Unmapped, Bad.HypervisorStart, Bad.HypervisorLast, Bad.NonCanonical, ~0UL])
            {
                c.MmuextOp($"invlpg, local, 0x{address:x}", new MmuextRequest(Mmuext.InvlpgLocal, address));
                c.MmuextOp($"invlpg, all, 0x{address:x}", new MmuextRequest(Mmuext.InvlpgAll, address));
            }
        });
        script.Case("flushes of the vCPUs of a bitmap", c =>
        {
            ScratchPage page = c.Page();
            foreach ((string name, ulong bits) in (ReadOnlySpan<(string, ulong)>)[("none", 0), ("vCPU 0", 1), ("absent", 1UL << 63), ("all", ~0UL)])
            {
                ScriptBuffer mask = c.Structure("mask", 8, (0, 8, bits));
                c.MmuextOp($"flush, {name}", new MmuextRequest(Mmuext.TlbFlushMulti, 0, mask.At));
                c.MmuextOp($"invlpg, {name}", new MmuextRequest(Mmuext.InvlpgMulti, page.At, mask.At));
                c.MmuextOp($"invlpg, {name}, hypervisor's address", new MmuextRequest(Mmuext.InvlpgMulti, Bad.HypervisorStart, mask.At));
            }
        });
        script.Case("bitmaps that cannot be read", c =>
        {
            foreach (ulong address in (ulong[])[0, Bad.Unmapped, Bad.HypervisorStart, Bad.NonCanonical])
            {
                c.MmuextOp($"flush, mask at 0x{address:x}", new MmuextRequest(Mmuext.TlbFlushMulti, 0, address));
                c.MmuextOp($"invlpg, mask at 0x{address:x}", new MmuextRequest(Mmuext.InvlpgMulti, 0, address));
            }
        });
        script.Case("a bitmap that ends with its page, and one that does not", c =>
        {
            ScratchPage[] pages = c.Pages(2);
            c.Put(pages[0][4088], 8, 1);
            c.UpdateVa(pages[1], 0);
            c.MmuextOp("flush, mask at the end", new MmuextRequest(Mmuext.TlbFlushMulti, 0, pages[0][4088]));
            c.MmuextOp("flush, mask across the end", new MmuextRequest(Mmuext.TlbFlushMulti, 0, pages[0][4092]));
        });
        script.Case("cache flushes, of a domain without devices", c =>
        {
            c.MmuextOp("flush cache", new MmuextRequest(Mmuext.FlushCache));
            c.MmuextOp("flush cache, global", new MmuextRequest(Mmuext.FlushCacheGlobal));
        });
        script.Case("superpages are not supported", c =>
        {
            ScratchPage page = c.Page();
            c.MmuextOp("mark super", new MmuextRequest(Mmuext.MarkSuper, page.Mfn));
            c.MmuextOp("unmark super", new MmuextRequest(Mmuext.UnmarkSuper, page.Mfn));
            c.MmuextOp("mark super of a bad frame", new MmuextRequest(Mmuext.MarkSuper, ~0UL));
        });
    }

    private static void WritePageContents(AbiScript script)
    {
        script.Case("a page is cleared, another is copied", c =>
        {
            ScratchPage[] pages = c.Pages(2);
            c.Fill(pages[0].At, 512, 8, 1, 1);
            c.MmuextOp("copy page", new MmuextRequest(Mmuext.CopyPage, pages[1].Mfn, pages[0].Mfn));
            c.Load(pages[1].At);
            c.Load(pages[1][4088]);
            c.MmuextOp("clear page", new MmuextRequest(Mmuext.ClearPage, pages[0].Mfn));
            c.Load(pages[0].At);
            c.Load(pages[0][4088]);
            c.Load(pages[1][4088]);
        });
        script.Case("a page onto itself, and pages that are mapped read-only or not at all", c =>
        {
            ScratchPage[] pages = c.Pages(3);
            c.Put(pages[0].At, 8, 0x99);
            c.MmuextOp("copy onto itself", new MmuextRequest(Mmuext.CopyPage, pages[0].Mfn, pages[0].Mfn));
            c.Load(pages[0].At);
            c.ReadOnly(pages[1]);
            c.MmuextOp("copy to a read-only one", new MmuextRequest(Mmuext.CopyPage, pages[1].Mfn, pages[0].Mfn));
            c.Load(pages[1].At);
            c.UpdateVa(pages[2], 0);
            c.MmuextOp("clear one that is not mapped", new MmuextRequest(Mmuext.ClearPage, pages[2].Mfn));
        });
        script.Case("a page table is copied from, and neither copied to nor cleared", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page();
            c.MmuUpdate(MmuRequest.Normal(table, 0, data.Entry(Pte.ReadWrite)));
            c.MmuextOp("clear", new MmuextRequest(Mmuext.ClearPage, table.Mfn));
            c.MmuextOp("copy to", new MmuextRequest(Mmuext.CopyPage, table.Mfn, data.Mfn));
            c.MmuextOp("copy from", new MmuextRequest(Mmuext.CopyPage, data.Mfn, table.Mfn));
            c.ShowEntry(data, 0);
        });
        script.Case("frames that are none", c =>
        {
            ScratchPage page = c.Page();
            foreach (ulong frame in (ulong[])[0, Bad.Frame, Bad.HugeFrame, ~0UL])
            {
                c.MmuextOp($"clear 0x{frame:x}", new MmuextRequest(Mmuext.ClearPage, frame));
                c.MmuextOp($"copy to 0x{frame:x}", new MmuextRequest(Mmuext.CopyPage, frame, page.Mfn));
                c.MmuextOp($"copy from 0x{frame:x}", new MmuextRequest(Mmuext.CopyPage, page.Mfn, frame));
            }
        });
    }

    private static void WriteLdt(AbiScript script)
    {
        script.Case("the LDT: sizes and addresses", c =>
        {
            ScratchPage page = c.Page("ldt");
            c.ReadOnly(page);
            foreach ((string text, Value address, ulong entries) in (ReadOnlySpan<(string, Value, ulong)>)
                [
                    ("a page", page.At, 512), ("8192 entries", page.At, 8192), ("8193 entries", page.At, 8193), ("a huge count", page.At, 0xffff_ffff),
                    ("the count's upper half is nothing", page.At, 0x1_0000_0001), ("not at a page's start", page[8], 1), ("nowhere", Bad.Unmapped, 1),
                    ("the hypervisor's", Bad.HypervisorStart, 1), ("not canonical", Bad.NonCanonical, 1), ("none", 0, 0), ("none, anywhere", Bad.HypervisorStart + 5, 0),
                ])
            {
                c.MmuextOp($"set LDT: {text}", new MmuextRequest(Mmuext.SetLdt, address, entries));
            }
        });
        script.Case("the LDT of another domain", c =>
        {
            ScratchPage page = c.Page("ldt");
            foreach (ulong domain in (ulong[])[0, Domid.Io, Domid.Xen, Domid.Absent])
                c.MmuextOpOf(domain, $"set LDT, domain 0x{domain:x}", new MmuextRequest(Mmuext.SetLdt, page.At, 1));
        });
        script.Case("a selector of the LDT is loaded, and its page is typed only then", c =>
        {
            ScratchPage page = c.Page("ldt");
            // A flat data segment of privilege 0, which becomes 3.
            c.Put(page[8], 8, 0x00cf_9200_0000_ffff);
            c.UpdateVa(page, page.Entry(Pte.ReadOnly));
            c.MmuextOp("set LDT", new MmuextRequest(Mmuext.SetLdt, page.At, 512));
            c.UpdateVa(page, page.Entry(Pte.ReadWrite));
            c.ReadOnly(page);
            c.Kernel("mov ds, ax", static a => a.mov(Iced.Intel.AssemblerRegisters.ds, Iced.Intel.AssemblerRegisters.ax), with: [(Register64.Rax, 0xf)]);
            c.Load(page[8]);
            c.UpdateVa(page, page.Entry(Pte.ReadWrite));
            c.Kernel("mov ds, ax", static a => a.mov(Iced.Intel.AssemblerRegisters.ds, Iced.Intel.AssemblerRegisters.ax), with: [(Register64.Rax, 0)]);
            c.MmuextOp("no LDT", new MmuextRequest(Mmuext.SetLdt, 0, 0));
            c.UpdateVa(page, page.Entry(Pte.ReadWrite));
            c.Kernel("mov ds, ax", static a => a.mov(Iced.Intel.AssemblerRegisters.ds, Iced.Intel.AssemblerRegisters.ax), with: [(Register64.Rax, 0xf)]);
        });
    }

    private static void WriteArguments(AbiScript script)
    {
        script.Case("a batch stops at the first error", c =>
        {
            ScratchPage[] tables = [c.Page("a"), c.Page("b")];
            c.ReadOnly(tables);
            c.MmuextOp("pin, unpin, unpin, pin",
                new MmuextRequest(Mmuext.PinL1Table, tables[0].Mfn), new MmuextRequest(Mmuext.UnpinTable, tables[0].Mfn),
                new MmuextRequest(Mmuext.UnpinTable, tables[0].Mfn), new MmuextRequest(Mmuext.PinL1Table, tables[1].Mfn));
            c.Unpin(tables[1]);
        });
        script.Case("commands that there are none of", c =>
        {
            foreach (ulong command in (ulong[])[14, 21, 1000, 0xffff_ffff, 0x1_0000_0006])
                c.MmuextOp($"command {command}", new MmuextRequest(command));
        });
        script.Case("counts and the done count", c =>
        {
            c.MmuextOp("nothing");
            ScriptBuffer list = c.Operations("operations", new MmuextRequest(Mmuext.TlbFlushLocal), new MmuextRequest(Mmuext.TlbFlushLocal));
            ScriptBuffer done = c.Structure("done", 8, (0, 8, 100));
            c.Hypercall(GuestHypercall.MmuextOp, list, 2 | MmuCommand.Preempted, done, Domid.Self);
            c.ShowDone(done);
            c.Hypercall(GuestHypercall.MmuextOp, 0, MmuCommand.Preempted, done, 99);
            c.ShowDone(done);
            c.Hypercall(GuestHypercall.MmuextOp, list, 2, Bad.Unmapped, Domid.Self);
            c.Hypercall(GuestHypercall.MmuextOp, list, 2, Bad.HypervisorStart, Domid.Self);
            c.Hypercall(GuestHypercall.MmuextOp, Bad.Unmapped, 0, done, Domid.Self);
            c.ShowDone(done);
        });
        script.Case("operations at addresses that cannot be read", c =>
        {
            foreach (ulong address in (ulong[])[0, Bad.Unmapped, Bad.HypervisorStart, Bad.HypervisorLast, Bad.NonCanonical, 0xffff_ffff_ffff_fff8])
            {
                ScriptBuffer done = c.Done();
                c.Hypercall(GuestHypercall.MmuextOp, address, 1, done, Domid.Self);
                c.ShowDone(done);
            }
        });
        script.Case("operations that run into a page that cannot be read", c =>
        {
            ScratchPage[] list = c.Pages(2);
            c.Put(list[0][4072], 8, Mmuext.TlbFlushLocal);
            c.UpdateVa(list[1], 0);
            ScriptBuffer done = c.Done();
            c.Hypercall(GuestHypercall.MmuextOp, list[0][4072], 2, done, Domid.Self);
            c.ShowDone(done);
            c.Hypercall(GuestHypercall.MmuextOp, list[0][4080], 1, done, Domid.Self);
            c.ShowDone(done);
        });
        script.Case("other domains", c =>
        {
            ScratchPage page = c.Page();
            foreach (ulong domain in (ulong[])[Domid.Absent, Domid.Invalid, Domid.Cow, Domid.Xen, Domid.Io, Domid.Idle])
            {
                c.MmuextOpOf(domain, $"flush, domain 0x{domain:x}", new MmuextRequest(Mmuext.TlbFlushLocal));
                c.MmuextOpOf(domain, $"clear page, domain 0x{domain:x}", new MmuextRequest(Mmuext.ClearPage, page.Mfn));
            }
        });
    }
}
