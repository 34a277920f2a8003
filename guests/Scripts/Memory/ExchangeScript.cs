// memory_op: XENMEM_exchange, frames for others.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Memory;

internal static class ExchangeScript
{
    public static AbiScript Create() => new("exchange", "memory_op", script =>
    {
        script.Case("a page for another", c =>
        {
            ScratchPage page = c.Page("page");
            c.UpdateVa(page, 0);
            ScriptBuffer given = c.Structure("given", 8, (0, 8, page.Mfn));
            ScriptBuffer taken = c.Structure("taken", 8, (0, 8, page.Pfn));
            ScriptBuffer exchange = Exchange(c, given, 1, 0, taken, 1, 0);
            c.MemoryOp("exchange, 1 for 1", Xenmem.Exchange, exchange);
            c.Load(exchange[64]);
            c.Show(Value.Pfn(Value.Load(taken.At)).Named("pfn of the new frame"));
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, ((Value.Load(taken.At) << 12) | Pte.ReadWrite).Named("new frame|0x63"), Uvmf.Invlpg);
            c.Store(page.At, 8, 0x88);
            c.Load(page.At);
        });
        script.Case("two pages for one extent of two, and back", c =>
        {
            ScratchPage[] pages = c.Pages(2);
            foreach (ScratchPage page in pages)
                c.UpdateVa(page, 0);
            ScriptBuffer given = c.Structure("given", 16, (0, 8, pages[0].Mfn), (8, 8, pages[1].Mfn));
            ScriptBuffer taken = c.Structure("taken", 8, (0, 8, 0x11000));
            ScriptBuffer exchange = Exchange(c, given, 2, 0, taken, 1, 1);
            c.MemoryOp("exchange, 2 for 1 of order 1", Xenmem.Exchange, exchange);
            c.Load(exchange[64]);
            c.Show((Value.Load(taken.At) & 1).Named("frame's lowest bit"));
            c.Show(Value.Pfn(Value.Load(taken.At) + 1).Named("pfn of the second"));
            ScriptBuffer back = c.Structure("back", 16, (0, 8, 0x12000), (8, 8, 0x13000));
            ScriptBuffer again = Exchange(c, taken, 1, 1, back, 2, 0);
            c.MemoryOp("exchange, 1 of order 1 for 2", Xenmem.Exchange, again);
            c.Load(again[64]);
            c.Show(Value.Pfn(Value.Load(back.At)).Named("pfn of the first"));
            c.Show(Value.Pfn(Value.Load(back[8])).Named("pfn of the second"));
        });
        script.Case("pages that are mapped, or page tables, or nobody's", c =>
        {
            ScratchPage page = c.Page("page");
            ScratchPage table = c.PinnedTable(1, "l1");
            c.Put(page.At, 8, 0x42);
            foreach ((string text, Value frame) in (ReadOnlySpan<(string, Value)>)[("mapped", page.Mfn), ("a page table", table.Mfn), ("beyond memory", Bad.Frame), ("-1", ~0UL)])
            {
                ScriptBuffer given = c.Structure("given", 8, (0, 8, frame));
                ScriptBuffer taken = c.Structure("taken", 8, (0, 8, 0x14000));
                ScriptBuffer exchange = Exchange(c, given, 1, 0, taken, 1, 0);
                c.MemoryOp($"exchange, {text}", Xenmem.Exchange, exchange);
                c.Load(exchange[64]);
                c.Load(taken.At);
            }

            c.Load(page.At);
        });
        script.Case("the second of two cannot be given", c =>
        {
            ScratchPage[] pages = c.Pages(2);
            c.UpdateVa(pages[0], 0);
            ScriptBuffer given = c.Structure("given", 16, (0, 8, pages[0].Mfn), (8, 8, pages[1].Mfn));
            ScriptBuffer taken = c.Structure("taken", 16, (0, 8, pages[0].Pfn), (8, 8, pages[1].Pfn));
            ScriptBuffer exchange = Exchange(c, given, 2, 0, taken, 2, 0);
            c.MemoryOp("exchange, 2 for 2, the second mapped", Xenmem.Exchange, exchange);
            c.Load(exchange[64]);
            c.Show(Value.Pfn(Value.Load(taken.At)).Named("pfn of the first"));
            c.Load(taken[8]);
        });
        script.Case("lists that do not match", c =>
        {
            ScriptBuffer list = c.Structure("list", 16, (0, 8, Bad.Frame));
            foreach ((string text, ulong inCount, ulong inOrder, ulong outCount, ulong outOrder, ulong done) in (ReadOnlySpan<(string, ulong, ulong, ulong, ulong, ulong)>)
                [
                    ("2 for 1", 2, 0, 1, 0, 0), ("1 for 1 of order 1", 1, 0, 1, 1, 0), ("more done than there is", 1, 0, 1, 0, 2), ("all done", 2, 0, 2, 0, 2),
                    ("nothing", 0, 0, 0, 0, 0), ("2^64-1 of order 1", ~0UL, 1, ~0UL, 1, 0), ("order 19", 1, 19, 1, 19, 0), ("order 2^31", 1, 1U << 31, 1, 0, 0),
                ])
            {
                ScriptBuffer exchange = Exchange(c, list, inCount, inOrder, list, outCount, outOrder, done);
                c.MemoryOp($"exchange, {text}", Xenmem.Exchange, exchange);
                c.Load(exchange[64]);
            }
        });
        script.Case("domains", c =>
        {
            ScriptBuffer list = c.Structure("list", 16, (0, 8, Bad.Frame));
            foreach ((string text, ulong given, ulong taken) in (ReadOnlySpan<(string, ulong, ulong)>)
                [("two domains", Domid.Self, Domid.Absent), ("no such domain", Domid.Absent, Domid.Absent), ("DOMID_IO", Domid.Io, Domid.Io)])
            {
                ScriptBuffer exchange = Exchange(c, list, 1, 0, list, 1, 0);
                c.Put(exchange[24], 2, given);
                c.Put(exchange[56], 2, taken);
                c.MemoryOp($"exchange, {text}", Xenmem.Exchange, exchange);
            }
        });
        script.Case("addresses that cannot be used", c =>
        {
            ScriptBuffer list = c.Structure("list", 16, (0, 8, Bad.Frame));
            foreach (ulong address in (ulong[])[0, Bad.Unmapped, Bad.HypervisorStart, Bad.NonCanonical])
            {
                c.MemoryOp($"exchange, argument at 0x{address:x}", Xenmem.Exchange, address);
                c.MemoryOp($"exchange, given at 0x{address:x}", Xenmem.Exchange, Exchange(c, address, 1, 0, list, 1, 0));
                c.MemoryOp($"exchange, taken at 0x{address:x}", Xenmem.Exchange, Exchange(c, list, 1, 0, address, 1, 0));
            }

            c.MemoryOp("exchange, continued", Xenmem.Exchange | (1UL << Xenmem.ExtentShift), Exchange(c, list, 1, 0, list, 1, 0));
        });
    });

    /// <summary>A struct xen_memory_exchange; its nr_exchanged is at 64.</summary>
    private static ScriptBuffer Exchange(AbiCase c, Value given, ulong givenCount, ulong givenOrder, Value taken, ulong takenCount, ulong takenOrder, ulong done = 0)
        => c.Structure("exchange", 72,
            (0, 8, given), (8, 8, givenCount), (16, 4, givenOrder), (24, 2, Domid.Self),
            (32, 8, taken), (40, 8, takenCount), (48, 4, takenOrder), (56, 2, Domid.Self), (64, 8, done));
}
