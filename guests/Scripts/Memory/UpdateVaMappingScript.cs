// update_va_mapping: the flags, the entry, and what is refused.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Memory;

internal static class UpdateVaMappingScript
{
    public static AbiScript Create() => new("update-va-mapping", "update_va_mapping", script =>
    {
        script.Case("a page becomes read-only and writable again", c =>
        {
            ScratchPage page = c.Page();
            c.UpdateVa(page, page.Entry(Pte.ReadOnly));
            c.Store(page.At, 8, 1);
            c.UpdateVa(page, page.Entry(Pte.ReadWrite));
            c.Store(page.At, 8, 1);
            c.Load(page.At);
        });
        script.Case("a page goes, and another comes in its place", c =>
        {
            ScratchPage[] pages = c.Pages(2);
            c.Put(pages[1].At, 8, 0x1111);
            c.UpdateVa(pages[0], 0);
            c.Load(pages[0].At);
            c.Store(pages[0].At, 1, 1);
            c.UpdateVa(pages[0], pages[1].Entry(Pte.ReadWrite));
            c.Load(pages[0].At);
            c.Store(pages[0][8], 8, 0x2222);
            c.Load(pages[1][8]);
        });
        script.Case("the entry as it is read back", c =>
        {
            ScratchPage page = c.Page();
            Value entry = MemoryCalls.EntryInBootMapping(page.At, 1);
            c.UpdateVa(page, page.Entry(Pte.ReadWrite));
            c.ShowEntry(entry, "page");
            c.UpdateVa(page, page.Entry(Pte.ReadWrite | Pte.User | Pte.Available0 | Pte.NoExecute));
            c.ShowEntry(entry, "page");
        });
        script.Case("every way to flush, on the own vCPU", c =>
        {
            ScratchPage page = c.Page();
            ScriptBuffer none = c.Structure("no vCPU", 8);
            ScriptBuffer first = c.Structure("vCPU 0", 8, (0, 8, 1));
            ScriptBuffer all = c.Structure("all vCPUs", 8, (0, 8, ~0UL));
            foreach (ulong flags in (ulong[])[Uvmf.None, Uvmf.TlbFlush | Uvmf.Local, Uvmf.TlbFlush | Uvmf.All, Uvmf.Invlpg | Uvmf.Local, Uvmf.Invlpg | Uvmf.All, 3, Uvmf.None | Uvmf.All])
                c.UpdateVa(page, page.Entry(Pte.ReadWrite), flags);
            foreach (ScriptBuffer mask in (ScriptBuffer[])[none, first, all])
            {
                c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, page.Entry(Pte.ReadWrite), mask.At + Uvmf.TlbFlush);
                c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, page.Entry(Pte.ReadWrite), mask.At + Uvmf.Invlpg);
            }
        });
        script.Case("a flush shows the new entry", c =>
        {
            ScratchPage[] pages = c.Pages(4);
            ScriptBuffer first = c.Structure("vCPU 0", 8, (0, 8, 1));
            for (int i = 1; i < 4; i++)
                c.Put(pages[i].At, 8, (ulong)i);
            c.Load(pages[0].At);
            c.Hypercall(GuestHypercall.UpdateVaMapping, pages[0].At, pages[1].Entry(Pte.ReadWrite), Uvmf.TlbFlush | Uvmf.Local);
            c.Load(pages[0].At);
            c.Hypercall(GuestHypercall.UpdateVaMapping, pages[0].At, pages[2].Entry(Pte.ReadWrite), Uvmf.Invlpg | Uvmf.All);
            c.Load(pages[0].At);
            c.Hypercall(GuestHypercall.UpdateVaMapping, pages[0].At, pages[3].Entry(Pte.ReadOnly), first.At + Uvmf.Invlpg);
            c.Load(pages[0].At);
            c.Store(pages[0].At, 8, 9);
        });
        script.Case("a vCPU bitmap that cannot be read: the entry has changed", c =>
        {
            ScratchPage page = c.Page();
            Value entry = MemoryCalls.EntryInBootMapping(page.At, 1);
            foreach (ulong bitmap in (ulong[])[8, Bad.Unmapped & ~7UL, Bad.HypervisorStart, Bad.NonCanonical])
            {
                c.UpdateVa(page, page.Entry(Pte.ReadOnly), bitmap | Uvmf.TlbFlush);
                c.ShowFlags(c.Get(entry), "page");
                c.UpdateVa(page, page.Entry(Pte.ReadWrite), bitmap | Uvmf.Invlpg);
                c.ShowFlags(c.Get(entry), "page");
                c.UpdateVa(page, page.Entry(Pte.ReadWrite), bitmap);
            }
        });
        script.Case("a refused entry leaves the old one, and a bad bitmap is not looked at", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            c.UpdateVa(table, table.Entry(Pte.ReadWrite), Bad.NonCanonical | Uvmf.TlbFlush);
            c.Load(table.At);
            c.Store(table.At, 8, 1UL << 60);
        });
        script.Case("a page table is not mapped writable, and is free for it when no longer one", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            c.UpdateVa(table, table.Entry(Pte.ReadWrite));
            c.Unpin(table);
            c.UpdateVa(table, table.Entry(Pte.ReadWrite));
            c.Store(table.At, 8, 1);
            c.Load(table.At);
        });
        script.Case("addresses that cannot be mapped", c =>
        {
            foreach (ulong address in (ulong[])[Bad.NonCanonical, Bad.HypervisorStart, Bad.HypervisorLast & ~0xfffUL, 0x7fff_ffff_f000, 0xffff_8800_0000_0000, Bad.Unmapped])
            {
                c.Hypercall(GuestHypercall.UpdateVaMapping, address, 0, Uvmf.Invlpg);
                c.Hypercall(GuestHypercall.UpdateVaMapping, address, Pte.ReadOnly, Uvmf.Invlpg);
            }
        });
        script.Case("an address in the middle of a page", c =>
        {
            ScratchPage page = c.Page();
            c.Hypercall(GuestHypercall.UpdateVaMapping, page[0x123], page.Entry(Pte.ReadOnly), Uvmf.Invlpg);
            c.Store(page.At, 8, 1);
        });
        script.Case("entries that may not be", c =>
        {
            ScratchPage page = c.Page();
            foreach (ulong flag in (ulong[])[Pte.WriteThrough, Pte.CacheDisable, Pte.LargePage])
                c.UpdateVa(page, page.Entry(Pte.ReadWrite | flag));
            c.UpdateVa(page, ((Value)Bad.Frame << 12) | Pte.ReadOnly);
            c.UpdateVa(page, ((Value)Bad.InvalidFrame << 12) | Pte.ReadOnly);
            c.Store(page.At, 8, 1);
        });
        script.Case("no-execute holds", c =>
        {
            ScratchPage page = c.Page();
            c.Put(page.At, 1, 0xc3);
            c.Kernel("call rax", static a => a.call(Iced.Intel.AssemblerRegisters.rax), with: [(Register64.Rax, page.At)]);
            c.UpdateVa(page, page.Entry(Pte.ReadWrite | Pte.NoExecute));
            c.Kernel("call rax", static a => a.call(Iced.Intel.AssemblerRegisters.rax), with: [(Register64.Rax, page.At)]);
        });
        script.Case("a frame mapped twice, writable and not", c =>
        {
            ScratchPage[] pages = c.Pages(2);
            c.UpdateVa(pages[1], pages[0].Entry(Pte.ReadOnly));
            c.Store(pages[0].At, 8, 5);
            c.Load(pages[1].At);
            c.Store(pages[1].At, 8, 6);
            c.UpdateVa(pages[1], pages[0].Entry(Pte.ReadWrite));
            c.Store(pages[1].At, 8, 7);
            c.Load(pages[0].At);
        });
        script.Case("an L1 that is shared shows the change everywhere", c =>
        {
            ScratchPage page = c.Page();
            ScratchPage other = c.Page("other");
            c.Put(other.At, 8, 0x77);
            AddressWindow window = AddressWindow.Create(c, 3);
            c.One("pin L2", Mmuext.PinL2Table, window.Tables[2].Mfn);
            c.MmuUpdate(MmuRequest.Normal(window.Tables[2], 1, Value.Load(MemoryCalls.EntryInBootMapping(page.At, 2)).Named("l2e(boot)")));
            Value alias = Value.Constant(window.Address(512) + (page.Address & 0x1f_ffff), "alias");
            c.Load(alias);
            c.UpdateVa(page, other.Entry(Pte.ReadWrite), Uvmf.TlbFlush | Uvmf.All);
            c.Load(alias);
            c.Hypercall(GuestHypercall.UpdateVaMapping, alias, page.Entry(Pte.ReadWrite), Uvmf.TlbFlush | Uvmf.All);
            c.Load(page.At);
        });
    });
}
