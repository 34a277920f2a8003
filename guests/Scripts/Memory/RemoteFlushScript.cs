// What other vCPUs still see of an entry that one has changed: nothing, once the flush has been answered.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Memory;

internal static class RemoteFlushScript
{
    private static readonly TimeSpan s_joined = TimeSpan.FromSeconds(10);

    public static AbiScript Create() => new("remote-flush", "mmuext_op", script =>
    {
        script.Case("every flush that reaches another vCPU", c =>
        {
            ScratchPage[] pages = c.Pages(10);
            ScriptBuffer turns = c.Buffer("turns", 16);
            ScriptBuffer second = c.Structure("vCPU 1", 8, (0, 8, 2));
            for (int i = 1; i < pages.Length; i++)
                c.Put(pages[i].At, 8, (ulong)i);
            c.StartVcpu(1, one =>
            {
                for (ulong turn = 1; turn < 10; turn++)
                {
                    one.Load(pages[0].At);
                    one.PassTurn(turns, turn);
                }

                one.Load(pages[0].At);
            });
            for (ulong turn = 1; turn < 10; turn++)
            {
                Value entry = pages[turn].Entry(Pte.ReadWrite);
                c.AwaitTurn(turns, turn);
                if (turn <= 4)
                    c.Hypercall(GuestHypercall.UpdateVaMapping, pages[0].At, entry, FlagsOf(turn, second));
                else
                    c.MmuUpdate(new MmuRequest(pages[0].EntryAddress, entry));
                switch (turn)
                {
                    case 5:
                        c.MmuextOp("flush all", new MmuextRequest(Mmuext.TlbFlushAll));
                        break;
                    case 6:
                        c.MmuextOp("invlpg all", new MmuextRequest(Mmuext.InvlpgAll, pages[0].At));
                        break;
                    case 7:
                        c.MmuextOp("flush vCPU 1", new MmuextRequest(Mmuext.TlbFlushMulti, 0, second.At));
                        break;
                    case 8:
                        c.MmuextOp("invlpg vCPU 1", new MmuextRequest(Mmuext.InvlpgMulti, pages[0].At, second.At));
                        break;
                    case 9:
                        c.MmuextOp("flush all, after two", new MmuextRequest(Mmuext.TlbFlushLocal), new MmuextRequest(Mmuext.TlbFlushAll));
                        break;
                }

                c.EndTurn(turns, turn);
            }

            c.Join(1, s_joined);
        });
        script.Case("a page that another vCPU writes becomes a page table", c =>
        {
            ScratchPage page = c.Page();
            ScriptBuffer turns = c.Buffer("turns", 16);
            c.StartVcpu(2, two =>
            {
                two.Store(page.At, 8, 0x1000);
                two.PassTurn(turns, 1);
                two.Store(page.At, 8, 0x2000);
                two.PassTurn(turns, 2);
                two.Store(page.At, 8, 0x3000);
                two.Load(page.At);
            });
            c.AwaitTurn(turns, 1);

            // Nobody asks for a flush: the page's new type does.
            c.MmuUpdate(new MmuRequest(page.EntryAddress, page.Entry(Pte.ReadOnly)));
            c.Pin(2, page);
            c.EndTurn(turns, 1);
            c.AwaitTurn(turns, 2);
            c.Load(page.At);
            c.Unpin(page);
            c.UpdateVa(page, page.Entry(Pte.ReadWrite), Uvmf.Invlpg | Uvmf.All);
            c.EndTurn(turns, 2);
            c.Join(2, s_joined);
        });
        script.Case("a table that another vCPU walks is taken out, and written as a page", c =>
        {
            ScratchPage[] pages = c.Pages(3);
            ScriptBuffer turns = c.Buffer("turns", 16);
            c.Put(pages[0].At, 8, 0x2222);
            c.Put(pages[1].At, 8, 0x3333);
            ScratchPage next = pages[2];
            c.Put(next.At, 8, pages[1].Entry(Pte.ReadWrite));
            c.ReadOnly(next);
            AddressWindow window = AddressWindow.Create(c, 5, pages[0].Entry(Pte.ReadWrite));
            c.StartVcpu(3, three =>
            {
                three.Load(window.At(0));
                three.PassTurn(turns, 1);
                three.Load(window.At(0));
                three.PassTurn(turns, 2);
                three.Load(window.At(0));
            });
            c.AwaitTurn(turns, 1);
            c.MmuUpdate(MmuRequest.Normal(window.L2, 0, next.Entry(Pte.Table)));
            c.EndTurn(turns, 1);
            c.AwaitTurn(turns, 2);
            c.UpdateVa(window.L1, window.L1.Entry(Pte.ReadWrite), Uvmf.Invlpg | Uvmf.All);
            c.Store(window.L1.At, 8, 0);
            c.EndTurn(turns, 2);
            c.Join(3, s_joined);
        });
    });

    private static Value FlagsOf(ulong turn, ScriptBuffer second) => turn switch
    {
        1 => Uvmf.TlbFlush | Uvmf.All,
        2 => Uvmf.Invlpg | Uvmf.All,
        3 => second.At + Uvmf.TlbFlush,
        _ => second.At + Uvmf.Invlpg,
    };

    /// <summary>Says that it is the other's turn, and waits until that is over, without leaving the guest.</summary>
    private static void PassTurn(this AbiCase c, ScriptBuffer turns, ulong turn)
    {
        c.Put(turns[0], 8, turn);
        c.Await(turns[8], turn);
    }

    private static void AwaitTurn(this AbiCase c, ScriptBuffer turns, ulong turn) => c.Await(turns[0], turn);

    private static void EndTurn(this AbiCase c, ScriptBuffer turns, ulong turn) => c.Put(turns[8], 8, turn);

    private static void Await(this AbiCase c, Value address, ulong value)
        => c.Kernel(
            $"await turn {value}",
            a =>
            {
                Label again = a.CreateLabel();
                a.Label(ref again);
                a.pause();
                a.cmp(__qword_ptr[rcx], (int)value);
                a.jb(again);
            },
            with: [(Register64.Rcx, address)]);
}
