// memory_op: the domain's size, its map, and what is refused; the changes of its frames have scripts of their own.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Memory;

internal static class MemoryOpScript
{
    public static AbiScript Create() => new("memory-op", "memory_op", script =>
    {
        WriteSizes(script);
        WriteTables(script);
        WritePhysmap(script);
        WriteOthers(script);
    });

    private static void WriteSizes(AbiScript script)
    {
        (string Name, ulong Command)[] commands =
            [("current reservation", Xenmem.CurrentReservation), ("maximum reservation", Xenmem.MaximumReservation), ("maximum gpfn", Xenmem.MaximumGpfn)];
        script.Case("sizes of the own domain", c =>
        {
            ScriptBuffer self = c.Structure("domid", 8, (0, 2, Domid.Self));
            Value current = c.MemoryOp("current reservation", Xenmem.CurrentReservation, self, AnswerFormat.Sign);
            Value kept = c.Keep(current, "current");
            Value maximum = c.MemoryOp("maximum reservation", Xenmem.MaximumReservation, self, AnswerFormat.Sign);
            c.Show(((maximum - kept) >> 63).Named("maximum below current"));
            c.MemoryOp("maximum gpfn", Xenmem.MaximumGpfn, self);
            Value ram = c.MemoryOp("maximum ram page", Xenmem.MaximumRamPage, 0, AnswerFormat.Sign);
            c.Show(((ram - c.Root - 1) >> 63).Named("maximum ram page at or below the root's frame"));
            c.MemoryOp("maximum ram page, with any argument", Xenmem.MaximumRamPage, Bad.NonCanonical, AnswerFormat.Sign);
        });
        script.Case("sizes of other domains", c =>
        {
            foreach ((string name, ulong command) in commands)
            {
                foreach (ulong domain in (ulong[])[Domid.Absent, Domid.Io, Domid.Xen, Domid.Invalid])
                {
                    ScriptBuffer other = c.Structure("domid", 8, (0, 2, domain));
                    c.MemoryOp($"{name}, domain 0x{domain:x}", command, other);
                }
            }
        });
        script.Case("sizes, with a domid that cannot be read", c =>
        {
            foreach ((string name, ulong command) in commands)
            {
                foreach (ulong address in (ulong[])[0, Bad.Unmapped, Bad.HypervisorStart, Bad.NonCanonical])
                    c.MemoryOp($"{name}, domid at 0x{address:x}", command, address);
            }
        });
        script.Case("sizes are never continued", c =>
        {
            ScriptBuffer self = c.Structure("domid", 8, (0, 2, Domid.Self));
            foreach ((string name, ulong command) in commands)
                c.MemoryOp($"{name}, continued", command | (1UL << Xenmem.ExtentShift), self);
            c.MemoryOp("maximum ram page, continued", Xenmem.MaximumRamPage | (1UL << 40), self);
        });
    }

    private static void WriteTables(AbiScript script)
    {
        script.Case("the machine-to-physical table", c =>
        {
            ScriptBuffer mapping = c.Structure("mapping", 24, (0, 8, ~0UL), (8, 8, ~0UL), (16, 8, ~0UL));
            c.MemoryOp("machphys mapping", Xenmem.MachphysMapping, mapping);
            Value start = Value.Load(mapping[0]);
            Value end = Value.Load(mapping[8]);
            Value last = Value.Load(mapping[16]);
            c.Show((start - c.MachineToPhys).Named("start, from where the probe has it"));
            c.Show((((end - start) - ((last + 1) << 3)) >> 63).Named("too short for its last frame"));
            c.Show(((last - c.Root) >> 63).Named("last frame below the root's"));
        });
        script.Case("the machine-to-physical table, told to places that cannot be written", c =>
        {
            ScratchPage page = c.Page();
            c.ReadOnly(page);
            foreach (Value address in (Value[])[0, Bad.Unmapped, Bad.HypervisorStart, Bad.NonCanonical, page.At, page[4080]])
                c.MemoryOp($"machphys mapping at {address.Text}", Xenmem.MachphysMapping, address);
            ScriptBuffer mapping = c.Buffer("mapping", 24);
            c.MemoryOp("machphys mapping, continued", Xenmem.MachphysMapping | (1UL << Xenmem.ExtentShift), mapping);
        });
        script.Case("the frames of the machine-to-physical table", c =>
        {
            ScriptBuffer frames = c.Structure("frames", 64, (0, 8, 0xdeadUL), (8, 8, 0xdeadUL));
            ScriptBuffer list = c.Structure("list", 24, (0, 4, 1), (8, 8, frames.At), (16, 4, 77));
            c.MemoryOp("machphys mfn list, 1", Xenmem.MachphysMfnList, list);
            c.Load(list[16], 4);
            c.Load(frames.At, 8, AnswerFormat.Sign);
            c.Load(frames[8]);
            c.Put(list, 4, 0);
            c.MemoryOp("machphys mfn list, 0", Xenmem.MachphysMfnList, list);
            c.Load(list[16], 4);
            c.Put(list, 4, 1);
            c.Put(list[8], 8, Bad.Unmapped);
            c.MemoryOp("machphys mfn list, to nowhere", Xenmem.MachphysMfnList, list);
            c.MemoryOp("machphys mfn list, from nowhere", Xenmem.MachphysMfnList, Bad.Unmapped);
            c.MemoryOp("machphys mfn list, continued", Xenmem.MachphysMfnList | (1UL << Xenmem.ExtentShift), list);
        });
        script.Case("the frames of the machine-to-physical table, into the last room of a page and beyond it", c =>
        {
            // One: how many more there are is a matter of the machine's memory.
            ScratchPage[] pages = c.Pages(2);
            c.UpdateVa(pages[1], 0);
            ScriptBuffer list = c.Structure("list", 24, (0, 4, 1), (8, 8, pages[0][4092]), (16, 4, 77));
            c.MemoryOp("machphys mfn list, 1, half of it beyond the page", Xenmem.MachphysMfnList, list);
            c.Load(list[16], 4);
            c.Put(list[8], 8, pages[0][4088]);
            c.MemoryOp("machphys mfn list, 1", Xenmem.MachphysMfnList, list);
            c.Load(list[16], 4);
            c.Load(pages[0][4088], 8, AnswerFormat.Sign);
        });
        script.Case("the frames of the machine-to-physical table are not for an unprivileged domain to map", c =>
        {
            ScriptBuffer frames = c.Buffer("frames", 8);
            ScriptBuffer list = c.Structure("list", 24, (0, 4, 1), (8, 8, frames.At));
            c.MemoryOp("machphys mfn list, 1", Xenmem.MachphysMfnList, list);
            Value frame = c.Keep(Value.Load(frames.At), "m2p frame");
            ScratchPage page = c.Page("page");
            ScratchPage table = c.PinnedTable(1, "l1");
            c.UpdateVa(page, ((frame << 12) | Pte.ReadOnly).Named("m2p frame|0x61"));
            c.UpdateVa(page, ((frame << 12) | Pte.ReadWrite).Named("m2p frame|0x63"));
            c.MmuUpdate(MmuRequest.Normal(table, 0, ((frame << 12) | Pte.ReadOnly).Named("m2p frame|0x61")));
            c.MmuUpdateOf(Domid.Xen, MmuRequest.Normal(table, 0, ((frame << 12) | Pte.ReadOnly).Named("m2p frame|0x61")));
            c.MmuUpdateOf(Domid.Io, MmuRequest.Normal(table, 0, ((frame << 12) | Pte.ReadOnly).Named("m2p frame|0x61")));
            c.MmuUpdate(new MmuRequest((frame << 12).Named("m2p frame"), 0));
            c.MmuUpdate(new MmuRequest(((frame << 12) | MmuCommand.MachphysUpdate).Named("m2p of the m2p frame"), 1));
            c.One("pin L1 m2p frame", Mmuext.PinL1Table, frame);
            c.One("copy page from the m2p frame", Mmuext.CopyPage, page.Mfn, frame);
            c.One("clear page m2p frame", Mmuext.ClearPage, frame);
        });
        script.Case("the machine-to-physical table of 32-bit guests", c =>
        {
            ScriptBuffer frames = c.Buffer("frames", 8);
            ScriptBuffer list = c.Structure("list", 24, (0, 4, 1), (8, 8, frames.At));
            c.MemoryOp("machphys compat mfn list, 1", Xenmem.MachphysCompatMfnList, list);
            c.MemoryOp("machphys compat mfn list, from nowhere", Xenmem.MachphysCompatMfnList, Bad.Unmapped);
            c.MemoryOp("machphys compat mfn list, continued", Xenmem.MachphysCompatMfnList | (1UL << Xenmem.ExtentShift), list);
        });
        script.Case("the memory map: entries that fit, and their room", c =>
        {
            ScriptBuffer entries = c.Structure("entries", 64, (0, 8, 0xdeadUL), (8, 8, 0xdeadUL), (16, 8, 0xdeadUL), (24, 8, 0xdeadUL));
            ScriptBuffer map = c.Structure("map", 16, (0, 4, 3), (8, 8, entries.At));
            c.MemoryOp("memory map", Xenmem.MemoryMap, map);
            c.Load(map.At, 4);
            c.Load(entries.At);
            c.Load(entries[16], 4);
            c.Load(entries[20], 4);
            c.Put(map.At, 4, 0);
            c.MemoryOp("memory map, no room", Xenmem.MemoryMap, map);
            c.Load(map.At, 4);
        });
        script.Case("the memory map, and places that cannot be used", c =>
        {
            ScratchPage page = c.Page();
            c.Put(page.At, 4, 1);
            c.Put(page[8], 8, page[64]);
            c.ReadOnly(page);
            foreach (Value address in (Value[])[0, Bad.Unmapped, Bad.HypervisorStart, Bad.NonCanonical, page.At])
            {
                c.MemoryOp($"memory map at {address.Text}", Xenmem.MemoryMap, address);
                ScriptBuffer map = c.Structure("map", 16, (0, 4, 1), (8, 8, address));
                c.MemoryOp($"memory map, entries at {address.Text}", Xenmem.MemoryMap, map);
            }
        });
        script.Case("the domain sets its memory map, and reads it", c =>
        {
            ScriptBuffer entries = c.Structure("entries", 40, (0, 8, 0x1000), (8, 8, 0x2000), (16, 4, 1), (20, 4, 0x5000), (28, 4, 0x1000), (36, 4, 2));
            ScriptBuffer set = c.Structure("set", 24, (0, 2, Domid.Self), (8, 4, 2), (16, 8, entries.At));
            c.MemoryOp("set memory map, 2 entries", Xenmem.SetMemoryMap, set);
            ScriptBuffer room = c.Buffer("room", 64);
            ScriptBuffer map = c.Structure("map", 16, (0, 4, 3), (8, 8, room.At));
            c.MemoryOp("memory map", Xenmem.MemoryMap, map);
            c.Load(map.At, 4);
            for (int i = 0; i < 40; i += 8)
                c.Load(room[i]);
        });
        script.Case("memory maps that cannot be set", c =>
        {
            ScriptBuffer entries = c.Buffer("entries", 40);
            foreach ((string text, ulong domain, ulong count, Value address) in (ReadOnlySpan<(string, ulong, ulong, Value)>)
                [
                    ("1025 entries", Domid.Self, 1025, entries.At), ("no such domain", Domid.Absent, 1, entries.At),
                    ("from nowhere", Domid.Self, 1, Bad.Unmapped), ("from the hypervisor", Domid.Self, 1, Bad.HypervisorStart),
                ])
            {
                ScriptBuffer set = c.Structure("set", 24, (0, 2, domain), (8, 4, count), (16, 8, address));
                c.MemoryOp($"set memory map, {text}", Xenmem.SetMemoryMap, set);
            }

            c.MemoryOp("set memory map, at nowhere", Xenmem.SetMemoryMap, Bad.Unmapped);
        });
        script.Case("the machine's memory map", c =>
        {
            ScriptBuffer map = c.Structure("map", 16, (0, 4, 0), (8, 8, Bad.Unmapped));
            c.MemoryOp("machine memory map", Xenmem.MachineMemoryMap, map);
            c.MemoryOp("machine memory map, at nowhere", Xenmem.MachineMemoryMap, Bad.Unmapped);
        });
    }

    private static void WritePhysmap(AbiScript script)
    {
        script.Case("nothing is added to the physmap of a PV domain", c =>
        {
            ScratchPage page = c.Page();
            for (ulong space = 0; space <= 6; space++)
            {
                ScriptBuffer add = c.Structure("add", 24, (0, 2, Domid.Self), (2, 2, 1), (4, 4, space), (8, 8, 0), (16, 8, page.Pfn));
                c.MemoryOp($"add to physmap, space {space}", Xenmem.AddToPhysmap, add);
            }

            ScriptBuffer absent = c.Structure("add", 24, (0, 2, Domid.Absent));
            c.MemoryOp("add to physmap, no such domain", Xenmem.AddToPhysmap, absent);
            c.MemoryOp("add to physmap, at nowhere", Xenmem.AddToPhysmap, Bad.Unmapped);
            c.MemoryOp("add to physmap, continued from 1", Xenmem.AddToPhysmap | (1UL << Xenmem.ExtentShift), absent);
            c.MemoryOp("add to physmap, continued from 65536", Xenmem.AddToPhysmap | (65536UL << Xenmem.ExtentShift), absent);
        });
        script.Case("nor in batches", c =>
        {
            for (ulong space = 0; space <= 6; space++)
            {
                ScriptBuffer add = c.Structure("batch", 32, (0, 2, Domid.Self), (2, 2, space), (4, 2, 1));
                c.MemoryOp($"add to physmap, batch, space {space}", Xenmem.AddToPhysmapBatch, add);
            }

            ScriptBuffer absent = c.Structure("batch", 32, (0, 2, Domid.Absent));
            c.MemoryOp("add to physmap, batch, no such domain", Xenmem.AddToPhysmapBatch, absent);
            c.MemoryOp("add to physmap, batch, at nowhere", Xenmem.AddToPhysmapBatch, Bad.Unmapped);
            c.MemoryOp("add to physmap, batch, continued from 65536", Xenmem.AddToPhysmapBatch | (65536UL << Xenmem.ExtentShift), absent);
        });
        script.Case("nor is anything removed", c =>
        {
            ScratchPage page = c.Page();
            foreach (ulong domain in (ulong[])[Domid.Self, Domid.Absent])
            {
                ScriptBuffer remove = c.Structure("remove", 16, (0, 2, domain), (8, 8, page.Pfn));
                c.MemoryOp($"remove from physmap, domain 0x{domain:x}", Xenmem.RemoveFromPhysmap, remove);
                c.MemoryOp("remove from physmap, continued", Xenmem.RemoveFromPhysmap | (1UL << Xenmem.ExtentShift), remove);
            }

            c.MemoryOp("remove from physmap, at nowhere", Xenmem.RemoveFromPhysmap, Bad.Unmapped);
        });
    }

    private static void WriteOthers(AbiScript script)
    {
        script.Case("claims", c =>
        {
            foreach ((string text, ulong start, ulong order, ulong flags, ulong domain) in (ReadOnlySpan<(string, ulong, ulong, ulong, ulong)>)
                [
                    ("of DOMID_SELF", 0, 0, 0, Domid.Self), ("with extents", 1, 0, 0, 0), ("with an order", 0, 1, 0, 0), ("with flags", 0, 0, 1, 0),
                    ("of no domain", 0, 0, 0, Domid.Absent), ("of domain 0", 0, 0, 0, 0),
                ])
            {
                ScriptBuffer claim = c.Structure("claim", 32, (0, 8, start), (16, 4, order), (20, 4, flags), (24, 2, domain));
                c.MemoryOp($"claim, {text}", Xenmem.ClaimPages, claim);
            }

            c.MemoryOp("claim, at nowhere", Xenmem.ClaimPages, Bad.Unmapped);
            c.MemoryOp("claim, continued", Xenmem.ClaimPages | (1UL << Xenmem.ExtentShift), Bad.Unmapped);
        });
        script.Case("virtual NUMA nodes, of which there are none", c =>
        {
            foreach ((string text, ulong domain, ulong padding) in (ReadOnlySpan<(string, ulong, ulong)>)
                [("own", Domid.Self, 0), ("with padding", Domid.Self, 1), ("of no domain", Domid.Absent, 0)])
            {
                ScriptBuffer topology = c.Structure("topology", 40, (0, 2, domain), (2, 2, padding));
                c.MemoryOp($"vnuma info, {text}", Xenmem.GetVnumainfo, topology);
            }

            ScratchPage[] pages = c.Pages(2);
            c.Put(pages[0][4056], 2, Domid.Self);
            c.UpdateVa(pages[1], 0);
            c.MemoryOp("vnuma info, at the end of its page", Xenmem.GetVnumainfo, pages[0][4056]);
            c.MemoryOp("vnuma info, at nowhere", Xenmem.GetVnumainfo, Bad.Unmapped);
            c.MemoryOp("vnuma info, continued", Xenmem.GetVnumainfo | (1UL << Xenmem.ExtentShift), pages[0].At);
        });
        script.Case("memory reserved for devices, of which there is none", c =>
        {
            foreach ((string text, ulong flags, ulong count, ulong buffer) in (ReadOnlySpan<(string, ulong, ulong, ulong)>)
                [("all", 1, 4, 0), ("one device's", 0, 4, 0), ("unknown flags", 2, 4, 0), ("no room", 1, 0, 0), ("to the hypervisor", 1, 4, Bad.HypervisorStart)])
            {
                ScriptBuffer map = c.Structure("map", 24, (0, 4, flags), (4, 4, count), (8, 8, buffer));
                c.MemoryOp($"reserved device memory, {text}", Xenmem.ReservedDeviceMemoryMap, map);
                c.Load(map[4], 4);
            }

            ScratchPage page = c.Page();
            c.Put(page.At, 4, 1);
            c.ReadOnly(page);
            c.MemoryOp("reserved device memory, read-only", Xenmem.ReservedDeviceMemoryMap, page.At);
            c.MemoryOp("reserved device memory, at nowhere", Xenmem.ReservedDeviceMemoryMap, Bad.Unmapped);
            c.MemoryOp("reserved device memory, continued", Xenmem.ReservedDeviceMemoryMap | (1UL << Xenmem.ExtentShift), page.At);
        });
        script.Case("populate-on-demand targets are for other domains", c =>
        {
            foreach (ulong domain in (ulong[])[Domid.Self, Domid.Absent])
            {
                ScriptBuffer target = c.Structure("target", 40, (32, 2, domain));
                c.MemoryOp($"set pod target, domain 0x{domain:x}", Xenmem.SetPodTarget, target);
                c.MemoryOp($"get pod target, domain 0x{domain:x}", Xenmem.GetPodTarget, target);
            }

            c.MemoryOp("set pod target, at nowhere", Xenmem.SetPodTarget, Bad.Unmapped);
            c.MemoryOp("get pod target, continued", Xenmem.GetPodTarget | (1UL << Xenmem.ExtentShift), Bad.Unmapped);
        });
        script.Case("sharing, paging, access", c =>
        {
            c.MemoryOp("sharing, freed pages", Xenmem.GetSharingFreedPages, 0);
            c.MemoryOp("sharing, shared pages", Xenmem.GetSharingSharedPages, 0);
            c.MemoryOp("sharing, freed pages, continued", Xenmem.GetSharingFreedPages | (1UL << Xenmem.ExtentShift), 0);
            foreach (ulong domain in (ulong[])[Domid.Self, Domid.Absent])
            {
                ScriptBuffer argument = c.Structure("argument", 64, (2, 2, domain), (0, 2, 0));
                c.MemoryOp($"paging, domain 0x{domain:x}", Xenmem.PagingOp, argument);
                c.MemoryOp($"sharing, domain 0x{domain:x}", Xenmem.SharingOp, argument);
                c.MemoryOp($"access, domain 0x{domain:x}", Xenmem.AccessOp, argument);
            }

            c.MemoryOp("access, at nowhere", Xenmem.AccessOp, Bad.Unmapped);
        });
        script.Case("resources of other domains", c =>
        {
            foreach ((string text, ulong domain, ulong padding, ulong frame) in (ReadOnlySpan<(string, ulong, ulong, ulong)>)
                [("own", Domid.Self, 0, 0), ("no domain", Domid.Absent, 0, 0), ("padding", Domid.Self, 1, 0), ("a frame beyond", Domid.Self, 0, 1UL << 32)])
            {
                ScriptBuffer resource = c.Structure("resource", 32, (0, 2, domain), (12, 4, padding), (16, 8, frame));
                c.MemoryOp($"acquire resource, {text}", Xenmem.AcquireResource, resource);
            }

            c.MemoryOp("acquire resource, at nowhere", Xenmem.AcquireResource, Bad.Unmapped);
        });
        script.Case("commands that there are none of", c =>
        {
            foreach (ulong command in (ulong[])[8, 29, 30, 63, 64 + 8, ~0UL])
                c.MemoryOp($"command {Value.Constant(command, command.ToString(System.Globalization.CultureInfo.InvariantCulture)).Text}", command, 0);
        });
    }
}
