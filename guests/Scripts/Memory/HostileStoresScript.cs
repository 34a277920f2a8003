// The same attempts as stores into read-only page tables, which the hypervisor performs, and as lists of calls in one.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Memory;

internal static class HostileStoresScript
{
    // struct multicall_entry.
    private const int EntrySize = 64;
    private const int Result = 8;
    private const int Arguments = 16;

    public static AbiScript Create() => new("hostile-stores", "hostile guest", script =>
    {
        script.Case("the assist is turned on", c => c.Hypercall(GuestHypercall.VmAssist, VmAssist.Enable, VmAssist.WritablePagetables));
        WriteStores(script);
        WriteLists(script);
    });

    private static void WriteStores(AbiScript script)
    {
        script.Case("whole entries for what may not be mapped, and what they would map", c =>
        {
            AddressWindow window = AddressWindow.CreateWithData(c, 90, out ScratchPage data);
            foreach ((string name, Value entry) in (ReadOnlySpan<(string, Value)>)
                [
                    ("itself", window.L1.Entry(Pte.ReadWrite)), ("its L2", window.L2.Entry(Pte.ReadWrite)), ("its L3", window.L3.Entry(Pte.ReadWrite)),
                    ("the root", (c.Root << 12) | Pte.ReadWrite), ("no memory", ((Value)Bad.Frame << 12) | Pte.ReadWrite), ("frame 0", Pte.ReadWrite),
                    ("the last frame", ((Value)Bad.InvalidFrame << 12) | Pte.ReadOnly), ("uncached", data.Entry(Pte.ReadWrite | Pte.CacheDisable)),
                    ("the hypervisor's table", (c.Get(c.RootAddress + (260 * 8)) & Pte.Frame) | Pte.ReadOnly),
                ])
            {
                c.Store(window.L1[8], 8, entry.Named(name));
                c.Load(window.At(1));
            }

            c.Load(window.At(0));
            window.Remove(c);
        });
        script.Case("parts of an entry make a table writable", c =>
        {
            AddressWindow window = AddressWindow.CreateWithData(c, 91, out ScratchPage data);
            c.Store(window.L1[8], 8, window.L2.Entry(Pte.ReadOnly));
            c.Store(window.L1[8], 1, Pte.ReadWrite);
            c.Store(window.L1[8], 2, (window.L2.Entry(Pte.ReadWrite) & 0xffff).Named("low half of l2|0x63"));
            c.Store(window.L1[8], 4, (window.L2.Entry(Pte.ReadWrite) & 0xffff_ffff).Named("low word of l2|0x63"));
            On(c, "lock or dword [rdi], 2", static a => a.@lock.or(__dword_ptr[rdi], 2), window.L1[8]);
            On(c, "lock bts qword [rdi], 1", static a => a.@lock.bts(__qword_ptr[rdi], 1), window.L1[8]);
            On(c, "add byte [rdi], 2", static a => a.add(__byte_ptr[rdi], 2), window.L1[8]);
            On(c, "xor byte [rdi], 2", static a => a.xor(__byte_ptr[rdi], 2), window.L1[8]);
            c.ShowFlags(c.Get(window.L1[8]), "l1[1]");
            c.Store(window.At(1) + 8, 8, data.Entry(Pte.Table | Pte.LargePage));
            window.Remove(c);
        });
        script.Case("the halves of two good entries make a bad one", c =>
        {
            AddressWindow window = AddressWindow.CreateWithData(c, 92, out ScratchPage data);
            c.Store(window.L1[8], 8, data.Entry(Pte.ReadWrite));
            c.Store(window.L1[12], 4, 0x000f_ffff);
            c.Store(window.L1[14], 1, 0xff);
            c.Load(window.At(1));
            c.Store(window.L1[9], 2, (window.L1.Mfn << 4).Named("frame of l1"));
            c.Store(window.L1[4], 8, data.Entry(Pte.ReadWrite));
            c.ShowFlags(c.Get(window.L1.At), "l1[0]");
            c.ShowFlags(c.Get(window.L1[8]), "l1[1]");
            window.Remove(c);
        });
        script.Case("compare and exchange to a writable table", c =>
        {
            AddressWindow window = AddressWindow.CreateWithData(c, 93, out _);
            c.Store(window.L1[8], 8, window.L3.Entry(Pte.ReadOnly));
            Value now = c.Keep(c.Get(window.L1[8]), "l1[1]");
            c.Kernel("lock cmpxchg [rdi], rcx", static a => a.@lock.cmpxchg(__[rdi], rcx), null,
                [(Register64.Rdi, window.L1[8]), (Register64.Rax, now), (Register64.Rcx, (now | Pte.Writable).Named("l1[1]|2"))]);
            c.Kernel("xchg [rdi], rcx", static a => a.xchg(__[rdi], rcx), null, [(Register64.Rdi, window.L1[8]), (Register64.Rcx, (now | Pte.Writable).Named("l1[1]|2"))]);
            c.Kernel("lock cmpxchg16b [rdi]", static a => a.@lock.cmpxchg16b(__xmmword_ptr[rdi]), null,
                [(Register64.Rdi, window.L1[16]), (Register64.Rbx, window.L3.Entry(Pte.ReadWrite)), (Register64.Rcx, window.L3.Entry(Pte.ReadWrite))]);
            c.Store(window.At(1), 8, 0);
            c.Load(window.At(2));
            window.Remove(c);
        });
        script.Case("upper tables: superpages, Writable on a linear entry, the hypervisor's slots", c =>
        {
            AddressWindow window = AddressWindow.CreateWithData(c, 94, out ScratchPage data);
            c.Store(window.L2.At, 8, window.L1.Entry(Pte.Table | Pte.LargePage));
            On(c, "lock bts qword [rdi], 7", static a => a.@lock.bts(__qword_ptr[rdi], 7), window.L2.At);
            On(c, "lock bts qword [rdi], 7", static a => a.@lock.bts(__qword_ptr[rdi], 7), window.L3.At);
            c.MmuUpdate(MmuRequest.Normal(window.L2, 1, window.L2.Entry(Pte.ReadOnly)));
            On(c, "lock bts qword [rdi], 1", static a => a.@lock.bts(__qword_ptr[rdi], 1), window.L2[8]);
            c.Store(window.L2[8], 8, data.Entry(Pte.Table));
            ScratchPage alias = c.Page("root's alias");
            c.UpdateVa(alias, ((c.Root << 12) | Pte.ReadOnly).Named("root|0x61"));
            On(c, "lock or qword [rdi], 2", static a => a.@lock.or(__qword_ptr[rdi], 2), alias[256 * 8]);
            c.ShowFlags(c.Get(window.L2.At), "l2[0]");
            c.ShowFlags(c.Get(window.L2[8]), "l2[1]");
            c.Load(window.At(0));
            window.Remove(c);
        });
        script.Case("a store after the table is none, through the mapping that was performed on", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page("data");
            c.Store(table.At, 8, data.Entry(Pte.ReadWrite));
            c.Unpin(table);
            c.Store(table.At, 8, ((c.Root << 12) | Pte.ReadWrite).Named("root|0x63"));
            c.Pin(2, table);
            c.MmuUpdate(MmuRequest.Normal(table, 0, 0));
            c.Pin(2, table);
            c.Store(table.At, 8, data.Entry(Pte.Table));
            c.Unpin(table);
            c.UpdateVa(data, data.Entry(Pte.ReadOnly));
            c.Pin(1, data);
        });
        script.Case("a string of entries from a source that is the table itself", c =>
        {
            AddressWindow window = AddressWindow.CreateWithData(c, 95, out ScratchPage data);
            c.Kernel("rep movsq", static a => a.rep.movsq(), [Register64.Rcx],
                [(Register64.Rdi, window.L1[8]), (Register64.Rsi, window.L1.At), (Register64.Rcx, 4)]);
            c.Store(window.At(4), 8, 0x1122);
            c.Load(data.At);
            c.UpdateVa(data, data.Entry(Pte.ReadOnly));
            c.Pin(1, data);
            c.Kernel("rep stosq", static a => a.rep.stosq(), [Register64.Rcx], [(Register64.Rdi, window.L1.At), (Register64.Rax, 0), (Register64.Rcx, 5)]);
            c.Pin(1, data);
            c.Store(window.At(4), 8, 0);
            window.Remove(c);
        });
    }

    private static void WriteLists(AbiScript script)
    {
        script.Case("a page becomes a table and is written, all in one list", c =>
        {
            ScratchPage table = c.Page("table");
            ScratchPage data = c.Page("data");
            ScriptBuffer pin = c.Operations("pin", new MmuextRequest(Mmuext.PinL1Table, table.Mfn));
            ScriptBuffer unpin = c.Operations("unpin", new MmuextRequest(Mmuext.UnpinTable, table.Mfn));
            ScriptBuffer clear = c.Operations("clear", new MmuextRequest(Mmuext.ClearPage, table.Mfn));
            ScriptBuffer map = c.Requests("map", MmuRequest.Normal(table, 0, data.Entry(Pte.ReadWrite)));
            Lists(c, "read-only, pin, writable, map, clear, unpin, writable, clear",
                (GuestHypercall.UpdateVaMapping, [table.At, table.Entry(Pte.ReadOnly), Uvmf.None]),
                (GuestHypercall.MmuextOp, [pin, 1, 0, Domid.Self]),
                (GuestHypercall.UpdateVaMapping, [table.At, table.Entry(Pte.ReadWrite), Uvmf.None]),
                (GuestHypercall.MmuUpdate, [map, 1, 0, Domid.Self]),
                (GuestHypercall.MmuextOp, [clear, 1, 0, Domid.Self]),
                (GuestHypercall.MmuextOp, [unpin, 1, 0, Domid.Self]),
                (GuestHypercall.UpdateVaMapping, [table.At, table.Entry(Pte.ReadWrite), Uvmf.None]),
                (GuestHypercall.MmuextOp, [clear, 1, 0, Domid.Self]));
            c.Load(table.At);
            c.Store(table.At, 8, 1);
        });
        script.Case("superpages, writable linear entries and the hypervisor's slots, in one list", c =>
        {
            AddressWindow window = AddressWindow.CreateWithData(c, 97, out ScratchPage data);
            ScriptBuffer superpage = c.Requests("superpage", MmuRequest.Normal(window.L2, 0, window.L1.Entry(Pte.Table | Pte.LargePage)));
            ScriptBuffer linear = c.Requests("linear", MmuRequest.Normal(window.L3, 1, window.L3.Entry(Pte.ReadOnly)));
            ScriptBuffer writable = c.Requests("writable", MmuRequest.With(MmuCommand.PtUpdatePreserveAd, window.L3, 1, window.L3.Entry(Pte.ReadWrite)));
            ScriptBuffer slot = c.Requests("slot", new MmuRequest(AddressWindow.Root(c, 256), window.L3.Entry(Pte.Table)));
            Lists(c, "superpage, linear, writable, slot, superpage",
                (GuestHypercall.MmuUpdate, [superpage, 1, 0, Domid.Self]),
                (GuestHypercall.MmuUpdate, [linear, 1, 0, Domid.Self]),
                (GuestHypercall.MmuUpdate, [writable, 1, 0, Domid.Self]),
                (GuestHypercall.MmuUpdate, [slot, 1, 0, Domid.Self]),
                (GuestHypercall.MmuUpdate, [superpage, 1, 0, Domid.Self]));
            c.ShowFlags(c.Get(window.L3[8]), "l3[1]");
            c.Load(window.At(0));
            c.Load(window.At(1));
            window.Remove(c);
        });
        script.Case("an entry changes and its page is given another use before the list ends", c =>
        {
            AddressWindow window = AddressWindow.CreateWithData(c, 98, out ScratchPage data);
            c.UpdateVa(data, data.Entry(Pte.ReadOnly));
            c.Store(window.At(0), 8, 0);
            ScriptBuffer remove = c.Requests("remove", MmuRequest.Normal(window.L1, 0, 0));
            ScriptBuffer pin = c.Operations("pin", new MmuextRequest(Mmuext.PinL2Table, data.Mfn));
            ScriptBuffer add = c.Requests("add", MmuRequest.Normal(window.L1, 0, data.Entry(Pte.ReadWrite)));
            Lists(c, "remove, pin, add",
                (GuestHypercall.MmuUpdate, [remove, 1, 0, Domid.Self]),
                (GuestHypercall.MmuextOp, [pin, 1, 0, Domid.Self]),
                (GuestHypercall.MmuUpdate, [add, 1, 0, Domid.Self]));
            c.Store(window.At(0), 8, window.L1.Entry(Pte.Table | Pte.LargePage));
            c.Load(data.At);
            window.Remove(c);
        });
        script.Case("the list, its results and its arguments in a page that becomes a table", c =>
        {
            ScratchPage page = c.Page("page");
            ScriptBuffer pin = c.Operations("pin", new MmuextRequest(Mmuext.PinL1Table, page.Mfn));
            Put(c, page, 0, GuestHypercall.UpdateVaMapping, page.At, page.Entry(Pte.ReadOnly), Uvmf.Invlpg);
            Put(c, page, 1, GuestHypercall.MmuextOp, pin, 1, 0, Domid.Self);
            c.Hypercall((ulong)GuestHypercall.Multicall, "multicall(read-only and pin, from the page itself)", AnswerFormat.Result, page.At, 2);
            c.Load(page[Result]);
            c.Load(page[EntrySize + Result]);
            c.Pin(1, page);

            // An aliased list, whose first call takes the alias away.
            ScratchPage list = c.Page("list");
            AddressWindow window = AddressWindow.Create(c, 99, list.Entry(Pte.ReadWrite));
            Put(c, list, 0, GuestHypercall.UpdateVaMapping, window.At(0), 0, Uvmf.Invlpg);
            Put(c, list, 1, GuestHypercall.XenVersion, 0, 0);
            c.Hypercall((ulong)GuestHypercall.Multicall, "multicall(the alias goes; version)", AnswerFormat.Result, window.At(0), 2);
            c.Load(list[Result]);
            c.Load(list[EntrySize + Result]);
            window.Remove(c);
        });
    }

    private static void On(AbiCase c, string text, Action<Assembler> emit, Value address) => c.Kernel(text, emit, null, [(Register64.Rdi, address)]);

    private static void Put(AbiCase c, ScratchPage page, int index, GuestHypercall number, params Value[] arguments)
    {
        c.Put(page[index * EntrySize], 8, (int)number);
        foreach ((int i, Value argument) in arguments.Index())
            c.Put(page[(index * EntrySize) + Arguments + (8 * i)], 8, argument);
    }

    /// <summary>A multicall, and each of its results.</summary>
    private static void Lists(AbiCase c, string text, params (GuestHypercall Number, Value[] Arguments)[] calls)
    {
        ScriptBuffer list = c.Buffer("list", calls.Length * EntrySize);
        foreach ((int i, (GuestHypercall number, Value[] arguments)) in calls.Index())
        {
            c.Put(list[i * EntrySize], 8, (int)number);
            foreach ((int j, Value argument) in arguments.Index())
                c.Put(list[(i * EntrySize) + Arguments + (8 * j)], 8, argument);
        }

        c.Hypercall((ulong)GuestHypercall.Multicall, $"multicall({text})", AnswerFormat.Result, list, calls.Length);
        for (int i = 0; i < calls.Length; i++)
            c.Load(list[(i * EntrySize) + Result], 8, AnswerFormat.Result);
    }
}
