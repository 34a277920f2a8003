// Stores to page tables in the forms that compilers and hand-written code give them: operands, prefixes, segments, single steps.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Memory;

internal static class PageTableStoreFormScript
{
    // Values that no entry maps anything with: Present is clear.
    private const ulong Absent = 0x0123_4567_89ab_cdee;
    private const ulong Stored = 0x7766_5544_3322_1110;
    private const ulong Trap = 1 << 8;
    private const ulong FsBase = 0;

    public static AbiScript Create() => new("page-table-store-forms", "page-table stores", script =>
    {
        script.Case("the assist is turned on", c => c.Hypercall(GuestHypercall.VmAssist, VmAssist.Enable, VmAssist.WritablePagetables));
        WriteOperands(script);
        WriteSegments(script);
        WriteStrings(script);
        WriteSingleSteps(script);
        WriteOthers(script);
    });

    private static void WriteOperands(AbiScript script)
    {
        script.Case("addresses of the operand", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            Show(c, table, "mov [rdi+rcx*8+8], rax, rcx -1", static a => a.mov(__qword_ptr[rdi + (rcx * 8) + 8], rax), (Register64.Rcx, -1));
            Show(c, table, "mov [rcx*8+table], rax, rcx 0", a => a.mov(__qword_ptr[(rcx * 8) + (int)table.Address], rax));
            Show(c, table, "mov [table], rax", a => a.mov(__qword_ptr[(long)(int)table.Address], rax));
            Show(c, table, "mov [rip+table], rax", a => a.AddInstruction(
                Instruction.Create(Code.Mov_rm64_r64, new MemoryOperand(Register.RIP, (long)table.Address, sizeof(ulong)), Register.RAX)));
            Show(c, table, "movabs [table], rax", a => a.db([0x48, 0xa3, .. BitConverter.GetBytes(table.Address)]));
            Show(c, table, "movabs [table], al", a => a.db([0xa2, .. BitConverter.GetBytes(table.Address)]));
            Show(c, table, "mov [rbp], rax", static a => a.mov(__qword_ptr[rbp], rax), (Register64.Rbp, table.At));
            Show(c, table, "mov [r13+r12], rax", static a => a.mov(__qword_ptr[r13 + r12], rax), (Register64.R12, 8), (Register64.R13, table.At - 8));
            Show(c, table, "mov [rsp-128], rax", static a =>
            {
                a.mov(rbx, rsp);
                a.lea(rsp, __[rdi + 128]);
                a.mov(__qword_ptr[rsp - 128], rax);
                a.mov(rsp, rbx);
            });
        });
        script.Case("sizes of the operand", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            foreach ((string text, byte[] code) in ((string, byte[])[])
                [
                    ("mov [rdi], ah", [0x88, 0x27]), ("rex mov [rdi], spl", [0x40, 0x88, 0x27]), ("mov [rdi], ax", [0x66, 0x89, 0x07]),
                    ("66 rex.w mov [rdi], rax", [0x66, 0x48, 0x89, 0x07]), ("mov [rdi], r10d", [0x44, 0x89, 0x17]), ("mov byte [rdi], -2", [0xc6, 0x07, 0xfe]),
                    ("mov word [rdi], 0x1234", [0x66, 0xc7, 0x07, 0x34, 0x12]), ("mov qword [rdi], -2", [0x48, 0xc7, 0x07, 0xfe, 0xff, 0xff, 0xff]),
                    ("xchg [rdi], ah", [0x86, 0x27]), ("66 xchg [rdi], ax", [0x66, 0x87, 0x07]), ("lock xchg [rdi], rax", [0xf0, 0x48, 0x87, 0x07]),
                    ("rep mov [rdi], rax", [0xf3, 0x48, 0x89, 0x07]), ("repne mov [rdi], eax", [0xf2, 0x89, 0x07]), ("ds mov [rdi], rax", [0x3e, 0x48, 0x89, 0x07]),
                    ("xacquire xchg [rdi], rax", [0xf2, 0x48, 0x87, 0x07]), ("xrelease mov [rdi], eax", [0xf3, 0x89, 0x07]),
                    ("mov [rdi], ds", [0x8c, 0x1f]), ("rex.w mov [rdi], fs", [0x48, 0x8c, 0x27]), ("66 mov [rdi], ss", [0x66, 0x8c, 0x17]),
                ])
            {
                Show(c, table, text, a => a.db(code));
            }
        });
        script.Case("cmpxchg and xadd of every size", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            foreach ((string text, byte[] code) in ((string, byte[])[])
                [
                    ("lock cmpxchg [rdi], bx", [0x66, 0xf0, 0x0f, 0xb1, 0x1f]), ("lock cmpxchg [rdi], ebx", [0xf0, 0x0f, 0xb1, 0x1f]),
                    ("cmpxchg [rdi], bh", [0x0f, 0xb0, 0x3f]), ("rex.w cmpxchg [rdi], rbx", [0x48, 0x0f, 0xb1, 0x1f]),
                    ("lock xadd [rdi], bx", [0x66, 0xf0, 0x0f, 0xc1, 0x1f]), ("lock xadd [rdi], bh", [0xf0, 0x0f, 0xc0, 0x3f]),
                    ("xadd [rdi], ebx", [0x0f, 0xc1, 0x1f]), ("cmpxchg8b [rdi]", [0x0f, 0xc7, 0x0f]),
                ])
            {
                foreach (ulong expected in (ulong[])[Absent, Stored])
                {
                    c.Store(table.At, 8, Absent);
                    c.Kernel(text, a => a.db(code), [Register64.Rax, Register64.Rbx, Register64.Rflags],
                        [(Register64.Rdi, table.At), (Register64.Rax, expected), (Register64.Rbx, 0x20_4060), (Register64.Rcx, 2), (Register64.Rdx, Absent >> 32)]);
                    c.Load(table.At);
                }
            }
        });
    }

    private static void WriteSegments(AbiScript script)
    {
        script.Case("operands in FS and GS", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            c.Hypercall(GuestHypercall.SetSegmentBase, FsBase, table.At);
            Show(c, table, "mov fs:[8], rax", static a => a.mov(__qword_ptr.fs[8], rax));
            c.Load(table[8]);
            Show(c, table, "mov fs:[rcx], eax", static a => a.mov(__dword_ptr.fs[rcx], eax), (Register64.Rcx, 4));
            Show(c, table, "lock or fs:[rcx], rax", static a => a.@lock.or(__qword_ptr.fs[rcx], rax));
            Show(c, table, "addr32 mov fs:[ecx], rax", static a => a.db(0x64, 0x67, 0x48, 0x89, 0x01), (Register64.Rcx, 0x1_0000_0010));
            c.Load(table[16]);
            Show(c, table, "movabs fs:[8], rax", static a => a.db(0x64, 0x48, 0xa3, 8, 0, 0, 0, 0, 0, 0, 0));
            c.Load(table[8]);
            Show(c, table, "fs stosq, which stays in ES", static a => a.db(0x64, 0x48, 0xab));
            Show(c, table, "fs movsq", static a => a.db(0x64, 0x48, 0xa5), (Register64.Rsi, 8));
            Show(c, table, "lock cmpxchg fs:[rcx], rax", static a => a.@lock.cmpxchg(__qword_ptr.fs[rcx], rax));
            Show(c, table, "setz fs:[rcx]", static a => a.setz(__byte_ptr.fs[rcx]));
            c.Hypercall(GuestHypercall.SetSegmentBase, FsBase, 0);
        });
        script.Case("segments that 64-bit code has no use for", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            foreach ((string name, byte prefix) in ((string, byte)[])[("cs", 0x2e), ("ss", 0x36), ("es", 0x26)])
                Show(c, table, $"mov {name}:[rdi], rax", a => a.db(prefix, 0x48, 0x89, 0x07));
        });
    }

    private static void WriteStrings(AbiScript script)
    {
        script.Case("string stores: sizes and directions", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScriptBuffer source = c.Structure("source", 16, (0, 8, Stored), (8, 8, Absent));
            foreach ((string text, byte[] code) in ((string, byte[])[])
                [
                    ("rep stosb", [0xf3, 0xaa]), ("repne stosw", [0x66, 0xf2, 0xab]), ("rep stosd", [0xf3, 0xab]), ("rep movsb", [0xf3, 0xa4]),
                    ("rep movsw", [0x66, 0xf3, 0xa5]), ("std; rep stosq; cld", [0xfd, 0xf3, 0x48, 0xab, 0xfc]), ("std; movsb; cld", [0xfd, 0xa4, 0xfc]),
                    ("rep stosb of none", [0x31, 0xc9, 0xf3, 0xaa]),
                ])
            {
                c.Store(table.At, 8, Absent);
                c.Store(table[8], 8, Absent);
                c.Kernel(text, a => a.db(code), [Register64.Rcx, Register64.Rdi, Register64.Rsi],
                    [(Register64.Rax, Stored), (Register64.Rcx, 2), (Register64.Rdi, table[8]), (Register64.Rsi, source)]);
                c.Load(table.At);
                c.Load(table[8]);
                c.Load(table[16]);
            }
        });
        script.Case("from one page table to another", c =>
        {
            ScratchPage from = c.PinnedTable(1, "from");
            ScratchPage to = c.PinnedTable(1, "to");
            ScratchPage data = c.Page("data");
            c.Store(from.At, 8, data.Entry(Pte.ReadWrite));
            c.Kernel("movsq", static a => a.movsq(), [Register64.Rdi, Register64.Rsi], [(Register64.Rdi, to.At), (Register64.Rsi, from.At)]);
            c.ShowEntry(to, 0);
        });
    }

    private static void WriteSingleSteps(AbiScript script)
    {
        script.Case("a trap after the store", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            Step(c, table, "mov [rdi], rax", static a => a.mov(__qword_ptr[rdi], rax));
            Step(c, table, "xchg [rdi], rax", static a => a.xchg(__qword_ptr[rdi], rax));
            Step(c, table, "lock btr qword [rdi], 4", static a => a.@lock.btr(__qword_ptr[rdi], (sbyte)4));
            Step(c, table, "lock cmpxchg [rdi], rcx, not equal", static a => a.@lock.cmpxchg(__qword_ptr[rdi], rcx));
        });
        script.Case("a trap after each repetition", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            for (int resumes = 0; resumes < 4; resumes++)
            {
                c.Fill(table.At, 4, 8, 0);
                c.Kernel($"popf with TF; rep stosq; nop; {resumes} traps passed", static a =>
                {
                    SetTrapFlag(a);
                    a.rep.stosq();
                    a.nop();
                }, null, [(Register64.Rax, Stored), (Register64.Rcx, 3), (Register64.Rdi, table.At)], resumes);
                for (int i = 0; i < 4; i++)
                    c.Load(table[i * 8]);
            }
        });
        script.Case("a store that is refused under a single step", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            c.Kernel("popf with TF; mov [rdi], rax; nop", static a =>
            {
                SetTrapFlag(a);
                a.mov(__qword_ptr[rdi], rax);
                a.nop();
            }, null, [(Register64.Rax, table.Entry(Pte.ReadWrite)), (Register64.Rdi, table.At)]);
        });
    }

    private static void WriteOthers(AbiScript script)
    {
        script.Case("instructions that store besides", c =>
        {
            ScratchPage table = c.PinnedTable(1, "l1");
            ScriptBuffer source = c.Structure("source", 16, (0, 8, Stored));
            foreach ((string text, byte[] code) in ((string, byte[])[])
                [
                    ("inc byte [rdi]", [0xfe, 0x07]), ("lock dec qword [rdi]", [0xf0, 0x48, 0xff, 0x0f]), ("lock not qword [rdi]", [0xf0, 0x48, 0xf7, 0x17]),
                    ("shr word [rdi], 1", [0x66, 0xd1, 0x2f]), ("shld [rdi], eax, 4", [0x0f, 0xa4, 0x07, 0x04]), ("lock sbb [rdi], eax", [0xf0, 0x19, 0x07]),
                    ("movnti [rdi], rax", [0x48, 0x0f, 0xc3, 0x07]),
                    ("movbe [rdi], rax", [0x48, 0x0f, 0x38, 0xf1, 0x07]), ("bts [rdi], rax", [0x48, 0x0f, 0xab, 0x07]), ("bt [rdi], rcx", [0x48, 0x0f, 0xa3, 0x0f]),
                    ("setz [rdi]", [0x0f, 0x94, 0x07]),
                ])
            {
                Show(c, table, text, a => a.db(code));
            }

            Show(c, table, "push [rsi] onto the table", static a =>
            {
                a.mov(rbx, rsp);
                a.lea(rsp, __[rdi + 8]);
                a.push(__qword_ptr[rsi]);
                a.mov(rsp, rbx);
            }, (Register64.Rsi, source));
            Show(c, table, "pop [rdi]", static a =>
            {
                a.push(rax);
                a.pop(__qword_ptr[rdi]);
            });
        });
    }

    /// <summary>Runs a store at entry 0, which starts absent, and shows the entry.</summary>
    private static void Show(AbiCase c, ScratchPage table, string text, Action<Assembler> emit, params (Register64 Register, Value Value)[] with)
    {
        c.Store(table.At, 8, Absent);
        (Register64 Register, Value Value)[] usual = [(Register64.Rax, Stored), (Register64.Rdi, table.At), (Register64.R10, 0x55aa_0ff0)];
        c.Kernel(text, emit, [Register64.Rax], [.. usual, .. with]);
        c.Load(table.At);
    }

    private static void Step(AbiCase c, ScratchPage table, string text, Action<Assembler> emit)
    {
        c.Store(table.At, 8, Absent);
        c.Kernel($"popf with TF; {text}; nop", a =>
        {
            SetTrapFlag(a);
            emit(a);
            a.nop();
        }, null, [(Register64.Rax, Stored), (Register64.Rdi, table.At)]);
        c.Load(table.At);
        c.Hypercall(GuestHypercall.GetDebugreg, 6);
        c.Hypercall(GuestHypercall.SetDebugreg, 6, 0);
    }

    private static void SetTrapFlag(Assembler a)
    {
        a.pushfq();
        a.or(__dword_ptr[rsp], (int)Trap);
        a.popfq();
    }
}
