// Forms of the instructions that are emulated: prefixes, address sizes, segments, single steps, and bytes across a page's end.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Processor;

internal static class InstructionFormScript
{
    private const ulong Pattern = 0x1122_3344_5566_7788;
    private const int Pic = 0x20;
    private const int PciAddress = 0xcf8;

    public static AbiScript Create() => new("instruction-forms", "privileged instructions", script =>
    {
        script.Case("the kernel's I/O privilege", c => c.SetIopl("iopl1", 1));
        WriteInputOutput(script);
        WriteStrings(script);
        WriteRegisters(script);
        WriteSingleSteps(script);
        WriteFetches(script);
        WriteUserMode(script);
        script.Case("no I/O privilege again", c => c.SetIopl("iopl0", 0));
    });

    private static void WriteInputOutput(AbiScript script)
    {
        script.Case("prefixes of in and out", c =>
        {
            foreach ((string text, byte[] code) in ((string, byte[])[])
                [
                    ("in al, dx", [0xec]), ("in ax, dx", [0x66, 0xed]), ("in eax, dx", [0xed]), ("rex.w in eax, dx", [0x48, 0xed]),
                    ("66 rex.w in eax, dx", [0x66, 0x48, 0xed]), ("rex.r in al, dx", [0x44, 0xec]), ("addr32 in al, dx", [0x67, 0xec]),
                    ("fs in al, dx", [0x64, 0xec]), ("rep in al, dx", [0xf3, 0xec]), ("repne in al, 0x20", [0xf2, 0xe4, Pic]),
                    ("lock in al, dx", [0xf0, 0xec]), ("lock in al, 0x20", [0xf0, 0xe4, Pic]), ("66 in al, 0x20", [0x66, 0xe4, Pic]),
                    ("rex.w in eax, 0x20", [0x48, 0xe5, Pic]), ("rex.w out dx, eax", [0x48, 0xef]), ("rep out dx, al", [0xf3, 0xee]),
                    ("lock out dx, al", [0xf0, 0xee]), ("rex, then 66, in", [0x48, 0x66, 0xed]),
                ])
            {
                c.Kernel(text, a => a.db(code), [Register64.Rax, Register64.Rcx],
                    [(Register64.Rax, Pattern), (Register64.Rcx, 3), (Register64.Rdx, Pic)]);
            }
        });
        script.Case("ports at the end of the space", c =>
        {
            foreach (int port in (int[])[0xfffd, 0xffff])
                c.Kernel("in eax, dx", static a => a.@in(eax, dx), [Register64.Rax], [(Register64.Rdx, port)]);
            c.Kernel("in al, dx, rdx's upper part set", static a => a.@in(al, dx), [Register64.Rax], [(Register64.Rdx, 0x1_0000_0000_0020)]);
        });
        script.Case("cli and sti with prefixes", c =>
        {
            foreach ((string text, byte[] code) in ((string, byte[])[])
                [("rep cli", [0xf3, 0xfa]), ("66 sti", [0x66, 0xfb]), ("rex.w cli", [0x48, 0xfa])])
            {
                c.Kernel(text, a => a.db(code));
            }
        });
    }

    private static void WriteStrings(AbiScript script)
    {
        script.Case("operand and address sizes of string input", c =>
        {
            ScriptBuffer area = c.Buffer("area", 64);
            foreach ((string text, byte[] code, ulong count) in ((string, byte[], ulong)[])
                [
                    ("rex.w insd", [0x48, 0x6d], 3), ("66 rex.w insd", [0x66, 0x48, 0x6d], 3), ("insw", [0x66, 0x6d], 3), ("repne insb", [0xf2, 0x6c], 3),
                    ("rep insb, then repne", [0xf3, 0xf2, 0x6c], 3), ("fs insb", [0x64, 0x6c], 3), ("rep insw", [0x66, 0xf3, 0x6d], 3),
                    ("rex.w rep insd after the prefix", [0xf3, 0x48, 0x6d], 2), ("lock insb", [0xf0, 0x6c], 1),
                ])
            {
                c.Fill(area, 8, 8, 0);
                c.Kernel(text, a => a.db(code), [Register64.Rcx, Register64.Rdi],
                    [(Register64.Rcx, count), (Register64.Rdx, Pic), (Register64.Rdi, area)]);
                c.Load(area);
                c.Load(area[8]);
            }
        });
        script.Case("string input with 32-bit addresses", c =>
        {
            ScriptBuffer area = c.Buffer("area", 8);
            c.Kernel("addr32 insb", static a => a.db(0x67, 0x6c), [Register64.Rcx],
                [(Register64.Rcx, 3), (Register64.Rdx, Pic), (Register64.Rdi, 0x1_0000_1000)]);
            c.Kernel("addr32 rep insb of none", static a => a.db(0x67, 0xf3, 0x6c), [Register64.Rcx],
                [(Register64.Rcx, 0x1_0000_0000), (Register64.Rdx, Pic), (Register64.Rdi, area)]);
            c.Kernel("addr32 rep outsb of none", static a => a.db(0x67, 0xf3, 0x6e), [Register64.Rcx],
                [(Register64.Rcx, 0x1_0000_0000), (Register64.Rdx, Pic), (Register64.Rsi, area)]);
        });
        script.Case("segments of string output", c =>
        {
            ScriptBuffer area = c.Structure("area", 16, (0, 8, 0x8000_1234), (8, 8, 0x8000_5678));
            c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.Fs, 8);
            foreach ((string text, byte[] code) in ((string, byte[])[])
                [
                    ("outsd", [0x6f]), ("fs outsd", [0x64, 0x6f]), ("cs outsd", [0x2e, 0x6f]), ("es outsd", [0x26, 0x6f]), ("ss outsd", [0x36, 0x6f]),
                    ("fs, then ds, outsd", [0x64, 0x3e, 0x6f]), ("rex.w fs outsd", [0x64, 0x48, 0x6f]),
                ])
            {
                c.Kernel($"{text}; in eax, dx", a =>
                {
                    a.db(code);
                    a.@in(eax, dx);
                }, [Register64.Rax], [(Register64.Rdx, PciAddress), (Register64.Rsi, area)]);
            }

            c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.Fs, 0);
        });
        script.Case("string output from places that cannot be read", c =>
        {
            ScratchPage page = c.Page("first");
            _ = c.UnmappedPage("hole");
            foreach ((string text, byte[] code) in ((string, byte[])[])
                [("rep outsb", [0xf3, 0x6e]), ("rep outsw", [0x66, 0xf3, 0x6f]), ("outsd", [0x6f])])
            {
                c.Kernel($"{text} across the end of a page", a => a.db(code), [Register64.Rcx, Register64.Rsi],
                    [(Register64.Rcx, 4), (Register64.Rdx, Pic), (Register64.Rsi, page[4093])]);
            }

            foreach ((string text, byte[] code) in ((string, byte[])[])
                [("ss outsb", [0x36, 0x6e]), ("fs outsb", [0x64, 0x6e]), ("cs outsd", [0x2e, 0x6f])])
            {
                foreach (ulong address in (ulong[])[Addresses.NonCanonical, Addresses.Hypervisor, 0x7fff_ffff_ffff, ulong.MaxValue])
                {
                    c.Kernel($"{text} at 0x{address:x}", a => a.db(code), null,
                        [(Register64.Rdx, Pic), (Register64.Rsi, address)]);
                }
            }
        });
        script.Case("backwards, repeated", c =>
        {
            ScriptBuffer area = c.Structure("area", 32, (8, 8, 0x1111));
            c.Kernel("std; rep insw; cld", static a =>
            {
                a.std();
                a.rep.insw();
                a.cld();
            }, [Register64.Rcx, Register64.Rdi], [(Register64.Rcx, 3), (Register64.Rdx, Pic), (Register64.Rdi, area[12])]);
            c.Load(area);
            c.Load(area[8]);
        });
        script.Case("string input into a page that is mapped read-only", c =>
        {
            ScratchPage page = c.Page("readonly");
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, page.Entry(Pte.ReadOnly), Pte.InvalidatePage);
            c.Kernel("rep insb", static a => a.rep.insb(), [Register64.Rcx, Register64.Rdi],
                [(Register64.Rcx, 4), (Register64.Rdx, Pic), (Register64.Rdi, page.At)]);
            c.Kernel("insd, two bytes before it", static a => a.insd(), [Register64.Rcx, Register64.Rdi],
                [(Register64.Rdx, Pic), (Register64.Rdi, page.At - 2)]);
        });
    }

    private static void WriteRegisters(AbiScript script)
    {
        script.Case("control registers", c =>
        {
            foreach ((string text, byte[] code) in ((string, byte[])[])
                [
                    ("mov rax, cr0 with rex.w", [0x48, 0x0f, 0x20, 0xc0]), ("66 mov rax, cr0", [0x66, 0x0f, 0x20, 0xc0]),
                    ("mov rax, cr0 as if from memory", [0x0f, 0x20, 0x00]), ("rep mov rax, cr0", [0xf3, 0x0f, 0x20, 0xc0]),
                    ("lock mov rax, cr0", [0xf0, 0x0f, 0x20, 0xc0]), ("mov rax, cr1", [0x0f, 0x20, 0xc8]), ("mov rax, cr8", [0x44, 0x0f, 0x20, 0xc0]),
                    ("mov cr8, rax", [0x44, 0x0f, 0x22, 0xc0]), ("mov r8, cr4", [0x41, 0x0f, 0x20, 0xe0]), ("mov rax, cr5", [0x0f, 0x20, 0xe8]),
                    ("66 mov rax, dr7", [0x66, 0x0f, 0x21, 0xf8]), ("mov dr7 as if from memory", [0x0f, 0x21, 0x38]),
                ])
            {
                c.Kernel(text, a => a.db(code), [Register64.Rax, Register64.R8], [(Register64.Rax, Pattern)]);
            }
        });
        script.Case("other instructions with prefixes", c =>
        {
            foreach ((string text, byte[] code) in ((string, byte[])[])
                [
                    ("wbinvd", [0x0f, 0x09]), ("wbnoinvd", [0xf3, 0x0f, 0x09]), ("66 wbinvd", [0x66, 0x0f, 0x09]), ("repne wbinvd", [0xf2, 0x0f, 0x09]),
                    ("lock wbinvd", [0xf0, 0x0f, 0x09]), ("invd", [0x0f, 0x08]), ("clts with rex.w", [0x48, 0x0f, 0x06]), ("66 clts", [0x66, 0x0f, 0x06]),
                    ("lock clts", [0xf0, 0x0f, 0x06]), ("rdpmc", [0x0f, 0x33]), ("invlpg [rdi]", [0x0f, 0x01, 0x3f]), ("lmsw ax", [0x0f, 0x01, 0xf0]),
                    ("hlt with rex.w", [0x48, 0xf4]), ("swapgs", [0x0f, 0x01, 0xf8]), ("lgdt [rdi]", [0x0f, 0x01, 0x17]), ("lldt ax", [0x0f, 0x00, 0xd0]),
                    ("ltr ax", [0x0f, 0x00, 0xd8]), ("sysretq", [0x48, 0x0f, 0x07]), ("invpcid rax, [rdi]", [0x66, 0x0f, 0x38, 0x82, 0x07]),
                    ("rsm", [0x0f, 0xaa]),
                ])
            {
                c.Kernel(text, a => a.db(code), null, [(Register64.Rax, 0)]);
            }
        });
        script.Case("rdmsr and wrmsr with prefixes", c =>
        {
            foreach ((string text, byte[] code) in ((string, byte[])[])
                [
                    ("rex.w rdmsr", [0x48, 0x0f, 0x32]), ("66 rdmsr", [0x66, 0x0f, 0x32]), ("rep rdmsr", [0xf3, 0x0f, 0x32]), ("lock rdmsr", [0xf0, 0x0f, 0x32]),
                    ("rex.w wrmsr", [0x48, 0x0f, 0x30]),
                ])
            {
                c.Kernel(text, a => a.db(code), [Register64.Rax, Register64.Rdx],
                    [(Register64.Rax, 0x1_1234_5678), (Register64.Rcx, MsrNumber.FsBase), (Register64.Rdx, 0xff_0000_0000)]);
            }

            c.ReadMsr("FS_BASE", MsrNumber.FsBase);
            c.WriteMsr("FS_BASE", MsrNumber.FsBase, 0);
        });
        script.Case("writes of CR3", c =>
        {
            ScratchPage page = c.Page("page");
            Cr3(c, "the root", c.Root << 12);
            Cr3(c, "the root with the bits below", (c.Root << 12) | 0xfff);
            Cr3(c, "the root with the bit that keeps translations", (c.Root << 12) | (1UL << 63));
            Cr3(c, "a page that is writable", page.Mfn << 12);
            Cr3(c, "frame 0", 0);
            Cr3(c, "all ones", ulong.MaxValue);
            c.Kernel("mov rax, cr3; the root's frame", static a =>
            {
                a.mov(rax, cr3);
                a.shr(rax, 12);
                a.sub(rax, rcx);
            }, [Register64.Rax], [(Register64.Rcx, c.Root)]);
        });
    }

    private static void WriteSingleSteps(AbiScript script)
    {
        script.Case("a trap after each emulated instruction", c =>
        {
            Step(c, "cli", static a => a.cli());
            Step(c, "in al, 0x20", static a => a.@in(al, Pic));
            Step(c, "out 0x20, al", static a => a.@out(Pic, al));
            Step(c, "mov rax, cr0", static a => a.mov(rax, cr0));
            Step(c, "mov rax, dr7", static a => a.mov(rax, dr7));
            Step(c, "wbinvd", static a => a.wbinvd());
            Step(c, "clts", static a => a.clts());
            Step(c, "rdmsr", static a => a.rdmsr(), (Register64.Rcx, MsrNumber.FsBase));
            Step(c, "wrmsr", static a => a.wrmsr(), (Register64.Rcx, MsrNumber.FsBase));
            Step(c, "rdmsr that faults", static a => a.rdmsr(), (Register64.Rcx, MsrNumber.Unknown));
            Step(c, "hlt", static a => a.hlt());
            Step(c, "mov ds, ecx, flat", static a => a.mov(ds, ecx), (Register64.Rcx, Selectors.FlatRing3Ds));
            Step(c, "mov ss, ecx, flat", static a => a.mov(ss, ecx), (Register64.Rcx, Selectors.FlatRing3Ds));
            Step(c, "mov ds, ecx, null", static a => a.mov(ds, ecx));
        });
        script.Case("a trap after each repetition", c =>
        {
            ScriptBuffer area = c.Buffer("area", 16);
            for (int resumes = 0; resumes < 4; resumes++)
            {
                c.Kernel($"popf with TF; rep insb; nop; {resumes} traps passed", static a =>
                {
                    SetTrapFlag(a);
                    a.rep.insb();
                    a.nop();
                }, [Register64.Rcx], [(Register64.Rcx, 3), (Register64.Rdx, Pic), (Register64.Rdi, area)], resumes);
                c.Load(area);
                c.Put(area, 8, 0);
            }

            c.Kernel("popf with TF; rep outsb of none; nop", static a =>
            {
                SetTrapFlag(a);
                a.rep.outsb();
                a.nop();
            }, null, [(Register64.Rdx, Pic), (Register64.Rsi, area)]);
            c.Hypercall(GuestHypercall.GetDebugreg, 6);
            c.Hypercall(GuestHypercall.SetDebugreg, 6, 0);
        });
        script.Case("a repetition that faults under a single step", c =>
        {
            ScratchPage page = c.Page("first");
            _ = c.UnmappedPage("hole");
            for (int resumes = 0; resumes < 3; resumes++)
            {
                c.Kernel($"popf with TF; rep insb across the end; {resumes} traps passed", static a =>
                {
                    SetTrapFlag(a);
                    a.rep.insb();
                }, [Register64.Rcx], [(Register64.Rcx, 4), (Register64.Rdx, Pic), (Register64.Rdi, page[4094])], resumes);
            }
        });
    }

    private static void WriteFetches(AbiScript script)
    {
        script.Case("instructions across the end of a page", c =>
        {
            ScratchPage[] pages = c.Pages(2);
            (string Text, byte[] Code)[] instructions =
            [
                ("in al, 0x20; ret", [0xe4, Pic, 0xc3]), ("mov rax, cr0; ret", [0x0f, 0x20, 0xc0, 0xc3]),
                ("66 in ax, dx, of the most prefixes; ret", [.. Enumerable.Repeat((byte)0x66, 14), 0xed, 0xc3]),
                ("one prefix more; ret", [.. Enumerable.Repeat((byte)0x66, 15), 0xed, 0xc3]),
            ];
            foreach ((string text, byte[] code) in instructions)
            {
                for (int before = 1; before < Math.Min(code.Length, 4); before++)
                {
                    foreach ((int index, byte value) in code.Index())
                        c.Put(pages[0][4096 - before + index], 1, (int)value);
                    c.Kernel($"jmp to {text}: {before} before the end", static a => a.jmp(rbx), [Register64.Rax],
                        [(Register64.Rax, Pattern), (Register64.Rdx, Pic), (Register64.Rbx, pages[0][4096 - before])]);
                }
            }
        });
        script.Case("instructions that run into a page that is not there", c =>
        {
            ScratchPage page = c.Page("first");
            _ = c.UnmappedPage("hole");
            foreach ((string text, byte[] code) in ((string, byte[])[])
                [
                    ("the opcode of in", [0xe4]), ("prefixes", [0x66, 0x48]), ("the first byte of mov from cr0", [0x0f]), ("a whole in, and no more", [0xe4, Pic]),
                    ("the whole of hlt", [0xf4]),
                ])
            {
                foreach ((int index, byte value) in code.Index())
                    c.Put(page[4096 - code.Length + index], 1, (int)value);
                c.Kernel($"jmp to {text}", static a => a.jmp(rbx), null, [(Register64.Rbx, page[4096 - code.Length])]);
            }
        });
        script.Case("instructions in a page without execute", c =>
        {
            ScratchPage page = c.Page("data");
            c.Put(page.At, 2, 0x20e4);
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, page.Entry(Pte.ReadWrite | Pte.NoExecute), Pte.InvalidatePage);
            c.Kernel("jmp to in al, 0x20", static a => a.jmp(rbx), null, [(Register64.Rbx, page.At)]);
        });
    }

    private static void WriteUserMode(AbiScript script)
    {
        script.Case("user mode with I/O privilege", c =>
        {
            c.SetIopl("iopl3", 3);
            c.User("in eax, dx", static a => a.@in(eax, dx), [Register64.Rax], [(Register64.Rdx, Pic)]);
            c.User("cli; sti", static a =>
            {
                a.cli();
                a.sti();
            });
            c.User("outsb from the kernel's page", static a => a.outsb(), null, [(Register64.Rdx, Pic), (Register64.Rsi, c.Page("kernel").At)]);
            c.User("insb to nowhere", static a => a.insb(), null, [(Register64.Rdx, Pic), (Register64.Rdi, Addresses.Unmapped)]);
            c.User("popf with TF; in al, 0x20; nop", static a =>
            {
                SetTrapFlag(a);
                a.@in(al, Pic);
                a.nop();
            });
            c.User("mov rax, cr0", static a => a.mov(rax, cr0));
            c.User("rdmsr", static a => a.rdmsr(), null, [(Register64.Rcx, MsrNumber.FsBase)]);
            c.User("wbinvd", static a => a.wbinvd());
            c.SetIopl("iopl1", 1);
        });
    }

    private static void Cr3(AbiCase c, string text, Value value)
        => c.Kernel($"mov cr3, rax: {text}", static a => a.mov(cr3, rax), null, [(Register64.Rax, value.Named("cr3"))]);

    private static void Step(AbiCase c, string text, Action<Assembler> emit, params (Register64 Register, Value Value)[] with)
    {
        c.Kernel($"popf with TF; {text}; nop", a =>
        {
            SetTrapFlag(a);
            emit(a);
            a.nop();
        }, null, with);
        c.Hypercall(GuestHypercall.GetDebugreg, 6);
        c.Hypercall(GuestHypercall.SetDebugreg, 6, 0);
    }

    private static void SetTrapFlag(Assembler a)
    {
        a.pushfq();
        a.or(__dword_ptr[rsp], (uint)Eflags.Trap);
        a.popfq();
    }
}
