// multicall: lists of hypercalls, and what becomes of them when something in between is wrong or comes up.
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Events;

internal static class MulticallScript
{
    // struct multicall_entry.
    private const int EntrySize = 64;
    private const int Result = 8;
    private const int Arguments = 16;
    private const int Untouched = 77;

    /// <summary>A hypercall that no Xen has.</summary>
    private const int UnknownHypercall = 62;

    public static AbiScript Create() => new("multicall", "multicall", script =>
    {
        script.LevelPorts();
        script.Case("three hypercalls", c =>
        {
            ScriptBuffer list = List(c, (GuestHypercall.XenVersion, [0, 0]), (GuestHypercall.SetTimerOp, [0]), (GuestHypercall.XenVersion, [7, 0]));
            Call(c, list, 3);
            Results(c, list, 3);
        });
        script.Case("one that fails does not stop the others", c =>
        {
            ScriptBuffer list = List(
                c, ((GuestHypercall)UnknownHypercall, []), (GuestHypercall.XenVersion, [6, 0]), (GuestHypercall.SchedOp, [255, 0]),
                (GuestHypercall.XenVersion, [0, 0]));
            Call(c, list, 4);
            Results(c, list, 4);
        });
        script.Case("an entry keeps all but its result", c =>
        {
            ScriptBuffer list = List(c, (GuestHypercall.XenVersion, [0, 1, 2, 3, 4, 5]));
            Call(c, list, 1);
            for (int offset = 0; offset < EntrySize; offset += 8)
                c.Load(list[offset]);
        });
        script.Case("a multicall in a multicall", c =>
        {
            ScriptBuffer inner = List(c, (GuestHypercall.XenVersion, [0, 0]));
            ScriptBuffer list = List(c, (GuestHypercall.Multicall, [inner, 1]), (GuestHypercall.XenVersion, [0, 0]));
            Call(c, list, 2);
            Results(c, list, 2);
            Results(c, inner, 1);
            Call(c, inner, 1);
        });
        script.Case("no entries", c =>
        {
            Call(c, List(c, (GuestHypercall.XenVersion, [0, 0])), 0);
            Call(c, BadAddress.Null, 0);
            Call(c, BadAddress.NonCanonical, 0);
            Call(c, BadAddress.Hypervisor, 0);
        });
        script.Case("lists that cannot be read", c =>
        {
            Call(c, BadAddress.Null, 1);
            Call(c, BadAddress.NonCanonical, 1);
            Call(c, BadAddress.Hypervisor, 1);
            Call(c, c.UnmappedPage().At, 1);
            Call(c, c.PageEnd(EntrySize - 8), 1);
        });
        script.Case("a list that goes on behind a page's end", c =>
        {
            Value end = c.PageEnd(2 * EntrySize);
            for (int i = 0; i < 2; i++)
            {
                c.Put(end + (i * EntrySize), 8, (int)GuestHypercall.XenVersion);
                c.Put(end + ((i * EntrySize) + Result), 8, Untouched);
            }

            Call(c, end, 3);
            c.Load(end + Result);
            c.Load(end + (EntrySize + Result));
            c.Put(end + Result, 8, Untouched);
            Call(c, end, 0xffff_ffffU);
            c.Load(end + Result);
        });
        script.Case("the count is the low half of its argument", c =>
        {
            ScriptBuffer list = List(c, (GuestHypercall.XenVersion, [0, 0]), (GuestHypercall.XenVersion, [0, 0]));
            Call(c, list, 0x1_0000_0001UL);
            Results(c, list, 2);
        });
        script.Case("the number of an entry is all of it", c =>
        {
            ScriptBuffer list = List(c, (GuestHypercall.XenVersion, [0, 0]));
            c.Put(list, 8, 0x1_0000_0000UL | (ulong)GuestHypercall.XenVersion);
            Call(c, list, 1);
            Results(c, list, 1);
        });
        script.Case("a result that cannot be written ends it, after what was done", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            ScriptBuffer send = c.Structure("send", 8, (0, 4, port));
            ScratchPage page = c.ReadOnlyPageOf(
                (0, 8, (int)GuestHypercall.EventChannelOp), (Arguments, 8, (int)EventOperation.Send), (Arguments + 8, 8, send),
                (EntrySize, 8, (int)GuestHypercall.XenVersion));
            Call(c, page.At, 2);
            c.ShowPending();
            c.QuietEvents();
            c.ClosePort(port);
        });
        script.Case("an event comes between entries", c =>
        {
            Value port = c.Keep(c.BindIpi(0), "port");
            c.Unmask(port);
            ScriptBuffer send = c.Structure("send", 8, (0, 4, port));
            ScriptBuffer list = List(
                c, (GuestHypercall.EventChannelOp, [(int)EventOperation.Send, send]), (GuestHypercall.XenVersion, [0, 0]),
                (GuestHypercall.EventChannelOp, [(int)EventOperation.Send, send]), (GuestHypercall.XenVersion, [0, 0]));
            c.MaskUpcalls(false);
            Call(c, list, 4);
            Results(c, list, 4);
            c.QuietEvents();
            c.ClosePort(port);
        });
        script.Case("a block between entries", c =>
        {
            Value port = c.Keep(c.BindVirq(Virq.Timer, 0), "timer port");
            c.Unmask(port);
            c.Hypercall(GuestHypercall.SetTimerOp, Value.SystemTime + 20_000_000);
            ScriptBuffer list = List(c, (GuestHypercall.SchedOp, [(int)SchedulerOperation.Block, 0]), (GuestHypercall.XenVersion, [0, 0]));
            Call(c, list, 2);
            Results(c, list, 2);
            c.QuietEvents();
            c.ClosePort(port);
        });
        script.Case("an iret among the entries ends the list", c =>
        {
            ScriptBuffer list = List(c, (GuestHypercall.XenVersion, [0, 0]), (GuestHypercall.Iret, []), (GuestHypercall.XenVersion, [0, 0]));
            c.Kernel("multicall of a version, an iret and a version", a =>
            {
                const int flatKernelSs = 0xe02b;
                const int flatKernelCs = 0xe030;
                const int raxOfFrame = 1234;
                Iced.Intel.Label after = a.CreateLabel();
                a.mov(rdx, rsp);
                a.mov(eax, flatKernelSs);
                a.push(rax);
                a.push(rdx);
                a.push(2);
                a.mov(eax, flatKernelCs);
                a.push(rax);
                a.lea(rax, __[after]);
                a.push(rax);
                a.push(0);
                a.push(0);
                a.push(0);
                a.push(raxOfFrame);
                a.mov(rdi, list.Address);
                a.mov(esi, 3);
                a.mov(eax, (int)GuestHypercall.Multicall);
                a.syscall();
                a.ud2();
                a.Label(ref after);
                a.nop();
            }, show: [Register64.Rax]);
            c.Load(list[Result]);
            c.Load(list[EntrySize + Result]);
            c.Load(list[(2 * EntrySize) + Result]);
        });
        script.Case("page tables are changed in it", c =>
        {
            ScratchPage page = c.Page();
            const ulong readOnly = 0x61;
            const ulong writable = 0x63;
            const int invalidatePage = 2;
            ScriptBuffer list = List(
                c, (GuestHypercall.UpdateVaMapping, [page.At, page.Entry(readOnly), invalidatePage]),
                (GuestHypercall.UpdateVaMapping, [page.At, page.Entry(writable), invalidatePage]),
                (GuestHypercall.UpdateVaMapping, [page.At, page.Entry(readOnly), invalidatePage]));
            Call(c, list, 2);
            c.Store(page.At, 8, 1);
            Call(c, list, 3);
            c.Store(page.At, 8, 2);
        });
    });

    private static ScriptBuffer List(AbiCase c, params (GuestHypercall Number, Value[] Arguments)[] calls)
    {
        ScriptBuffer list = c.Buffer("list", calls.Length * EntrySize);
        foreach ((int i, (GuestHypercall number, Value[] arguments)) in calls.Index())
        {
            c.Put(list[i * EntrySize], 8, (int)number);
            c.Put(list[(i * EntrySize) + Result], 8, Untouched);
            foreach ((int j, Value argument) in arguments.Index())
                c.Put(list[(i * EntrySize) + Arguments + (8 * j)], 8, argument);
        }

        return list;
    }

    private static void Call(AbiCase c, Value list, Value count) => c.Hypercall(GuestHypercall.Multicall, list, count);

    private static void Results(AbiCase c, ScriptBuffer list, int count)
    {
        for (int i = 0; i < count; i++)
            c.Load(list[(i * EntrySize) + Result]);
    }
}
