// Stores of the guest kernel to page tables that it has mapped read-only: performed where they make a good L1, a fault otherwise.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Memory;

internal static class PageTableStoresScript
{
    // A value that no entry maps anything with: Present is clear.
    private const ulong Absent = 0x0123_4567_89ab_cdee;

    public static AbiScript Create() => new("page-table-stores", "page-table stores", script =>
    {
        script.Case("without the assist a store to a page table is a fault", c =>
        {
            c.Hypercall(GuestHypercall.VmAssist, VmAssist.Disable, VmAssist.WritablePagetables);
            ScratchPage table = c.PinnedTable(1, "l1");
            c.Store(table.At, 8, Absent);
            c.ShowFlags(c.Get(table.At), "l1[0]");
        });
        script.Case("the assist is turned on", c => c.Hypercall(GuestHypercall.VmAssist, VmAssist.Enable, VmAssist.WritablePagetables));
        WritePlain(script);
        WriteStack(script);
        WriteReadModifyWrite(script);
        WriteCompareExchange(script);
        WriteStrings(script);
        WriteRefused(script);
        script.Case("without the assist again", c =>
        {
            c.Hypercall(GuestHypercall.VmAssist, VmAssist.Disable, VmAssist.WritablePagetables);
            ScratchPage table = c.PinnedTable(1, "l1");
            c.Store(table.At, 8, Absent);
        });
    });

    private static void WritePlain(AbiScript script)
    {
        script.Case("whole entries: a frame comes, changes and goes", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage[] data = c.Pages(2);
            c.Store(table.At, 8, data[0].Entry(Pte.ReadWrite));
            c.ShowEntry(table, 0);
            c.Store(table.At, 8, data[1].Entry(Pte.ReadOnly | Pte.User));
            c.ShowEntry(table, 0);
            c.Store(table.At, 8, 0);
            c.Load(table.At);
            c.Store(table[4088], 8, data[1].Entry(Pte.ReadOnly | Pte.NoExecute));
            c.ShowEntry(table, 511);
        });
        script.Case("what a store has mapped counts", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page("data");
            c.Store(table.At, 8, data.Entry(Pte.ReadWrite));
            c.ReadOnly(data);
            c.Pin(1, data);
            c.Store(table.At, 8, data.Entry(Pte.ReadOnly));
            c.Pin(1, data);
            c.Store(table[8], 8, data.Entry(Pte.ReadWrite));
            c.Load(table[8]);
        });
        script.Case("parts of an entry that is not present", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            c.Store(table.At, 8, Absent);
            c.Store(table[1], 1, 0x11);
            c.Store(table[2], 2, 0x2222);
            c.Store(table[4], 4, 0x3333_3333);
            c.Load(table.At);
            c.Store(table[7], 1, 0x44);
            c.Store(table[6], 2, 0x5566);
            c.Store(table.At, 4, 0x7777_7776);
            c.Load(table.At);
        });
        script.Case("parts of an entry that is present", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page();
            c.Store(table.At, 8, data.Entry(Pte.ReadWrite));
            c.Store(table.At, 1, Pte.ReadOnly);
            c.ShowEntry(table, 0);
            c.Store(table[7], 1, 0x80);
            c.ShowEntry(table, 0);
            c.Store(table[4], 4, 0x7fff_ffff);
            c.ShowEntry(table, 0);
            c.Store(table.At, 4, 0);
            c.Load(table.At, 4);
        });
        script.Case("a new upper half makes a good entry of the lower one", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page();
            c.Store(table[4], 4, data.Entry(Pte.ReadWrite) >> 32);
            c.Store(table.At, 4, data.Entry(Pte.ReadWrite));
            c.ShowEntry(table, 0);
        });
        script.Case("a store through an alias, and one that changes its own mapping", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage alias = c.Page("alias");
            ScratchPage data = c.Page("data");
            c.UpdateVa(alias, table.Entry(Pte.ReadOnly));
            c.Store(alias.At, 8, data.Entry(Pte.ReadWrite));
            c.ShowEntry(table, 0);
            AddressWindow window = AddressWindow.Create(c, 4, data.Entry(Pte.ReadWrite));
            c.UpdateVa(alias, window.L1.Entry(Pte.ReadOnly));
            c.Load(window.At(0));
            c.Store(alias.At, 8, 0);
            c.One("flush", Mmuext.TlbFlushLocal, 0);
            c.Load(window.At(0));
            c.Store(alias.At, 8, data.Entry(Pte.ReadOnly));
            c.Load(window.At(0));
            c.Store(window.At(0), 8, 1);
        });
        script.Case("other forms of a store", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            Show(c, table, "mov qword [rdi], -2", static a => a.mov(__qword_ptr[rdi], -2));
            Show(c, table, "mov dword [rdi + 4], 0x1234", static a => a.mov(__dword_ptr[rdi + 4], 0x1234));
            Show(c, table, "mov byte [rdi + rcx * 8], 2", static a => a.mov(__byte_ptr[rdi + rcx * 8], 2));
            Show(c, table, "movnti [rdi], rax", static a => a.movnti(__qword_ptr[rdi], rax));
            Show(c, table, "pop qword [rdi]", static a =>
            {
                a.push(rax);
                a.pop(__qword_ptr[rdi]);
            });
            Show(c, table, "setc byte [rdi]", static a =>
            {
                a.stc();
                a.setc(__byte_ptr[rdi + 1]);
            });
            Show(c, table, "mov word [rdi + 2], ds", static a => a.mov(__word_ptr[rdi + 2], ds));
        });
    }

    private static void WriteStack(AbiScript script)
    {
        script.Case("pushes onto a page table", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            void Push(string text, Action<Assembler> emit)
            {
                c.Kernel(text, a =>
                {
                    a.mov(rbx, rsp);
                    a.lea(rsp, __[rdi + 16]);
                    emit(a);
                    a.mov(rcx, rsp);
                    a.mov(rsp, rbx);
                }, [Register64.Rcx], [(Register64.Rdi, table.At), (Register64.Rax, 0x1_0000_0222)]);
                c.Load(table[8]);
            }

            Push("push rax", static a => a.push(rax));
            Push("push 0x70", static a => a.push(0x70));
            Push("push qword [rdi + 8]", static a => a.push(__qword_ptr[rdi + 8]));
            Push("push ax", static a => a.push(ax));
            Push("pushfq", static a => a.pushfq());
            Push("call next", static a =>
            {
                Label next = a.CreateLabel();
                a.call(next);
                a.Label(ref next);
                a.mov(rax, __[rsp]);
                a.lea(rdx, __[next]);
                a.sub(rdx, rax);
                a.mov(__qword_ptr[rsp], rdx);
            });
        });
    }

    private static void WriteReadModifyWrite(AbiScript script)
    {
        (string Text, Action<Assembler> Emit)[] operations =
        [
            ("xchg [rdi], rax", static a => a.xchg(__[rdi], rax)),
            ("xchg [rdi], al", static a => a.xchg(__[rdi], al)),
            ("lock or [rdi], rax", static a => a.@lock.or(__[rdi], rax)),
            ("lock and [rdi], rax", static a => a.@lock.and(__[rdi], rax)),
            ("lock xor [rdi], eax", static a => a.@lock.xor(__[rdi], eax)),
            ("or dword [rdi], 0x200", static a => a.or(__dword_ptr[rdi], 0x200)),
            ("and byte [rdi], 0xfd", static a => a.and(__byte_ptr[rdi], -3)),
            ("add [rdi], rax", static a => a.add(__[rdi], rax)),
            ("lock sub [rdi], rax", static a => a.@lock.sub(__[rdi], rax)),
            ("adc [rdi], rdx after stc", static a =>
            {
                a.stc();
                a.adc(__[rdi], rdx);
            }),
            ("sbb [rdi], rdx after stc", static a =>
            {
                a.stc();
                a.sbb(__[rdi], rdx);
            }),
            ("lock xadd [rdi], rax", static a => a.@lock.xadd(__[rdi], rax)),
            ("inc dword [rdi + 4] after stc", static a =>
            {
                a.stc();
                a.inc(__dword_ptr[rdi + 4]);
            }),
            ("dec word [rdi + 2]", static a => a.dec(__word_ptr[rdi + 2])),
            ("not dword [rdi + 4]", static a => a.not(__dword_ptr[rdi + 4])),
            ("neg qword [rdi]", static a => a.neg(__qword_ptr[rdi])),
        ];

        // With these the processor is free to do what it likes with some flags.
        (string Text, Action<Assembler> Emit)[] shifts =
        [
            ("lock bts [rdi], rcx", static a => a.@lock.bts(__[rdi], rcx)),
            ("lock btr [rdi], rcx", static a => a.@lock.btr(__[rdi], rcx)),
            ("btc dword [rdi], 9", static a => a.btc(__dword_ptr[rdi], (sbyte)9)),
            ("bts [rdi], rdx, of the next entry but one", static a => a.bts(__[rdi], rdx)),
            ("shl qword [rdi], 4", static a => a.shl(__qword_ptr[rdi], (sbyte)4)),
            ("ror dword [rdi + 4], cl", static a => a.ror(__dword_ptr[rdi + 4], cl)),
            ("sar byte [rdi + 3], cl", static a => a.sar(__byte_ptr[rdi + 3], cl)),
            ("rcl word [rdi + 6], cl", static a => a.rcl(__word_ptr[rdi + 6], cl)),
            ("shr dword [rdi + 4], 1", static a => a.shr(__dword_ptr[rdi + 4], (sbyte)1)),
            ("shld [rdi], rax, 8", static a => a.shld(__[rdi], rax, (sbyte)8)),
        ];
        script.Case("reading, computing and storing: entries that are not present", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            foreach ((string text, Action<Assembler> emit) in operations)
            {
                c.Store(table.At, 8, Absent);
                c.Kernel(text, emit, [Register64.Rax, Register64.Rflags],
                    [(Register64.Rdi, table.At), (Register64.Rax, 0x1_0000_0222), (Register64.Rcx, 5), (Register64.Rdx, 129)]);
                c.Load(table.At);
            }

        });
        script.Case("bits and shifts: entries that are not present", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            foreach ((string text, Action<Assembler> emit) in shifts)
            {
                c.Store(table.At, 8, Absent);
                c.Kernel($"{text}; setc al", a =>
                {
                    emit(a);
                    a.setc(al);
                }, [Register64.Rax], [(Register64.Rdi, table.At), (Register64.Rax, 0x1_0000_0222), (Register64.Rcx, 5), (Register64.Rdx, 129)]);
                c.Load(table.At);
            }

            c.Load(table[16]);
        });
        script.Case("locked operations on a present entry, as kernels use them", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page("data");
            c.Store(table.At, 8, data.Entry(Pte.ReadWrite));
            c.Kernel("lock btr qword [rdi], 1", static a => a.@lock.btr(__qword_ptr[rdi], (sbyte)1), null, [(Register64.Rdi, table.At)]);
            c.ShowAllFlags(table, 0);
            c.Kernel("lock and qword [rdi], ~0x20", static a => a.@lock.and(__qword_ptr[rdi], ~0x20), [Register64.Rflags], [(Register64.Rdi, table.At)]);
            c.ShowAllFlags(table, 0);
            c.Kernel("lock or qword [rdi], 0x22", static a => a.@lock.or(__qword_ptr[rdi], 0x22), [Register64.Rflags], [(Register64.Rdi, table.At)]);
            c.ShowAllFlags(table, 0);
            RunRegisters after = c.Kernel("xchg [rdi], rax", static a => a.xchg(__[rdi], rax), null, [(Register64.Rdi, table.At), (Register64.Rax, 0)]);
            c.Load(table.At);
            c.ShowFlags(after[Register64.Rax], "what was there");
        });
    }

    private static void WriteCompareExchange(AbiScript script)
    {
        (string Text, Action<Assembler> Emit)[] operations =
        [
            ("lock cmpxchg [rdi], rcx", static a => a.@lock.cmpxchg(__[rdi], rcx)),
            ("cmpxchg [rdi], ecx", static a => a.cmpxchg(__[rdi], ecx)),
            ("cmpxchg [rdi], cl", static a => a.cmpxchg(__[rdi], cl)),
            ("lock cmpxchg8b [rdi]", static a => a.@lock.cmpxchg8b(__[rdi])),
            ("lock cmpxchg16b [rdi]", static a => a.@lock.cmpxchg16b(__[rdi])),
        ];
        script.Case("compare and exchange: equal", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            foreach ((string text, Action<Assembler> emit) in operations)
            {
                // Of eight bytes the upper half is compared with EDX.
                bool isPair = text.Contains("8b", StringComparison.Ordinal);
                ulong expected = isPair ? Absent & uint.MaxValue : Absent;
                c.Store(table.At, 8, isPair ? expected | (2UL << 32) : expected);
                c.Kernel(text, emit, [Register64.Rax, Register64.Rdx, Register64.Rflags],
                    [(Register64.Rdi, table.At), (Register64.Rax, expected), (Register64.Rcx, 0x40), (Register64.Rdx, 2), (Register64.Rbx, 0x60)]);
                c.Load(table.At);
            }
        });
        script.Case("compare and exchange: not equal", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            foreach ((string text, Action<Assembler> emit) in operations)
            {
                c.Store(table.At, 8, Absent);
                c.Kernel(text, emit, [Register64.Rax, Register64.Rdx, Register64.Rflags],
                    [(Register64.Rdi, table.At), (Register64.Rax, 0x8000_0000), (Register64.Rcx, 0x40), (Register64.Rdx, 2), (Register64.Rbx, 0x60)]);
                c.Load(table.At);
            }
        });
        script.Case("compare and exchange of an entry that may not be", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            c.Kernel("lock cmpxchg [rdi], rcx", static a => a.@lock.cmpxchg(__[rdi], rcx), [Register64.Rax, Register64.Rflags],
                [(Register64.Rdi, table.At), (Register64.Rcx, table.Entry(Pte.ReadWrite))]);
            c.Load(table.At);
            c.Kernel("lock cmpxchg [rdi], rcx, not equal", static a => a.@lock.cmpxchg(__[rdi], rcx), [Register64.Rax, Register64.Rflags],
                [(Register64.Rdi, table.At), (Register64.Rax, 8), (Register64.Rcx, table.Entry(Pte.ReadWrite))]);
            c.Load(table.At);
        });
    }

    private static void WriteStrings(AbiScript script)
    {
        script.Case("string stores", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScriptBuffer source = c.Structure("source", 32, (0, 8, 0x10), (8, 8, 0x20), (16, 8, 0x30), (24, 8, 0x40));
            c.Kernel("stosq", static a => a.stosq(), [Register64.Rdi], [(Register64.Rdi, table.At), (Register64.Rax, Absent)]);
            c.Load(table.At);
            c.Kernel("stosb, backwards", static a =>
            {
                a.std();
                a.stosb();
                a.cld();
            }, [Register64.Rdi], [(Register64.Rdi, table[3]), (Register64.Rax, 0x99)]);
            c.Load(table.At);
            c.Kernel("rep stosq", static a => a.rep.stosq(), [Register64.Rdi, Register64.Rcx], [(Register64.Rdi, table.At), (Register64.Rax, 0x70), (Register64.Rcx, 512)]);
            c.Load(table.At);
            c.Load(table[4088]);
            c.Kernel("rep movsq", static a => a.rep.movsq(), [Register64.Rdi, Register64.Rsi, Register64.Rcx],
                [(Register64.Rdi, table[8]), (Register64.Rsi, source.At), (Register64.Rcx, 4)]);
            for (int i = 0; i < 6; i++)
                c.Load(table[i * 8]);
            c.Kernel("movsd", static a => a.movsd(), [Register64.Rdi, Register64.Rsi], [(Register64.Rdi, table[4]), (Register64.Rsi, source[8])]);
            c.Load(table.At);
        });
        script.Case("a string store that comes to an entry that may not be", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage data = c.Page("data");
            ScriptBuffer source = c.Structure("source", 24, (0, 8, data.Entry(Pte.ReadWrite)), (8, 8, table.Entry(Pte.ReadWrite)), (16, 8, 0x30));
            c.Kernel("rep movsq", static a => a.rep.movsq(), null, [(Register64.Rdi, table.At), (Register64.Rsi, source.At), (Register64.Rcx, 3)]);
            c.ShowEntry(table, 0);
            c.Load(table[8]);
            c.Load(table[16]);
        });
        script.Case("a string store from memory that cannot be read, and one out of the table", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            c.Kernel("movsq", static a => a.movsq(), null, [(Register64.Rdi, table.At), (Register64.Rsi, Bad.Unmapped)]);
            ScratchPage next = c.Page("next");
            c.Kernel("rep stosq", static a => a.rep.stosq(), [Register64.Rdi, Register64.Rcx], [(Register64.Rdi, table[4088]), (Register64.Rax, 0x80), (Register64.Rcx, 2)]);
            c.Load(table[4088]);
            c.Load(next.At);
        });
    }

    private static void WriteRefused(AbiScript script)
    {
        script.Case("entries that may not be", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScratchPage upper = c.PinnedTable(2, "l2");
            ScratchPage data = c.Page("data");
            c.Store(table.At, 8, data.Entry(Pte.ReadOnly));
            c.Store(table.At, 8, table.Entry(Pte.ReadWrite));
            c.Store(table.At, 8, upper.Entry(Pte.ReadWrite));
            c.Store(table.At, 8, (((Value)Bad.Frame << 12) | Pte.ReadOnly).Named("beyond memory"));
            c.Store(table.At, 8, data.Entry(Pte.ReadOnly | Pte.CacheDisable));
            c.Store(table[5], 1, 0xff);
            c.ShowEntry(table, 0);
        });
        script.Case("stores across entries and at odd places", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            c.Store(table[4], 8, 0x10);
            c.Store(table[1], 2, 0x10);
            c.Store(table[2], 4, 0x10);
            c.Store(table[7], 2, 0x10);
            c.Load(table.At);
        });
        script.Case("stores across the page's end", c =>
        {
            ScratchPage[] tables = c.Pages(2);
            c.ReadOnly(tables[0]);
            c.Pin(1, tables[0]);
            c.Store(tables[0][4092], 8, 0x10);
            c.Load(tables[0][4088]);
            c.Load(tables[1].At);
        });
        script.Case("tables of levels 2, 3 and 4", c =>
        {
            for (int level = 2; level <= 4; level++)
            {
                ScratchPage table = c.PinnedTable(level, $"level{level}");
                c.Store(table.At, 8, 0);
                c.Kernel("lock or [rdi], rax", static a => a.@lock.or(__[rdi], rax), null, [(Register64.Rdi, table.At)]);
            }
        });
        script.Case("a page that is read-only and no table", c =>
        {
            ScratchPage page = c.Page();
            c.ReadOnly(page);
            c.Store(page.At, 8, 1);
            ScratchPage table = c.PinnedTable(1, "l1");
            c.Unpin(table);
            c.Store(table.At, 8, 0);
        });
        script.Case("vector stores, and others that no kernel makes", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            Show(c, table, "movq [rdi], xmm0", static a => a.movq(__qword_ptr[rdi], xmm0));
            Show(c, table, "movaps [rdi], xmm0", static a => a.movaps(__xmmword_ptr[rdi], xmm0));
            Show(c, table, "movd [rdi], mm0", static a => a.movd(__dword_ptr[rdi], mm0));
            // No x87 store: with it, a guest of Xen 4.17 stops the whole host (put_fpu calls a hook that is not there).
        });
        script.Case("user mode", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            c.User("mov [rdi], rax", static a => a.mov(__[rdi], rax), null, [(Register64.Rdi, table.At)]);
        });
        script.Case("a single step ends behind the store", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            c.Kernel("mov [rdi], rax; nop", static a =>
            {
                a.mov(__[rdi], rax);
                a.nop();
            }, null, [(Register64.Rdi, table.At), (Register64.Rax, 0x20), (Register64.Rflags, 0x102)]);
            c.Load(table.At);
        });
    }

    /// <summary>Runs a store at entry 0, with operands that leave it not present, and shows the entry.</summary>
    private static void Show(AbiCase c, ScratchPage table, string text, Action<Assembler> emit, params Register64[] show)
    {
        c.Kernel(text, emit, show, [(Register64.Rdi, table.At), (Register64.Rax, 0x1_0000_0222), (Register64.Rcx, 0), (Register64.Rdx, 68)]);
        c.Load(table.At);
    }
}
