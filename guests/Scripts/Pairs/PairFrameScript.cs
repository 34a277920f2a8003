// Frames of another domain: entries of page tables that came by grants, and frames of the other where one's own are wanted.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts.Events;
using XenSharp.Guests.Scripts.Memory;

namespace XenSharp.Guests.Scripts.Pairs;

internal static class PairFrameScript
{
    public static AbiScript Create() => AbiScript.OfPair("pair-frames", "frames of another domain", script =>
    {
        ScratchPage table = null!;
        script.Case("the table is set up, and stores to page tables are emulated", (a, b) =>
        {
            table = a.MapTable()[0];
            b.Hypercall(GuestHypercall.VmAssist, VmAssist.Enable, VmAssist.WritablePagetables);
        });
        script.Case("an entry that came by a grant is taken away by update_va_mapping", (a, b) =>
        {
            const int first = 16;
            (Granted page, Value handle) = Mapped(a, b, table, first);
            b.Clear(page.Window);
            a.ShowFlags(table, first);
            b.Load(page.Window.At);
            b.Unmap("what is gone", handle, page.Window.At);
            a.ShowFlags(table, first);
            b.Unmap("by no address", handle, 0);
            a.ShowFlags(table, first);
        });
        script.Case("it is taken away by a store", (a, b) =>
        {
            const int first = 20;
            (Granted page, Value handle) = Mapped(a, b, table, first);
            b.Store(MemoryCalls.EntryInBootMapping(page.Window.At, 1), 8, 0);
            b.Load(page.Window.At);
            a.ShowFlags(table, first);
            b.Unmap("by no address", handle, 0);
            a.ShowFlags(table, first);
        });
        script.Case("it is written again with other flags", (a, b) =>
        {
            const int first = 24;
            (Granted page, Value handle) = Mapped(a, b, table, first);
            Value granted = b.FrameAt(page.Window);
            void Write(string text, ulong flags)
                => b.Hypercall(GuestHypercall.UpdateVaMapping, page.Window.At, ((granted << 12) | flags).Named(text), 2);

            Write("the same", Pte.ReadWrite);
            Write("with a bit of software's", Pte.ReadWrite | Pte.Available0);
            Write("not accessed, not dirty", Pte.Present | Pte.Writable);
            b.Load(page.Window.At);
            Write("for user mode", Pte.ReadWrite | Pte.User);
            Write("read-only", Pte.ReadOnly);
            Write("not executable", Pte.ReadWrite | Pte.NoExecute);
            Write("not cached", Pte.ReadWrite | Pte.CacheDisable);
            b.Load(page.Window.At);
            b.Store(page.Window.At, 8, 9);
            b.Unmap("as it was mapped", handle, page.Window.At);
            a.ShowFlags(table, first);
            Write("when it is not mapped any more", Pte.ReadWrite);
        });
        script.Case("it is copied", (a, b) =>
        {
            const int first = 28;
            (Granted page, Value handle) = Mapped(a, b, table, first);
            ScratchPage other = b.Page();
            Value granted = b.FrameAt(page.Window);
            b.Hypercall(GuestHypercall.UpdateVaMapping, other.At, ((granted << 12) | Pte.ReadWrite).Named("the granted frame"), 2);
            b.Hypercall(GuestHypercall.UpdateVaMapping, other.At, ((granted << 12) | Pte.ReadOnly).Named("it, read-only"), 2);
            b.MmuUpdate(new MmuRequest(other.EntryAddress, ((granted << 12) | Pte.ReadWrite).Named("the granted frame")));
            b.Store(MemoryCalls.EntryInBootMapping(other.At, 1), 8, ((granted << 12) | Pte.ReadWrite).Named("the granted frame"));
            b.Load(other.At);
            b.Unmap("as it was mapped", handle, page.Window.At);
            a.ShowFlags(table, first);
        });
        script.Case("PT_UPDATE_PRESERVE_AD of it", (a, b) =>
        {
            const int first = 32;
            (Granted page, Value handle) = Mapped(a, b, table, first);
            b.Store(page.Window.At, 8, 3);
            b.MmuUpdate(new MmuRequest(
                (page.Window.EntryAddress + MmuCommand.PtUpdatePreserveAd).Named("its entry|2"),
                ((b.FrameAt(page.Window) << 12) | Pte.Present | Pte.Writable).Named("the same frame")));
            b.Load(page.Window.At);
            b.Unmap("as it was mapped", handle, page.Window.At);
        });
        script.Case("frames that were never granted", (a, b) =>
        {
            Value frame = a.FarFrame();
            ScratchPage window = b.Page();
            foreach (ulong flags in (ulong[])[Pte.ReadWrite, Pte.ReadOnly])
            {
                b.Hypercall(GuestHypercall.UpdateVaMapping, window.At, ((frame << 12) | flags).Named($"frame of a|0x{flags:x}"), 2);
                b.MmuUpdate(new MmuRequest(window.EntryAddress, ((frame << 12) | flags).Named($"frame of a|0x{flags:x}")));
            }

            b.Store(MemoryCalls.EntryInBootMapping(window.At, 1), 8, ((frame << 12) | Pte.ReadWrite).Named("frame of a"));
            b.Load(window.At);
        });
        script.Case("requests on the other's tables", (a, b) =>
        {
            Value frame = a.FarFrame();
            Value entry = (frame << 12).Named("an entry in a frame of a");
            ScratchPage own = b.Page();
            b.MmuUpdate(new MmuRequest(entry, 0));
            b.MmuUpdate(new MmuRequest(entry, own.Entry(Pte.ReadWrite)));
            b.MmuUpdate(new MmuRequest(((frame << 12) | MmuCommand.MachphysUpdate).Named("m2p of a's frame"), 5));
            foreach ((string text, Value domains) in ((string, Value)[])[
                ("frames of a", b.Peer), ("tables of a", ((b.Peer + 1) << 16) | b.Own), ("both of a", ((b.Peer + 1) << 16) | b.Peer),
                ("tables of its own number", ((b.Own + 1) << 16) | b.Own)])
            {
                ScriptBuffer requests = b.Requests("requests", new MmuRequest(own.EntryAddress, own.Entry(Pte.ReadWrite)));
                ScriptBuffer done = b.Done();
                b.Hypercall(
                    (ulong)GuestHypercall.MmuUpdate, $"mmu_update(own page, {text})", AnswerFormat.Result, requests, 1, done,
                    domains);
                b.ShowDone(done);
            }

            foreach (Value domain in (Value[])[b.Peer, b.Own, DomainIds.Self])
            {
                b.Hypercall(
                    GuestHypercall.UpdateVaMappingOtherdomain, own.At, own.Entry(Pte.ReadWrite), 2, domain);
            }
        });
        script.Case("the machine-to-physical table", (a, b) =>
        {
            Value frame = a.FarFrame();
            ScratchPage own = b.Page();
            b.Show((own.Pfn ^ Value.Pfn(own.Mfn)).Named("own frame's pfn is another"));
            b.Show(Value.Pfn(frame).Named("pfn of a's frame"));
            a.Show(Value.Pfn(frame).Named("the same in a"));
        });
        script.Case("the machine-to-physical table of a page that was mapped", (a, b) =>
        {
            const int first = 36;
            (Granted page, Value handle) = Mapped(a, b, table, first);
            Value granted = b.FrameAt(page.Window);
            b.Show(Value.Pfn(granted).Named("pfn of the granted frame"));
            b.MmuUpdate(new MmuRequest(((granted << 12) | MmuCommand.MachphysUpdate).Named("m2p of the granted frame"), 5));
            b.Unmap("as it was mapped", handle, page.Window.At);
        });
        script.Case("mmuext_op on the other's frames", (a, b) =>
        {
            Value frame = a.FarFrame();
            ScratchPage own = b.Page();
            for (ulong level = Mmuext.PinL1Table; level <= Mmuext.PinL4Table; level++)
                b.MmuextOp($"pin L{level + 1} frame of a", new MmuextRequest(level, frame));
            b.MmuextOp("unpin frame of a", new MmuextRequest(Mmuext.UnpinTable, frame));
            b.MmuextOp("new_baseptr frame of a", new MmuextRequest(Mmuext.NewBaseptr, frame));
            b.MmuextOp("new_user_baseptr frame of a", new MmuextRequest(Mmuext.NewUserBaseptr, frame));
            b.MmuextOp("clear_page frame of a", new MmuextRequest(Mmuext.ClearPage, frame));
            b.MmuextOp("copy_page from frame of a", new MmuextRequest(Mmuext.CopyPage, own.Mfn, frame));
            b.MmuextOp("copy_page to frame of a", new MmuextRequest(Mmuext.CopyPage, frame, own.Mfn));
            b.MmuextOp("mark_super frame of a", new MmuextRequest(Mmuext.MarkSuper, frame));
        });
        script.Case("mmuext_op on behalf of the other", (_, b) =>
        {
            ScratchPage own = b.Page();
            foreach (Value domain in (Value[])[b.Peer, b.Own])
            {
                foreach ((string text, ulong command) in ((string, ulong)[])[
                    ("pin L1", Mmuext.PinL1Table), ("unpin", Mmuext.UnpinTable), ("tlb_flush_local", Mmuext.TlbFlushLocal),
                    ("clear_page", Mmuext.ClearPage), ("new_baseptr", Mmuext.NewBaseptr)])
                {
                    ScriptBuffer operations = b.Operations("operations", new MmuextRequest(command, own.Mfn));
                    ScriptBuffer done = b.Done();
                    b.Hypercall(
                        (ulong)GuestHypercall.MmuextOp, $"mmuext_op({text} own page, {domain.Text})", AnswerFormat.Result, operations, 1, done,
                        domain);
                    b.ShowDone(done);
                }
            }
        });
        script.Case("other hypercalls that take frames", (a, b) =>
        {
            Value frame = a.FarFrame();
            ScriptBuffer gdt = b.Structure("gdt", 8, (0, 8, frame));
            b.Hypercall(GuestHypercall.SetGdt, gdt, 8);
            b.Hypercall(GuestHypercall.UpdateDescriptor, (frame << 12).Named("descriptor in a's frame"), 0);
            b.InitControl(frame, 0, 0);
            b.ExpandArray(frame);
            ScriptBuffer info = b.Structure("info", 16, (0, 8, frame));
            b.VcpuOp(VcpuOperation.RegisterVcpuInfo, 0, "frame of a", info);
        });
        script.Case("memory_op with the other's frames", (a, b) =>
        {
            Value frame = a.FarFrame();
            ScratchPage own = b.Page();
            ScriptBuffer frames = b.Structure("frames", 8, (0, 8, frame));
            ScriptBuffer Reservation(Value domain, ScriptBuffer extents)
                => b.Structure("reservation", 32, (0, 8, extents), (8, 8, 1), (16, 4, 0), (20, 4, 0), (24, 2, domain));

            b.MemoryOp("decrease_reservation, frame of a", Xenmem.DecreaseReservation, Reservation(DomainIds.Self, frames));
            ScriptBuffer ownFrames = b.Structure("own frames", 8, (0, 8, own.Mfn));
            b.MemoryOp("decrease_reservation of a, own frame", Xenmem.DecreaseReservation, Reservation(b.Peer, ownFrames));
            b.MemoryOp("decrease_reservation of a, frame of a", Xenmem.DecreaseReservation, Reservation(b.Peer, frames));
            b.MemoryOp("increase_reservation of a", Xenmem.IncreaseReservation, Reservation(b.Peer, frames));
            b.MemoryOp("populate_physmap of a", Xenmem.PopulatePhysmap, Reservation(b.Peer, b.Structure("pfns", 8, (0, 8, own.Pfn))));
            foreach ((string text, ulong command) in ((string, ulong)[])[
                ("current_reservation", Xenmem.CurrentReservation), ("maximum_reservation", Xenmem.MaximumReservation),
                ("maximum_gpfn", Xenmem.MaximumGpfn)])
                b.MemoryOp($"{text} of a", command, b.Structure("domain", 8, (0, 2, b.Peer)));
            ScriptBuffer output = b.Structure("new frames", 8, (0, 8, own.Pfn));
            ScriptBuffer exchange = b.Structure(
                "exchange", 80, (0, 8, frames), (8, 8, 1), (24, 2, DomainIds.Self), (32, 8, output), (40, 8, 1), (56, 2, DomainIds.Self));
            b.MemoryOp("exchange of a frame of a", Xenmem.Exchange, exchange);
            b.Load(exchange[64]);
            b.Load(own.At);
        });
        script.Case("a granted frame where one's own is wanted", (a, b) =>
        {
            const int first = 40;
            (Granted page, Value handle) = Mapped(a, b, table, first);
            Value granted = b.FrameAt(page.Window);
            ScriptBuffer frames = b.Structure("frames", 8, (0, 8, granted));
            ScriptBuffer reservation = b.Structure("reservation", 32, (0, 8, frames), (8, 8, 1), (24, 2, DomainIds.Self));
            b.MemoryOp("decrease_reservation, granted frame", Xenmem.DecreaseReservation, reservation);
            b.MmuextOp("pin L1 granted frame", new MmuextRequest(Mmuext.PinL1Table, granted));
            b.MmuextOp("clear_page granted frame", new MmuextRequest(Mmuext.ClearPage, granted));
            b.MmuextOp("copy_page to the granted frame", new MmuextRequest(Mmuext.CopyPage, granted, b.Page().Mfn));
            b.Hypercall(GuestHypercall.SetGdt, frames, 8);
            b.InitControl(granted, 0, 0);
            b.Load(page.Window.At);
            b.Unmap("as it was mapped", handle, page.Window.At);
            a.ShowFlags(table, first);
        });
        script.Case("a hypercall's argument in a page of the other", (a, b) =>
        {
            const int first = 44;
            (Granted page, Value handle) = Mapped(a, b, table, first);
            a.Put(page.Source.At, 8, DomainIds.Self | (DomainIds.Self << 16));
            b.EventChannelOp(EventOperation.AllocUnbound, page.Window.At);
            b.ShowOther(EventSteps.Field32(page.Window[4], "port told in b"), a.Tell(EventSteps.Field32(page.Source[4], "port"), "port told in a"));
            b.ClosePort(EventSteps.Field32(page.Window[4], "that port"));
            b.Unmap("as it was mapped", handle, page.Window.At);
            Value read = b.Handle(b.Map("read-only", b.Peer, first, GrantMap.Host | GrantMap.ReadOnly, page.Window.At), "read");
            b.EventChannelOp(EventOperation.AllocUnbound, page.Window.At);
            b.Unmap("as it was mapped", read, page.Window.At);
        });
        script.Case("a page table that is granted", (a, b) =>
        {
            const int first = 48;
            ScratchPage l1 = a.PinnedTable(1, "l1");
            ScratchPage window = b.Page();
            a.PutEntry(table, first, GrantFlag.PermitAccess, a.Peer, l1.Mfn);
            b.Map("writable", b.Peer, first, GrantMap.Host, window.At);
            a.ShowFlags(table, first);
            Value handle = b.Handle(b.Map("read-only", b.Peer, first, GrantMap.Host | GrantMap.ReadOnly, window.At));
            b.Load(window.At);
            a.MmuUpdate(MmuRequest.Normal(l1, 3, a.Page().Entry(Pte.ReadOnly)));
            b.Show((Value.Load(window[24]) & 1).Named("present bit of what a wrote"));
            b.Store(window.At, 8, 1);
            a.Unpin(l1);
            b.Unmap("as it was mapped", handle, window.At);
            a.ShowFlags(table, first);
            Value second = b.Handle(b.Map("writable when it is no table any more", b.Peer, first, GrantMap.Host, window.At), "second");
            a.MmuextOp("pin l1 while it is mapped", new MmuextRequest(Mmuext.PinL1Table, l1.Mfn));
            b.Unmap("as it was mapped", second, window.At);
            a.ShowFlags(table, first);
        });
        script.Case("a page that is mapped elsewhere cannot become a table", (a, b) =>
        {
            const int first = 52;
            (Granted page, Value handle) = Mapped(a, b, table, first);
            a.ReadOnly(page.Source);
            a.MmuextOp("pin L1 while b can write it", new MmuextRequest(Mmuext.PinL1Table, page.Source.Mfn));
            b.Unmap("as it was mapped", handle, page.Window.At);
            Value read = b.Handle(b.Map("read-only", b.Peer, first, GrantMap.Host | GrantMap.ReadOnly, page.Window.At), "read");
            a.MmuextOp("pin L1 while b can read it", new MmuextRequest(Mmuext.PinL1Table, page.Source.Mfn));
            b.Map("writable", b.Peer, first, GrantMap.Host, b.Page().At);
            b.Unmap("as it was mapped", read, page.Window.At);
            a.Load(page.Source.At);
        });
        script.Case("a descriptor table that is granted", (a, b) =>
        {
            const int first = 56;
            ScratchPage gdt = a.Page("gdt");
            ScratchPage window = b.Page();
            a.ReadOnly(gdt);
            a.PutEntry(table, first, GrantFlag.PermitAccess, a.Peer, gdt.Mfn);
            Value handle = b.Handle(b.Map("writable", b.Peer, first, GrantMap.Host, window.At));
            a.Hypercall(GuestHypercall.SetGdt, a.Structure("frames", 8, (0, 8, gdt.Mfn)), 512);
            b.Unmap("as it was mapped", handle, window.At);
            a.Hypercall(GuestHypercall.SetGdt, a.Structure("frames", 8, (0, 8, gdt.Mfn)), 512);
            b.Map("writable while it is the GDT", b.Peer, first, GrantMap.Host, window.At);
            a.Hypercall(GuestHypercall.SetGdt, 0, 0);
        });
        script.Case("a mapped page is given back by its owner", (a, b) =>
        {
            const int first = 60;
            (Granted page, Value handle) = Mapped(a, b, table, first);
            Value frame = a.Keep(page.Source.Mfn, "given frame");
            Value before = a.Keep(a.PageCount(), "before");
            a.Clear(page.Source);
            ScriptBuffer frames = a.Structure("frames", 8, (0, 8, frame));
            ScriptBuffer reservation = a.Structure("reservation", 32, (0, 8, frames), (8, 8, 1), (24, 2, DomainIds.Self));
            a.MemoryOp("decrease_reservation, mapped by b", Xenmem.DecreaseReservation, reservation);
            a.Show((before - a.PageCount()).Named("pages less"));
            b.Load(page.Window.At);
            b.Store(page.Window.At, 8, 0xabc);
            b.Load(page.Window.At);
            a.MemoryOp("decrease_reservation once more", Xenmem.DecreaseReservation, reservation);
            a.Hypercall(GuestHypercall.UpdateVaMapping, page.Source.At, ((frame << 12) | Pte.ReadWrite).Named("the frame"), 2);
            a.Clear(page.Source);
            ScratchPage other = b.Page();
            Value again = b.Handle(b.Map("again", b.Peer, first, GrantMap.Host | GrantMap.ReadOnly, other.At), "again");
            b.Unmap("as it was mapped", handle, page.Window.At);
            a.Show((before - a.PageCount()).Named("pages less"));
            b.Unmap("the other", again, other.At);
            a.ShowFlags(table, first);
            a.Show((before - a.PageCount()).Named("pages less"));
            b.Map("when it is gone", b.Peer, first, GrantMap.Host, page.Window.At);
            a.Hypercall(GuestHypercall.UpdateVaMapping, page.Source.At, ((frame << 12) | Pte.ReadWrite).Named("the frame"), 2);
        });
        script.Case("a mapped page is exchanged by its owner", (a, b) =>
        {
            const int first = 64;
            (Granted page, Value handle) = Mapped(a, b, table, first);
            a.Clear(page.Source);
            ScriptBuffer input = a.Structure("frames", 8, (0, 8, page.Source.Mfn));
            ScriptBuffer output = a.Structure("new frames", 8, (0, 8, page.Source.Pfn));
            ScriptBuffer exchange = a.Structure(
                "exchange", 80, (0, 8, input), (8, 8, 1), (24, 2, DomainIds.Self), (32, 8, output), (40, 8, 1), (56, 2, DomainIds.Self));
            a.MemoryOp("exchange, mapped by b", Xenmem.Exchange, exchange);
            a.Load(exchange[64]);
            b.Load(page.Window.At);
            b.Unmap("as it was mapped", handle, page.Window.At);
        });
    });

    private static (Granted Page, Value Handle) Mapped(AbiCase from, AbiCase to, ScratchPage table, int reference)
    {
        Granted page = Granted.Make(from, to, table, reference);
        return (page, to.Handle(to.Map("writable", to.Peer, reference, GrantMap.Host, page.Window.At)));
    }
}
