// mmu_update and update_va_mapping_otherdomain: whose frames and whose tables are named.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Memory;

internal static class MmuUpdateDomainsScript
{
    private const int TableDomainShift = 16;

    public static AbiScript Create() => new("mmu-update-domains", "mmu_update", script =>
    {
        script.Case("frames of a domain that there is none of", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            foreach (ulong domain in (ulong[])[Domid.Absent, Domid.Invalid, Domid.Idle, 0xffff])
                c.MmuUpdateOf(domain, MmuRequest.Normal(table, 0, 0));
        });
        script.Case("frames of no domain, and no requests", c => c.MmuUpdateOf(Domid.Absent));
        script.Case("DOMID_IO: an entry goes, but no memory comes", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page();
            c.MmuUpdate(MmuRequest.Normal(table, 0, data.Entry(Pte.ReadOnly)));
            c.MmuUpdateOf(Domid.Io, MmuRequest.Normal(table, 1, data.Entry(Pte.ReadOnly)));
            c.MmuUpdateOf(Domid.Io, MmuRequest.Normal(table, 0, data.Entry(Pte.ReadOnly | Pte.NoExecute)));
            c.ShowEntry(table, 0);
            c.MmuUpdateOf(Domid.Io, MmuRequest.Normal(table, 0, 0));
            c.Load(table.At);
        });
        script.Case("DOMID_IO: frames that are no memory, for a domain without devices", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            c.MmuUpdateOf(Domid.Io, MmuRequest.Normal(table, 0, (((Value)Bad.Frame << 12) | Pte.ReadOnly).Named("beyond memory")));
        });
        script.Case("DOMID_IO: not for upper tables nor the M2P", c =>
        {
            ScratchPage upper = c.PinnedTable(2, "l2");
            ScratchPage data = c.Page();
            c.MmuUpdateOf(Domid.Io, MmuRequest.Normal(upper, 0, 0));
            c.MmuUpdateOf(Domid.Io, MmuRequest.Machphys(data, 1));
            c.MmuUpdateOf(Domid.Io, MmuRequest.Normal(data, 0, 5));
            c.Load(data.At);
        });
        script.Case("DOMID_XEN and DOMID_COW", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            c.MmuUpdateOf(Domid.Xen, MmuRequest.Normal(table, 0, 0));
            c.MmuUpdateOf(Domid.Cow, MmuRequest.Normal(table, 0, 0));
        });
        script.Case("page tables of a domain that there is none of", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            c.MmuUpdateOf(Domid.Self | ((Domid.Absent + 1) << TableDomainShift), MmuRequest.Normal(table, 0, 0));
            c.MmuUpdateOf(Domid.Self | ((Domid.Self + 1) << TableDomainShift), MmuRequest.Normal(table, 0, 0));
            c.MmuUpdateOf(Domid.Self | ((Domid.Io + 1) << TableDomainShift), MmuRequest.Normal(table, 0, 0));
            c.MmuUpdateOf(Domid.Absent | ((Domid.Absent + 1) << TableDomainShift), MmuRequest.Normal(table, 0, 0));
        });
        script.Case("update_va_mapping_otherdomain with DOMID_SELF", c =>
        {
            ScratchPage page = c.Page();
            c.Hypercall(GuestHypercall.UpdateVaMappingOtherdomain, page.At, page.Entry(Pte.ReadOnly), Uvmf.Invlpg, Domid.Self);
            c.Store(page.At, 8, 1);
        });
        script.Case("update_va_mapping_otherdomain with DOMID_IO", c =>
        {
            ScratchPage page = c.Page();
            c.Hypercall(GuestHypercall.UpdateVaMappingOtherdomain, page.At, page.Entry(Pte.ReadOnly), Uvmf.Invlpg, Domid.Io);
            c.Hypercall(GuestHypercall.UpdateVaMappingOtherdomain, page.At, 0, Uvmf.Invlpg, Domid.Io);
            c.Load(page.At);
        });
        script.Case("update_va_mapping_otherdomain with no domain", c =>
        {
            ScratchPage page = c.Page();
            foreach (ulong domain in (ulong[])[Domid.Absent, Domid.Xen, Domid.Cow, Domid.Invalid, Domid.Idle])
                c.Hypercall(GuestHypercall.UpdateVaMappingOtherdomain, page.At, 0, Uvmf.Invlpg, domain);
            c.Hypercall(GuestHypercall.UpdateVaMappingOtherdomain, Bad.NonCanonical, 0, 0, Domid.Absent);
            c.Load(page.At);
        });
    });
}
