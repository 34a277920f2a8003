// Attempts to reach the hypervisor's own range of addresses: through tables, descriptors, pointers, and the machine-to-physical table.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Memory;

internal static class HostileReservedScript
{
    private const int FirstSlot = 256;
    private const int LastSlot = 271;
    private const int FirstEmptySlot = 263;
    private const ulong FlatData = 0x00cf_f200_0000_ffff;

    /// <summary>In the hypervisor's range, behind the machine-to-physical table and all that a guest may read.</summary>
    private const ulong Inside = 0xffff_8600_0000_0000;

    private const ulong SlotSize = 1UL << 39;

    public static AbiScript Create() => new("hostile-reserved", "hostile guest", script =>
    {
        // The table is at its classic address on Xen, and may be in the next slot elsewhere.
        script.Symbols.Add(Bad.HypervisorStart, SlotSize, "m2p");
        script.Symbols.Add(Bad.HypervisorStart + SlotSize, SlotSize, "m2p");
        WriteSlots(script);
        WriteDescriptors(script);
        WriteMachineToPhys(script);
        WritePointers(script);
    });

    private static void WriteSlots(AbiScript script)
    {
        script.Case("the running root's own slots of the hypervisor", c =>
        {
            ScratchPage lower = c.Page("l3");
            ScratchPage alias = c.Page("root's alias");
            c.ReadOnly(lower);
            c.UpdateVa(alias, ((c.Root << 12) | Pte.ReadOnly).Named("root|0x61"));
            foreach (int slot in (int[])[FirstSlot, FirstSlot + 1, FirstSlot + 2, LastSlot])
            {
                c.MmuUpdate(new MmuRequest(AddressWindow.Root(c, slot), lower.Entry(Pte.Table)));
                c.MmuUpdate(new MmuRequest(AddressWindow.Root(c, slot), 0));
                c.MmuUpdate(new MmuRequest((AddressWindow.Root(c, slot) + MmuCommand.PtUpdatePreserveAd).Named($"root[{slot}]|2"), lower.Entry(Pte.Table)));
                c.MmuUpdate(new MmuRequest((AddressWindow.Root(c, slot) + MmuCommand.PtUpdateNoTranslate).Named($"root[{slot}]|3"), lower.Entry(Pte.Table)));
                c.MmuUpdate(new MmuRequest(AddressWindow.Root(c, slot), (c.Get(c.RootAddress + (slot * 8)) | Pte.Table).Named("what is there|0x67")));
                c.Store(alias[slot * 8], 8, 0);
            }

            c.Store(Inside, 8, 0);
        });
        script.Case("a root brings its own entries for the hypervisor's slots", c =>
        {
            ScratchPage root = c.Page("root 2");
            ScratchPage data = c.Page("data");
            AddressWindow window = AddressWindow.Create(c, 80, data.Entry(Pte.ReadWrite));
            c.Put(root[511 * 8], 8, Value.Load(c.RootAddress + (511 * 8)));
            for (int slot = FirstSlot; slot <= LastSlot; slot++)
                c.Put(root[slot * 8], 8, window.L3.Entry(Pte.Table));
            c.ReadOnly(root);
            c.One("new baseptr, root 2", Mmuext.NewBaseptr, root.Mfn);

            // What hypervisors have below is their own business, and shows in the fault's error code.
            for (int slot = FirstEmptySlot; slot <= LastSlot; slot++)
                c.Store(Value.Constant(0xffff_0000_0000_0000 | ((ulong)slot << 39), $"slot {slot}"), 8, 0);
            c.One("new baseptr, root", Mmuext.NewBaseptr, c.Root);
            c.UpdateVa(root, root.Entry(Pte.ReadWrite));
            window.Remove(c);
            c.UpdateVa(window.L3, window.L3.Entry(Pte.ReadWrite));
            c.Load(data.At);
        });
        script.Case("addresses of the hypervisor's as those of an own mapping", c =>
        {
            ScratchPage data = c.Page("data");
            foreach (ulong address in (ulong[])[Bad.HypervisorStart, Inside, Bad.HypervisorLast & ~0xfffUL, 0xffff_8100_0000_0000, Bad.NonCanonical])
            {
                c.Hypercall(GuestHypercall.UpdateVaMapping, address, data.Entry(Pte.ReadWrite), Uvmf.Invlpg);
                c.Hypercall(GuestHypercall.UpdateVaMapping, address, 0, Uvmf.TlbFlush | Uvmf.All);
                c.Hypercall(GuestHypercall.UpdateVaMappingOtherdomain, address, data.Entry(Pte.ReadWrite), Uvmf.Invlpg, Domid.Self);
            }
        });
        script.Case("the tables behind the hypervisor's slots, taken for the guest's own", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage upper = c.PinnedTable(4, "l4");
            ScratchPage page = c.Page("page");
            foreach (int slot in (int[])[FirstSlot, FirstSlot + 4])
            {
                Value entry = c.Keep(c.Get(c.RootAddress + (slot * 8)), $"root[{slot}]");
                Value frame = c.Keep((entry & Pte.Frame) >> 12, $"frame of root[{slot}]");
                c.MmuUpdate(MmuRequest.Normal(table, 0, ((frame << 12) | Pte.ReadOnly).Named($"{frame.Text}|0x61")));
                c.MmuUpdate(MmuRequest.Normal(table, 0, ((frame << 12) | Pte.ReadWrite).Named($"{frame.Text}|0x63")));
                c.MmuUpdate(MmuRequest.Normal(upper, 0, ((frame << 12) | Pte.Table).Named($"{frame.Text}|0x67")));
                c.MmuUpdate(new MmuRequest((frame << 12).Named($"{frame.Text}, entry 0"), page.Entry(Pte.ReadWrite)));
                c.MmuUpdate(new MmuRequest((frame << 12 | MmuCommand.MachphysUpdate).Named($"m2p of {frame.Text}"), 0));
                c.MmuextOp($"pin L3 {frame.Text}", new MmuextRequest(Mmuext.PinL3Table, frame));
                c.MmuextOp($"unpin {frame.Text}", new MmuextRequest(Mmuext.UnpinTable, frame));
                c.MmuextOp($"new baseptr {frame.Text}", new MmuextRequest(Mmuext.NewBaseptr, frame));
                c.MmuextOp($"clear {frame.Text}", new MmuextRequest(Mmuext.ClearPage, frame));
                c.MmuextOp($"copy from {frame.Text}", new MmuextRequest(Mmuext.CopyPage, page.Mfn, frame));
                ScriptBuffer frames = c.Structure("frames", 8, (0, 8, frame));
                c.Hypercall((ulong)GuestHypercall.SetGdt, $"set_gdt({frame.Text}, 512)", AnswerFormat.Result, frames, 512);
                c.Hypercall((ulong)GuestHypercall.UpdateDescriptor, $"update_descriptor({frame.Text}, 0)", AnswerFormat.Result, frame << 12, FlatData);
                ScriptBuffer reservation = c.Structure("reservation", 32, (0, 8, frames), (8, 8, 1), (24, 2, Domid.Self));
                c.MemoryOp($"decrease, {frame.Text}", Xenmem.DecreaseReservation, reservation);
            }
        });
    }

    private static void WriteDescriptors(AbiScript script)
    {
        script.Case("descriptor tables in the hypervisor's range", c =>
        {
            foreach (ulong address in (ulong[])[Bad.HypervisorStart, Inside, 0xffff_8200_0000_0000, Bad.HypervisorLast & ~0xfffUL])
            {
                c.MmuextOp($"set LDT at 0x{address:x}", new MmuextRequest(Mmuext.SetLdt, address, 512));
                c.Hypercall(GuestHypercall.SetGdt, address, 512);
                c.Hypercall(GuestHypercall.UpdateDescriptor, address, FlatData);
            }

            // The last page of the guest's addresses in front of it, with entries that would go on into it.
            c.MmuextOp("set LDT, from the last page in front of the range", new MmuextRequest(Mmuext.SetLdt, 0x0000_7fff_ffff_f000, 1024));
            Load(c, "mov ds, ax", 0xf, static a => a.mov(ds, ax));
            Load(c, "mov ds, ax", 0x100f, static a => a.mov(ds, ax));
            c.MmuextOp("no LDT", new MmuextRequest(Mmuext.SetLdt, 0, 0));
        });
        script.Case("LGDT, LIDT, LLDT and LTR are the hypervisor's", c =>
        {
            ScriptBuffer pointer = c.Structure("pointer", 16, (0, 2, 0xfff), (2, 8, Inside));
            Run(c, "lgdt [rdi]", static a => a.lgdt(__[rdi]), pointer);
            Run(c, "lidt [rdi]", static a => a.lidt(__[rdi]), pointer);
            Load(c, "lldt ax", 0xe040, static a => a.lldt(ax));
            Load(c, "ltr ax", 0xe040, static a => a.ltr(ax));
        });
        script.Case("a frame of descriptors is written behind the hypervisor's back", c =>
        {
            ScratchPage page = c.Page("gdt");
            c.Put(page[8], 8, FlatData);
            c.ReadOnly(page);
            AddressWindow window = AddressWindow.Create(c, 81, page.Entry(Pte.ReadOnly));
            ScriptBuffer frames = c.Structure("frames", 8, (0, 8, page.Mfn));
            c.Hypercall((ulong)GuestHypercall.SetGdt, "set_gdt(gdt, 512)", AnswerFormat.Result, frames, 512);
            c.MmuUpdate(MmuRequest.Normal(window.L1, 0, page.Entry(Pte.ReadWrite)));
            c.MmuUpdate(MmuRequest.With(MmuCommand.PtUpdateNoTranslate, page, 1, 0x0000_8900_0000_0067));
            c.Store(window.At(0) + 8, 8, 0x0000_8900_0000_0067);
            c.Store(page[8], 1, 0);
            c.MmuextOp("copy onto it", new MmuextRequest(Mmuext.CopyPage, page.Mfn, window.L1.Mfn));
            c.Load(page[8]);
            c.Hypercall(GuestHypercall.SetGdt, 0, 0);
            window.Remove(c);
        });
    }

    private static void WriteMachineToPhys(AbiScript script)
    {
        script.Case("entries of the machine-to-physical table that are not the guest's to set", c =>
        {
            ScratchPage page = c.Page("page");
            foreach (ulong frame in (ulong[])[0, 1, Bad.Frame, Bad.InvalidFrame])
                c.MmuUpdate(new MmuRequest((frame << 12) | MmuCommand.MachphysUpdate, 0x1234));
            c.MmuUpdateOf(Domid.Io, MmuRequest.Machphys(page, 0x1234));
            c.MmuUpdateOf(Domid.Xen, MmuRequest.Machphys(page, 0x1234));
            c.Show((c.Get(EntryOf(c, page.Mfn)) - page.Pfn).Named("m2p[page], from its pfn"));
        });
        script.Case("what the guest says a frame's number is decides nothing", c =>
        {
            ScratchPage page = c.Page("page");
            ScratchPage table = c.PinnedTable(1, "l1");
            foreach (Value pfn in (Value[])[0, ~0UL, 1UL << 63, table.Pfn])
            {
                c.MmuUpdate(MmuRequest.Machphys(page, pfn));
                c.Show((c.Get(EntryOf(c, page.Mfn)) - pfn).Named("m2p[page], from what was set"));
                c.MmuUpdate(MmuRequest.Normal(table, 0, page.Entry(Pte.ReadWrite)));
                c.MmuUpdate(MmuRequest.Normal(table, 1, table.Entry(Pte.ReadWrite)));
                c.MmuUpdate(MmuRequest.Normal(table, 0, 0));
            }

            c.MmuUpdate(MmuRequest.Machphys(table, page.Pfn));
            c.UpdateVa(table, table.Entry(Pte.ReadWrite));
            c.MmuUpdate(MmuRequest.Machphys(table, table.Pfn), MmuRequest.Machphys(page, page.Pfn));
        });
        script.Case("hypercalls that answer into the machine-to-physical table", c =>
        {
            ScratchPage page = c.Page("page");
            Value target = c.Keep(EntryOf(c, page.Mfn), "address of m2p[page]").Named("&m2p[page]");
            WriteInto(c, target);
            c.Show((c.Get(target) - page.Pfn).Named("m2p[page], from its pfn"));
        });
        script.Case("the table in a window of the guest's own", c =>
        {
            ScratchPage table = c.PinnedTable(4, "l4");
            Value slot = c.Keep((c.MachineToPhys >> 39) & 511, "slot of the m2p");
            Value entry = c.Keep(Value.Load(c.RootAddress + (c.Keep((c.MachineToPhys >> 36) & 0xff8, "offset"))), "root[m2p]");
            c.MmuUpdate(MmuRequest.Normal(table, 0, entry.Named("what the m2p's slot has")));
            c.MmuUpdate(new MmuRequest(AddressWindow.Root(c, 82), (entry | Pte.Table).Named("what the m2p's slot has|0x67")));
            c.MmuUpdate(new MmuRequest(((c.Root << 12) + (slot << 3)).Named("root[m2p]"), (entry | Pte.Table).Named("what the m2p's slot has|0x67")));
            c.Store(c.MachineToPhys, 8, 0);
        });
    }

    private static void WritePointers(AbiScript script)
    {
        script.Case("hypercalls that answer into the hypervisor's range", c => WriteInto(c, Inside));
        script.Case("hypercalls that answer across its start", c => WriteInto(c, Bad.NonCanonical | 0x0000_7fff_ffff_fffcUL));
        script.Case("lists that begin in front of the hypervisor's range, or wrap around", c =>
        {
            foreach (ulong address in (ulong[])[0xffff_7fff_ffff_fff8, 0x0000_7fff_ffff_fff8, 0xffff_ffff_ffff_fff0, Bad.HypervisorLast & ~7UL])
            {
                foreach (ulong count in (ulong[])[1, 2, 0x7fff_ffff])
                {
                    c.Hypercall(GuestHypercall.MmuUpdate, address, count, 0, Domid.Self);
                    c.Hypercall(GuestHypercall.MmuextOp, address, count, 0, Domid.Self);
                    c.Hypercall(GuestHypercall.Multicall, address, count);
                }

                c.Hypercall(GuestHypercall.SetGdt, address, 7168);
            }
        });
        script.Case("an exchange says what it did where it may not (XSA-212)", c =>
        {
            ScratchPage page = c.Page("page");
            ScratchPage readOnly = c.Page("read-only");
            c.UpdateVa(page, 0);
            c.ReadOnly(readOnly);
            ScriptBuffer given = c.Structure("given", 8, (0, 8, page.Mfn));
            foreach (Value address in (Value[])[Inside, Bad.HypervisorStart, (c.MachineToPhys + 8).Named("m2p+8"), Bad.NonCanonical])
            {
                foreach (ulong done in (ulong[])[0, 1, ~0UL >> 4, ~0UL])
                {
                    ScriptBuffer exchange = c.Structure("exchange", 72,
                        (0, 8, given), (8, 8, 1), (24, 2, Domid.Self), (32, 8, address), (40, 8, 1), (56, 2, Domid.Self), (64, 8, done));
                    c.MemoryOp($"exchange, taken at {address.Text}, {(done > 1 ? $"0x{done:x}" : done)} done", Xenmem.Exchange, exchange);
                }
            }

            // The count of what was done leads to the pointer only where it is no more than there is.
            ScriptBuffer far = c.Structure("exchange", 72,
                (0, 8, given), (8, 8, ~0UL >> 1), (24, 2, Domid.Self), (32, 8, Inside - (0x1000UL << 3)), (40, 8, ~0UL >> 1), (56, 2, Domid.Self), (64, 8, 0x1000));
            c.MemoryOp("exchange, continued at the hypervisor's range", Xenmem.Exchange, far);
            c.Load(given.At, 8, AnswerFormat.Sign);
        });
        script.Case("trap handlers, callbacks and stacks in the hypervisor's range", c =>
        {
            ScriptBuffer table = c.Structure("table", 32, (0, 1, 6), (2, 2, 0xe033), (8, 8, Inside));
            c.Hypercall(GuestHypercall.SetTrapTable, table.At);
            c.Kernel("ud2", static a => a.ud2());
            c.Kernel("jmp rax", static a => a.jmp(rax), null, [(Register64.Rax, Inside)]);
        });
    }

    /// <summary>Every call of the memory area that writes, told to write there.</summary>
    private static void WriteInto(AbiCase c, Value target)
    {
        ScratchPage page = c.Page("given");
        ScriptBuffer operation = c.Operations("operations", new MmuextRequest(Mmuext.TlbFlushLocal));
        ScriptBuffer requests = c.Requests("requests", MmuRequest.Machphys(page, page.Pfn));
        c.Hypercall(GuestHypercall.MmuextOp, operation, 1, target, Domid.Self);
        c.Hypercall(GuestHypercall.MmuUpdate, requests, 1, target, Domid.Self);
        foreach ((string name, ulong command) in (ReadOnlySpan<(string, ulong)>)
            [
                ("memory map", Xenmem.MemoryMap), ("m2p mapping", Xenmem.MachphysMapping), ("m2p frames", Xenmem.MachphysMfnList), ("increase", Xenmem.IncreaseReservation),
                ("exchange", Xenmem.Exchange), ("virtual NUMA", Xenmem.GetVnumainfo),
            ])
        {
            c.MemoryOp($"{name}, {target.Text}", command, target);
        }

        ScriptBuffer map = c.Structure("map", 16, (0, 4, 4), (8, 8, target));
        c.MemoryOp($"memory map, entries to {target.Text}", Xenmem.MemoryMap, map);
        c.UpdateVa(page, 0);
        ScriptBuffer extents = c.Structure("extents", 8, (0, 8, page.Mfn));
        ScriptBuffer reservation = c.Structure("reservation", 32, (0, 8, extents), (8, 8, 1), (24, 2, Domid.Self));
        c.MemoryOp("decrease, given", Xenmem.DecreaseReservation, reservation);
        ScriptBuffer taken = c.Structure("reservation", 32, (0, 8, target), (8, 8, 1), (24, 2, Domid.Self));
        c.MemoryOp($"increase, extents to {target.Text}", Xenmem.IncreaseReservation, taken);
        c.Hypercall(GuestHypercall.XenVersion, 1, target);
        ScriptBuffer list = c.Structure("list", 64, (0, 8, (ulong)GuestHypercall.XenVersion));
        c.Hypercall(GuestHypercall.Multicall, list, 1);
        c.Hypercall(GuestHypercall.Multicall, target, 1);
    }

    private static Value EntryOf(AbiCase c, Value frame) => c.MachineToPhys + (frame << 3);

    private static void Load(AbiCase c, string text, ulong selector, Action<Assembler> emit) => c.Kernel(text, emit, null, [(Register64.Rax, selector)]);

    private static void Run(AbiCase c, string text, Action<Assembler> emit, Value address) => c.Kernel(text, emit, null, [(Register64.Rdi, address)]);
}
