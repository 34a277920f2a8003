// grant_table_op between two domains by entries of version 2: status frames, parts of pages, entries that lead to others.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts.Events;

namespace XenSharp.Guests.Scripts.Pairs;

internal static class PairGrantVersionScript
{
    private const int EntrySize = 16;

    /// <summary>Reference by which the pair shares its page.</summary>
    private const int PairReference = 7;

    public static AbiScript Create() => AbiScript.OfPair("pair-grant-versions", "grant_table_op between domains", script =>
    {
        ScratchPage table = null!;
        ScratchPage status = null!;
        void ShowEntry(AbiCase c, int reference)
        {
            c.Load(table[reference * EntrySize], 2);
            c.Load(status[reference * 2], 2);
        }

        (ScratchPage Source, ScratchPage Window) Grant(AbiCase a, AbiCase b, int reference, int flags = GrantFlag.PermitAccess)
        {
            ScratchPage source = a.Page();
            a.Put(source.At, 8, Granted.Pattern);
            a.PutEntry2(table, reference, flags, a.Peer, 0, source.Mfn);
            return (source, b.Page());
        }

        script.Case("another version while the other domain has a page", (a, b) =>
        {
            table = a.MapTable()[0];
            a.Load(table[PairReference * PairSteps.EntrySize], 2);
            a.SetVersion(2);
            status = a.MapStatusFrame();
            ShowEntry(a, PairReference);
            b.SetVersion(2);
            b.SetVersion(1);
        });
        script.Case("a page that both have", (a, b) =>
        {
            const int first = 16;
            (ScratchPage source, ScratchPage window) = Grant(a, b, first);
            Value handle = b.Handle(b.Map("writable", b.Peer, first, GrantMap.Host, window.At));
            ShowEntry(a, first);
            b.Store(window[8], 8, 4);
            a.Load(source[8]);
            ScratchPage other = b.Page();
            Value read = b.Handle(b.Map("read-only", b.Peer, first, GrantMap.Host | GrantMap.ReadOnly, other.At), "read");
            b.Unmap("the writable one", handle, window.At);
            ShowEntry(a, first);
            a.SetVersion(1, " while one is mapped");
            b.Unmap("the other", read, other.At);
            ShowEntry(a, first);
        });
        script.Case("an entry to read only", (a, b) =>
        {
            const int first = 20;
            (_, ScratchPage window) = Grant(a, b, first, GrantFlag.PermitAccess | GrantFlag.ReadOnly);
            b.Map("writable", b.Peer, first, GrantMap.Host, window.At);
            Value handle = b.Handle(b.Map("read-only", b.Peer, first, GrantMap.Host | GrantMap.ReadOnly, window.At));
            ShowEntry(a, first);
            b.Store(window.At, 8, 1);
            b.Unmap("as it was mapped", handle, window.At);
            ShowEntry(a, first);
        });
        script.Case("entries that cannot be mapped", (a, b) =>
        {
            const int first = 24;
            (ScratchPage source, ScratchPage window) = Grant(a, b, first);
            void Try(string text, int flags, Value domain, Value middle, Value frame)
            {
                a.PutEntry2(table, first, flags, domain, middle, frame);
                b.Map(text, b.Peer, first, GrantMap.Host, window.At);
                ShowEntry(a, first);
            }

            Try("for another", GrantFlag.PermitAccess, DomainIds.Absent, 0, source.Mfn);
            Try("a part of a page", GrantFlag.PermitAccess | GrantFlag.SubPage, a.Peer, 16 | (32 << 16), source.Mfn);
            Try("transitive", GrantFlag.Transitive, a.Peer, a.Own, 16);
            Try("a frame of nobody", GrantFlag.PermitAccess, a.Peer, 0, 0xff_ffff_ffffUL);
            Try("the root table", GrantFlag.PermitAccess, a.Peer, 0, a.Root);
            Try("to be transferred", GrantFlag.AcceptTransfer, a.Peer, 0, source.Mfn);
            Try("invalid", 0, a.Peer, 0, source.Mfn);
        });
        script.Case("access that ends while the page is mapped", (a, b) =>
        {
            const int first = 28;
            (_, ScratchPage window) = Grant(a, b, first);
            Value handle = b.Handle(b.Map("writable", b.Peer, first, GrantMap.Host, window.At));
            a.Put(table[first * EntrySize], 2, 0);
            ShowEntry(a, first);
            b.Load(window.At);
            b.Unmap("as it was mapped", handle, window.At);
            ShowEntry(a, first);
        });
        script.Case("parts of pages", (a, b) =>
        {
            const int first = 32;
            (ScratchPage source, ScratchPage own) = Grant(a, b, first);
            a.Fill(source.At, 64, 8, 0x1000, 1);
            a.PutEntry2(table, first, GrantFlag.PermitAccess | GrantFlag.SubPage, a.Peer, 16 | (32 << 16), source.Mfn);
            b.Copy("its first bytes", Side.Reference(b.Peer, first, 16), Side.Frame(own));
            b.Load(own.At);
            b.Copy("all of it", Side.Reference(b.Peer, first, 16), Side.Frame(own), 32);
            b.Copy("before it", Side.Reference(b.Peer, first, 8), Side.Frame(own));
            b.Copy("beyond it", Side.Reference(b.Peer, first, 44), Side.Frame(own));
            b.Put(own.At, 8, 0x77);
            b.Copy("to it", Side.Frame(own), Side.Reference(b.Peer, first, 40));
            a.Load(source[40]);
            b.Copy("to before it", Side.Frame(own), Side.Reference(b.Peer, first, 12));
            a.Load(source[8]);
            ShowEntry(a, first);
        });
        script.Case("a transitive entry that leads back to who uses it", (a, b) =>
        {
            const int first = 36;
            ScratchPage tableOfB = b.MapTable()[0];
            Granted page = Granted.Make(b, a, tableOfB, first);
            ScratchPage own = b.Page();
            a.PutEntry2(table, first, GrantFlag.Transitive, a.Peer, a.Peer, first);
            b.Copy("from it", Side.Reference(b.Peer, first), Side.Frame(own));
            b.Load(own.At);
            ShowEntry(a, first);
            b.ShowFlags(tableOfB, first);
            b.Put(own.At, 8, 0x31);
            b.Copy("to it", Side.Frame(own), Side.Reference(b.Peer, first, 8));
            b.Load(page.Source[8]);
            b.Copy("across its end", Side.Reference(b.Peer, first, 4092), Side.Frame(own));
            b.PutEntry(tableOfB, first, GrantFlag.PermitAccess | GrantFlag.ReadOnly, b.Peer, page.Source.Mfn);
            b.Copy("to it, when it is read-only", Side.Frame(own), Side.Reference(b.Peer, first));
            b.PutEntry(tableOfB, first, GrantFlag.PermitAccess, DomainIds.Absent, page.Source.Mfn);
            b.Copy("when it is for another", Side.Reference(b.Peer, first), Side.Frame(own));
            b.PutEntry(tableOfB, first, 0, b.Peer, 0);
            b.Copy("when it is not valid", Side.Reference(b.Peer, first), Side.Frame(own));
            ShowEntry(a, first);
        });
        script.Case("transitive entries that lead elsewhere", (a, b) =>
        {
            const int first = 40;
            (ScratchPage source, ScratchPage own) = Grant(a, b, first);
            void Try(string text, Value domain, Value reference, int flags = GrantFlag.Transitive)
            {
                a.PutEntry2(table, first + 1, flags, a.Peer, domain, reference);
                b.Copy(text, Side.Reference(b.Peer, first + 1), Side.Frame(own));
            }

            Try("to the granter's entry for the user", a.Own, first);
            a.PutEntry2(table, first + 2, GrantFlag.PermitAccess, a.Own, 0, source.Mfn);
            Try("to the granter's entry for itself", a.Own, first + 2);
            b.Load(own.At);
            Try("to itself", a.Own, first + 1);
            Try("to an absent domain", DomainIds.Absent, 20);
            Try("to domain 0", DomainIds.Zero, 400);
            Try("to DOMID_SELF", DomainIds.Self, first + 2);
            Try("beyond a table", a.Peer, 0xffff_ffffU);
            Try("read-only", a.Own, first + 2, GrantFlag.Transitive | GrantFlag.ReadOnly);
            b.Copy("to it, which is read-only", Side.Frame(own), Side.Reference(b.Peer, first + 1));
            a.PutEntry2(table, first + 1, GrantFlag.Transitive, DomainIds.Absent, a.Own, first + 2);
            b.Copy("that is for another", Side.Reference(b.Peer, first + 1), Side.Frame(own));
            ShowEntry(a, first + 1);
            ShowEntry(a, first + 2);
        });
        script.Case("a page for an entry of version 2", (a, b) =>
        {
            const int first = 44;
            a.PutEntry2(table, first, GrantFlag.AcceptTransfer, a.Peer, 0, 0x4321);
            ScratchPage given = b.Page();
            b.Put(given.At, 8, 0x99);
            Value frame = b.Tell(given.Mfn, "frame");
            b.Clear(given);
            b.Transfer("a page", frame, b.Peer, first);
            ShowEntry(a, first);
            Value got = a.Keep(Value.Load(table[(first * EntrySize) + 8]), "got");
            a.ShowOther(got, frame);
            ScratchPage window = a.Page();
            a.Hypercall(GuestHypercall.UpdateVaMapping, window.At, ((got << 12) | GrantSteps.WritablePage).Named("the frame"), 2);
            a.Load(window.At);
        });
        script.Case("back to version 1", (a, b) =>
        {
            const int first = 48;
            (_, ScratchPage window) = Grant(a, b, first);
            a.SetVersion(1, " with a status frame mapped");
            a.Clear(status);
            a.SetVersion(1);
            a.Load(table[PairReference * PairSteps.EntrySize], 2);
            b.Map("what is gone", b.Peer, first, GrantMap.Host, window.At);
            a.PutEntry(table, first, GrantFlag.PermitAccess, a.Peer, window.Mfn);
            b.Map("a frame of nobody's", b.Peer, first, GrantMap.Host, window.At);
        });
    });
}
