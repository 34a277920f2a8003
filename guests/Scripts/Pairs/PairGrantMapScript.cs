// grant_table_op where one domain grants and the other maps.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using XenSharp.Guests.Scripts.Events;

namespace XenSharp.Guests.Scripts.Pairs;

internal static class PairGrantMapScript
{
    public static AbiScript Create() => AbiScript.OfPair("pair-grant-map", "grant_table_op between domains", script =>
    {
        ScratchPage table = null!;
        script.Case("the table is set up", (a, _) => table = a.MapTable()[0]);
        script.Case("a page that both have", (a, b) =>
        {
            const int first = 16;
            Granted page = Grant(a, b, table, first);
            ScriptBuffer map = b.Map("writable", b.Peer, first, GrantMap.Host, page.Window.At);
            Value handle = b.Handle(map);
            b.ShowOther(Value.Load(map[24]).Named("bus address"), (page.Frame << 12).Named("the frame's"));
            b.Load(page.Window.At);
            a.ShowFlags(table, first);
            b.Store(page.Window[8], 8, 0x99);
            a.Load(page.Source[8]);
            a.Store(page.Source[16], 8, 0x77);
            b.Load(page.Window[16]);
            b.Unmap("as it was mapped", handle, page.Window.At);
            a.ShowFlags(table, first);
            b.Load(page.Window.At);
            a.Load(page.Source[8]);
            b.Unmap("once more", handle, page.Window.At);
        });
        script.Case("an entry to read only", (a, b) =>
        {
            const int first = 24;
            Granted page = Grant(a, b, table, first, GrantFlag.PermitAccess | GrantFlag.ReadOnly);
            b.Map("writable", b.Peer, first, GrantMap.Host, page.Window.At);
            a.ShowFlags(table, first);
            b.Load(page.Window.At);
            Value handle = b.Handle(b.Map("read-only", b.Peer, first, GrantMap.Host | GrantMap.ReadOnly, page.Window.At));
            a.ShowFlags(table, first);
            b.Load(page.Window.At);
            b.Store(page.Window.At, 8, 1);
            a.Store(page.Source.At, 8, 2);
            b.Load(page.Window.At);
            b.Map("writable while it is mapped", b.Peer, first, GrantMap.Host, b.Page().At);
            b.Unmap("as it was mapped", handle, page.Window.At);
            a.ShowFlags(table, first);
        });
        script.Case("an entry to write that is mapped to read", (a, b) =>
        {
            const int first = 25;
            Granted page = Grant(a, b, table, first);
            Value handle = b.Handle(b.Map("read-only", b.Peer, first, GrantMap.Host | GrantMap.ReadOnly, page.Window.At));
            a.ShowFlags(table, first);
            b.Store(page.Window.At, 8, 1);
            ScratchPage other = b.Page();
            Value second = b.Handle(b.Map("writable", b.Peer, first, GrantMap.Host, other.At), "second");
            a.ShowFlags(table, first);
            b.Store(other.At, 8, 3);
            b.Load(page.Window.At);
            b.Unmap("the writable one", second, other.At);
            a.ShowFlags(table, first);
            b.Unmap("the other", handle, page.Window.At);
            a.ShowFlags(table, first);
        });
        script.Case("by the machine address of an entry", (a, b) =>
        {
            const int first = 32;
            Granted page = Grant(a, b, table, first);
            Value entry = Value.EntryAddress(page.Window.At);
            Value far = ((a.FarFrame() << 12) + 8).Named("an entry in a frame of a");
            const int flags = GrantMap.Host | GrantMap.ContainsPte;
            b.Map("not aligned", b.Peer, first, flags, (entry + 4).Named("within an entry"));
            b.Map("in a page of the other", b.Peer, first, flags, far);
            b.Map("of nobody", b.Peer, first, flags, 0xff_ffff_ffff_f000UL);
            Value handle = b.Handle(b.Map("an entry", b.Peer, first, flags, entry));
            b.Load(page.Window.At);
            b.Store(page.Window[8], 8, 5);
            a.Load(page.Source[8]);
            b.Unmap("by its address", handle, page.Window.At);
            b.Unmap("in a page of the other", handle, far);
            b.Replace("with a page of one's own", handle, entry, b.Page().At);
            b.Unmap("by its entry", handle, entry);
            a.ShowFlags(table, first);
            b.Load(page.Window.At);
        });
        script.Case("for a device", (a, b) =>
        {
            const int first = 40;
            Granted page = Grant(a, b, table, first);
            ScriptBuffer map = b.Map("a device alone", b.Peer, first, GrantMap.Device, 0);
            Value handle = b.Handle(map);
            Value bus = b.Keep(Value.Load(map[24]), "bus address");
            a.ShowFlags(table, first);
            b.Unmap("as host", handle, page.Window.At);
            b.Unmap("another bus address", handle, 0, 0x1000);
            b.Unmap("the bus address", handle, 0, bus);
            a.ShowFlags(table, first);
            Value both = b.Handle(b.Map("both", b.Peer, first, GrantMap.Device | GrantMap.Host, page.Window.At), "both");
            b.Unmap("the bus address", both, 0, bus);
            a.ShowFlags(table, first);
            b.Load(page.Window.At);
            b.Unmap("the address", both, page.Window.At);
            a.ShowFlags(table, first);
            Value read = b.Handle(b.Map("read-only", b.Peer, first, GrantMap.Device | GrantMap.ReadOnly, 0), "read");
            a.ShowFlags(table, first);
            b.Unmap("the bus address", read, 0, bus);
            a.ShowFlags(table, first);
        });
        script.Case("entries for others", (a, b) =>
        {
            const int first = 48;
            Granted page = Grant(a, b, table, first);
            foreach (Value domain in (Value[])[DomainIds.Absent, DomainIds.Self, DomainIds.Zero, DomainIds.Io, DomainIds.Invalid, a.Own])
            {
                a.PutEntry(table, first, GrantFlag.PermitAccess, domain, page.Source.Mfn);
                b.Map($"for {domain.Text}", b.Peer, first, GrantMap.Host, page.Window.At);
                a.ShowFlags(table, first);
            }

            b.Load(page.Window.At);
        });
        script.Case("kinds of entries", (a, b) =>
        {
            const int first = 49;
            Granted page = Grant(a, b, table, first);
            (string Text, int Flags)[] kinds =
            [
                ("invalid", 0), ("to be transferred", GrantFlag.AcceptTransfer), ("transitive", GrantFlag.Transitive),
                ("a part of a page", GrantFlag.PermitAccess | GrantFlag.SubPage), ("not cached", GrantFlag.PermitAccess | (1 << 5)),
                ("with bits that mean nothing", GrantFlag.PermitAccess | 0xfe00),
            ];
            foreach ((string text, int flags) in kinds)
            {
                a.PutEntry(table, first, flags, a.Peer, page.Source.Mfn);
                ScriptBuffer map = b.Map(text, b.Peer, first, GrantMap.Host, page.Window.At);
                a.ShowFlags(table, first);
                b.Unmap("if it was mapped", EventSteps.Field32(map[20], "handle"), page.Window.At);
            }
        });
        script.Case("frames that an entry can name", (a, b) =>
        {
            const int first = 50;
            Granted page = Grant(a, b, table, first);
            ScriptBuffer list = a.Buffer("frames", 8);
            a.Op(
                GrantOperation.SetupTable, "1", a.Structure("setup", 24, (0, 2, DomainIds.Self), (4, 4, 1), (8, 2, 77), (16, 8, list)), 1);
            Value shared = (Value.Load(a.StartInfo + StartInfoOffset.SharedInfo) >> 12).Named("shared_info");
            void Try(string text, Value frame)
            {
                a.PutEntry(table, first, GrantFlag.PermitAccess, a.Peer, frame);
                foreach (int flags in (int[])[GrantMap.Host, GrantMap.Host | GrantMap.ReadOnly])
                {
                    ScriptBuffer map = b.Map(flags == GrantMap.Host ? text : $"{text}, read-only", b.Peer, first, flags, page.Window.At);
                    a.ShowFlags(table, first);
                    b.Unmap("if it was mapped", EventSteps.Field32(map[20], "handle"), page.Window.At);
                }
            }

            Try("a frame of nobody", 0xffff_ffffU);
            Try("the root table", a.Root);
            Try("the shared info page", shared);
            Try("the grant table", Value.Load(list).Named("table"));
            Try("frame 0", 0);
            a.ShowFlags(table, first);
        });
        script.Case("a frame of the domain that it is granted to", (a, b) =>
        {
            const int first = 53;
            Value frame = a.FarFrame(1);
            ScratchPage tableOfB = b.MapTable()[0];
            b.PutEntry(tableOfB, first, GrantFlag.PermitAccess, b.Peer, frame);
            a.Map("writable", a.Peer, first, GrantMap.Host, a.Page().At);
            a.Map("read-only", a.Peer, first, GrantMap.Host | GrantMap.ReadOnly, a.Page().At);
            b.ShowFlags(tableOfB, first);
        });
        script.Case("who is named as the granter", (a, b) =>
        {
            const int first = 51;
            Granted page = Grant(a, b, table, first);
            foreach (Value domain in (Value[])[b.Own, DomainIds.Self, DomainIds.Absent, DomainIds.Io, DomainIds.Xen, DomainIds.Invalid])
                b.Map($"of {domain.Text}", domain, first, GrantMap.Host, page.Window.At);
            a.Map("of b by a", a.Peer, first, GrantMap.Host, a.Page().At);
            a.Map("one's own that is for b", a.Own, first, GrantMap.Host, a.Page().At);
            a.ShowFlags(table, first);
        });
        script.Case("references", (a, b) =>
        {
            ScratchPage window = b.Page();
            foreach (uint reference in (uint[])[0, 1, 2, 511, 512, 0x7fff_ffff, 0xffff_ffff])
                b.Map($"{reference}", b.Peer, reference, GrantMap.Host, window.At);
            a.Load(table.At, 2);
        });
        script.Case("where a page cannot be mapped", (a, b) =>
        {
            const int first = 52;
            Granted page = Grant(a, b, table, first);
            b.Map("no flags", b.Peer, first, 0, page.Window.At);
            b.Map("read-only alone", b.Peer, first, GrantMap.ReadOnly, page.Window.At);
            b.Map("where there is no table", b.Peer, first, GrantMap.Host, 0x7f00_0000_0000UL);
            b.Map("in the hypervisor's", b.Peer, first, GrantMap.Host, BadAddress.Hypervisor);
            b.Map("at a non-canonical address", b.Peer, first, GrantMap.Host, BadAddress.NonCanonical);
            a.ShowFlags(table, first);
            ScriptBuffer map = b.Map("within a page", b.Peer, first, GrantMap.Host, page.Window[8]);
            b.Load(page.Window.At);
            b.Unmap("as it was mapped", b.Handle(map), page.Window[8]);
            a.ShowFlags(table, first);
        });
        script.Case("an entry that is mapped several times", (a, b) =>
        {
            const int first = 56;
            Granted page = Grant(a, b, table, first);
            ScratchPage[] windows = b.Pages(3);
            Value[] handles = [.. windows.Select((window, i) => b.Handle(
                b.Map($"{i}", b.Peer, first, i == 1 ? GrantMap.Host | GrantMap.ReadOnly : GrantMap.Host, window.At), $"handle {i}"))];
            b.Store(windows[0].At, 8, 0x1234);
            b.Load(windows[1].At);
            b.Load(windows[2].At);
            b.Unmap("by another's address", handles[0], windows[2].At);
            b.Unmap("the first", handles[0], windows[0].At);
            a.ShowFlags(table, first);
            b.Load(windows[1].At);
            b.Unmap("the third", handles[2], windows[2].At);
            a.ShowFlags(table, first);
            b.Unmap("the second", handles[1], windows[1].At);
            a.ShowFlags(table, first);
            b.Load(windows[0].At);
        });
        script.Case("two entries for one page", (a, b) =>
        {
            const int first = 60;
            Granted page = Grant(a, b, table, first);
            a.PutEntry(table, first + 1, GrantFlag.PermitAccess | GrantFlag.ReadOnly, a.Peer, page.Source.Mfn);
            ScratchPage other = b.Page();
            Value one = b.Handle(b.Map("by the first", b.Peer, first, GrantMap.Host, page.Window.At), "one");
            Value two = b.Handle(b.Map("by the second", b.Peer, first + 1, GrantMap.Host | GrantMap.ReadOnly, other.At), "two");
            b.Store(page.Window.At, 8, 0x4321);
            b.Load(other.At);
            b.Unmap("the first with the second's handle", two, page.Window.At);
            b.Unmap("the first", one, page.Window.At);
            a.ShowFlags(table, first);
            a.ShowFlags(table, first + 1);
            b.Load(other.At);
            b.Unmap("the second", two, other.At);
            a.ShowFlags(table, first + 1);
        });
        script.Case("access that ends while the page is mapped", (a, b) =>
        {
            const int first = 64;
            Granted page = Grant(a, b, table, first);
            Value handle = b.Handle(b.Map("writable", b.Peer, first, GrantMap.Host, page.Window.At));
            a.Put(table[first * PairSteps.EntrySize], 2, 0);
            b.Load(page.Window.At);
            b.Store(page.Window.At, 8, 8);
            b.Map("again", b.Peer, first, GrantMap.Host, b.Page().At);
            b.Map("again, read-only", b.Peer, first, GrantMap.Host | GrantMap.ReadOnly, b.Page().At);
            a.ShowFlags(table, first);
            a.PutEntry(table, first, GrantFlag.PermitAccess, DomainIds.Absent, page.Source.Mfn);
            b.Map("when it is for another", b.Peer, first, GrantMap.Host, b.Page().At);
            a.Put(table[first * PairSteps.EntrySize], 2, 0);
            b.Unmap("as it was mapped", handle, page.Window.At);
            a.ShowFlags(table, first);
            a.Load(page.Source.At);
            b.Map("afterwards", b.Peer, first, GrantMap.Host, page.Window.At);
        });
        script.Case("an entry that changes its frame while it is mapped", (a, b) =>
        {
            const int first = 68;
            Granted page = Grant(a, b, table, first);
            ScratchPage other = a.Page();
            a.Put(other.At, 8, 0x55);
            ScratchPage window = b.Page();
            Value one = b.Handle(b.Map("the first frame", b.Peer, first, GrantMap.Host, page.Window.At), "one");
            a.Put(table[(first * PairSteps.EntrySize) + 4], 4, other.Mfn);
            Value two = b.Handle(b.Map("after the change", b.Peer, first, GrantMap.Host, window.At), "two");
            b.Load(window.At);
            b.Unmap("the second", two, window.At);
            b.Unmap("the first", one, page.Window.At);
            a.ShowFlags(table, first);
            Value three = b.Handle(b.Map("anew", b.Peer, first, GrantMap.Host, page.Window.At), "three");
            b.Load(page.Window.At);
            b.Unmap("as it was mapped", three, page.Window.At);
        });
        script.Case("an entry that becomes read-only while it is mapped", (a, b) =>
        {
            const int first = 72;
            Granted page = Grant(a, b, table, first);
            ScratchPage other = b.Page();
            Value handle = b.Handle(b.Map("writable", b.Peer, first, GrantMap.Host, page.Window.At));
            a.Put(table[first * PairSteps.EntrySize], 2, GrantFlag.PermitAccess | GrantFlag.ReadOnly);
            b.Store(page.Window.At, 8, 4);
            ScriptBuffer map = b.Map("writable again", b.Peer, first, GrantMap.Host, other.At);
            a.ShowFlags(table, first);
            b.Unmap("if it was mapped", EventSteps.Field32(map[20], "handle"), other.At);
            b.Unmap("as it was mapped", handle, page.Window.At);
            a.ShowFlags(table, first);
        });
        script.Case("several in one call", (a, b) =>
        {
            const int first = 76;
            Granted page = Grant(a, b, table, first);
            ScratchPage other = b.Page();
            ScriptBuffer maps = b.Structure(
                "maps", 96, (0, 8, page.Window.At), (8, 4, GrantMap.Host), (12, 4, first), (16, 2, b.Peer), (32 + 8, 4, GrantMap.Host),
                (32 + 12, 4, 0xffff_ffffU), (32 + 16, 2, b.Peer), (64, 8, other.At), (64 + 8, 4, GrantMap.Host), (64 + 12, 4, first),
                (64 + 16, 2, b.Peer));
            b.Op(GrantOperation.MapGrantRef, "three", maps, 3);
            foreach (int at in (int[])[0, 32, 64])
                b.Load(maps[at + 18], 2);
            a.ShowFlags(table, first);
            ScriptBuffer unmaps = b.Structure(
                "unmaps", 72, (0, 8, page.Window.At), (16, 4, EventSteps.Field32(maps[20], "first")), (24, 8, page.Window.At),
                (24 + 16, 4, 0xffff_ffffU), (48, 8, other.At), (48 + 16, 4, EventSteps.Field32(maps[64 + 20], "third")));
            b.Op(GrantOperation.UnmapGrantRef, "three", unmaps, 3);
            foreach (int at in (int[])[0, 24, 48])
                b.Load(unmaps[at + 20], 2);
            a.ShowFlags(table, first);
        });
        script.Case("a mapping in another's place", (a, b) =>
        {
            const int first = 80;
            Granted page = Grant(a, b, table, first);
            Granted second = Grant(a, b, table, first + 1);
            Value one = b.Handle(b.Map("the first", b.Peer, first, GrantMap.Host, page.Window.At), "one");
            Value two = b.Handle(b.Map("the second over it", b.Peer, first + 1, GrantMap.Host, page.Window.At), "two");
            a.Store(second.Source.At, 8, 2);
            b.Load(page.Window.At);
            a.ShowFlags(table, first);
            b.Unmap("the first", one, page.Window.At);
            b.Load(page.Window.At);
            b.Unmap("the second", two, page.Window.At);
            a.ShowFlags(table, first);
            a.ShowFlags(table, first + 1);
            b.Unmap("the first by no address", one, 0);
            a.ShowFlags(table, first);
        });
        script.Case("a mapping that is replaced", (a, b) =>
        {
            const int first = 84;
            Granted page = Grant(a, b, table, first);
            ScratchPage other = b.Page();
            b.Put(other.At, 8, 0x77);
            Value handle = b.Handle(b.Map("writable", b.Peer, first, GrantMap.Host, page.Window.At));
            b.Replace("from where there is no table", handle, page.Window.At, 0x7f00_0000_0000UL);
            b.Replace("from a page of one's own", handle, page.Window.At, other.At);
            b.Load(page.Window.At);
            b.Load(other.At);
            a.ShowFlags(table, first);
            b.Replace("once more", handle, page.Window.At, other.At);
        });
        script.Case("a mapping that is replaced by itself, elsewhere", (a, b) =>
        {
            const int first = 85;
            Granted page = Grant(a, b, table, first);
            ScratchPage other = b.Page();
            Value handle = b.Handle(b.Map("writable", b.Peer, first, GrantMap.Host, page.Window.At));
            b.Replace("another address", handle, other.At, page.Window.At);
            b.Load(page.Window.At);
            b.Load(other.At);
            a.ShowFlags(table, first);
            b.Unmap("as it was mapped", handle, page.Window.At);
            a.ShowFlags(table, first);
        });
        script.Case("handles of others", (a, b) =>
        {
            const int first = 88;
            Granted page = Grant(a, b, table, first);
            ScratchPage other = b.Page();
            Value handle = b.Handle(b.Map("writable", b.Peer, first, GrantMap.Host, page.Window.At));
            a.Unmap("by the granter", handle, page.Source.At);
            b.Unmap("a page of one's own", handle, other.At);
            b.Unmap("where there is no table", handle, 0x7f00_0000_0000UL);
            b.Unmap("a handle that is free", handle + 1, page.Window.At);
            b.Unmap("no handle", 0xffff_ffffU, page.Window.At);
            b.Load(page.Window.At);
            b.Unmap("no address", handle, 0);
            a.ShowFlags(table, first);
            b.Unmap("as it was mapped", handle, page.Window.At);
            a.ShowFlags(table, first);
        });
        script.Case("references that change places", (a, b) =>
        {
            const int first = 92;
            Granted page = Grant(a, b, table, first);
            void Swap(string text, Value one, Value two)
            {
                ScriptBuffer swap = a.Structure("swap", 12, (0, 4, one), (4, 4, two), (8, 2, 77));
                a.Op(GrantOperation.SwapGrantRef, text, swap, 1);
                a.Load(swap[8], 2);
            }

            Swap("two that are not mapped", first, first + 1);
            b.Map("by the old reference", b.Peer, first, GrantMap.Host, page.Window.At);
            Value handle = b.Handle(b.Map("by the new one", b.Peer, first + 1, GrantMap.Host, page.Window.At));
            Swap("one that is mapped", first, first + 1);
            Swap("the other way", first + 1, first);
            b.Load(page.Window.At);
            a.SetVersion(2, " while one is mapped");
            b.SetVersion(2, " of the mapper");
            b.SetVersion(1, " of the mapper");
            b.Unmap("as it was mapped", handle, page.Window.At);
            Swap("afterwards", first + 1, first);
        });
        script.Case("pages granted both ways", (a, b) =>
        {
            const int first = 96;
            Granted page = Grant(a, b, table, first);
            ScratchPage tableOfB = b.MapTable()[0];
            Granted back = Grant(b, a, tableOfB, first);
            Value handleOfB = b.Handle(b.Map("of a", b.Peer, first, GrantMap.Host, page.Window.At), "handle of b");
            Value handleOfA = a.Handle(a.Map("of b", a.Peer, first, GrantMap.Host, back.Window.At), "handle of a");
            a.Store(back.Window[8], 8, 0x21);
            b.Store(page.Window[8], 8, 0x12);
            a.Load(page.Source[8]);
            b.Load(back.Source[8]);
            a.ShowFlags(table, first);
            b.ShowFlags(tableOfB, first);
            a.Unmap("of b", handleOfA, back.Window.At);
            b.Unmap("of a", handleOfB, page.Window.At);
            a.ShowFlags(table, first);
            b.ShowFlags(tableOfB, first);
        });
        script.Case("a page that was mapped is granted on", (a, b) =>
        {
            const int first = 104;
            Granted page = Grant(a, b, table, first);
            ScratchPage tableOfB = b.MapTable()[0];
            Value handle = b.Handle(b.Map("of a", b.Peer, first, GrantMap.Host, page.Window.At));
            b.PutEntry(tableOfB, first, GrantFlag.PermitAccess, b.Peer, b.FrameAt(page.Window));
            a.Map("its own, from b", a.Peer, first, GrantMap.Host, page.Window.At);
            b.ShowFlags(tableOfB, first);
            b.PutEntry(tableOfB, first, 0, b.Peer, 0);
            b.Unmap("as it was mapped", handle, page.Window.At);
        });
        script.Case("a growing table", (a, b) =>
        {
            const int first = 600;
            ScratchPage[] tables = a.MapTable(2);
            ScratchPage source = a.Page();
            ScratchPage window = b.Page();
            a.Put(source.At, 8, 0x66);
            a.PutEntry(tables[1], first - 512, GrantFlag.PermitAccess, a.Peer, source.Mfn);
            Value handle = b.Handle(b.Map("in the second frame", b.Peer, first, GrantMap.Host, window.At));
            b.Load(window.At);
            a.ShowFlags(tables[1], first - 512);
            b.Map("in the third", b.Peer, 1024, GrantMap.Host, window.At);
            b.Unmap("as it was mapped", handle, window.At);
            a.ShowFlags(tables[1], first - 512);
        });
        script.Case("the other's table", (_, b) =>
        {
            ScriptBuffer size = b.Structure("size", 24, (0, 2, b.Peer), (12, 2, 77));
            b.Op(GrantOperation.QuerySize, "a", size, 1);
            b.Load(size[12], 2);
            ScriptBuffer list = b.Buffer("frames", 8);
            ScriptBuffer setup = b.Structure("setup", 24, (0, 2, b.Peer), (4, 4, 1), (8, 2, 77), (16, 8, list));
            b.Op(GrantOperation.SetupTable, "a", setup, 1);
            b.Load(setup[8], 2);
            b.Load(list);
            ScriptBuffer version = b.Structure("version", 8, (0, 2, b.Peer));
            b.Op(GrantOperation.GetVersion, "a", version, 1);
            b.Load(version[4], 4);
            ScriptBuffer frames = b.Structure("status", 16, (0, 4, 1), (4, 2, b.Peer), (6, 2, 77), (8, 8, list));
            b.Op(GrantOperation.GetStatusFrames, "a", frames, 1);
            b.Load(frames[6], 2);
        });
    });

    private static Granted Grant(AbiCase from, AbiCase to, ScratchPage table, int reference, int flags = GrantFlag.PermitAccess)
        => Granted.Make(from, to, table, reference, flags);
}
