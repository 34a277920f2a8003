// Page tables with entries that came by grants: their flags, what becomes of them with their table, and tables of the other domain.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts.Events;
using XenSharp.Guests.Scripts.Memory;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Pairs;

internal static class PairPageTableScript
{
    public static AbiScript Create() => AbiScript.OfPair("pair-page-tables", "frames of another domain", script =>
    {
        const int flagsOfPte = GrantMap.Host | GrantMap.ContainsPte;
        ScratchPage table = null!;
        script.Case("the table is set up", (a, _) => table = a.MapTable()[0]);
        script.Case("flags of an entry that a grant made", (a, b) =>
        {
            const int first = 16;
            Granted page = Granted.Make(a, b, table, first);
            Value entry = MemoryCalls.EntryInBootMapping(page.Window.At, 1);
            (string Text, int Flags)[] maps =
            [
                ("writable", GrantMap.Host), ("read-only", GrantMap.Host | GrantMap.ReadOnly), ("for applications", GrantMap.Host | GrantMap.Application),
                ("with software's bits", GrantMap.Host | (5 * GrantMap.Available0)), ("with all of them", GrantMap.Host | (7 * GrantMap.Available0)),
                ("with a bit that is not defined", GrantMap.Host | (1 << 8)), ("with a bit above software's", GrantMap.Host | (1 << 24)),
            ];
            foreach ((string text, int flags) in maps)
            {
                ScriptBuffer map = b.Map(text, b.Peer, first, flags, page.Window.At);
                b.Show((b.Get(entry) & ~Pte.Frame).Named($"flags of the entry, {text}"));
                b.Unmap(text, EventSteps.Field32(map[20], "handle"), page.Window.At);
                b.Load(entry);
            }
        });
        script.Case("user mode reads what was mapped", (a, b) =>
        {
            const int first = 20;
            Granted page = Granted.Make(a, b, table, first);
            foreach (int flags in (int[])[GrantMap.Host, GrantMap.Host | GrantMap.Application])
            {
                string text = flags == GrantMap.Host ? "for the kernel" : "for applications";
                ScriptBuffer map = b.Map(text, b.Peer, first, flags, page.Window.At);
                b.User($"mov rax, [rbx] {text}", static code => code.mov(rax, __qword_ptr[rbx]), [Register64.Rax], [(Register64.Rbx, page.Window.At)]);
                b.Unmap(text, EventSteps.Field32(map[20], "handle"), page.Window.At);
            }
        });
        script.Case("instructions of the other domain", (a, b) =>
        {
            const int first = 24;
            const int ret = 0xc3;
            Granted page = Granted.Make(a, b, table, first);
            a.Put(page.Source.At, 1, ret);
            ScriptBuffer map = b.Map("writable", b.Peer, first, GrantMap.Host, page.Window.At);
            b.Kernel("call rbx", static code => code.call(rbx), with: [(Register64.Rbx, page.Window.At)]);
            b.Unmap("as it was mapped", EventSteps.Field32(map[20], "handle"), page.Window.At);
        });
        script.Case("an entry that mmu_update takes away", (a, b) =>
        {
            const int first = 28;
            Granted page = Granted.Make(a, b, table, first);
            ScratchPage own = b.Page();
            Value handle = b.Handle(b.Map("writable", b.Peer, first, GrantMap.Host, page.Window.At));
            b.MmuUpdate(new MmuRequest(page.Window.EntryAddress, own.Entry(Pte.ReadWrite)));
            b.Load(page.Window.At);
            b.Unmap("what is another page now", handle, page.Window.At);
            a.ShowFlags(table, first);
            b.MmuUpdate(new MmuRequest(page.Window.EntryAddress, 0));
            b.Unmap("by no address", handle, 0);
            a.ShowFlags(table, first);
        });
        script.Case("a table that no root leads to", (a, b) =>
        {
            const int first = 32;
            Granted page = Granted.Make(a, b, table, first);
            ScratchPage l1 = b.PinnedTable(1, "l1");
            Value entry = ((l1.Mfn << 12) + 40).Named("l1[5]");
            Value handle = b.Handle(b.Map("into it", b.Peer, first, flagsOfPte, entry));
            b.Show((b.Get(l1[40]) & ~Pte.Frame).Named("flags of l1[5]"));
            a.ShowFlags(table, first);
            b.Unmap("from another of its entries", handle, ((l1.Mfn << 12) + 48).Named("l1[6]"));
            b.Unmap("from it", handle, entry);
            b.Load(l1[40]);
            a.ShowFlags(table, first);
            Value second = b.Handle(b.Map("into it again", b.Peer, first, flagsOfPte, entry), "second");
            b.Unpin(l1);
            a.ShowFlags(table, first);
            b.Unmap("from what is no table any more", second, entry);
            b.MmuextOp("pin L1 l1, with the entry in it", new MmuextRequest(Mmuext.PinL1Table, l1.Mfn));
            b.Unmap("by no address", second, 0);
            a.ShowFlags(table, first);
            b.Map("into what is no table", b.Peer, first, flagsOfPte, entry);
        });
        script.Case("tables that name the other's frames", (a, b) =>
        {
            const int first = 36;
            Granted page = Granted.Make(a, b, table, first);
            Value far = a.FarFrame();
            a.MmuextOp("pin L1 a frame that is all zero", new MmuextRequest(Mmuext.PinL1Table, far));
            a.PutEntry(table, first + 1, GrantFlag.PermitAccess, a.Peer, far);
            ScratchPage window = b.Page();
            Value handle = b.Handle(b.Map("the page", b.Peer, first, GrantMap.Host, page.Window.At));
            Value read = b.Handle(b.Map("the table", b.Peer, first + 1, GrantMap.Host | GrantMap.ReadOnly, window.At), "read");
            ScratchPage l1 = b.Page("l1");
            Value granted = b.FrameAt(page.Window);
            b.Put(l1.At, 8, (granted << 12) | Pte.ReadOnly);
            b.ReadOnly(l1);
            b.MmuextOp("pin L1 that names the page", new MmuextRequest(Mmuext.PinL1Table, l1.Mfn));
            ScratchPage l2 = b.PinnedTable(2, "l2");
            b.MmuUpdate(MmuRequest.Normal(l2, 0, ((far << 12) | Pte.Table).Named("the table, by its number|0x67")));
            b.MmuUpdate(MmuRequest.Normal(l2, 0, ((b.FrameAt(window) << 12) | Pte.Table).Named("the table, as it is mapped|0x67")));
            b.MmuUpdate(MmuRequest.Normal(l2, 0, ((granted << 12) | Pte.Table).Named("the page|0x67")));
            b.Map("the page, into an L2", b.Peer, first, flagsOfPte, ((l2.Mfn << 12) + 8).Named("l2[1]"));
            b.Unmap("the table", read, window.At);
            b.Unmap("the page", handle, page.Window.At);
            a.ShowFlags(table, first);
            a.ShowFlags(table, first + 1);
            a.MmuextOp("unpin", new MmuextRequest(Mmuext.UnpinTable, far));
            b.Unpin(l2);
        });
        script.Case("a page that becomes a table after it was mapped and let go", (a, b) =>
        {
            const int first = 40;
            Granted page = Granted.Make(a, b, table, first);
            Value handle = b.Handle(b.Map("writable", b.Peer, first, GrantMap.Host, page.Window.At));
            b.Store(page.Window.At, 8, 0);
            b.Unmap("as it was mapped", handle, page.Window.At);
            a.ReadOnly(page.Source);
            a.Pin(1, page.Source);
            b.Map("writable", b.Peer, first, GrantMap.Host, page.Window.At);
            a.Unpin(page.Source);
            Value again = b.Handle(b.Map("writable again", b.Peer, first, GrantMap.Host, page.Window.At), "again");
            b.Store(page.Window.At, 8, 7);
            a.Load(page.Source.At);
            b.Unmap("as it was mapped", again, page.Window.At);
        });
        script.Case("the granter's own mapping goes while the other's stays", (a, b) =>
        {
            const int first = 44;
            Granted page = Granted.Make(a, b, table, first);
            Value frame = a.Keep(page.Source.Mfn, "frame");
            Value handle = b.Handle(b.Map("writable", b.Peer, first, GrantMap.Host, page.Window.At));
            a.Clear(page.Source);
            b.Store(page.Window.At, 8, 0x515);
            b.Load(page.Window.At);
            a.Hypercall(GuestHypercall.UpdateVaMapping, page.Source.At, ((frame << 12) | Pte.ReadWrite).Named("the frame"), 2);
            a.Load(page.Source.At);
            a.MmuextOp("clear_page while it is mapped", new MmuextRequest(Mmuext.ClearPage, frame));
            b.Load(page.Window.At);
            b.Unmap("as it was mapped", handle, page.Window.At);
            a.ShowFlags(table, first);
        });
    });
}
