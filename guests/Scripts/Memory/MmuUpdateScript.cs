// mmu_update of L1 tables: the commands, the flags of an entry, batches, and what is refused.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Memory;

internal static class MmuUpdateScript
{
    public static AbiScript Create() => new("mmu-update", "mmu_update", script =>
    {
        WriteEntries(script);
        WriteCommands(script);
        WriteBatches(script);
        WritePointers(script);
    });

    private static void WriteEntries(AbiScript script)
    {
        script.Case("an empty entry of a pinned L1 gets a frame, then another", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage[] data = c.Pages(2);
            c.MmuUpdate(MmuRequest.Normal(table, 0, data[0].Entry(Pte.ReadWrite)));
            c.ShowEntry(table, 0);
            c.MmuUpdate(MmuRequest.Normal(table, 0, data[1].Entry(Pte.ReadOnly)));
            c.ShowEntry(table, 0);
            c.MmuUpdate(MmuRequest.Normal(table, 0, 0));
            c.Load(table.At);
        });
        script.Case("kernel, user, global and no-execute entries as they are read back", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page();
            ulong[] flags =
            [
                Pte.ReadWrite, Pte.ReadWrite | Pte.User, Pte.ReadWrite | Pte.Global, Pte.ReadWrite | Pte.User | Pte.Global,
                Pte.ReadWrite | Pte.User | Pte.GuestKernel, Pte.ReadWrite | Pte.GuestKernel | Pte.Global, Pte.ReadOnly | Pte.NoExecute,
                Pte.Present, Pte.Present | Pte.Writable | Pte.Dirty,
            ];
            c.MmuUpdate([.. flags.Select((flag, i) => MmuRequest.Normal(table, i, data.Entry(flag)))]);
            for (int i = 0; i < flags.Length; i++)
                c.ShowAllFlags(table, i);
        });
        script.Case("available bits are kept", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page();
            c.MmuUpdate(MmuRequest.Normal(table, 0, data.Entry(Pte.ReadOnly | Pte.Available0 | Pte.Available2 | Pte.AvailableHigh)));
            c.ShowEntry(table, 0);
            c.MmuUpdate(MmuRequest.Normal(table, 0, data.Entry(Pte.ReadOnly | (0x7ffUL << 52))));
            c.ShowEntry(table, 0);
        });
        script.Case("cache attributes are refused", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page();
            foreach (ulong flag in (ulong[])[Pte.WriteThrough, Pte.CacheDisable, Pte.LargePage, Pte.LargePage | Pte.CacheDisable | Pte.WriteThrough])
                c.MmuUpdate(MmuRequest.Normal(table, 0, data.Entry(Pte.ReadOnly | flag)));
            c.ShowFlags(c.Get(table.At), "l1[0]");
        });
        script.Case("an entry that is not present is stored as it is", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            c.MmuUpdate(MmuRequest.Normal(table, 0, 0x1eUL), MmuRequest.Normal(table, 1, ~1UL), MmuRequest.Normal(table, 2, Pte.LargePage | Pte.Global | Pte.NoExecute));
            for (int i = 0; i < 3; i++)
                c.Load(table[i * 8]);
        });
        script.Case("only flags change, of a frame that is a page table by now", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage other = c.PinnedTable(1, "other");
            c.MmuUpdate(MmuRequest.Normal(table, 0, other.Entry(Pte.ReadOnly)));
            c.MmuUpdate(MmuRequest.Normal(table, 0, other.Entry(Pte.Present | Pte.NoExecute | Pte.Available0)));
            c.ShowAllFlags(table, 0);
            c.MmuUpdate(MmuRequest.Normal(table, 0, other.Entry(Pte.ReadWrite)));
            c.ShowAllFlags(table, 0);
        });
        script.Case("a page table cannot be mapped writable, whatever its level", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            for (int level = 1; level <= 4; level++)
            {
                ScratchPage target = c.PinnedTable(level, $"target{level}");
                c.MmuUpdate(MmuRequest.Normal(table, 0, target.Entry(Pte.ReadWrite)));
                c.MmuUpdate(MmuRequest.Normal(table, 0, target.Entry(Pte.ReadOnly)));
            }

            c.MmuUpdate(MmuRequest.Normal(table, 0, table.Entry(Pte.ReadWrite)));
            c.MmuUpdate(MmuRequest.Normal(table, 0, table.Entry(Pte.ReadOnly)));
            c.MmuUpdate(MmuRequest.Normal(table, 0, 0));
        });
        script.Case("frames that are no memory", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            c.MmuUpdate(MmuRequest.Normal(table, 0, Entry(Bad.Frame, Pte.ReadOnly)));
            c.MmuUpdate(MmuRequest.Normal(table, 0, Entry(Bad.Frame, Pte.ReadWrite | Pte.User)));
            c.MmuUpdate(MmuRequest.Normal(table, 0, Entry(Bad.InvalidFrame, Pte.ReadOnly)));
            c.MmuUpdate(MmuRequest.Normal(table, 0, Entry(0, Pte.ReadOnly)));
            c.ShowFlags(c.Get(table.At), "l1[0]");
        });
        script.Case("a frame that its domain gave back", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage gone = c.Page("gone");
            c.UpdateVa(gone, 0);
            ScriptBuffer extents = c.Structure("extents", 8, (0, 8, gone.Mfn));
            ScriptBuffer reservation = c.Structure("reservation", 32, (0, 8, extents.At), (8, 8, 1), (24, 2, Domid.Self));
            c.MemoryOp("decrease, 1 page", Xenmem.DecreaseReservation, reservation);
            c.MmuUpdate(MmuRequest.Normal(table, 0, gone.Entry(Pte.ReadOnly)));
            c.MmuUpdate(MmuRequest.Normal(table, 0, gone.Entry(Pte.ReadWrite)));
            c.MmuUpdate(MmuRequest.Normal(gone, 0, 0));
            c.MmuUpdate(MmuRequest.Machphys(gone, 1));
        });
        script.Case("shared_info is mapped, and is no page table", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage upper = c.PinnedTable(2, "l2");
            Value entry = Value.Load(MemoryCalls.EntryInBootMapping(ProbeLayout.SharedInfoPage, 1)) & Pte.Frame;
            c.MmuUpdate(MmuRequest.Normal(table, 0, (entry | Pte.ReadWrite).Named("shared_info|0x63")));
            c.MmuUpdate(MmuRequest.Normal(upper, 0, (entry | Pte.Table).Named("shared_info|0x67")));
            c.MmuUpdate(MmuRequest.Normal(table, 0, 0));
            c.One("pin L1 shared_info", Mmuext.PinL1Table, entry >> 12);
        });
        script.Case("an ordinary page takes any value", c =>
        {
            ScratchPage page = c.Page();
            c.MmuUpdate(MmuRequest.Normal(page, 5, 0x1234_5678_9abc_def0UL));
            c.Load(page[40]);
            c.ReadOnly(page);
            c.MmuUpdate(MmuRequest.With(MmuCommand.PtUpdatePreserveAd, page, 511, ~0UL));
            c.Load(page[511 * 8]);
        });
        script.Case("frames that have no entries to update", c =>
        {
            ScratchPage descriptors = c.Page("descriptors");
            c.MmuUpdate(new MmuRequest(((Value)Bad.Frame << 12).Named("beyond memory"), 0));
            c.MmuUpdate(new MmuRequest(~7UL, 0));
            c.MmuUpdate(new MmuRequest(0, 0));
            c.ReadOnly(descriptors);
            ScriptBuffer frames = c.Structure("frames", 8, (0, 8, descriptors.Mfn));
            c.Hypercall(GuestHypercall.SetGdt, frames.At, 512);
            c.MmuUpdate(MmuRequest.Normal(descriptors, 0, 0));
            c.Hypercall(GuestHypercall.SetGdt, 0, 0);
            c.MmuUpdate(MmuRequest.Normal(descriptors, 0, 0));
        });
    }

    private static void WriteCommands(AbiScript script)
    {
        script.Case("Accessed and Dirty are set by the guest, or kept", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page();
            c.MmuUpdate(MmuRequest.Normal(table, 0, data.Entry(Pte.ReadWrite)));
            c.MmuUpdate(MmuRequest.With(MmuCommand.PtUpdatePreserveAd, table, 0, data.Entry(Pte.Present)));
            c.ShowAllFlags(table, 0);
            c.MmuUpdate(MmuRequest.Normal(table, 0, data.Entry(Pte.Present)));
            c.ShowAllFlags(table, 0);
            c.MmuUpdate(MmuRequest.Normal(table, 0, data.Entry(Pte.Present | Pte.Accessed)));
            c.MmuUpdate(MmuRequest.With(MmuCommand.PtUpdatePreserveAd, table, 0, 0));
            c.Load(table.At);
        });
        script.Case("PT_UPDATE_NO_TRANSLATE is as the normal update", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page();
            c.MmuUpdate(MmuRequest.With(MmuCommand.PtUpdateNoTranslate, table, 3, data.Entry(Pte.ReadWrite)));
            c.ShowEntry(table, 3);
            c.MmuUpdate(MmuRequest.With(MmuCommand.PtUpdateNoTranslate, table, 3, table.Entry(Pte.ReadWrite)));
            c.ShowEntry(table, 3);
        });
        script.Case("commands that there are none of", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            for (ulong command = 4; command < 8; command++)
                c.MmuUpdate(MmuRequest.With(command, table, 0, 0));
        });
        script.Case("the machine-to-physical table changes and is changed back", c =>
        {
            ScratchPage page = c.Page();
            Value entry = (c.MachineToPhys + (page.Mfn << 3)).Named($"m2p[{page.Name}]");
            c.Load(entry);
            c.MmuUpdate(MmuRequest.Machphys(page, 0x12345UL));
            c.Load(entry);
            c.MmuUpdate(MmuRequest.Machphys(page, ~0UL));
            c.Load(entry);
            c.MmuUpdate(MmuRequest.Machphys(page, page.Pfn));
            c.Load(entry);
        });
        script.Case("MACHPHYS_UPDATE ignores the offset in the page, and takes page tables", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            Value entry = (c.MachineToPhys + (table.Mfn << 3)).Named("m2p[l1]");
            c.MmuUpdate(new MmuRequest(((table.Mfn << 12) | 0xff8 | MmuCommand.MachphysUpdate).Named("m2p of l1, at 0xff8"), 77));
            c.Load(entry);
            c.MmuUpdate(MmuRequest.Machphys(table, table.Pfn));
            c.Load(entry);
        });
        script.Case("MACHPHYS_UPDATE of frames that are not the domain's", c =>
        {
            c.MmuUpdate(new MmuRequest((((Value)Bad.Frame << 12) | MmuCommand.MachphysUpdate).Named("m2p beyond memory"), 0));
            c.MmuUpdate(new MmuRequest(MmuCommand.MachphysUpdate, 0));
            c.MmuUpdate(new MmuRequest((~7UL) | MmuCommand.MachphysUpdate, 0));
        });
    }

    private static void WriteBatches(AbiScript script)
    {
        script.Case("a batch stops at the first error; what was before it stays", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage[] data = c.Pages(3);
            c.MmuUpdate(
                MmuRequest.Normal(table, 0, data[0].Entry(Pte.ReadOnly)),
                MmuRequest.Normal(table, 1, data[1].Entry(Pte.ReadOnly)),
                MmuRequest.Normal(table, 2, table.Entry(Pte.ReadWrite)),
                MmuRequest.Normal(table, 3, data[2].Entry(Pte.ReadOnly)));
            c.ShowEntry(table, 0);
            c.ShowEntry(table, 1);
            c.Load(table[16]);
            c.Load(table[24]);
        });
        script.Case("a batch stops at a command that there is none of", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage page = c.Page();
            c.MmuUpdate(
                MmuRequest.Machphys(page, page.Pfn), MmuRequest.Normal(table, 0, page.Entry(Pte.ReadWrite)),
                MmuRequest.With(5, table, 0, 0), MmuRequest.Normal(table, 0, 0));
            c.ShowEntry(table, 0);
        });
        script.Case("one entry many times in a batch", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage page = c.Page();
            c.MmuUpdate(
                MmuRequest.Normal(table, 0, page.Entry(Pte.ReadWrite)), MmuRequest.Normal(table, 0, page.Entry(Pte.ReadOnly)),
                MmuRequest.Normal(table, 0, 0), MmuRequest.Normal(table, 0, page.Entry(Pte.ReadWrite | Pte.NoExecute)));
            c.ShowEntry(table, 0);
        });
        script.Case("no requests", c =>
        {
            c.MmuUpdate();
            ScriptBuffer done = c.Done();
            c.Hypercall(GuestHypercall.MmuUpdate, 0, 0, done, Domid.Self);
            c.ShowDone(done);
        });
        script.Case("a whole table in one call", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page();
            ScriptBuffer list = c.Buffer("requests", 512 * 16);
            c.Fill(list, 512, 16, table.Mfn << 12, 8);
            c.Fill(list[8], 512, 16, data.Entry(Pte.ReadWrite));
            ScriptBuffer done = c.Done();
            c.Hypercall(GuestHypercall.MmuUpdate, list, 512, done, Domid.Self);
            c.ShowDone(done);
            c.ShowEntry(table, 0);
            c.ShowEntry(table, 511);
            c.Fill(list[8], 512, 16, 0);
            c.Hypercall(GuestHypercall.MmuUpdate, list, 512, done, Domid.Self);
            c.Load(table[511 * 8]);
        });
        script.Case("a count with the bit of a continuation adds to the done count", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page();
            ScriptBuffer list = c.Requests("requests", MmuRequest.Normal(table, 0, data.Entry(Pte.ReadOnly)), MmuRequest.Normal(table, 1, data.Entry(Pte.ReadOnly)));
            ScriptBuffer done = c.Structure("done", 8, (0, 8, 10));
            c.Hypercall(GuestHypercall.MmuUpdate, list, 2 | MmuCommand.Preempted, done, Domid.Self);
            c.ShowDone(done);
            c.Hypercall(GuestHypercall.MmuUpdate, list, MmuCommand.Preempted, done, Domid.Self);
            c.ShowDone(done);
            c.Hypercall(GuestHypercall.MmuUpdate, list, 1 | MmuCommand.Preempted, 0, Domid.Self);
        });
        script.Case("no requests at all, as the end of a continuation, gives back the fourth argument", c =>
        {
            ScriptBuffer done = c.Done();
            c.Hypercall(GuestHypercall.MmuUpdate, 0, MmuCommand.Preempted, done, 1234);
            c.Hypercall(GuestHypercall.MmuUpdate, 0, MmuCommand.Preempted, done, -22);
            c.ShowDone(done);
        });
    }

    private static void WritePointers(AbiScript script)
    {
        script.Case("no done count is asked for", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScriptBuffer list = c.Requests("requests", MmuRequest.Normal(table, 0, 0));
            c.Hypercall(GuestHypercall.MmuUpdate, list, 1, 0, Domid.Self);
        });
        script.Case("a done count that cannot be written is no error", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page();
            ScriptBuffer list = c.Requests("requests", MmuRequest.Normal(table, 0, data.Entry(Pte.ReadOnly)));
            c.Hypercall(GuestHypercall.MmuUpdate, list, 1, Bad.Unmapped, Domid.Self);
            c.Hypercall(GuestHypercall.MmuUpdate, list, 1, table.At, Domid.Self);
            c.Hypercall(GuestHypercall.MmuUpdate, list, 1, Bad.HypervisorStart, Domid.Self);
            c.Hypercall(GuestHypercall.MmuUpdate, list, 1, Bad.NonCanonical, Domid.Self);
            c.ShowEntry(table, 0);
        });
        script.Case("requests at addresses that cannot be read", c =>
        {
            foreach (ulong address in (ulong[])[0, Bad.Unmapped, Bad.HypervisorStart, Bad.HypervisorLast, Bad.NonCanonical, 0xffff_ffff_ffff_fff8])
            {
                ScriptBuffer done = c.Done();
                c.Hypercall(GuestHypercall.MmuUpdate, address, 1, done, Domid.Self);
                c.ShowDone(done);
            }
        });
        script.Case("requests that run into a page that cannot be read", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page();
            ScratchPage[] list = c.Pages(2);
            c.Put(list[0][4080], 8, table.Mfn << 12);
            c.Put(list[0][4088], 8, data.Entry(Pte.ReadOnly));
            c.UpdateVa(list[1], 0);
            ScriptBuffer done = c.Done();
            c.Hypercall(GuestHypercall.MmuUpdate, list[0][4080], 2, done, Domid.Self);
            c.ShowDone(done);
            c.ShowEntry(table, 0);
            c.Put(list[0][4088], 8, table.Mfn << 12);
            c.Hypercall(GuestHypercall.MmuUpdate, list[0][4088], 1, done, Domid.Self);
            c.ShowDone(done);
        });
        script.Case("requests in a read-only page, and at an odd address", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page();
            ScratchPage list = c.Page("list");
            c.Put(list[1], 8, table.Mfn << 12);
            c.Put(list[9], 8, data.Entry(Pte.ReadOnly));
            c.ReadOnly(list);
            ScriptBuffer done = c.Done();
            c.Hypercall(GuestHypercall.MmuUpdate, list[1], 1, done, Domid.Self);
            c.ShowDone(done);
            c.ShowEntry(table, 0);
        });
        script.Case("more requests than can be", c =>
        {
            ScriptBuffer done = c.Done();
            c.Hypercall(GuestHypercall.MmuUpdate, Bad.Unmapped, 0x7fff_ffff, done, Domid.Self);
            c.ShowDone(done);
            c.Hypercall(GuestHypercall.MmuUpdate, Bad.Unmapped, 0xffff_ffff, done, Domid.Self);
            c.ShowDone(done);
        });
    }

    private static Value Entry(ulong frame, ulong flags) => (((Value)frame << 12) | flags).Named($"frame 0x{frame:x}|0x{flags:x}");
}
