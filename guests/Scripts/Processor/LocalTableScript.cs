// The local descriptor table: when its pages are typed and released, where its selectors lead, and code in its segments.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Processor;

internal static class LocalTableScript
{
    private const int SetLdt = 13;
    private const int NewBaseptr = 5;
    private const int DomidSelf = 0x7ff0;
    private const int EntriesPerPage = 512;

    // Descriptors (AMD64 manual volume 2, 4.7 and 4.8).
    private const ulong FlatData = 0x00cf_f300_0000_ffff;
    private const ulong BasedData = 0x12cf_f334_5678_ffff;
    private const ulong OtherBasedData = 0x21cf_f343_8765_ffff;
    private const ulong AbsentData = 0x00cf_7300_0000_ffff;
    private const ulong KernelData = 0x00cf_9300_0000_ffff;
    private const ulong Code64 = 0x00af_fb00_0000_ffff;
    private const ulong AbsentCode = 0x00af_7b00_0000_ffff;
    private const ulong TaskState = 0x0000_8900_0000_0067;

    public static AbiScript Create() => new("local-descriptor-table", "segments", script =>
    {
        WritePages(script);
        WritePlaces(script);
        WriteUpdates(script);
        WriteUserMode(script);
        WriteCode(script);
    });

    private static void WritePages(AbiScript script)
    {
        script.Case("pages are typed one by one", c =>
        {
            ScratchPage[] pages = c.Pages(2);
            c.Put(pages[0][8 * 40], 8, FlatData);
            c.Put(pages[1][8 * 8], 8, BasedData);
            ReadOnly(c, pages);
            Load(c, "two pages", pages[0].At, 2 * EntriesPerPage);
            LoadFs(c, 40);
            Writable(c, pages[1]);
            Writable(c, pages[0]);
            ReadOnly(c, pages[1]);
            LoadFs(c, EntriesPerPage + 8);
            Writable(c, pages[1]);
            Load(c, "none", 0, 0);
            Writable(c, pages[0]);
            Writable(c, pages[1]);
        });
        script.Case("the same table again leaves its pages typed, another does not", c =>
        {
            ScratchPage page = Table(c, "ldt", BasedData);
            Load(c, "set", page.At, EntriesPerPage);
            LoadFs(c, 1);
            Load(c, "the same", page.At, EntriesPerPage);
            Writable(c, page);
            Load(c, "one entry less", page.At, EntriesPerPage - 1);
            Writable(c, page);
            LoadFs(c, 1);
            ReadOnly(c, page);
            LoadFs(c, 1);
            Writable(c, page);
            Load(c, "too many entries", page.At, 8193);
            Writable(c, page);
            Load(c, "none", 0, 0);
            Load(c, "none again", page.At, 0);
            Writable(c, page);
        });
        script.Case("another root releases the pages, the same does not", c =>
        {
            ScratchPage page = Table(c, "ldt", BasedData);
            ScratchPage copy = c.Page("copy");
            for (int slot = 0; slot < 512; slot++)
            {
                if (slot is < 256 or > 271)
                    c.Put(copy[slot * 8], 8, Value.Load(c.RootAddress + (slot * 8)));
            }

            ReadOnly(c, copy);
            Load(c, "set", page.At, EntriesPerPage);
            LoadFs(c, 1);
            Root(c, "root", c.Root);
            Writable(c, page);
            Root(c, "copy", copy.Mfn);
            Writable(c, page);
            ReadOnly(c, page);
            LoadFs(c, 1);
            Root(c, "root", c.Root);
            c.Kernel("mov cr3, rax, the root", static a => a.mov(cr3, rax), with: [(Register64.Rax, (c.Root << 12).Named("root"))]);
            Writable(c, page);
            Load(c, "none", 0, 0);
        });
        script.Case("what is behind the address changes after its page was typed", c =>
        {
            ScratchPage page = Table(c, "ldt", BasedData);
            ScratchPage other = Table(c, "other", OtherBasedData);
            Load(c, "set", page.At, EntriesPerPage);
            LoadFs(c, 1);
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, other.Entry(Pte.ReadOnly), Pte.InvalidatePage);
            LoadFs(c, 1);
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, 0, Pte.InvalidatePage);
            LoadFs(c, 1);
            Load(c, "one entry less", page.At, EntriesPerPage - 1);
            LoadFs(c, 1);
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, other.Entry(Pte.ReadOnly), Pte.InvalidatePage);
            LoadFs(c, 1);
            Load(c, "none", 0, 0);
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, page.Entry(Pte.ReadWrite), Pte.InvalidatePage);
        });
    }

    private static void WritePlaces(AbiScript script)
    {
        script.Case("an address that nothing is mapped at", c =>
        {
            Load(c, "nowhere", Addresses.Unmapped, 8192);
            LoadFs(c, 1);
            LoadFs(c, 8191);
            c.Kernel("mov ss, ecx", static a => a.mov(ss, ecx), with: [(Register64.Rcx, Selector(1))]);
            Load(c, "none", 0, 0);
        });
        script.Case("a table that ends with the lower half, and one that goes round", c =>
        {
            Load(c, "the last page of the lower half", 0x7fff_ffff_f000, 8192);
            LoadFs(c, 1);
            LoadFs(c, EntriesPerPage);
            LoadFs(c, EntriesPerPage + 3);
            Load(c, "the last page of all", 0xffff_ffff_ffff_f000, 8192);
            LoadFs(c, EntriesPerPage + 8);
            Load(c, "none", 0, 0);
        });
        script.Case("pages that cannot be descriptor tables", c =>
        {
            ScratchPage system = Table(c, "system", FlatData);
            Writable(c, system);
            c.Put(system[511 * 8], 8, TaskState);
            ReadOnly(c, system);
            Load(c, "a page with a TSS", system.At, EntriesPerPage);
            LoadFs(c, 1);
            c.Load(system[511 * 8]);
            ScratchPage writable = c.Page("writable");
            c.Put(writable[8], 8, FlatData);
            Load(c, "a writable page", writable.At, EntriesPerPage);
            LoadFs(c, 1);
            ReadOnly(c, writable);
            LoadFs(c, 1);
            Load(c, "the root", c.RootAddress, EntriesPerPage);
            LoadFs(c, 1);
            Load(c, "none", 0, 0);
        });
        script.Case("descriptors are made safe when their page is typed", c =>
        {
            ScratchPage page = Table(c, "ldt", KernelData);
            Load(c, "set", page.At, 2);
            c.Load(page[8]);
            LoadFs(c, 1);
            c.Load(page[8]);
            LoadFs(c, 2);
            Load(c, "none", 0, 0);
        });
    }

    private static void WriteUpdates(AbiScript script)
    {
        script.Case("update_descriptor of a page in use, and of one that is not yet", c =>
        {
            ScratchPage page = Table(c, "ldt", BasedData);
            Load(c, "set", page.At, EntriesPerPage);
            Update(c, "another base", page, OtherBasedData);
            LoadFs(c, 1);
            Update(c, "the first base", page, BasedData);
            LoadFs(c, 1);
            Update(c, "a TSS", page, TaskState);
            Update(c, "absent data", page, AbsentData);
            LoadFs(c, 1);
            Update(c, "nothing", page, 0);
            LoadFs(c, 1);
            Load(c, "none", 0, 0);
        });
        script.Case("one page as the global and the local table", c =>
        {
            ScratchPage page = Table(c, "both", BasedData);
            Load(c, "set", page.At, EntriesPerPage);
            c.Hypercall(GuestHypercall.SetGdt, c.Structure("frames", 8, (0, 8, page.Mfn)), EntriesPerPage);
            LoadFs(c, 1);
            c.Hypercall(GuestHypercall.SetGdt, 0, 0);
            Writable(c, page);
            Load(c, "none", 0, 0);
            Writable(c, page);
        });
    }

    private static void WriteUserMode(AbiScript script)
    {
        script.Case("selectors in user mode, whose root does not show the table", c =>
        {
            ScratchPage page = Table(c, "ldt", BasedData, AbsentData, Code64);
            Load(c, "set", page.At, EntriesPerPage);
            c.User("mov fs, ecx; mov fs, 0", EmitLoadFs, with: [(Register64.Rcx, Selector(1))]);
            Writable(c, page);
            foreach (int index in (int[])[1, 2, 3, 4, EntriesPerPage])
            {
                c.User($"mov ds, 0x{Selector(index):x}; mov ds, 0", a =>
                {
                    a.mov(ecx, Selector(index));
                    a.mov(ds, ecx);
                    a.xor(ecx, ecx);
                    a.mov(ds, ecx);
                });
                c.User($"mov ss, 0x{Selector(index):x}", a =>
                {
                    a.mov(ecx, Selector(index));
                    a.mov(ss, ecx);
                });
            }

            Load(c, "nowhere", Addresses.Unmapped, EntriesPerPage);
            c.User("mov fs, ecx; mov fs, 0", EmitLoadFs, with: [(Register64.Rcx, Selector(1))]);
            Load(c, "none", 0, 0);
        });
        script.Case("set_segment_base of a selector types its page", c =>
        {
            ScratchPage page = Table(c, "ldt", BasedData);
            Load(c, "set", page.At, EntriesPerPage);
            c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.GsUserSelector, Selector(1));
            c.ReadMsr("KERNEL_GS_BASE", MsrNumber.KernelGsBase);
            Writable(c, page);
            c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.GsUserSelector, 0);
            Load(c, "nowhere", Addresses.Unmapped, EntriesPerPage);
            c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.GsUserSelector, Selector(1));
            c.ReadMsr("KERNEL_GS_BASE", MsrNumber.KernelGsBase);
            c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.GsUserSelector, 0);
            Load(c, "none", 0, 0);
        });
    }

    private static void WriteCode(AbiScript script)
    {
        script.Case("far returns to code in the table", c =>
        {
            ScratchPage page = Table(c, "ldt", Code64, AbsentCode, FlatData);
            Load(c, "set", page.At, EntriesPerPage);
            for (int index = 1; index <= 4; index++)
                c.FarReturn(Selector(index));
            Load(c, "nowhere", Addresses.Unmapped, EntriesPerPage);
            c.FarReturn(Selector(1));
            Load(c, "none", 0, 0);
            c.FarReturn(Selector(1));
        });
        script.Case("HYPERVISOR_iret to code in the table", c =>
        {
            ScratchPage page = Table(c, "ldt", Code64, FlatData, AbsentCode);
            Load(c, "set", page.At, EntriesPerPage);
            Iret(c, "code and stack", Selector(1), Selector(2));
            Iret(c, "absent code", Selector(3), Selector(2));
            Iret(c, "data as code", Selector(2), Selector(2));
            Iret(c, "code as the stack", Selector(1), Selector(1));
            Load(c, "nowhere", Addresses.Unmapped, EntriesPerPage);
            Iret(c, "code nowhere", Selector(1), Selectors.FlatRing3Ds);
            Iret(c, "the stack nowhere", Selectors.FlatRing3Cs64, Selector(2));
            Load(c, "none", 0, 0);
            Iret(c, "no table", Selector(1), Selectors.FlatRing3Ds);
        });
        script.Case("an instruction that is emulated in a code segment of the table", c =>
        {
            ScratchPage page = Table(c, "ldt", Code64);
            Load(c, "set", page.At, EntriesPerPage);
            c.Kernel("retfq; mov rax, cr0; ud2", static a =>
            {
                Label there = a.CreateLabel();
                a.push(rcx);
                a.lea(rax, __[there]);
                a.push(rax);
                a.db(0x48, 0xcb); // retfq
                a.Label(ref there);
                a.mov(rax, cr0);
                a.ud2();
            }, with: [(Register64.Rcx, Selector(1))]);
            Load(c, "none", 0, 0);
        });
    }

    private static int Selector(int index) => (index << 3) | 7;

    /// <summary>A page of descriptors from 1 on, read-only as a table has to be.</summary>
    private static ScratchPage Table(AbiCase c, string name, params ulong[] descriptors)
    {
        ScratchPage page = c.Page(name);
        foreach ((int index, ulong descriptor) in descriptors.Index())
            c.Put(page[(index + 1) * 8], 8, descriptor);
        ReadOnly(c, page);
        return page;
    }

    private static void ReadOnly(AbiCase c, params ScratchPage[] pages)
    {
        foreach (ScratchPage page in pages)
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, page.Entry(Pte.ReadOnly), Pte.InvalidatePage);
    }

    private static void Writable(AbiCase c, ScratchPage page)
        => c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, page.Entry(Pte.ReadWrite), Pte.InvalidatePage);

    private static void Load(AbiCase c, string text, Value address, int entries)
    {
        ScriptBuffer operation = c.Structure("operation", 24, (0, 4, SetLdt), (8, 8, address), (16, 4, entries));
        c.Hypercall((ulong)GuestHypercall.MmuextOp, $"mmuext_op(set LDT: {text})", AnswerFormat.Result, operation, 1, 0, DomidSelf);
    }

    private static void Root(AbiCase c, string text, Value frame)
    {
        ScriptBuffer operation = c.Structure("operation", 24, (0, 4, NewBaseptr), (8, 8, frame));
        c.Hypercall((ulong)GuestHypercall.MmuextOp, $"mmuext_op(new baseptr {text})", AnswerFormat.Result, operation, 1, 0, DomidSelf);
    }

    private static void Update(AbiCase c, string text, ScratchPage page, ulong descriptor) => c.Hypercall(
        (ulong)GuestHypercall.UpdateDescriptor, $"update_descriptor({page.Name}+8, {text})", AnswerFormat.Result, (page.Mfn << 12) + 8, descriptor);

    /// <summary>Loads FS, shows its base, and leaves no selector of a table that goes: Xen reloads it when it switches vCPUs.</summary>
    private static void LoadFs(AbiCase c, int index) => c.Kernel("mov fs, ecx; rdmsr FS_BASE; mov fs, 0", static a =>
    {
        a.mov(fs, ecx);
        a.mov(ecx, MsrNumber.FsBase);
        a.rdmsr();
        a.xor(ecx, ecx);
        a.mov(fs, ecx);
    }, [Register64.Rax], [(Register64.Rcx, Selector(index))]);

    private static void EmitLoadFs(Assembler a)
    {
        a.mov(fs, ecx);
        a.xor(ecx, ecx);
        a.mov(fs, ecx);
    }

    /// <summary>To user mode, where the first instruction is an UD2.</summary>
    private static void Iret(AbiCase c, string text, int code, int stack) => c.Kernel($"iret to user code: {text}", a =>
    {
        Label there = a.CreateLabel();
        a.lea(rdi, __[there]);
        ProcessorSteps.EmitIret(a);
        a.Label(ref there);
        a.ud2();
    }, with:
    [
        (Register64.Rsi, code), (Register64.Rdx, Eflags.Usual), (Register64.Rbx, stack), (Register64.Rbp, ProbeLayout.UserStackTop),
    ]);
}
