// GNTTABOP_copy and GNTTABOP_transfer between two domains.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts.Events;
using XenSharp.Guests.Scripts.Memory;

namespace XenSharp.Guests.Scripts.Pairs;

internal static class PairGrantCopyScript
{
    public static AbiScript CreateCopy() => AbiScript.OfPair("pair-grant-copy", "grant_table_op between domains", script =>
    {
        ScratchPage table = null!;
        script.Case("the table is set up", (a, _) => table = a.MapTable()[0]);
        script.Case("from the other's page and to it", (a, b) =>
        {
            const int first = 16;
            Granted page = Granted.Make(a, b, table, first);
            ScratchPage own = b.Page();
            b.Copy("from a reference", Side.Reference(b.Peer, first), Side.Frame(own));
            b.Load(own.At);
            a.ShowFlags(table, first);
            b.Put(own.At, 8, 0x5a5a);
            b.Copy("to a reference", Side.Frame(own), Side.Reference(b.Peer, first, 16));
            a.Load(page.Source[16]);
            a.ShowFlags(table, first);
            b.Copy("within the reference's page", Side.Reference(b.Peer, first, 16), Side.Reference(b.Peer, first, 32));
            a.Load(page.Source[32]);
        });
        script.Case("offsets and lengths", (a, b) =>
        {
            const int first = 20;
            Granted page = Granted.Make(a, b, table, first);
            ScratchPage own = b.Page();
            a.Fill(page.Source.At, 512, 8, 0x0101_0101_0101_0101, 1);
            b.Copy("nothing", Side.Reference(b.Peer, first), Side.Frame(own), 0);
            b.Copy("a byte", Side.Reference(b.Peer, first, 9), Side.Frame(own, 3), 1);
            b.Load(own.At);
            b.Copy("up to both ends", Side.Reference(b.Peer, first, 4088), Side.Frame(own, 4088));
            b.Load(own[4088]);
            b.Copy("across the source's end", Side.Reference(b.Peer, first, 4092), Side.Frame(own));
            b.Copy("across the destination's end", Side.Reference(b.Peer, first), Side.Frame(own, 4092));
            b.Copy("beyond the source's end", Side.Reference(b.Peer, first, 4096), Side.Frame(own));
            b.Copy("beyond it, nothing", Side.Reference(b.Peer, first, 4096), Side.Frame(own), 0);
            b.Copy("beyond it by far, nothing", Side.Reference(b.Peer, first, 0xffff), Side.Frame(own), 0);
            b.Copy("a page and a byte", Side.Reference(b.Peer, first), Side.Frame(own), 4097);
            b.Copy("65535 bytes", Side.Reference(b.Peer, first, 1), Side.Frame(own), 0xffff);
            b.Copy("a page", Side.Reference(b.Peer, first), Side.Frame(own), 4096);
            b.Load(own[2048]);
            b.Load(own[4088]);
            b.Copy("all but a byte, back", Side.Frame(own, 1), Side.Reference(b.Peer, first), 4095);
            a.Load(page.Source.At);
            a.Load(page.Source[4088]);
            a.ShowFlags(table, first);
        });
        script.Case("entries that can only be read", (a, b) =>
        {
            const int first = 24;
            Granted page = Granted.Make(a, b, table, first, GrantFlag.PermitAccess | GrantFlag.ReadOnly);
            ScratchPage own = b.Page();
            b.Copy("to a reference", Side.Frame(own), Side.Reference(b.Peer, first));
            a.Load(page.Source.At);
            b.Copy("from a reference", Side.Reference(b.Peer, first), Side.Frame(own));
            b.Load(own.At);
            a.ShowFlags(table, first);
        });
        script.Case("entries that are for others, or for something else", (a, b) =>
        {
            const int first = 28;
            Granted page = Granted.Make(a, b, table, first);
            ScratchPage own = b.Page();
            foreach (Value domain in (Value[])[DomainIds.Absent, DomainIds.Self, DomainIds.Zero, a.Own])
            {
                a.PutEntry(table, first, GrantFlag.PermitAccess, domain, page.Source.Mfn);
                b.Copy($"for {domain.Text}", Side.Reference(b.Peer, first), Side.Frame(own));
            }

            foreach (int flags in (int[])[0, GrantFlag.AcceptTransfer, GrantFlag.Transitive, GrantFlag.PermitAccess | GrantFlag.SubPage])
            {
                a.PutEntry(table, first, flags, a.Peer, page.Source.Mfn);
                b.Copy($"flags {flags}", Side.Reference(b.Peer, first), Side.Frame(own));
                a.ShowFlags(table, first);
            }

            foreach (uint reference in (uint[])[0, 400, 511, 512, 0xffff_ffff])
                b.Copy($"reference {reference}", Side.Reference(b.Peer, reference), Side.Frame(own));
            b.Load(own.At);
        });
        script.Case("domains that are named", (a, b) =>
        {
            const int first = 32;
            Granted page = Granted.Make(a, b, table, first);
            ScratchPage own = b.Page();
            foreach (Value domain in (Value[])[b.Own, DomainIds.Self, DomainIds.Absent, DomainIds.Zero, DomainIds.Io, DomainIds.Xen])
            {
                b.Copy($"from a reference of {domain.Text}", Side.Reference(domain, first), Side.Frame(own));
                b.Copy($"to a reference of {domain.Text}", Side.Frame(own), Side.Reference(domain, first));
            }

            b.Copy("from a frame of a", Side.Frame(page.Frame, b.Peer), Side.Frame(own));
            b.Copy("to a frame of a", Side.Frame(own), Side.Frame(page.Frame, b.Peer));
            Value far = a.FarFrame();
            b.Copy("from a frame of a in b's name", Side.Frame(far, DomainIds.Self), Side.Frame(own));
            b.Copy("to a frame of a in b's name", Side.Frame(own), Side.Frame(far, DomainIds.Self));
            b.Copy("between references of a and a frame of its own number", Side.Reference(b.Peer, first), Side.Frame(own.Mfn, b.Own));
            b.Load(own.At);
            a.Load(page.Source.At);
        });
        script.Case("frames that an entry can name", (a, b) =>
        {
            const int first = 36;
            ScratchPage own = b.Page();
            foreach ((string text, Value frame) in ((string, Value)[])[("a frame of nobody", 0xffff_ffffU), ("the root table", a.Root)])
            {
                a.PutEntry(table, first, GrantFlag.PermitAccess, a.Peer, frame);
                b.Copy($"from {text}", Side.Reference(b.Peer, first), Side.Frame(own), 0);
                b.Copy($"to {text}", Side.Frame(own), Side.Reference(b.Peer, first), 0);
                a.ShowFlags(table, first);
            }

            ScratchPage l1 = a.PinnedTable(1, "l1");
            a.PutEntry(table, first, GrantFlag.PermitAccess, a.Peer, l1.Mfn);
            b.Copy("from a page table", Side.Reference(b.Peer, first), Side.Frame(own));
            b.Copy("to a page table", Side.Frame(own), Side.Reference(b.Peer, first));
            a.Unpin(l1);
            b.Copy("to what was one", Side.Frame(own), Side.Reference(b.Peer, first));
        });
        script.Case("a frame of the domain that it is granted to", (a, b) =>
        {
            const int first = 37;
            Value frame = a.FarFrame(1);
            ScratchPage tableOfB = b.MapTable()[0];
            ScratchPage own = a.Page();
            b.PutEntry(tableOfB, first, GrantFlag.PermitAccess, b.Peer, frame);
            a.Copy("from it", Side.Reference(a.Peer, first), Side.Frame(own));
            a.Copy("to it", Side.Frame(own), Side.Reference(a.Peer, first));
            b.ShowFlags(tableOfB, first);
        });
        script.Case("own pages that cannot be copied to", (a, b) =>
        {
            const int first = 40;
            Granted page = Granted.Make(a, b, table, first);
            ScratchPage l1 = b.PinnedTable(1, "l1");
            b.Copy("to one's own page table", Side.Reference(b.Peer, first), Side.Frame(l1));
            b.Copy("to one's root table", Side.Reference(b.Peer, first), Side.Frame(b.Root, DomainIds.Self));
            b.Copy("to a frame of nobody", Side.Reference(b.Peer, first), Side.Frame(0xff_ffff_ffffUL, DomainIds.Self));
            b.Copy("from one's own page table", Side.Frame(l1), Side.Reference(b.Peer, first));
            a.Load(page.Source.At);
            a.ShowFlags(table, first);
        });
        script.Case("while the entry is mapped", (a, b) =>
        {
            const int first = 44;
            Granted page = Granted.Make(a, b, table, first);
            ScratchPage own = b.Page();
            Value handle = b.Handle(b.Map("read-only", b.Peer, first, GrantMap.Host | GrantMap.ReadOnly, page.Window.At));
            b.Put(own.At, 8, 0xc0);
            b.Copy("to the reference", Side.Frame(own), Side.Reference(b.Peer, first));
            a.ShowFlags(table, first);
            b.Load(page.Window.At);
            b.Copy("from the frame that is mapped", Side.Frame(b.FrameAt(page.Window), DomainIds.Self), Side.Frame(own));
            a.Put(table[first * PairSteps.EntrySize], 2, 0);
            b.Copy("when access has ended", Side.Reference(b.Peer, first), Side.Frame(own));
            b.Unmap("as it was mapped", handle, page.Window.At);
            b.Copy("when nothing is left", Side.Reference(b.Peer, first), Side.Frame(own));
            a.ShowFlags(table, first);
        });
        script.Case("between entries of both", (a, b) =>
        {
            const int first = 48;
            Granted page = Granted.Make(a, b, table, first);
            ScratchPage tableOfB = b.MapTable()[0];
            Granted back = Granted.Make(b, a, tableOfB, first);
            b.Put(back.Source.At, 8, 0xb0);
            b.Copy("b's own entry, which is for a", Side.Reference(b.Own, first), Side.Reference(b.Peer, first));
            b.PutEntry(tableOfB, first + 1, GrantFlag.PermitAccess, b.Own, back.Source.Mfn);
            b.Copy("b's own entry, which is for b", Side.Reference(b.Own, first + 1), Side.Reference(b.Peer, first, 8));
            a.Load(page.Source[8]);
            a.Copy("by a, from b's entry to its own, which is for b", Side.Reference(a.Peer, first), Side.Reference(a.Own, first, 16));
            a.PutEntry(table, first + 1, GrantFlag.PermitAccess, a.Own, page.Source.Mfn);
            a.Copy("by a, from b's entry to one for itself", Side.Reference(a.Peer, first), Side.Reference(a.Own, first + 1, 24));
            a.Load(page.Source[24]);
            b.ShowFlags(tableOfB, first);
            a.ShowFlags(table, first);
        });
        script.Case("several in one call", (a, b) =>
        {
            const int first = 52;
            Granted page = Granted.Make(a, b, table, first);
            Granted read = Granted.Make(a, b, table, first + 1, GrantFlag.PermitAccess | GrantFlag.ReadOnly);
            ScratchPage own = b.Page();
            b.Put(own.At, 8, 0x111);
            a.Put(read.Source.At, 8, 0x222);
            CopySteps.Request[] requests =
            [
                new(Side.Frame(own), Side.Reference(b.Peer, first)), new(Side.Reference(b.Peer, first + 1), Side.Frame(own, 8)),
                new(Side.Frame(own), Side.Reference(b.Peer, first + 1)), new(Side.Reference(b.Peer, first + 1), Side.Reference(b.Peer, first, 8)),
                new(Side.Reference(b.Peer, first + 1), Side.Reference(b.Peer, first, 4094)), new(Side.Frame(own, 8), Side.Reference(b.Peer, first, 16)),
            ];
            b.CopyAll("six, of which the third and the fifth cannot be", requests);
            foreach (int offset in (int[])[0, 8, 16])
                a.Load(page.Source[offset]);
            b.Load(own[8]);
            a.ShowFlags(table, first);
            a.ShowFlags(table, first + 1);
        });
    });

    public static AbiScript CreateTransfer() => AbiScript.OfPair("pair-grant-transfer", "grant_table_op between domains", script =>
    {
        ScratchPage table = null!;
        script.Case("the table of who takes pages is set up", (_, b) => table = b.MapTable()[0]);
        script.Case("a page goes over", (a, b) =>
        {
            const int first = 16;
            ScratchPage given = a.Page();
            a.Put(given.At, 8, Granted.Pattern);
            Value frame = a.Tell(given.Mfn, "frame");
            b.PutEntry(table, first, GrantFlag.AcceptTransfer, b.Peer, 0x1234);
            a.Transfer("a page that is mapped", frame, a.Peer, first);
            b.ShowFlags(table, first);
            a.Clear(given);
            a.Transfer("a page", frame, a.Peer, first);
            b.ShowFlags(table, first);
            Value got = b.Keep(EventSteps.Field32(table[(first * PairSteps.EntrySize) + 4], "got"), "got");
            b.ShowOther(got, frame);
            b.Show(Value.Pfn(got).Named("its pfn"));
            ScratchPage window = b.Page();
            b.Hypercall(GuestHypercall.UpdateVaMapping, window.At, ((got << 12) | Pte.ReadWrite).Named("the frame"), 2);
            b.Load(window.At);
            a.Hypercall(GuestHypercall.UpdateVaMapping, given.At, ((frame << 12) | Pte.ReadWrite).Named("the frame"), 2);
            a.Transfer("once more", frame, a.Peer, first);
            a.Transfer("the frame that was got by b", got.Named("b's frame"), a.Peer, first);
        });
        script.Case("how many pages each has", (a, b) =>
        {
            const int first = 20;
            ScratchPage given = a.Page();
            Value frame = a.Tell(given.Mfn, "frame");
            Value beforeA = a.Keep(a.PageCount(), "before");
            Value beforeB = b.Keep(b.PageCount(), "before");
            b.PutEntry(table, first, GrantFlag.AcceptTransfer, b.Peer, 0);
            a.Clear(given);
            a.Transfer("a page", frame, a.Peer, first);
            a.Show((beforeA - a.PageCount()).Named("pages less"));
            b.Show((b.PageCount() - beforeB).Named("pages more"));
        });
        script.Case("entries that take no page", (a, b) =>
        {
            const int first = 24;
            ScratchPage given = a.Page();
            a.Put(given.At, 8, 7);
            void Try(string text, int flags, Value domain)
            {
                ScratchPage page = a.Page();
                b.PutEntry(table, first, flags, domain, 0);
                Value frame = a.Keep(page.Mfn, "frame");
                a.Clear(page);
                a.Transfer(text, frame, a.Peer, first);
                b.ShowFlags(table, first);
                a.Hypercall(GuestHypercall.UpdateVaMapping, page.At, ((frame << 12) | Pte.ReadWrite).Named("the frame"), 2);
            }

            Try("for another domain", GrantFlag.AcceptTransfer, DomainIds.Absent);
            Try("for access", GrantFlag.PermitAccess, b.Peer);
            Try("invalid", 0, b.Peer);
            Try("committed already", GrantFlag.AcceptTransfer | (1 << 2), b.Peer);
            Try("completed already", GrantFlag.AcceptTransfer | (1 << 3), b.Peer);
            Value own = a.Keep(given.Mfn, "frame");
            a.Clear(given);
            a.Transfer("a reference beyond the table", own, a.Peer, 0xffff_ffffU);
            a.Hypercall(GuestHypercall.UpdateVaMapping, given.At, ((own << 12) | Pte.ReadWrite).Named("the frame"), 2);
        });
        script.Case("pages that cannot go", (a, b) =>
        {
            const int first = 28;
            b.PutEntry(table, first, GrantFlag.AcceptTransfer, b.Peer, 0);
            a.Transfer("the root table", a.Root, a.Peer, first);
            a.Transfer("a frame of nobody", 0xff_ffff_ffffUL, a.Peer, first);
            b.ShowFlags(table, first);
            ScratchPage tableOfA = a.MapTable()[0];
            a.PutEntry(tableOfA, first, GrantFlag.AcceptTransfer, a.Peer, 0);
            b.Transfer("a page of the other", a.FarFrame(), b.Peer, first);
            a.ShowFlags(tableOfA, first);
        });
        script.Case("a page that the other has mapped by a grant", (a, b) =>
        {
            const int first = 32;
            ScratchPage tableOfA = a.MapTable()[0];
            Granted page = Granted.Make(a, b, tableOfA, first);
            Value handle = b.Handle(b.Map("writable", b.Peer, first, GrantMap.Host, page.Window.At));
            b.PutEntry(table, first, GrantFlag.AcceptTransfer, b.Peer, 0);
            a.Clear(page.Source);
            a.Transfer("a page that is mapped by b", page.Frame, a.Peer, first);
            b.ShowFlags(table, first);
            b.Load(page.Window.At);
            b.Unmap("as it was mapped", handle, page.Window.At);
            a.Transfer("when it is not", page.Frame, a.Peer, first);
            b.ShowFlags(table, first);
        });
    });
}
