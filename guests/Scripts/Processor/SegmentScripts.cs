// Segment registers and bases: set_segment_base, selectors of Xen's flat segments and of the guest's own tables, 32-bit code.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Processor;

internal static class SegmentScripts
{
    private const int SetLdt = 13;
    private const ulong Fsgsbase = 1 << 16;

    /// <summary>Past those that a Linux host may have in its own global table.</summary>
    private const int FirstDescriptor = 32;

    private const int TableEntries = FirstDescriptor + 16;

    // Descriptors (AMD64 manual volume 2, 4.7 and 4.8).
    private const ulong FlatData = 0x00cf_f300_0000_ffff;
    private const ulong ReadOnlyData = 0x00cf_f100_0000_ffff;
    private const ulong AbsentData = 0x00cf_7300_0000_ffff;
    private const ulong Code64 = 0x00af_fb00_0000_ffff;
    private const ulong Code32 = 0x00cf_fb00_0000_ffff;
    private const ulong ExecuteOnlyCode = 0x00af_f900_0000_ffff;
    private const ulong AbsentCode = 0x00af_7b00_0000_ffff;

    private static readonly Value NonCanonical = Value.Constant(Addresses.NonCanonical, "noncanonical");

    private static readonly (string Name, Action<Assembler> Load)[] Registers =
    [
        ("ds", static a => a.mov(ds, ecx)), ("es", static a => a.mov(es, ecx)), ("fs", static a => a.mov(fs, ecx)),
        ("gs", static a => a.mov(gs, ecx)), ("ss", static a => a.mov(ss, ecx)),
    ];

    public static AbiScript CreateSetSegmentBase() => new("set-segment-base", "set_segment_base", script =>
    {
        script.Case("FS", c =>
        {
            ScriptBuffer area = c.Structure("area", 16, (8, 8, 0x1234_5678));
            c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.Fs, area);
            c.Kernel("load fs:[8]", static a => a.mov(rax, __qword_ptr.fs[8]), [Register64.Rax]);
            c.User("load fs:[8]", static a => a.mov(rax, __qword_ptr.fs[8]), [Register64.Rax]);
            c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.Fs, 0);
            c.Kernel("load fs:[8]", static a => a.mov(rax, __qword_ptr.fs[8]));
        });
        script.Case("GS of the kernel and of user mode", c =>
        {
            ScriptBuffer kernel = c.Structure("kernel", 16, (8, 8, 0x1111));
            ScriptBuffer user = c.Structure("user", 16, (8, 8, 0x2222));
            c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.GsKernel, kernel);
            c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.GsUser, user);
            c.Kernel("load gs:[8]", static a => a.mov(rax, __qword_ptr.gs[8]), [Register64.Rax]);
            c.User("load gs:[8]", static a => a.mov(rax, __qword_ptr.gs[8]), [Register64.Rax]);
            c.Kernel("load gs:[8]", static a => a.mov(rax, __qword_ptr.gs[8]), [Register64.Rax]);
            c.ReadMsr("GS_BASE", MsrNumber.GsBase);
            c.ReadMsr("KERNEL_GS_BASE", MsrNumber.KernelGsBase);
        });
        script.Case("GS of user mode by its selector", c =>
        {
            ScriptBuffer user = c.Structure("user", 16, (8, 8, 0x2222));
            foreach (int selector in (int[])[0, 3, 2, Selectors.FlatRing3Ds, Selectors.FlatRing3Ds & ~3, 0x1233, 0x2b, 0x17, Selectors.FlatKernelCs64])
            {
                c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.GsUser, user);
                c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.GsUserSelector, selector);
                c.User("mov eax, gs", static a => a.mov(eax, gs), [Register64.Rax]);
                c.ReadMsr("KERNEL_GS_BASE", MsrNumber.KernelGsBase);
            }

            c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.GsUserSelector, 0);
        });
        script.Case("only the lower half of a selector's word counts", c =>
        {
            c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.GsUserSelector, Value.Constant(0xffff_0000, "0xffff0000"));
            c.User("mov eax, gs", static a => a.mov(eax, gs), [Register64.Rax]);
        });
        script.Case("bases that are not canonical, and what else is refused", c =>
        {
            foreach (int which in (int[])[SegmentBase.Fs, SegmentBase.GsUser, SegmentBase.GsKernel])
                c.Hypercall(GuestHypercall.SetSegmentBase, which, NonCanonical);
            c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.Fs, Value.Constant(Addresses.Hypervisor, "hypervisor"));
            c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.Fs, 0);
            c.Hypercall(GuestHypercall.SetSegmentBase, 4, 0);
            c.Hypercall(GuestHypercall.SetSegmentBase, -1, 0);
            c.Hypercall(GuestHypercall.SetSegmentBase, 4, NonCanonical);
        });
        script.Case("bases that the guest writes itself", c =>
        {
            ScriptBuffer area = c.Structure("area", 16, (0, 8, 0x1111), (8, 8, 0x2222));
            SetCr4(c, "with FSGSBASE", Fsgsbase);
            c.Kernel("wrfsbase, load fs:[0], rdfsbase", static a =>
            {
                a.wrfsbase(rcx);
                a.mov(rax, __qword_ptr.fs[0]);
                a.rdfsbase(rdx);
            }, [Register64.Rax, Register64.Rdx], [(Register64.Rcx, area)]);
            c.ReadMsr("FS_BASE", MsrNumber.FsBase);
            c.Kernel("wrgsbase, load gs:[0]", static a =>
            {
                a.wrgsbase(rcx);
                a.mov(rax, __qword_ptr.gs[0]);
            }, [Register64.Rax], [(Register64.Rcx, area[8])]);
            c.User("wrgsbase, load gs:[0]", static a =>
            {
                a.wrgsbase(rcx);
                a.mov(rax, __qword_ptr.gs[0]);
            }, [Register64.Rax], [(Register64.Rcx, area)]);
            c.Kernel("load gs:[0]", static a => a.mov(rax, __qword_ptr.gs[0]), [Register64.Rax]);
            c.ReadMsr("KERNEL_GS_BASE", MsrNumber.KernelGsBase);
            c.Kernel("wrfsbase, not canonical", static a => a.wrfsbase(rcx), with: [(Register64.Rcx, NonCanonical)]);
            c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.Fs, 0);
        });
        script.Case("without CR4.FSGSBASE there are no such instructions", c =>
        {
            SetCr4(c, "without FSGSBASE", 0);
            c.Kernel("rdfsbase", static a => a.rdfsbase(rax));
            c.User("wrgsbase", static a => a.wrgsbase(rax));
        });
    });

    public static AbiScript CreateSelectors() => new("selectors", "segments", script =>
    {
        script.Case("null selectors", c =>
        {
            foreach ((string name, Action<Assembler> load) in Registers)
            {
                c.Kernel($"mov {name}, ecx", load, with: [(Register64.Rcx, 0)]);
                c.User($"mov {name}, ecx", load, with: [(Register64.Rcx, 3)]);
            }
        });
        script.Case("flat selectors", c =>
        {
            foreach (int selector in (int[])[Selectors.FlatRing3Ds, Selectors.FlatRing3Cs64, Selectors.FlatRing3Cs32, Selectors.FlatRing3Ds & ~3])
            {
                foreach ((string name, Action<Assembler> load) in Registers)
                    c.Kernel($"mov {name}, ecx", load, with: [(Register64.Rcx, selector)]);
            }
        });
        script.Case("flat selectors of user mode", c =>
        {
            foreach ((string name, Action<Assembler> load) in Registers)
                c.User($"mov {name}, ecx", load, with: [(Register64.Rcx, Selectors.FlatRing3Ds)]);
        });
        script.Case("a load clears the base", c =>
        {
            ScriptBuffer area = c.Structure("area", 16, (8, 8, 0x1234_5678));
            c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.Fs, area);
            c.Kernel("mov fs, ecx", static a => a.mov(fs, ecx), with: [(Register64.Rcx, Selectors.FlatRing3Ds)]);
            c.ReadMsr("FS_BASE", MsrNumber.FsBase);
        });
        script.Case("what was loaded is read back", c => c.Kernel("mov ds, ecx; mov eax, ds", static a =>
        {
            a.mov(ds, ecx);
            a.mov(eax, ds);
        }, [Register64.Rax], [(Register64.Rcx, Selectors.FlatRing3Ds)]));
        script.Case("selectors of no descriptor", c =>
        {
            foreach (int selector in (int[])[0x1233, 0x1230, 0x17, 0xfffb])
            {
                foreach ((string name, Action<Assembler> load) in Registers)
                    c.Kernel($"mov {name}, ecx", load, with: [(Register64.Rcx, selector)]);
            }
        });
        script.Case("pop of a selector", c =>
        {
            c.Kernel("push 0xe02b; pop fs", static a =>
            {
                a.push(Selectors.FlatRing3Ds);
                a.pop(fs);
            });
            c.Kernel("push 0x1233; pop gs", static a =>
            {
                a.push(0x1233);
                a.pop(gs);
            });
        });
        script.Case("far returns", c =>
        {
            foreach (int selector in (int[])[Selectors.FlatRing3Cs64, Selectors.FlatKernelCs64, Selectors.FlatRing3Ds, 0x1233])
                c.FarReturn(selector);
        });
        script.Case("selectors that a bare Linux has, and no guest has installed", c =>
        {
            c.FarReturn(0x33);
            c.Kernel("mov ds, ecx", static a => a.mov(ds, ecx), with: [(Register64.Rcx, 0x2b)]);
            c.Kernel("mov ss, ecx", static a => a.mov(ss, ecx), with: [(Register64.Rcx, 0x2b)]);
        });
        script.Case("questions about selectors", c =>
        {
            foreach (int selector in (int[])[Selectors.FlatRing3Ds, Selectors.FlatRing3Cs64, 0, 0x1233])
            {
                c.Kernel("lar, verr, verw", static a =>
                {
                    a.lar(eax, ecx);
                    a.setz(bl);
                    a.verr(cx);
                    a.setz(dl);
                    a.verw(cx);
                    a.setz(sil);
                }, [Register64.Rax, Register64.Rbx, Register64.Rdx, Register64.Rsi], [(Register64.Rcx, selector)]);
            }
        });
    });

    public static AbiScript CreateTables() => new("descriptor-table-selectors", "segments", script =>
    {
        script.Case("selectors of the guest's global table", c =>
        {
            ScratchPage table = TablePage(c, "gdt");
            ScriptBuffer frames = c.Structure("frames", 8, (0, 8, table.Mfn));
            c.Hypercall(GuestHypercall.SetGdt, frames, TableEntries);
            Loads(c, 3);
            c.Hypercall(GuestHypercall.SetGdt, 0, 0);
            c.Kernel("mov ds, ecx", static a => a.mov(ds, ecx), with: [(Register64.Rcx, Selector(1, 3))]);
        });
        script.Case("selectors of the guest's local table", c =>
        {
            ScratchPage table = TablePage(c, "ldt");
            LoadLdt(c, "setLdt", table.At, TableEntries);
            Loads(c, 7);
            LoadLdt(c, "shorter", table.At, FirstDescriptor + 1);
            c.Kernel("mov ds, ecx", static a => a.mov(ds, ecx), with: [(Register64.Rcx, Selector(1, 7))]);
            LoadLdt(c, "none", 0, 0);
            c.Kernel("mov ds, ecx", static a => a.mov(ds, ecx), with: [(Register64.Rcx, Selector(1, 7))]);
        });
        script.Case("a local table whose page cannot be one", c =>
        {
            ScratchPage page = c.Page("writable");
            c.Put(page[(FirstDescriptor + 1) * 8], 8, FlatData);
            LoadLdt(c, "setLdt", page.At, TableEntries);
            c.Kernel("mov ds, ecx", static a => a.mov(ds, ecx), with: [(Register64.Rcx, Selector(1, 7))]);
            LoadLdt(c, "none", 0, 0);
        });
        script.Case("code of the guest's own selector", c =>
        {
            ScratchPage table = TablePage(c, "gdt");
            ScriptBuffer frames = c.Structure("frames", 8, (0, 8, table.Mfn));
            c.Hypercall(GuestHypercall.SetGdt, frames, TableEntries);
            c.FarReturn(Selector(4, 3));
            c.FarReturn(Selector(6, 3));
            c.FarReturn(Selector(7, 3));
            c.FarReturn(Selector(1, 3));
            c.Hypercall(GuestHypercall.SetGdt, 0, 0);
        });
    });

    public static AbiScript CreateCompatCode() => new("compat-code", "segments", script =>
    {
        script.Case("32-bit code of user mode: exceptions and int 0x80", c =>
        {
            LowPage low = MapLow(c);
            low.Run(c, "ud2", 0x0f, 0x0b);
            low.Run(c, "int 0x80", 0xcd, 0x80);
            low.Run(c, "int3", 0xcc);
            low.Run(c, "int 3", 0xcd, 0x03);
            low.Run(c, "into with OF", 0xb0, 0x7f, 0x04, 0x01, 0xce);
            low.Run(c, "into without OF, then ud2", 0x31, 0xc0, 0xce);
            low.Run(c, "div by 0", 0x31, 0xc9, 0xf7, 0xf1);
            low.Run(c, "hlt", 0xf4);
            low.Run(c, "mov ds, 0x1233", 0xb8, 0x33, 0x12, 0x00, 0x00, 0x8e, 0xd8);
            low.Run(c, "forced-emulation cpuid", 0x0f, 0x0b, (byte)'x', (byte)'e', (byte)'n', 0x0f, 0xa2);
        });
        script.Case("32-bit code of user mode: memory operands", c =>
        {
            LowPage low = MapLow(c);

            // mov eax, 0xe02b; mov ds, eax: while DS is null there are none.
            byte[] setDs = [0xb8, 0x2b, 0xe0, 0x00, 0x00, 0x8e, 0xd8];
            low.Run(c, "load from 0", [.. setDs, 0xa1, 0x00, 0x00, 0x00, 0x00]);
            low.Run(c, "store beyond the page", [.. setDs, 0xa3, 0x00, 0x10, 0x40, 0x00]);
            low.Run(c, "bound that holds, then ud2", [.. setDs, 0x62, 0x05, 0x00, 0x00, 0x40, 0x00]);
            low.Run(c, "bound that fails", [.. setDs, 0x62, 0x05, 0x04, 0x00, 0x40, 0x00]);
            low.Run(c, "les of a bad selector", [.. setDs, 0xc4, 0x05, 0x00, 0x00, 0x40, 0x00]);
        });
        script.Case("32-bit code with a null data segment", c =>
        {
            LowPage low = MapLow(c);
            c.Kernel("mov ds, ecx", static a => a.mov(ds, ecx), with: [(Register64.Rcx, 0)]);
            low.Run(c, "load from its own page", 0xa1, 0x00, 0x00, 0x40, 0x00);
        });
        script.Case("a far jump from 32-bit code to 64-bit code", c =>
        {
            LowPage low = MapLow(c);

            // jmp 0xe033:0x400807, then in 64-bit code mov eax, 1 and ud2; its RIP says that it came there.
            low.Run(c, "jmp 0xe033:there", 0xea, 0x07, 0x08, 0x40, 0x00, 0x33, 0xe0, 0x48, 0x31, 0xc0, 0x0f, 0x0b);
        });
    });

    /// <summary>System calls of 32-bit code. SYSENTER is not asked of it: it is there on one vendor's processors and not on the other's.</summary>
    public static AbiScript CreateCompatSystemCalls() => new("compat-system-calls", "callbacks", script =>
    {
        const byte setCarry = 0xf9;
        const byte setDirection = 0xfd;
        byte[] syscall = [0x0f, 0x05];
        void Register(AbiCase c, string name, int type, int flags, ProbeEntry entry) => c.RegisterCallback(name, type, flags, c.Handler((int)entry));
        script.Case("without a callback of its own it is an invalid opcode", c =>
        {
            LowPage low = MapLow(c);
            low.Run(c, "syscall", syscall);
            low.Run(c, "std; syscall", [setDirection, .. syscall]);
        });
        script.Case("with its callback", c =>
        {
            LowPage low = MapLow(c);
            Register(c, "compat", Callback.SyscallCompat, 0, ProbeEntry.Syscall32);
            low.Run(c, "syscall", syscall);
            low.Run(c, "stc; std; syscall", [setCarry, setDirection, .. syscall]);
            c.MaskUpcalls(true);
            low.Run(c, "syscall, events masked before", syscall);
            c.MaskUpcalls(false);
            c.User("syscall of 64-bit code", static a => a.syscall());
        });
        script.Case("its flag is that of 64-bit system calls", c =>
        {
            LowPage low = MapLow(c);
            Register(c, "masking", Callback.SyscallCompat, Callback.MaskEvents, ProbeEntry.Syscall32);
            low.Run(c, "syscall", syscall);
            Register(c, "usual", Callback.SyscallCompat, 0, ProbeEntry.Syscall32);
            Register(c, "masking64", Callback.Syscall, Callback.MaskEvents, ProbeEntry.Syscall);
            low.Run(c, "syscall", syscall);
            c.MaskUpcalls(false);
            Register(c, "usual64", Callback.Syscall, 0, ProbeEntry.Syscall);
            low.Run(c, "syscall", syscall);
        });
        script.Case("the callback is taken away", c =>
        {
            LowPage low = MapLow(c);
            Register(c, "compat", Callback.SyscallCompat, 0, ProbeEntry.Syscall32);
            c.RegisterCallback("none", Callback.SyscallCompat, 0, 0);
            low.Run(c, "syscall", syscall);
        });
        script.Case("int 0x80, with its flag and without an entry", c =>
        {
            LowPage low = MapLow(c);
            c.Install("masking", new Trap(0x80, TrapFlags.MasksEvents, c.Handler(0x80)));
            low.Run(c, "int 0x80", 0xcd, 0x80);
            c.MaskUpcalls(false);
            c.Install("open", new Trap(0x80, TrapFlags.UserMayRaise, c.Handler(0x80)));
            low.Run(c, "int 0x80", 0xcd, 0x80);
        });
        script.Case("from 32-bit code of kernel mode it is no hypercall", c =>
        {
            LowPage low = MapLow(c, kernel: true);
            Register(c, "compat", Callback.SyscallCompat, 0, ProbeEntry.Syscall32);
            low.RunAsKernel(c, "syscall", syscall);
        });
    });

    /// <summary>
    /// A page with descriptors, typed as a descriptor table needs it: 1 flat data, 2 read-only, 3 not present, 4 64-bit code, 5 32-bit
    /// code, 6 execute-only, 7 absent code, 8 flat data with a base, counted from <see cref="FirstDescriptor"/>.
    /// </summary>
    private static ScratchPage TablePage(AbiCase c, string name)
    {
        ScratchPage page = c.Page(name);
        ulong[] descriptors = [0, FlatData, ReadOnlyData, AbsentData, Code64, Code32, ExecuteOnlyCode, AbsentCode];
        foreach ((int index, ulong descriptor) in descriptors.Index())
            c.Put(page[(FirstDescriptor + index) * 8], 8, descriptor);

        // Base 0x12345678 in its three places.
        c.Put(page[(FirstDescriptor + 8) * 8], 8, 0x12cf_f334_5678_ffff);
        c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, page.Entry(Pte.ReadOnly), Pte.InvalidatePage);
        return page;
    }

    private static int Selector(int index, int low) => ((FirstDescriptor + index) << 3) | low;

    private static void SetCr4(AbiCase c, string what, ulong value)
        => c.Kernel($"mov cr4, rcx: {what}", static a => a.mov(cr4, rcx), with: [(Register64.Rcx, value)]);

    private static void LoadLdt(AbiCase c, string name, Value address, int entries)
    {
        const int DomidSelf = 0x7ff0;
        ScriptBuffer operation = c.Structure(name, 24, (0, 4, SetLdt), (8, 8, address), (16, 4, entries));
        c.Hypercall(GuestHypercall.MmuextOp, operation, 1, 0, DomidSelf);
    }

    /// <summary>Loads of the descriptors of <see cref="TablePage"/>.</summary>
    private static void Loads(AbiCase c, int low)
    {
        for (int index = 1; index <= 8; index++)
        {
            foreach ((string name, Action<Assembler> load) in Registers)
            {
                if (name is "es" or "gs")
                    continue;
                c.Kernel($"mov {name}, ecx", load, with: [(Register64.Rcx, Selector(index, low))]);
            }
        }

        c.Kernel("mov fs, ecx; mov eax, fs", static a =>
        {
            a.mov(fs, ecx);
            a.mov(eax, fs);
        }, [Register64.Rax], [(Register64.Rcx, Selector(8, low))]);
        c.ReadMsr("FS_BASE", MsrNumber.FsBase);
        c.Kernel("lar", static a => a.lar(eax, ecx), [Register64.Rax], [(Register64.Rcx, Selector(1, low))]);
        c.Kernel("mov fs, ecx", static a => a.mov(fs, ecx), with: [(Register64.Rcx, 0)]);
        c.Kernel("mov ds, ecx", static a => a.mov(ds, ecx), with: [(Register64.Rcx, 0)]);
        c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.GsUserSelector, Selector(1, low));
        c.User("mov eax, gs", static a => a.mov(eax, gs), [Register64.Rax]);
        c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.GsUserSelector, Selector(8, low));
        c.ReadMsr("KERNEL_GS_BASE", MsrNumber.KernelGsBase);
        c.Hypercall(GuestHypercall.SetSegmentBase, SegmentBase.GsUserSelector, Selector(3, low));
        c.User("mov eax, gs", static a => a.mov(eax, gs), [Register64.Rax]);
    }

    /// <summary>A page below 4 GiB in user mode's tables, for code in 32-bit segments.</summary>
    private sealed class LowPage(ScratchPage page, ulong address)
    {
        private const int CodeOffset = 0x800;

        /// <summary>Runs bytes as 32-bit code; an exception ends it.</summary>
        public void Run(AbiCase c, string text, params byte[] code)
        {
            foreach ((int index, byte value) in code.Index())
                c.Put(page[CodeOffset + index], 1, (int)value);

            // Whatever goes on comes to an UD2.
            c.Put(page[CodeOffset + code.Length], 2, 0x0b0f);
            Run(c, $"32-bit code: {text}", Selectors.FlatRing3Cs32);
        }

        /// <summary>The same in kernel mode.</summary>
        public void RunAsKernel(AbiCase c, string text, params byte[] code)
        {
            foreach ((int index, byte value) in code.Index())
                c.Put(page[CodeOffset + index], 1, (int)value);
            Run(c, $"32-bit code of kernel mode: {text}", Selectors.FlatRing3Cs32 & ~3);
        }

        private void Run(AbiCase c, string text, int selector) => c.Kernel(text, static a => ProcessorSteps.EmitIret(a), with:
        [
            (Register64.Rdi, address + CodeOffset), (Register64.Rsi, selector), (Register64.Rdx, Eflags.Fixed | Eflags.InterruptEnable),
            (Register64.Rbx, Selectors.FlatRing3Ds), (Register64.Rbp, address + 0x700),
        ]);
    }

    /// <param name="c">The case.</param>
    /// <param name="kernel">In kernel mode's tables instead, whose own low addresses have no table yet.</param>
    private static LowPage MapLow(AbiCase c, bool kernel = false)
    {
        const ulong address = 0x40_0000;
        const int slot3 = (int)((address >> 30) & 511);
        const int slot2 = (int)((address >> 21) & 511);
        const int slot1 = (int)((address >> 12) & 511);
        const int DomidSelf = 0x7ff0;
        ScratchPage page = c.Page("low");

        // Bounds for BOUND: 0 to 0x7fffffff, 0x7fffffff to 0; at 4 a bad selector for LES follows.
        c.Put(page[0], 8, 0x7fff_ffff_0000_0000);
        ScratchPage l1 = c.Page("l1");
        ScratchPage l2 = c.Page("l2");
        ScratchPage l3 = c.Page("l3");
        c.Put(l1[slot1 * 8], 8, page.Entry(Pte.UserTable));
        c.Put(l2[slot2 * 8], 8, l1.Entry(Pte.UserTable));
        c.Put(l3[slot3 * 8], 8, l2.Entry(Pte.UserTable));
        foreach (ScratchPage table in (ScratchPage[])[l1, l2, l3])
            c.Hypercall(GuestHypercall.UpdateVaMapping, table.At, table.Entry(Pte.ReadOnly), Pte.InvalidatePage);
        ScriptBuffer request = c.Structure("request", 16, (0, 8, (kernel ? c.Root : c.UserRoot) << 12), (8, 8, l3.Entry(Pte.UserTable)));
        c.Hypercall(GuestHypercall.MmuUpdate, request, 1, 0, DomidSelf);
        return new LowPage(page, address);
    }
}
