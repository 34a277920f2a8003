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
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, page.Entry(0x61), 2);
            c.Store(page.At, 8, 1);
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, page.Entry(0x63), 2);
            c.Store(page.At, 8, 1);
            c.Load(page.At);
        });
        script.Case("an address beyond the canonical ones", c =>
            c.Hypercall(GuestHypercall.UpdateVaMapping, Value.Constant(0x8000_0000_0000_0000, "noncanonical"), 0, 0));
    });
}
