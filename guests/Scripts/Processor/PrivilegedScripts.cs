// Instructions that are the kernel's on a bare machine, and what the ABI makes of them: control and debug registers, MSRs, CPUID, ports.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Processor;

internal static class PrivilegedScripts
{
    private static readonly Value NonCanonical = Value.Constant(Addresses.NonCanonical, "noncanonical");

    /// <summary>Instructions that the processor leaves to CPL 0, and that need no operand to be harmless.</summary>
    private static readonly (string Text, Action<Assembler> Emit)[] Privileged =
    [
        ("hlt", static a => a.hlt()),
        ("cli", static a => a.cli()),
        ("sti", static a => a.sti()),
        ("clts", static a => a.clts()),
        ("invd", static a => a.invd()),
        ("wbinvd", static a => a.wbinvd()),
        ("invlpg", static a => a.invlpg(__byte_ptr[rsp])),
        ("lgdt", static a => a.lgdt(__[rsp])),
        ("lidt", static a => a.lidt(__[rsp])),
        ("lldt", static a => a.lldt(cx)),
        ("ltr", static a => a.ltr(cx)),
        ("lmsw", static a => a.lmsw(cx)),
        ("mov rax, cr0", static a => a.mov(rax, cr0)),
        ("mov cr3, rcx", static a => a.mov(cr3, rcx)),
        ("mov rax, cr8", static a => a.db(0x44, 0x0f, 0x20, 0xc0)),
        ("mov cr8, rax", static a => a.db(0x44, 0x0f, 0x22, 0xc0)),
        ("mov rax, cr1", static a => a.db(0x0f, 0x20, 0xc8)),
        ("mov rax, dr0", static a => a.mov(rax, dr0)),
        ("mov dr7, rcx", static a => a.mov(dr7, rcx)),
        ("rdmsr", static a => a.rdmsr()),
        ("wrmsr", static a => a.wrmsr()),
        ("rdpmc", static a => a.rdpmc()),
        ("xsetbv", static a => a.xsetbv()),
        ("swapgs", static a => a.swapgs()),
        ("sysretq", static a => a.sysretq()),
        ("in al, dx", static a => a.@in(al, dx)),
        ("out 0x80, al", static a => a.@out(0x80, al)),
        ("insb", static a => a.insb()),
        ("outsb", static a => a.outsb()),
    ];

    public static AbiScript CreatePrivileged() => new("privileged-instructions", "privileged instructions", script =>
    {
        foreach (bool user in (bool[])[false, true])
        {
            script.Case($"what {(user ? "user mode" : "the kernel")} may not do", c =>
            {
                foreach ((string text, Action<Assembler> emit) in Privileged)
                {
                    bool allowed = text is "clts" or "wbinvd" or "mov rax, cr0" or "mov rax, dr0";
                    if (user || !allowed)
                        c.Run(user, text, emit, with: [(Register64.Rcx, MsrNumber.Unknown), (Register64.Rdi, 0), (Register64.Rsi, 0)]);
                }
            });
        }

        script.Case("what the kernel may do although it is privileged", c =>
        {
            c.Kernel("wbinvd", static a => a.wbinvd(), [Register64.Rflags]);
            c.Kernel("clts", static a => a.clts(), [Register64.Rflags]);
        });
        script.Case("what everybody may do", c =>
        {
            foreach (bool user in (bool[])[false, true])
            {
                c.Run(user, "rdtsc", static a => a.rdtsc());
                c.Run(user, "smsw ax, its lowest bit", static a =>
                {
                    a.smsw(eax);
                    a.and(eax, 1);
                }, [Register64.Rax]);
                c.Run(user, "xgetbv, x87 and SSE", static a =>
                {
                    a.xor(ecx, ecx);
                    a.xgetbv();
                    a.and(eax, 3);
                }, [Register64.Rax]);
                c.Run(user, "pushf", static a =>
                {
                    a.pushfq();
                    a.pop(rax);
                }, [Register64.Rax]);
                c.Run(user, "popf of all flags but TF, NT and AC", static a =>
                {
                    a.push(0x37_beff - 0x4_4000);
                    a.popfq();
                    a.pushfq();
                    a.pop(rax);
                    a.cld();
                }, [Register64.Rax]);
            }
        });
        script.Case("popf and the upcall mask have nothing to do with each other", c =>
        {
            c.MaskUpcalls(false);
            c.Kernel("popf without IF; pushf", static a =>
            {
                a.push(2);
                a.popfq();
                a.pushfq();
                a.pop(rax);
            }, [Register64.Rax]);
            c.Load(c.VcpuInfo() + 1, 1);
        });
        script.Case("an emulated instruction under a single step", c =>
        {
            c.Kernel("popf with TF; wbinvd; nop", static a =>
            {
                a.pushfq();
                a.or(__dword_ptr[rsp], (uint)Eflags.Trap);
                a.popfq();
                a.wbinvd();
                a.nop();
            });
            c.Hypercall(GuestHypercall.GetDebugreg, 6);
            c.Hypercall(GuestHypercall.SetDebugreg, 6, 0);
        });
        script.Case("an instruction that cannot be fetched whole", c =>
        {
            ScratchPage page = c.Page("first");
            _ = c.UnmappedPage("hole");

            // The forced-emulation prefix, its signature cut short by the end of the page.
            c.Put(page[4092], 4, 0x6578_0b0f);
            c.Kernel("jmp to a prefix at the end of a page", static a => a.jmp(rcx), with: [(Register64.Rcx, page[4092])]);

            // wbinvd that ends with the page.
            c.Put(page[4094], 2, 0x090f);
            c.Kernel("jmp to wbinvd at the end of a page", static a => a.jmp(rcx), with: [(Register64.Rcx, page[4094])]);
        });
        script.Case("xsetbv", c =>
        {
            c.Kernel("mov rax, cr4; or OSXSAVE; mov cr4, rax", static a =>
            {
                a.mov(rax, cr4);
                a.or(eax, 1 << 18);
                a.mov(cr4, rax);
            });
            c.Kernel("xsetbv(0) of x87 and SSE; xgetbv", static a =>
            {
                a.mov(eax, 3);
                a.xor(edx, edx);
                a.xor(ecx, ecx);
                a.xsetbv();
                a.xgetbv();
            }, [Register64.Rax, Register64.Rdx]);
            c.Kernel("xsetbv(0) without x87", static a => a.xsetbv(), with: [(Register64.Rax, 2)]);
            c.Kernel("xsetbv(0) of a bit that is none", static a => a.xsetbv(), with: [(Register64.Rax, 3), (Register64.Rdx, 0x4000_0000)]);
            c.Kernel("xsetbv(1)", static a => a.xsetbv(), with: [(Register64.Rax, 3), (Register64.Rcx, 1)]);
            c.User("xsetbv(0)", static a => a.xsetbv(), with: [(Register64.Rax, 3)]);
        });
    });

    public static AbiScript CreateControlRegisters() => new("control-registers", "privileged instructions", script =>
    {
        script.Case("CR0", c =>
        {
            c.Kernel("mov rax, cr0", static a => a.mov(rax, cr0), [Register64.Rax]);
            c.Kernel("mov cr0, rcx: as it was", static a => a.mov(cr0, rcx), with: [(Register64.Rcx, 0x8005_0033)]);
            (string What, ulong Value)[] refused =
            [
                ("without PG", 0x0005_0033), ("without WP", 0x8004_0033), ("with CD", 0xc005_0033), ("with EM", 0x8005_0037),
                ("with an upper bit", 0x1_8005_0033),
            ];
            foreach ((string what, ulong value) in refused)
                c.Kernel($"mov cr0, rcx: {what}", static a => a.mov(cr0, rcx), with: [(Register64.Rcx, value)]);
            c.Kernel("mov rax, cr0", static a => a.mov(rax, cr0), [Register64.Rax]);
        });
        script.Case("CR2", c =>
        {
            c.Kernel("mov cr2, rcx; mov rax, cr2", static a =>
            {
                a.mov(cr2, rcx);
                a.mov(rax, cr2);
            }, [Register64.Rax], [(Register64.Rcx, 0x1234_5000)]);
            c.Load(c.VcpuInfo() + 16);
            ScratchPage hole = c.UnmappedPage("hole");
            c.Load(hole[0x18]);
            c.Kernel("mov rax, cr2", static a => a.mov(rax, cr2), [Register64.Rax]);
        });
        script.Case("CR2 is not vcpu_info's", c =>
        {
            c.Put(c.VcpuInfo() + 16, 8, 0x5555);
            c.Kernel("mov rax, cr2", static a => a.mov(rax, cr2), [Register64.Rax]);
        });
        script.Case("CR3", c =>
        {
            RunRegisters registers = c.Kernel("mov rax, cr3", static a => a.mov(rax, cr3));
            c.Show((registers[Register64.Rax] - (c.Root << 12)).Named("cr3-root"));
            c.Kernel("mov cr3, rcx: the same", static a => a.mov(cr3, rcx), with: [(Register64.Rcx, (c.Root << 12).Named("root"))]);
            ScratchPage page = c.Page("page");
            c.Kernel("mov cr3, rcx: a page that is no root", static a => a.mov(cr3, rcx),
                with: [(Register64.Rcx, (page.Mfn << 12).Named("page"))]);
            c.Kernel("mov cr3, rcx: beyond all memory", static a => a.mov(cr3, rcx), with: [(Register64.Rcx, 0x000f_ffff_ffff_f000)]);
        });
        script.Case("CR4", c =>
        {
            // PAE, MCE, OSFXSR and OSXMMEXCPT are the hypervisor's to show; TSD, DE, FSGSBASE and OSXSAVE the guest's to set.
            const uint Shown = (1 << 5) | (1 << 6) | (1 << 9) | (1 << 10);
            const uint TimeStampDisable = 1 << 2;
            const uint DebugExtensions = 1 << 3;
            void Write(string what, ulong value) => c.Kernel($"mov cr4, rcx: {what}; mov rax, cr4", static a =>
            {
                a.mov(cr4, rcx);
                a.mov(rax, cr4);
            }, [Register64.Rax], [(Register64.Rcx, value)]);
            Write("what the hypervisor shows", Shown);
            Write("nothing", 0);
            Write("with DE", Shown | DebugExtensions);
            Write("with VME, PSE, PGE, PCE, UMIP, VMXE, SMEP, SMAP", Shown | 0x30_2993);
            Write("with upper bits", Shown | 0xffff_ffff_0000_0000);
            Write("with TSD", Shown | TimeStampDisable);
            c.Kernel("rdtsc", static a => a.rdtsc());
            c.User("rdtsc, TSD set", static a => a.rdtsc());
            Write("without TSD", Shown);
            c.User("rdtsc", static a => a.rdtsc());
        });
        script.Case("TS by fpu_taskswitch, clts and CR0", c =>
        {
            c.Hypercall(GuestHypercall.FpuTaskswitch, 1);
            c.Kernel("mov rax, cr0", static a => a.mov(rax, cr0), [Register64.Rax]);
            c.Kernel("clts; mov rax, cr0", static a =>
            {
                a.clts();
                a.mov(rax, cr0);
            }, [Register64.Rax]);
            c.Kernel("mov cr0, rcx: with TS; mov rax, cr0", static a =>
            {
                a.mov(cr0, rcx);
                a.mov(rax, cr0);
            }, [Register64.Rax], [(Register64.Rcx, 0x8005_003b)]);
            c.Hypercall(GuestHypercall.FpuTaskswitch, 0);
            c.Kernel("mov rax, cr0", static a => a.mov(rax, cr0), [Register64.Rax]);
            c.Hypercall(GuestHypercall.FpuTaskswitch, 2);
            c.Kernel("mov rax, cr0", static a => a.mov(rax, cr0), [Register64.Rax]);
            c.Hypercall(GuestHypercall.FpuTaskswitch, Value.Constant(0x1_0000_0000, "2^32"));
            c.Kernel("mov rax, cr0", static a => a.mov(rax, cr0), [Register64.Rax]);
        });
        script.Case("#NM with TS set, which clears it", c =>
        {
            foreach (bool user in (bool[])[false, true])
            {
                c.Hypercall(GuestHypercall.FpuTaskswitch, 1);
                c.Run(user, "fnop", static a => a.fnop());
                c.Run(user, "fnop", static a => a.fnop());
                c.Hypercall(GuestHypercall.FpuTaskswitch, 1);
                c.Run(user, "xorps xmm0, xmm0, resumed", static a => a.xorps(xmm0, xmm0), resumes: 1);
                c.Kernel("mov rax, cr0", static a => a.mov(rax, cr0), [Register64.Rax]);
            }

            c.Hypercall(GuestHypercall.FpuTaskswitch, 0);
        });
    });

    public static AbiScript CreateDebugRegisters() => new("debug-registers", "set_debugreg", script =>
    {
        script.Case("each register is set and read", c =>
        {
            for (int register = 0; register < 4; register++)
            {
                c.Hypercall(GuestHypercall.SetDebugreg, register, 0x1000 + register);
                c.Hypercall(GuestHypercall.GetDebugreg, register);
            }

            foreach (int register in (int[])[4, 5, 6, 7])
                c.Hypercall(GuestHypercall.GetDebugreg, register);
        });
        script.Case("the highest address of user mode's half, addresses of the kernel's half", c =>
        {
            c.Hypercall(GuestHypercall.SetDebugreg, 0, 0x7fff_ffff_ffff);
            c.Hypercall(GuestHypercall.GetDebugreg, 0);
            c.Hypercall(GuestHypercall.SetDebugreg, 1, 0xffff_8800_0000_0000);
            c.Hypercall(GuestHypercall.GetDebugreg, 1);
        });
        script.Case("addresses that are refused", c =>
        {
            c.Hypercall(GuestHypercall.SetDebugreg, 0, NonCanonical);
            c.Hypercall(GuestHypercall.SetDebugreg, 1, Value.Constant(Addresses.Hypervisor, "hypervisor"));
            c.Hypercall(GuestHypercall.SetDebugreg, 2, Value.Constant(Addresses.HypervisorLast, "hypervisor's last page"));
            c.Hypercall(GuestHypercall.GetDebugreg, 0);
        });
        script.Case("registers that do not exist", c =>
        {
            foreach (Value register in (Value[])[8, -1, 99])
            {
                c.Hypercall(GuestHypercall.SetDebugreg, register, 0);
                c.Hypercall(GuestHypercall.GetDebugreg, register);
            }
        });
        script.Case("DR6: reserved bits", c =>
        {
            foreach (ulong value in (ulong[])[0, 0xffff_ffff, 0x1000, 0x400f])
            {
                c.Hypercall(GuestHypercall.SetDebugreg, 6, value);
                c.Hypercall(GuestHypercall.GetDebugreg, 6);
            }

            c.Hypercall(GuestHypercall.SetDebugreg, 6, Value.Constant(0x1_0000_0000, "2^32"));
            c.Hypercall(GuestHypercall.GetDebugreg, 6);
            c.Hypercall(GuestHypercall.SetDebugreg, 4, 0);
            c.Hypercall(GuestHypercall.GetDebugreg, 6);
        });
        script.Case("DR7: reserved bits, general detect, I/O breakpoints", c =>
        {
            foreach (ulong value in (ulong[])[0, 0xd800, 0x300, 0x2000, 0x2_0000, 0x2_0001, 0xffff_0400])
            {
                c.Hypercall(GuestHypercall.SetDebugreg, 7, value);
                c.Hypercall(GuestHypercall.GetDebugreg, 7);
            }

            c.Hypercall(GuestHypercall.SetDebugreg, 7, Value.Constant(0x1_0000_0000, "2^32"));
            c.Hypercall(GuestHypercall.SetDebugreg, 5, 0x400);
            c.Hypercall(GuestHypercall.GetDebugreg, 7);
        });
        script.Case("with CR4.DE registers 4 and 5 are gone, and I/O breakpoints can be set", c =>
        {
            const uint DebugExtensions = 1 << 3;
            c.Kernel("mov cr4, rcx: with DE", static a => a.mov(cr4, rcx), with: [(Register64.Rcx, DebugExtensions)]);
            foreach (int register in (int[])[4, 5])
            {
                c.Hypercall(GuestHypercall.SetDebugreg, register, 0);
                c.Hypercall(GuestHypercall.GetDebugreg, register);
            }

            c.Kernel("mov rax, dr4", static a => a.db(0x0f, 0x21, 0xe0));
            c.Kernel("mov dr5, rax", static a => a.db(0x0f, 0x23, 0xe8));
            c.Hypercall(GuestHypercall.SetDebugreg, 0, 0x61);
            c.Hypercall(GuestHypercall.SetDebugreg, 7, 0x2_0001);
            c.Hypercall(GuestHypercall.GetDebugreg, 7);
            c.SetIopl("iopl1", 1);
            c.Kernel("in al, 0x61; nop", static a =>
            {
                a.@in(al, 0x61);
                a.nop();
            });
            c.Hypercall(GuestHypercall.GetDebugreg, 6);
            c.Kernel("in al, 0x62; nop", static a => a.@in(al, 0x62));
            c.SetIopl("iopl0", 0);
            c.Hypercall(GuestHypercall.SetDebugreg, 7, 0);
            c.Hypercall(GuestHypercall.SetDebugreg, 6, 0);
            c.Kernel("mov cr4, rcx: without DE", static a => a.mov(cr4, rcx));
        });
        script.Case("the processor's instructions", c =>
        {
            c.Kernel("mov dr1, rcx; mov rax, dr1", static a =>
            {
                a.mov(dr1, rcx);
                a.mov(rax, dr1);
            }, [Register64.Rax], [(Register64.Rcx, 0x4321)]);
            c.Hypercall(GuestHypercall.GetDebugreg, 1);
            c.Kernel("mov dr6, rcx; mov rax, dr6", static a =>
            {
                a.mov(dr6, rcx);
                a.mov(rax, dr6);
            }, [Register64.Rax], [(Register64.Rcx, 0)]);
            c.Kernel("mov dr7, rcx; mov rax, dr7", static a =>
            {
                a.mov(dr7, rcx);
                a.mov(rax, dr7);
            }, [Register64.Rax], [(Register64.Rcx, 0x8000)]);
            c.Kernel("mov dr1, rcx", static a => a.mov(dr1, rcx), with: [(Register64.Rcx, NonCanonical)]);
            c.Kernel("mov dr1, rcx", static a => a.mov(dr1, rcx),
                with: [(Register64.Rcx, Value.Constant(Addresses.Hypervisor, "hypervisor"))]);
            c.Kernel("mov dr7, rcx", static a => a.mov(dr7, rcx), with: [(Register64.Rcx, 0x2000)]);
            c.Kernel("mov dr7, rcx", static a => a.mov(dr7, rcx), with: [(Register64.Rcx, Value.Constant(0x1_0000_0000, "2^32"))]);
            c.Kernel("mov rax, dr4", static a => a.db(0x0f, 0x21, 0xe0), [Register64.Rax]);
            c.User("mov rax, dr0", static a => a.mov(rax, dr0));
        });
        script.Case("a breakpoint on an instruction, returned to", c =>
        {
            // 0x401: L0, of type execute and one byte.
            c.Kernel("breakpoint on the third instruction from here", static a =>
            {
                Label there = a.CreateLabel();
                a.lea(rsi, __[there]);
                a.xor(edi, edi);
                ProcessorSteps.EmitHypercall(a, GuestHypercall.SetDebugreg);
                a.mov(edi, 7);
                a.mov(esi, 0x401);
                ProcessorSteps.EmitHypercall(a, GuestHypercall.SetDebugreg);
                a.nop();
                a.Label(ref there);
                a.nop();
            });
            c.Hypercall(GuestHypercall.GetDebugreg, 6);
            c.Hypercall(GuestHypercall.SetDebugreg, 7, 0);
            c.Hypercall(GuestHypercall.SetDebugreg, 6, 0);
        });
        script.Case("a breakpoint on data", c =>
        {
            ScriptBuffer watched = c.Buffer("watched", 8);
            c.Hypercall(GuestHypercall.SetDebugreg, 1, watched);

            // L1, of type write and four bytes.
            c.Hypercall(GuestHypercall.SetDebugreg, 7, 0xd0_0404);
            c.Kernel("load; store; nop", static a =>
            {
                a.mov(eax, __dword_ptr[rcx]);
                a.mov(__dword_ptr[rcx], eax);
                a.nop();
            }, with: [(Register64.Rcx, watched)]);
            c.Hypercall(GuestHypercall.GetDebugreg, 6);
            c.Hypercall(GuestHypercall.SetDebugreg, 7, 0);
            c.Hypercall(GuestHypercall.SetDebugreg, 6, 0);
        });
    });

    public static AbiScript CreateMsrs() => new("msrs", "privileged instructions", script =>
    {
        script.Case("segment bases", c =>
        {
            foreach ((string name, uint number) in ((string, uint)[])
                [("FS_BASE", MsrNumber.FsBase), ("GS_BASE", MsrNumber.GsBase), ("KERNEL_GS_BASE", MsrNumber.KernelGsBase)])
            {
                c.WriteMsr(name, number, 0x1234_5678_9abc);
                c.ReadMsr(name, number);
                c.WriteMsr(name, number, NonCanonical);
                c.ReadMsr(name, number);
                c.WriteMsr(name, number, 0);
            }
        });
        script.Case("EFER: read, written back, changed", c =>
        {
            c.ReadMsr("EFER", MsrNumber.Efer);
            c.WriteMsr("EFER", MsrNumber.Efer, 0xd01);
            c.WriteMsr("EFER", MsrNumber.Efer, 0x501);
            c.WriteMsr("EFER", MsrNumber.Efer, 0x1d01);
            c.ReadMsr("EFER", MsrNumber.Efer);
        });
        script.Case("registers of SYSCALL and SYSENTER", c =>
        {
            foreach ((string name, uint number) in ((string, uint)[])
                [
                    ("STAR", MsrNumber.Star), ("LSTAR", MsrNumber.Lstar), ("CSTAR", MsrNumber.Cstar), ("SF_MASK", MsrNumber.SyscallMask),
                    ("SYSENTER_CS", MsrNumber.SysenterCs),
                ])
            {
                c.ReadMsr(name, number);
                c.WriteMsr(name, number, 0);
            }
        });
        script.Case("APIC_BASE and the x2APIC", c =>
        {
            c.ReadMsr("APIC_BASE", MsrNumber.ApicBase);
            c.WriteMsr("APIC_BASE", MsrNumber.ApicBase, 0xfee0_0900);
            c.ReadMsr("x2APIC version", MsrNumber.X2ApicVersion);
            c.WriteMsr("x2APIC version", MsrNumber.X2ApicVersion, 0);
        });
        script.Case("the time-stamp counter can be read and not set", c =>
        {
            c.Kernel("rdmsr TIME_STAMP_COUNTER", static a => a.rdmsr(), [], [(Register64.Rcx, MsrNumber.TimeStampCounter)]);
            c.WriteMsr("TIME_STAMP_COUNTER", MsrNumber.TimeStampCounter, 0);
        });
        script.Case("memory types", c =>
        {
            c.ReadMsr("PAT", MsrNumber.Pat);
            c.WriteMsr("PAT", MsrNumber.Pat, 0x0007_0406_0007_0406);
            c.ReadMsr("MTRRcap", MsrNumber.MtrrCapability);
            c.ReadMsr("MTRRfix64K", MsrNumber.MtrrFix64K);
            c.WriteMsr("MTRRfix64K", MsrNumber.MtrrFix64K, 0);
        });
        script.Case("registers that the guest has no feature for", c =>
        {
            c.ReadMsr("U_CET", MsrNumber.UserCet);
            c.WriteMsr("U_CET", MsrNumber.UserCet, 0);
            c.ReadMsr("VM_CR", MsrNumber.VmCr);
            c.WriteMsr("VM_CR", MsrNumber.VmCr, 0);
            c.ReadMsr("DEBUGCTL", MsrNumber.DebugControl);
            c.WriteMsr("DEBUGCTL", MsrNumber.DebugControl, 1);
        });
        script.Case("MCG_STATUS", c =>
        {
            c.ReadMsr("MCG_STATUS", MsrNumber.MachineCheckStatus);
            c.WriteMsr("MCG_STATUS", MsrNumber.MachineCheckStatus, 5);
            c.ReadMsr("MCG_STATUS", MsrNumber.MachineCheckStatus);
            c.WriteMsr("MCG_STATUS", MsrNumber.MachineCheckStatus, 0);
        });
        script.Case("MISC_FEATURES_ENABLES", c =>
        {
            c.ReadMsr("MISC_FEATURES_ENABLES", MsrNumber.MiscFeaturesEnables);
            c.WriteMsr("MISC_FEATURES_ENABLES", MsrNumber.MiscFeaturesEnables, 0);
            c.WriteMsr("MISC_FEATURES_ENABLES", MsrNumber.MiscFeaturesEnables, 2);
        });
        script.Case("registers that nobody knows", c =>
        {
            c.ReadMsr("0x12345678", MsrNumber.Unknown);
            c.WriteMsr("0x12345678", MsrNumber.Unknown, 0);
            c.ReadMsr("0xffffffff", uint.MaxValue);
        });
        script.Case("only the lower half of RCX counts", c => c.Kernel(
            "rdmsr", static a => a.rdmsr(),
                [Register64.Rax, Register64.Rdx], [(Register64.Rcx, 0x1234_0000_0000 | (ulong)MsrNumber.ApicBase)]));
        script.Case("a hypercall page", c =>
        {
            ScratchPage page = c.Page("hypercalls");
            c.ReadMsr("hypercall page", MsrNumber.Hypervisor);
            c.WriteMsr("hypercall page", MsrNumber.Hypervisor, (page.Mfn << 12).Named("hypercalls"));
            c.Kernel("call of the entry of xen_version", static a =>
            {
                a.add(rcx, (int)GuestHypercall.XenVersion * 32);
                a.xor(edi, edi);
                a.call(rcx);
            }, [Register64.Rax], [(Register64.Rcx, page.At)]);
            c.Kernel("call of the entry of a hypercall that does not exist", static a =>
            {
                a.add(rcx, 63 * 32);
                a.call(rcx);
            }, [Register64.Rax], [(Register64.Rcx, page.At)]);
            c.WriteMsr("hypercall page", MsrNumber.Hypervisor, (page.Mfn << 12).Named("hypercalls") + 1);
            c.WriteMsr("hypercall page", MsrNumber.Hypervisor, 0x000f_ffff_ffff_f000);
            c.WriteMsr("hypercall page", MsrNumber.Hypervisor, (c.Root << 12).Named("root"));
            c.ReadMsr("hypervisor + 1", MsrNumber.Hypervisor + 1);
            c.WriteMsr("hypervisor + 1", MsrNumber.Hypervisor + 1, 0);
        });
        script.Case("without a #GP handler a register that the processor has reads as 0", c =>
        {
            c.Install("none", new Trap(Vectors.Divide, 0, c.Handler(Vectors.Divide)));
            c.Hypercall(GuestHypercall.SetTrapTable, 0);
            c.ReadMsr("LSTAR", MsrNumber.Lstar);
            c.Install(
                "usual", new Trap(Vectors.GeneralProtection, 0, c.Handler(Vectors.GeneralProtection)),
                new Trap(Vectors.PageFault, 0, c.Handler(Vectors.PageFault)));
            c.ReadMsr("LSTAR", MsrNumber.Lstar);
        });
    });

    public static AbiScript CreateCpuid() => new("cpuid", "cpuid", script =>
    {
        script.Case("the hypervisor's leaves", c =>
        {
            ForcedCpuid(c, false, 0x4000_0000);
            ForcedCpuid(c, true, 0x4000_0000);
            ForcedCpuid(c, false, 0x4000_0001);
            ForcedCpuid(c, false, 0x4000_0002);
            ForcedCpuid(c, false, 0x4000_0003, show: [Register64.Rbx]);
            ForcedCpuid(c, false, 0x4000_0004);
            ForcedCpuid(c, false, 0x4000_0005, show: [Register64.Rax, Register64.Rdx, Register64.R8]);
            ForcedCpuid(c, false, 0x4000_0006);
            ForcedCpuid(c, false, 0x4000_0100);
        });
        script.Case("leaves that are none", c =>
        {
            ForcedCpuid(c, false, 0x1234_5678);
            ForcedCpuid(c, false, 0x4000_0200);
            ForcedCpuid(c, false, 0xffff_ffff);
            ForcedCpuid(c, false, 0x8000_ffff);
        });
        script.Case("what is hidden from a PV guest, leaf 1", c =>
        {
            // DTES64, MONITOR, DS-CPL, VMX, SMX, TM2, xTPR, PDCM, PCID, DCA, TSC deadline.
            const ulong HiddenInRcx =
                (1 << 2) | (1 << 3) | (1 << 4) | (1 << 5) | (1 << 6) | (1 << 8) | (1 << 14) | (1 << 15) | (1 << 17) | (1 << 18) | (1 << 24);

            // VME, PSE, PGE, PSE36, DS, TM, PBE.
            const ulong HiddenInRdx = (1 << 1) | (1 << 3) | (1 << 13) | (1 << 17) | (1 << 21) | (1 << 29) | (1UL << 31);
            foreach (bool user in (bool[])[false, true])
            {
                RunRegisters registers = ForcedCpuid(c, user, 1, show: []);
                c.Show((registers[Register64.R8] & HiddenInRcx).Named("rcx, what is to be hidden"));
                c.Show((registers[Register64.Rdx] & HiddenInRdx).Named("rdx, what is to be hidden"));

                // The hypervisor bit; FPU, TSC, MSR, PAE, CX8, APIC, CMOV, FXSR, SSE, SSE2, which 64-bit processors have.
                c.Show((registers[Register64.R8] & (1UL << 31)).Named("rcx, the hypervisor bit"));
                c.Show((registers[Register64.Rdx] & 0x0700_8371).Named("rdx, what every processor has"));
            }
        });
        script.Case("what is hidden from a PV guest, leaf 1 of user mode", c =>
        {
            RunRegisters registers = ForcedCpuid(c, true, 1, show: []);

            // EIST; MTRR.
            c.Show((registers[Register64.R8] & (1 << 7)).Named("rcx, EIST"));
            c.Show((registers[Register64.Rdx] & (1 << 12)).Named("rdx, MTRR"));
        });
        script.Case("what is hidden from a PV guest, leaf 7", c =>
        {
            RunRegisters registers = ForcedCpuid(c, false, 7, show: []);

            // SGX, SMEP, INVPCID, MPX, SMAP, processor trace; UMIP, PKU, CET, LA57.
            c.Show((registers[Register64.Rbx] & ((1 << 2) | (1 << 7) | (1 << 10) | (1 << 14) | (1 << 20) | (1 << 25))).Named("rbx, what is to be hidden"));
            c.Show((registers[Register64.R8] & ((1 << 2) | (1 << 3) | (1 << 4) | (1 << 7) | (1 << 16))).Named("rcx, what is to be hidden"));
        });
        script.Case("what is hidden from a PV guest, leaf 0x80000001", c =>
        {
            RunRegisters registers = ForcedCpuid(c, false, 0x8000_0001, show: []);

            // SVM, extended APIC space, SKINIT; 1 GiB pages.
            c.Show((registers[Register64.R8] & ((1 << 2) | (1 << 3) | (1 << 12))).Named("rcx, what is to be hidden"));
            c.Show((registers[Register64.Rdx] & (1 << 26)).Named("rdx, 1 GiB pages"));

            // SYSCALL, NX, long mode; LAHF in long mode.
            c.Show((registers[Register64.Rdx] & ((1 << 11) | (1 << 20) | (1 << 29))).Named("rdx, what every processor has"));
        });
        script.Case("the prefix before another instruction is an invalid opcode", c =>
        {
            c.Kernel("ud2; \"xen\"; nop", static a => a.db(0x0f, 0x0b, (byte)'x', (byte)'e', (byte)'n', 0x90));
            c.Kernel("ud2; \"xem\"; cpuid", static a => a.db(0x0f, 0x0b, (byte)'x', (byte)'e', (byte)'m', 0x0f, 0xa2));
            c.Kernel("ud2; \"xen\"; prefix; cpuid", static a => a.db(0x0f, 0x0b, (byte)'x', (byte)'e', (byte)'n', 0x66, 0x0f, 0xa2));
        });
        script.Case("under a single step", c =>
        {
            c.Kernel("popf with TF; forced-emulation cpuid; nop", static a =>
            {
                a.mov(eax, 0x4000_0001);
                a.pushfq();
                a.or(__dword_ptr[rsp], (uint)Eflags.Trap);
                a.popfq();
                EmitForcedCpuid(a);
                a.nop();
            });
        });
    });

    private static RunRegisters ForcedCpuid(AbiCase c, bool user, uint leaf, uint subleaf = 0, Register64[]? show = null)
        => c.Run(
            user, "forced-emulation cpuid", EmitForcedCpuid, show ?? [Register64.Rax, Register64.Rbx, Register64.Rdx, Register64.R8],
            [(Register64.Rax, leaf), (Register64.Rcx, subleaf)]);

    private static void EmitForcedCpuid(Assembler a)
    {
        a.db(0x0f, 0x0b, (byte)'x', (byte)'e', (byte)'n');
        a.cpuid();

        // SYSCALL at the end of user code loses it.
        a.mov(r8, rcx);
    }
}
