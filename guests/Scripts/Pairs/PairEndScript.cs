// What a domain sees of the other's end: ports, pages that it granted, pages that were granted to it.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts.Events;
using XenSharp.Guests.Scripts.Memory;

namespace XenSharp.Guests.Scripts.Pairs;

internal static class PairEndScript
{
    private const int First = 16;

    /// <summary>"b", which mapped pages of "a", ends.</summary>
    public static AbiScript CreateMapper() => AbiScript.OfPair("pair-end-mapper", "the other domain's end", script =>
    {
        ScratchPage table = null!;
        Granted[] pages = [];
        Value far = null!;
        Value near = null!;
        Value bound = null!;
        Value offered = null!;
        Value waiting = null!;
        script.LevelPortsOfBoth();
        script.Case("what they have together", (a, b) =>
        {
            table = a.MapTable()[0];
            (far, near) = PairSteps.Connect(a, b);
            (offered, bound) = PairSteps.Connect(b, a, " of b");
            waiting = a.Offer("waiting");
            pages = [.. Enumerable.Range(0, 4).Select(i => Granted.Make(a, b, table, First + i))];
            b.Map("writable", b.Peer, First, GrantMap.Host, pages[0].Window.At);
            b.Map("read-only", b.Peer, First + 1, GrantMap.Host | GrantMap.ReadOnly, pages[1].Window.At);
            b.Map("for a device", b.Peer, First + 2, GrantMap.Device, 0);
            b.Map("twice", b.Peer, First + 3, GrantMap.Host, pages[3].Window.At);
            b.Map("twice", b.Peer, First + 3, GrantMap.Host, b.Page().At);
            for (int i = 0; i < pages.Length; i++)
                a.ShowFlags(table, First + i);
            a.QuietEvents();
            b.Send(near);
        });
        script.Case("its ports, when it is gone", (a, b) =>
        {
            b.Shutdown(GuestShutdownReason.PowerOff);
            a.WaitForEnd(far);
            a.ShowPending();
            a.ShowPort(far);
            a.ShowPort(bound);
            a.ShowPort(waiting);
            a.Send(far);
            a.Send(bound);
            a.Send(waiting);
            a.BindInterdomain(a.Peer, offered);
            a.BindInterdomain(a.Peer, near);
            Value late = a.Keep(a.AllocUnbound(DomainIds.Self, a.Peer), "late");
            a.ShowPort(late);
            a.PortStatus(a.Peer, near);
            foreach (Value port in (Value[])[far, bound, waiting, late])
                a.ClosePort(port);
        });
        script.Case("the pages that it had mapped", (a, _) =>
        {
            for (int i = 0; i < pages.Length; i++)
                a.ShowFlags(table, First + i);
            foreach (Granted page in pages)
                a.Load(page.Source.At);
            a.ReadOnly(pages[0].Source);
            a.Put(table[First * PairSteps.EntrySize], 2, 0);
            a.MmuextOp("pin L1 what it could write", new MmuextRequest(Mmuext.PinL1Table, pages[0].Source.Mfn));
            a.Unpin(pages[0].Source);
        });
        script.Case("its number, when nobody has it", (a, _) =>
        {
            ScratchPage own = a.Page();
            a.Map("by a reference", a.Peer, First, GrantMap.Host, own.At);
            a.Copy("from a reference", Side.Reference(a.Peer, First), Side.Frame(own));
            a.Copy("from a frame", Side.Frame(own.Mfn, a.Peer), Side.Frame(own));
            a.PutEntry(table, First + 8, GrantFlag.PermitAccess, a.Peer, own.Mfn);
            a.ShowFlags(table, First + 8);
            Value frame = a.Keep(own.Mfn, "frame");
            ScriptBuffer size = a.Structure("size", 24, (0, 2, a.Peer), (12, 2, 77));
            a.Op(GrantOperation.QuerySize, "b", size, 1);
            a.Load(size[12], 2);
            ScriptBuffer version = a.Structure("version", 8, (0, 2, a.Peer));
            a.Op(GrantOperation.GetVersion, "b", version, 1);
            a.MemoryOp("current_reservation of b", Xenmem.CurrentReservation, a.Structure("domain", 8, (0, 2, a.Peer)));
            a.MmuUpdateOfPeer(own);
            a.Clear(own);
            a.Transfer("a page to b", frame, a.Peer, First);
            a.Transfer("once more", frame, a.Peer, First);
        });
        script.Case("the table is free for another version", (a, _) =>
        {
            a.SetVersion(2);
            a.SetVersion(1);
        });
    });

    /// <summary>"a", whose pages "b" has mapped, ends; they stay as long as that.</summary>
    public static AbiScript CreateGranter() => AbiScript.OfPair("pair-end-granter", "the other domain's end", script =>
    {
        ScratchPage table = null!;
        Granted[] pages = [];
        Value[] handles = [];
        Value far = null!;
        Value near = null!;
        Value farFrame = null!;
        script.LevelPortsOfBoth();
        script.Case("what they have together", (a, b) =>
        {
            table = a.MapTable()[0];
            (far, near) = PairSteps.Connect(a, b);
            farFrame = a.FarFrame();
            pages = [.. Enumerable.Range(0, 3).Select(i => Granted.Make(a, b, table, First + i))];
            handles =
            [
                b.Handle(b.Map("writable", b.Peer, First, GrantMap.Host, pages[0].Window.At), "writable"),
                b.Handle(b.Map("read-only", b.Peer, First + 1, GrantMap.Host | GrantMap.ReadOnly, pages[1].Window.At), "read-only"),
            ];
            b.Store(pages[0].Window[8], 8, 1);
        });
        script.Case("mapped pages stay when it is gone", (a, b) =>
        {
            a.Shutdown(GuestShutdownReason.Reboot);
            b.WaitForEnd(near);
            b.Load(pages[0].Window.At);
            b.Load(pages[0].Window[8]);
            b.Store(pages[0].Window[16], 8, 2);
            b.Load(pages[0].Window[16]);
            b.Load(pages[1].Window.At);
            b.Store(pages[1].Window.At, 8, 3);
        });
        script.Case("its ports", (_, b) =>
        {
            b.ShowPort(near);
            b.Send(near);
            b.BindInterdomain(b.Peer, far);
            b.PortStatus(b.Peer, far);
            b.AllocUnbound(DomainIds.Self, b.Peer);
            b.ClosePort(near);
        });
        script.Case("its table", (_, b) =>
        {
            ScratchPage own = b.Page();
            b.Map("what is mapped, again", b.Peer, First, GrantMap.Host, own.At);
            b.Map("what was granted and is not mapped", b.Peer, First + 2, GrantMap.Host, own.At);
            b.Copy("from a reference that is mapped", Side.Reference(b.Peer, First), Side.Frame(own));
            b.Copy("from one that is not", Side.Reference(b.Peer, First + 2), Side.Frame(own));
            b.Copy("from a frame", Side.Frame(pages[0].Frame, b.Peer), Side.Frame(own));
            b.Hypercall(GuestHypercall.UpdateVaMapping, own.At, ((farFrame << 12) | Pte.ReadWrite).Named("a frame of a's"), 2);
            ScriptBuffer size = b.Structure("size", 24, (0, 2, b.Peer), (12, 2, 77));
            b.Op(GrantOperation.QuerySize, "a", size, 1);
            b.Load(size[12], 2);
            b.MemoryOp("current_reservation of a", Xenmem.CurrentReservation, b.Structure("domain", 8, (0, 2, b.Peer)));
            b.MmuUpdateOfPeer(own);
            Value frame = b.Keep(own.Mfn, "frame");
            b.Clear(own);
            b.Transfer("a page to a", frame, b.Peer, First);
        });
        script.Case("its pages are let go", (_, b) =>
        {
            b.Unmap("the writable one", handles[0], pages[0].Window.At);
            b.Load(pages[0].Window.At);
            b.Map("again", b.Peer, First, GrantMap.Host, pages[0].Window.At);
            b.Hypercall(GuestHypercall.UpdateVaMapping, pages[1].Window.At, 0, 2);
            b.Unmap("the other, by no address", handles[1], 0);
            b.Unmap("once more", handles[1], 0);
        });
    });

    /// <summary>mmu_update of one's own table for the other domain's frames.</summary>
    private static void MmuUpdateOfPeer(this AbiCase c, ScratchPage page)
    {
        ScriptBuffer requests = c.Requests("requests", new MmuRequest(page.EntryAddress, page.Entry(Pte.ReadWrite)));
        ScriptBuffer done = c.Done();
        c.Hypercall(
            (ulong)GuestHypercall.MmuUpdate, $"mmu_update(own page, frames of {c.Peer.Text})", AnswerFormat.Result, requests, 1, done, c.Peer);
        c.ShowDone(done);
    }
}
