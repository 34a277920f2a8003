// set_trap_table: installing, extending and replacing entries, their flags, and what is refused.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Processor;

internal static class SetTrapTableScript
{
    /// <summary>Another handler of the probe's, so that its lines tell it from the usual one.</summary>
    private const int Other = 0x82;

    public static AbiScript Create() => new("set-trap-table", "set_trap_table", script =>
    {
        script.Case("an entry is replaced and put back", c =>
        {
            c.MaskUpcalls(false);
            c.Install("replaced", new Trap(Vectors.InvalidOpcode, 0, c.Handler(Other)));
            InvalidOpcode(c);
            c.Install("usual", new Trap(Vectors.InvalidOpcode, 0, c.Handler(Vectors.InvalidOpcode)));
            InvalidOpcode(c);
        });
        script.Case("a handler starts with events masked where its entry says so", c =>
        {
            c.Install("masking", new Trap(Vectors.InvalidOpcode, TrapFlags.MasksEvents, c.Handler(Vectors.InvalidOpcode)));
            InvalidOpcode(c);
            c.MaskUpcalls(true);
            InvalidOpcode(c);
            c.MaskUpcalls(false);
            c.Install("usual", new Trap(Vectors.InvalidOpcode, 0, c.Handler(Vectors.InvalidOpcode)));
            c.MaskUpcalls(true);
            InvalidOpcode(c);
            c.MaskUpcalls(false);
        });
        script.Case("any code selector will do", c =>
        {
            c.Install("selector0", new Trap(Vectors.InvalidOpcode, 0, c.Handler(Vectors.InvalidOpcode), 0));
            InvalidOpcode(c);
            c.Install("selector32", new Trap(Vectors.InvalidOpcode, 0, c.Handler(Vectors.InvalidOpcode), Selectors.FlatRing3Cs32));
            InvalidOpcode(c);
            c.Install("selectorBad", new Trap(Vectors.InvalidOpcode, 0, c.Handler(Vectors.InvalidOpcode), 0x1234));
            InvalidOpcode(c);
        });
        script.Case("flags that nobody knows are ignored", c =>
        {
            c.Install("flags", new Trap(Vectors.InvalidOpcode, 0xf8, c.Handler(Vectors.InvalidOpcode)));
            InvalidOpcode(c);
        });
        script.Case("the privilege level of an exception's entry does not matter", c =>
        {
            c.Install("level3", new Trap(Vectors.InvalidOpcode, TrapFlags.UserMayRaise, c.Handler(Vectors.InvalidOpcode)));
            InvalidOpcode(c);
            c.Install("level0", new Trap(Vectors.InvalidOpcode, 0, c.Handler(Vectors.InvalidOpcode)));
            InvalidOpcode(c);
        });
        script.Case("a table that is empty changes nothing", c =>
        {
            c.Install("empty");
            InvalidOpcode(c);
        });
        script.Case("an entry without an address ends the table", c =>
        {
            c.Install("ended", new Trap(Vectors.Divide, 0, 0), new Trap(Vectors.InvalidOpcode, 0, c.Handler(Other)));
            InvalidOpcode(c);
        });
        script.Case("the last entry for a vector counts", c =>
        {
            c.Install(
                "twice", new Trap(Vectors.InvalidOpcode, 0, c.Handler(Other)),
                new Trap(Vectors.InvalidOpcode, 0, c.Handler(Vectors.InvalidOpcode)));
            InvalidOpcode(c);
        });
        script.Case("a handler at a non-canonical address, after one that is good", c =>
        {
            c.Install(
                "noncanonical", new Trap(Vectors.InvalidOpcode, 0, c.Handler(Other)),
                new Trap(Vectors.Divide, 0, Value.Constant(Addresses.NonCanonical, "noncanonical")),
                new Trap(Vectors.GeneralProtection, 0, c.Handler(Other)));
            InvalidOpcode(c);
            Divide(c);
            c.Kernel("hlt", static a => a.hlt());
            c.Install("usual", new Trap(Vectors.InvalidOpcode, 0, c.Handler(Vectors.InvalidOpcode)));
        });
        script.Case("the last canonical address below the hole, and the first beyond", c =>
        {
            c.Install("lastLow", new Trap(0x50, 0, 0x7fff_ffff_ffff));
            c.Install("firstBeyond", new Trap(0x50, 0, 0x8000_0000_0000));
            c.Install("lastBeyond", new Trap(0x50, 0, 0xffff_7fff_ffff_ffff));
        });
        script.Case("a handler in the hypervisor's range is taken", c =>
            c.Install("hypervisor", new Trap(0x50, 0, Value.Constant(Addresses.Hypervisor, "hypervisor"))));
        script.Case("the highest vector", c => c.Install("highest", new Trap(255, TrapFlags.UserMayRaise, c.Handler(Other))));
        script.Case("tables that cannot be read", c =>
        {
            ScratchPage hole = c.UnmappedPage("hole");
            c.Hypercall(GuestHypercall.SetTrapTable, hole.At);
            c.Hypercall(GuestHypercall.SetTrapTable, Value.Constant(Addresses.NonCanonical, "noncanonical"));
            c.Hypercall(GuestHypercall.SetTrapTable, Value.Constant(Addresses.Hypervisor, "hypervisor"));
            c.Hypercall(GuestHypercall.SetTrapTable, Value.Constant(Addresses.HypervisorLast, "hypervisor's last page"));
            c.Hypercall(GuestHypercall.SetTrapTable, Value.Constant(Addresses.Unmapped, "unmapped"));
            c.Hypercall(GuestHypercall.SetTrapTable, Value.Constant(8, "8"));
        });
        script.Case("a table that goes on into a page that is not there", c =>
        {
            ScratchPage page = c.Page("last");
            _ = c.UnmappedPage("hole");
            c.PutTrap(page[4080], new Trap(Vectors.InvalidOpcode, 0, c.Handler(Other)));
            c.Hypercall(GuestHypercall.SetTrapTable, page[4080]);
            InvalidOpcode(c);
            c.Install("usual", new Trap(Vectors.InvalidOpcode, 0, c.Handler(Vectors.InvalidOpcode)));
        });
        script.Case("an entry that is half in a page that is not there", c =>
        {
            ScratchPage page = c.Page("last");
            _ = c.UnmappedPage("hole");
            c.Put(page[4088], 1, Vectors.InvalidOpcode);
            c.Hypercall(GuestHypercall.SetTrapTable, page[4088]);
            InvalidOpcode(c);
        });
        script.Case("no table at all clears every entry", c =>
        {
            c.Hypercall(GuestHypercall.SetTrapTable, 0);

            // Without an entry the software interrupt is refused, and that needs a handler.
            c.Install("refusal", new Trap(Vectors.GeneralProtection, 0, c.Handler(Vectors.GeneralProtection)));
            c.User("int 0x80", static a => a.@int(0x80));
        });
    });

    /// <summary>What ends a domain: an exception that has no handler.</summary>
    public static AbiScript CreateEnding() => new("exception-without-handler", "set_trap_table", script =>
        script.Case("an exception without a handler ends the domain", c =>
        {
            c.Hypercall(GuestHypercall.SetTrapTable, 0);
            InvalidOpcode(c);
            c.Show(1);
        }));

    private static void InvalidOpcode(AbiCase c) => c.Kernel("ud2", static a => a.ud2());

    private static void Divide(AbiCase c) => c.Kernel("div by 0", static a => a.div(Iced.Intel.AssemblerRegisters.ecx));
}
