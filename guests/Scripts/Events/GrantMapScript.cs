// grant_table_op where a domain maps, copies and transfers by entries of its own table, which Xen lets it.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;

namespace XenSharp.Guests.Scripts.Events;

internal static class GrantMapScript
{
    private static readonly Value Pattern = 0x1122_3344_5566_7788UL;

    public static AbiScript CreateMap() => new("grant-map", "grant_table_op with references of one's own", script =>
    {
        script.Case("a page that is granted to oneself", c =>
        {
            const int first = 16;
            (Value own, ScratchPage table, ScratchPage source, ScratchPage window) = Begin(c);
            c.PutEntry(table, first, GrantFlag.PermitAccess, own, source.Mfn);
            ScriptBuffer map = c.Map("writable", own, first, GrantMap.Host, window.At);
            Value handle = c.Handle(map);
            c.Show((Value.Load(map[24]) - (source.Mfn << 12)).Named("bus address of another frame"));
            c.Load(window.At);
            c.Store(window[8], 8, 0x99);
            c.Load(source[8]);
            c.Load(table[first * 8], 2);
            ScratchPage again = c.Page();
            Value second = c.Handle(c.Map("again", own, first, GrantMap.Host | GrantMap.ReadOnly, again.At), "second");
            c.Unmap("another address", handle, table.At);
            c.Unmap("no address", handle, 0);
            c.Load(table[first * 8], 2);
            c.Unmap("as it was mapped", handle, window.At);
            c.Load(table[first * 8], 2);
            c.Load(window.At);
            c.Unmap("once more", handle, window.At);
            c.Unmap("the other", second, again.At);
            c.Load(table[first * 8], 2);
        });
        script.Case("read-only", c =>
        {
            const int first = 24;
            (Value own, ScratchPage table, ScratchPage source, ScratchPage window) = Begin(c);
            c.PutEntry(table, first, GrantFlag.PermitAccess | GrantFlag.ReadOnly, own, source.Mfn);
            c.Map("writable", own, first, GrantMap.Host, window.At);
            c.Load(table[first * 8], 2);
            Value handle = c.Handle(c.Map("read-only", own, first, GrantMap.Host | GrantMap.ReadOnly, window.At));
            c.Load(table[first * 8], 2);
            c.Load(window.At);
            c.Store(window.At, 8, 1);
            c.Map("writable while it is mapped", own, first, GrantMap.Host, c.Page().At);
            c.Unmap("as it was mapped", handle, window.At);
            c.Load(table[first * 8], 2);
        });
        script.Case("by the machine address of an entry", c =>
        {
            const int first = 32;
            (Value own, ScratchPage table, ScratchPage source, ScratchPage window) = Begin(c);
            c.PutEntry(table, first, GrantFlag.PermitAccess, own, source.Mfn);
            Value entry = Value.EntryAddress(window.At);
            const int flags = GrantMap.Host | GrantMap.ContainsPte;
            c.Map("not aligned", own, first, flags, (entry + 4).Named("within an entry"));
            c.Map("not a table", own, first, flags, (source.Mfn << 12).Named("a page"));
            c.Map("of nobody", own, first, flags, 0xff_ffff_ffff_f000UL);
            c.Map("the root table", own, first, flags, ((c.Root << 12) + 8).Named("entry of the root table"));
            Value handle = c.Handle(c.Map("an entry", own, first, flags | GrantMap.Application | (5 * GrantMap.Available0), entry));
            c.Load(window.At);
            c.Replace("with another page", handle, entry, c.Page().At);
            c.Unmap("by its address", handle, window.At);
            c.Unmap("by its entry", handle, entry);
            c.Load(window.At);
        });
        script.Case("for a device", c =>
        {
            const int first = 40;
            (Value own, ScratchPage table, ScratchPage source, ScratchPage window) = Begin(c);
            c.PutEntry(table, first, GrantFlag.PermitAccess, own, source.Mfn);
            Value handle = c.Handle(c.Map("a device alone", own, first, GrantMap.Device, 0));
            c.Load(table[first * 8], 2);
            c.Unmap("as host", handle, window.At);
            c.Unmap("another bus address", handle, 0, 0x1000);
            c.Unmap("the bus address", handle, 0, (source.Mfn << 12).Named("bus address"));
            c.Load(table[first * 8], 2);
            Value both = c.Handle(c.Map("both", own, first, GrantMap.Device | GrantMap.Host, window.At), "both");
            c.Unmap("the bus address", both, 0, (source.Mfn << 12).Named("bus address"));
            c.Load(table[first * 8], 2);
            c.Unmap("the address", both, window.At);
            c.Load(table[first * 8], 2);
            Value read = c.Handle(c.Map("read-only", own, first, GrantMap.Device | GrantMap.ReadOnly, 0), "read");
            c.Load(table[first * 8], 2);
            c.Unmap("the bus address", read, 0, (source.Mfn << 12).Named("bus address"));
            c.Load(table[first * 8], 2);
        });
        script.Case("what cannot be mapped", c =>
        {
            const int first = 48;
            (Value own, ScratchPage table, ScratchPage source, ScratchPage window) = Begin(c);
            ScriptBuffer Try(string text, Value flags, Value domain, Value frame, int mapFlags = GrantMap.Host)
            {
                c.PutEntry(table, first, flags, domain, frame);
                ScriptBuffer map = c.Map(text, own, first, mapFlags, window.At);
                c.Load(table[first * 8], 2);
                return map;
            }

            Try("for another domain", GrantFlag.PermitAccess, DomainIds.Absent, source.Mfn);
            Try("for DOMID_SELF", GrantFlag.PermitAccess, DomainIds.Self, source.Mfn);
            Try("invalid", 0, own, source.Mfn);
            Try("to be transferred", GrantFlag.AcceptTransfer, own, source.Mfn);
            Try("a part of a page", GrantFlag.PermitAccess | GrantFlag.SubPage, own, source.Mfn);
            Try("a frame of nobody", GrantFlag.PermitAccess, own, 0xffff_ffffU);
            Try("a page table, writable", GrantFlag.PermitAccess, own, c.Root);
            Value handle = c.Handle(Try("a page table, read-only", GrantFlag.PermitAccess, own, c.Root, GrantMap.Host | GrantMap.ReadOnly));
            c.Unmap("the page table", handle, window.At);
            Try("no flags", GrantFlag.PermitAccess, own, source.Mfn, GrantMap.ReadOnly);
            c.PutEntry(table, first, GrantFlag.PermitAccess, own, source.Mfn);
            c.Map("to where there is no table", own, first, GrantMap.Host, 0x7f00_0000_0000UL);
            c.Map("to the hypervisor's", own, first, GrantMap.Host, BadAddress.Hypervisor);
            c.Map("to a non-canonical address", own, first, GrantMap.Host, BadAddress.NonCanonical);
            c.Map("DOMID_SELF", DomainIds.Self, first, GrantMap.Host, window.At);
            c.Map("DOMID_IO", DomainIds.Io, first, GrantMap.Host, window.At);
            c.Map("of domain 0, not given", DomainIds.Zero, 400, GrantMap.Host, window.At);
            c.Map("of domain 0, beyond its table", DomainIds.Zero, 0xffff_ffffU, GrantMap.Host, window.At);
            c.Map("the toolstack's", own, 1, GrantMap.Host, window.At);
            c.Load(window.At);
        });
        script.Case("several at once", c =>
        {
            const int first = 56;
            (Value own, ScratchPage table, ScratchPage source, ScratchPage window) = Begin(c);
            ScratchPage other = c.Page();
            c.PutEntry(table, first, GrantFlag.PermitAccess, own, source.Mfn);
            ScriptBuffer maps = c.Structure(
                "maps", 96, (0, 8, window.At), (8, 4, GrantMap.Host), (12, 4, first), (16, 2, own), (32 + 8, 4, GrantMap.Host),
                (32 + 12, 4, 0xffff_ffffU), (32 + 16, 2, own), (64, 8, other.At), (64 + 8, 4, GrantMap.Host), (64 + 12, 4, first), (64 + 16, 2, own));
            c.Op(GrantOperation.MapGrantRef, "three", maps, 3);
            foreach (int at in (int[])[0, 32, 64])
                c.Load(maps[at + 18], 2);
            ScriptBuffer unmaps = c.Structure(
                "unmaps", 48, (0, 8, window.At), (16, 4, EventSteps.Field32(maps[20], "first")), (24, 8, other.At),
                (24 + 16, 4, EventSteps.Field32(maps[64 + 20], "third")));
            c.Op(GrantOperation.UnmapGrantRef, "two", unmaps, 2);
            c.Load(unmaps[20], 2);
            c.Load(unmaps[24 + 20], 2);
            c.Op(GrantOperation.MapGrantRef, "at a page's end", c.PageEnd(16), 1);
            c.Op(GrantOperation.UnmapGrantRef, "at a page's end", c.PageEnd(16), 1);
            c.Load(table[first * 8], 2);
        });
        script.Case("a mapping that takes another's place", c =>
        {
            const int first = 64;
            (Value own, ScratchPage table, ScratchPage source, ScratchPage window) = Begin(c);
            ScratchPage other = c.Page();
            c.Put(other.At, 8, 0x77);
            c.PutEntry(table, first, GrantFlag.PermitAccess, own, source.Mfn);
            Value handle = c.Handle(c.Map("writable", own, first, GrantMap.Host, window.At));
            c.Replace("from where there is no table", handle, window.At, 0x7f00_0000_0000UL);
            c.Replace("from another page", handle, window.At, other.At);
            c.Load(window.At);
            c.Load(other.At);
            c.Load(table[first * 8], 2);
        });
        script.Case("references that change places", c =>
        {
            const int first = 72;
            (Value own, ScratchPage table, ScratchPage source, ScratchPage window) = Begin(c);
            c.PutEntry(table, first, GrantFlag.PermitAccess, own, source.Mfn);
            c.PutEntry(table, first + 1, GrantFlag.AcceptTransfer, own, 5);
            void Swap(string text, Value a, Value b)
            {
                ScriptBuffer swap = c.Structure("swap", 12, (0, 4, a), (4, 4, b), (8, 2, 77));
                c.Op(GrantOperation.SwapGrantRef, text, swap, 1);
                c.Load(swap[8], 2);
            }

            Swap("two", first, first + 1);
            c.Load(table[first * 8], 2);
            c.Load(table[(first * 8) + 4], 4);
            c.Load(table[(first * 8) + 8], 2);
            Value handle = c.Handle(c.Map("by the other", own, first + 1, GrantMap.Host, window.At));
            Swap("one that is mapped", first, first + 1);
            Swap("with itself, mapped", first + 1, first + 1);
            c.SetVersion(2, " while one is mapped");
            c.Unmap("as it was mapped", handle, window.At);
            Swap("the toolstack's", 0, first);
        });
        script.Case("a mapping that is written over", c =>
        {
            const int first = 80;
            (Value own, ScratchPage table, ScratchPage source, ScratchPage window) = Begin(c);
            c.PutEntry(table, first, GrantFlag.PermitAccess, own, source.Mfn);
            Value handle = c.Handle(c.Map("writable", own, first, GrantMap.Host, window.At));
            c.Clear(window);
            c.Load(table[first * 8], 2);
            c.Unmap("what is gone", handle, window.At);
            Value next = c.Handle(c.Map("again", own, first, GrantMap.Host, window.At), "next");
            Value third = c.Handle(c.Map("over it", own, first, GrantMap.Host | GrantMap.ReadOnly, window.At), "third");
            c.Unmap("the writable one", next, window.At);
            c.Unmap("the read-only one", third, window.At);
            c.Hypercall(GuestHypercall.UpdateVaMapping, window.At, source.Entry(GrantSteps.WritablePage), 2);
            c.Unmap("an entry of one's own", handle, window.At);
            c.Load(window.At);
        });
    });

    public static AbiScript CreateCopy() => new("grant-copy", "grant_table_op copies and transfers by references of one's own", script =>
    {
        script.Case("copies by reference", c =>
        {
            const int first = 88;
            (Value own, ScratchPage table, ScratchPage source, ScratchPage target) = Begin(c);
            c.PutEntry(table, first, GrantFlag.PermitAccess | GrantFlag.ReadOnly, own, source.Mfn);
            c.PutEntry(table, first + 1, GrantFlag.PermitAccess, own, target.Mfn);
            c.Copy("from a reference", (0, 4, first), (GrantCopyField.SourceDomain, 2, own), (GrantCopyField.Destination, 8, target.Mfn),
                (GrantCopyField.Flags, 2, 1));
            c.Load(target.At);
            c.Copy("between references", (0, 4, first), (GrantCopyField.SourceDomain, 2, own), (GrantCopyField.Destination, 4, first + 1),
                (GrantCopyField.DestinationDomain, 2, DomainIds.Self), (GrantCopyField.DestinationOffset, 2, 64), (GrantCopyField.Flags, 2, 3));
            c.Load(target[64]);
            c.Copy("to a reference that is read-only", (0, 8, target.Mfn), (GrantCopyField.Destination, 4, first), (GrantCopyField.Flags, 2, 2));
            c.Copy("from a frame by number of the domain", (0, 8, source.Mfn), (GrantCopyField.SourceDomain, 2, own),
                (GrantCopyField.Destination, 8, target.Mfn));
            c.Copy("from a frame of domain 0", (0, 8, source.Mfn), (GrantCopyField.SourceDomain, 2, DomainIds.Zero),
                (GrantCopyField.Destination, 8, target.Mfn));
            c.Copy("to a frame of an absent domain", (0, 8, source.Mfn), (GrantCopyField.Destination, 8, target.Mfn),
                (GrantCopyField.DestinationDomain, 2, DomainIds.Absent));
            c.Copy("from a reference of domain 0", (0, 4, 400), (GrantCopyField.SourceDomain, 2, DomainIds.Zero),
                (GrantCopyField.Destination, 8, target.Mfn),
                (GrantCopyField.Flags, 2, 1));
            c.Copy("beyond the table", (0, 4, 0xffff_ffffU), (GrantCopyField.Destination, 8, target.Mfn), (GrantCopyField.Flags, 2, 1));
            c.Copy("from a reference of an absent domain", (0, 4, 400), (GrantCopyField.SourceDomain, 2, DomainIds.Absent),
                (GrantCopyField.Destination, 8, target.Mfn), (GrantCopyField.Flags, 2, 1));
            c.Copy("a whole page", (0, 8, source.Mfn), (GrantCopyField.Destination, 8, target.Mfn), (GrantCopyField.Length, 2, 4096));
            c.Copy("within a page", (0, 8, source.Mfn), (GrantCopyField.Destination, 8, source.Mfn), (GrantCopyField.DestinationOffset, 2, 2048));
            c.Load(source[2048]);
            c.Load(table[first * 8], 2);
            c.Load(table[(first + 1) * 8], 2);
            c.PutEntry(table, first, GrantFlag.PermitAccess, own, 0xffff_ffffU);
            c.Copy("a frame of nobody", (0, 4, first), (GrantCopyField.Destination, 8, target.Mfn), (GrantCopyField.Flags, 2, 1));
            c.PutEntry(table, first, GrantFlag.PermitAccess, own, c.Root);
            c.Copy("to a page table", (0, 8, source.Mfn), (GrantCopyField.Destination, 4, first), (GrantCopyField.Flags, 2, 2));
            c.Copy("from a page table", (0, 4, first),
                (GrantCopyField.Destination, 8, target.Mfn), (GrantCopyField.Flags, 2, 1), (GrantCopyField.Length, 2, 0));
            c.Copy("the toolstack's", (0, 4, 0), (GrantCopyField.Destination, 8, target.Mfn), (GrantCopyField.Flags, 2, 1));
            c.Load(table[first * 8], 2);
        });
        script.Case("copies in one go", c =>
        {
            const int first = 96;
            (Value own, ScratchPage table, ScratchPage source, ScratchPage target) = Begin(c);
            c.PutEntry(table, first, GrantFlag.PermitAccess, own, source.Mfn);
            var fields = new List<(int Offset, int Size, Value Value)>();
            for (int i = 0; i < 3; i++)
            {
                int at = i * GrantCopyField.Size;
                fields.AddRange([
                    (at, 4, i == 1 ? 0xffff_ffffU : first), (at + GrantCopyField.SourceDomain, 2, DomainIds.Self),
                    (at + GrantCopyField.Destination, 8, target.Mfn), (at + GrantCopyField.DestinationDomain, 2, DomainIds.Self),
                    (at + GrantCopyField.DestinationOffset, 2, 256 + (i * 8)), (at + GrantCopyField.Length, 2, 8), (at + GrantCopyField.Flags, 2, 1),
                    (at + GrantCopyField.Status, 2, 77)]);
            }

            ScriptBuffer copies = c.Structure("copies", 3 * GrantCopyField.Size, [.. fields]);
            c.Op(GrantOperation.Copy, "three, of which the second cannot be", copies, 3);
            for (int i = 0; i < 3; i++)
                c.Load(copies[(i * GrantCopyField.Size) + GrantCopyField.Status], 2);
            for (int i = 0; i < 3; i++)
                c.Load(target[256 + (i * 8)]);
            c.Load(table[first * 8], 2);
        });
        script.Case("transfers to oneself", c =>
        {
            const int first = 104;
            (Value own, ScratchPage table, ScratchPage source, ScratchPage given) = Begin(c);
            c.Put(given.At, 8, Pattern);
            Value frame = c.Keep(given.Mfn, "frame");
            c.PutEntry(table, first, GrantFlag.AcceptTransfer, own, 0x1234);
            c.Transfer("a page that is mapped", frame, own, first);
            c.Transfer("a page table", c.Root, own, first);
            c.Clear(given);
            c.Transfer("a page", frame, own, first);
            c.Load(table[first * 8], 2);
            c.Show((EventSteps.Field32(table[(first * 8) + 4], "frame in the entry") - frame).Named("another frame"));
            c.Load((c.MachineToPhys + (frame << 3)).Named("its pfn"));
            c.Hypercall(GuestHypercall.UpdateVaMapping, given.At, ((frame << 12) | GrantSteps.WritablePage).Named("the frame"), 2);
            c.Load(given.At);
            c.Clear(given);
            c.Transfer("where it was done", frame, own, first);
        });
        script.Case("transfers that lose the page", c =>
        {
            const int first = 112;
            (_, _, ScratchPage source, ScratchPage given) = Begin(c);
            Value frame = c.Keep(given.Mfn, "frame");
            c.Clear(given);
            c.Transfer("to an absent domain", frame, DomainIds.Absent, first);
            c.Transfer("once more", frame, DomainIds.Absent, first);
            Value other = c.Keep(source.Mfn, "other");
            c.Clear(source);
            c.Transfer("to domain 0, which does not wait for it", other, DomainIds.Zero, 400);
            c.Transfer("once more", other, DomainIds.Zero, 400);
        });
        script.Case("flushing the cache", c =>
        {
            ScratchPage page = c.Page();
            void Flush(string text, Value address, int offset, int length, Value operation)
                => c.Op(GrantOperation.CacheFlush, text, c.Structure("flush", 16, (0, 8, address), (8, 2, offset), (10, 2, length), (12, 4, operation)), 1);

            Value address = (page.Mfn << 12).Named("bus address");
            Flush("clean", address, 0, 4096, 1);
            Flush("invalidate", address, 0, 64, 2);
            Flush("both", address, 8, 8, 3);
            Flush("nothing to do", address, 0, 64, 0);
            Flush("beyond the page", address, 4000, 200, 1);
            Flush("a reference", address, 0, 64, 0x8000_0001U);
            Flush("of nobody", 0xff_ffff_ffff_f000UL, 0, 64, 1);
        });
    });

    public static AbiScript CreateVersions() => new("grant-versions", "grant_table_op with entries of version 2", script =>
    {
        script.Case("growing the table", c =>
        {
            ScriptBuffer size = c.Structure("size", 16, (0, 2, DomainIds.Self), (12, 2, 77));
            c.MapTable(2);
            c.Op(GrantOperation.QuerySize, "self", size, 1);
            c.Load(size[4], 4);
            c.Load(size[8], 4);
            ScriptBuffer zero = c.Structure("size", 16, (0, 2, DomainIds.Zero), (12, 2, 77));
            c.Op(GrantOperation.QuerySize, "domain 0", zero, 1);
            c.Load(zero[12], 2);
            ScriptBuffer setup = c.Structure("setup", 24, (0, 2, DomainIds.Zero), (4, 4, 1), (8, 2, 77), (16, 8, size));
            c.Op(GrantOperation.SetupTable, "domain 0", setup, 1);
            c.Load(setup[8], 2);
            c.Op(GrantOperation.SetupTable, "a list that is nobody's", c.Structure("setup", 24, (0, 2, DomainIds.Self), (4, 4, 1), (16, 8, BadAddress.Hypervisor)), 1);
            ScriptBuffer unmapped = c.Structure("setup", 24, (0, 2, DomainIds.Self), (4, 4, 1), (8, 2, 77), (16, 8, c.UnmappedPage().At));
            c.Op(GrantOperation.SetupTable, "a list that is not mapped", unmapped, 1);
            c.Load(unmapped[8], 2);
            ScriptBuffer most = c.Structure("setup", 24, (0, 2, DomainIds.Self), (4, 4, 65), (8, 2, 77), (16, 8, c.Buffer("frames", 65 * 8)));
            c.Op(GrantOperation.SetupTable, "one too many", most, 1);
            c.Load(most[8], 2);
            ScriptBuffer version = c.Structure("version", 8, (0, 2, DomainIds.Zero));
            c.Op(GrantOperation.GetVersion, "domain 0", version, 1);
        });
        script.Case("entries of version 2", c =>
        {
            const int first = 120;
            (Value own, ScratchPage table, ScratchPage source, ScratchPage window) = Begin(c);
            c.PutEntry(table, 3, GrantFlag.AcceptTransfer, own, source.Mfn);
            c.PutEntry(table, 4, GrantFlag.PermitAccess, own, source.Mfn);
            c.PutEntry(table, first, GrantFlag.PermitAccess, own, source.Mfn);
            c.SetVersion(2);
            c.Load(table[0], 4);
            c.Load(table[16], 4);
            c.Load(table[3 * 16], 2);
            c.Load(table[4 * 16], 2);
            c.Show((Value.Load(table[(4 * 16) + 8]) - source.Mfn).Named("another frame"));
            c.Load(table[first * 16], 2);
            ScratchPage status = c.MapStatusFrame();
            c.Load(status[0], 2);
            c.Load(status[2], 2);
            c.Load(status[4 * 2], 2);
            c.PutEntry2(table, first, GrantFlag.PermitAccess, own, 0, source.Mfn);
            Value handle = c.Handle(c.Map("writable", own, first, GrantMap.Host, window.At));
            c.Load(window.At);
            c.Load(table[first * 16], 2);
            c.Load(status[first * 2], 2);
            c.SetVersion(1, " while one is mapped");
            c.Unmap("as it was mapped", handle, window.At);
            c.Load(status[first * 2], 2);
            c.Map("beyond the table", own, 512, GrantMap.Host, window.At);
            c.PutEntry2(table, first, GrantFlag.PermitAccess | GrantFlag.ReadOnly, own, 0, source.Mfn);
            c.Map("writable, though read-only", own, first, GrantMap.Host, window.At);
            Value read = c.Handle(c.Map("read-only", own, first, GrantMap.Host | GrantMap.ReadOnly, window.At), "read");
            c.Load(status[first * 2], 2);
            c.Unmap("as it was mapped", read, window.At);
            c.PutEntry2(table, first, GrantFlag.PermitAccess, own, 0, 0xff_ffff_ffffUL);
            c.Map("a frame of nobody", own, first, GrantMap.Host, window.At);
            c.Load(status[first * 2], 2);
            c.Clear(status);
        });
        script.Case("parts of pages", c =>
        {
            const int first = 128;
            Value own = c.OwnNumber();
            ScratchPage table = c.MapTable()[0];
            ScratchPage source = c.Page();
            ScratchPage target = c.Page();
            c.Put(source[16], 8, Pattern);
            c.PutEntry2(table, first, GrantFlag.PermitAccess | GrantFlag.SubPage, own, 16 | (32 << 16), source.Mfn);
            c.Map("a part", own, first, GrantMap.Host, target.At);
            void Part(string text, int offset, int length)
                => c.Copy(text, (0, 4, first), (GrantCopyField.SourceOffset, 2, offset), (GrantCopyField.Length, 2, length),
                    (GrantCopyField.Destination, 8, target.Mfn), (GrantCopyField.Flags, 2, 1));

            Part("before it", 8, 8);
            Part("its first bytes", 16, 8);
            c.Load(target.At);
            Part("all of it", 16, 32);
            Part("beyond it", 40, 16);
            c.PutEntry2(table, first, GrantFlag.Transitive, own, own, first + 1);
            c.Map("transitive, mapped", own, first, GrantMap.Host, target.At);
            Part("transitive to itself", 0, 8);
            c.PutEntry2(table, first, GrantFlag.Transitive, own, DomainIds.Absent, 20);
            Part("transitive to an absent domain", 0, 8);
            c.PutEntry2(table, first, GrantFlag.Transitive, own, 0, 400);
            Part("transitive to domain 0", 0, 8);
            c.PutEntry2(table, first, GrantFlag.Transitive, own, 0, 0xffff_ffffU);
            Part("transitive beyond domain 0's table", 0, 8);
            c.PutEntry2(table, first, GrantFlag.Transitive, 0, own, 400);
            Part("transitive for another", 0, 8);
            c.PutEntry2(table, first, GrantFlag.AcceptTransfer, own, 0, 0x4321);
            Value frame = c.Keep(source.Mfn, "frame");
            c.Clear(source);
            c.Transfer("a page", frame, own, first);
            c.Load(table[first * 16], 2);
            c.Show((Value.Load(table[(first * 16) + 8]) - frame).Named("another frame"));
        });
        script.Case("back to version 1", c =>
        {
            Value own = c.OwnNumber();
            ScratchPage table = c.MapTable()[0];
            ScratchPage status = c.MapStatusFrame();
            c.PutEntry2(table, 5, GrantFlag.Transitive, own, 0, 0);
            c.SetVersion(1, " with a transitive entry");
            c.PutEntry2(table, 5, GrantFlag.PermitAccess, own, 0, 0x1_0000_0000UL);
            c.SetVersion(1, " with a frame too large");
            c.PutEntry2(table, 5, GrantFlag.AcceptTransfer, own, 0, 7);
            c.PutEntry2(table, 6, GrantFlag.PermitAccess, own, 0, 8);
            c.SetVersion(1, " with a status frame mapped");
            c.Clear(status);
            c.SetVersion(1);
        });
        script.Case("after it", c =>
        {
            const int first = 136;
            ScratchPage table = c.MapTable()[0];
            foreach (int reference in (int[])[0, 1, 2, 5, 6, first])
                c.Load(table[reference * 8], 2);
            c.Load(table[(6 * 8) + 4], 4);
            ScriptBuffer frames = c.Structure("status", 16, (0, 4, 1), (4, 2, DomainIds.Self), (6, 2, 77), (8, 8, c.Buffer("frames", 8)));
            c.Op(GrantOperation.GetStatusFrames, "self", frames, 1);
            c.Load(frames[6], 2);
            c.SetVersion(2);
            c.Op(GrantOperation.GetStatusFrames, "two at once", frames, 2);
            c.Op(GrantOperation.GetStatusFrames, "null", BadAddress.Null, 1);
            ScriptBuffer many = c.Structure("status", 16, (0, 4, 2), (4, 2, DomainIds.Self), (6, 2, 77), (8, 8, c.Buffer("frames", 16)));
            c.Op(GrantOperation.GetStatusFrames, "more than there are", many, 1);
            c.Load(many[6], 2);
            c.SetVersion(1);
        });
    });

    private static (Value Own, ScratchPage Table, ScratchPage Source, ScratchPage Window) Begin(AbiCase c)
    {
        Value own = c.OwnNumber();
        ScratchPage table = c.MapTable()[0];
        ScratchPage source = c.Page();
        c.Put(source.At, 8, Pattern);
        return (own, table, source, c.Page());
    }
}
