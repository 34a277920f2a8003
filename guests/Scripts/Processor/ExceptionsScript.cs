// Exceptions as the guest's handlers find them, of the kernel's instructions and of user mode's.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Processor;

internal static class ExceptionsScript
{
    /// <summary>The same cases at both privileges.</summary>
    public static AbiScript Create(bool user) => new(user ? "exceptions-user" : "exceptions-kernel", "exceptions", script =>
    {
        script.Case("#DE", c =>
        {
            c.MaskUpcalls(false);
            c.Run(user, "div by 0", static a => a.div(ecx), with: [(Register64.Rflags, Eflags.Fixed | Eflags.Carry | Eflags.Direction)]);
            c.Run(user, "idiv, quotient too large", static a =>
            {
                a.mov(edx, 1);
                a.mov(ecx, 1);
                a.idiv(ecx);
            });
        });
        script.Case("#DB of a single step", c =>
        {
            c.Run(user, "popf with TF, two instructions", static a =>
            {
                a.pushfq();
                a.or(__dword_ptr[rsp], (uint)Eflags.Trap);
                a.popfq();
                a.nop();
                a.nop();
            });
            c.Hypercall(GuestHypercall.GetDebugreg, 6);
            c.Hypercall(GuestHypercall.SetDebugreg, 6, 0);
            c.Run(user, "popf with TF, nop, popf without, each step resumed", static a =>
            {
                a.pushfq();
                a.or(__dword_ptr[rsp], (uint)Eflags.Trap);
                a.popfq();
                a.nop();
                a.pushfq();
                a.and(__dword_ptr[rsp], ~(int)Eflags.Trap);
                a.popfq();
                a.nop();
            }, resumes: 4);
            c.Hypercall(GuestHypercall.SetDebugreg, 6, 0);
        });
        script.Case("#BP of int3, with its entry's level at 3 and at 0", c =>
        {
            c.Run(user, "int3", static a => a.int3());
            c.Install("closed", new Trap(Vectors.Breakpoint, 0, c.Handler(Vectors.Breakpoint)));
            c.Run(user, "int3", static a => a.int3());
            c.Install("open", new Trap(Vectors.Breakpoint, TrapFlags.UserMayRaise, c.Handler(Vectors.Breakpoint)));
        });
        script.Case("#BP resumed", c => c.Run(user, "int3, resumed, int3", static a =>
        {
            a.mov(eax, 5);
            a.int3();
            a.inc(eax);
        }, [Register64.Rax], resumes: 1));
        script.Case("#BP of int 3, the two-byte form", c => c.Run(user, "int 3", static a => a.db(0xcd, 0x03)));
        script.Case("#OF of int 4, with its entry's level at 3 and at 0", c =>
        {
            c.Run(user, "int 4", static a => a.db(0xcd, 0x04));
            c.Install("closed", new Trap(Vectors.Overflow, 0, c.Handler(Vectors.Overflow)));
            c.Run(user, "int 4", static a => a.db(0xcd, 0x04));
            c.Install("open", new Trap(Vectors.Overflow, TrapFlags.UserMayRaise, c.Handler(Vectors.Overflow)));
        });
        script.Case("#UD", c =>
        {
            c.Run(user, "ud2", static a => a.ud2(), with: [(Register64.Rflags, Eflags.Usual | Eflags.Id)]);
            c.Run(user, "into", static a => a.db(0xce));
            c.Run(user, "push es", static a => a.db(0x06));
            c.Run(user, "lock nop", static a => a.db(0xf0, 0x90));
        });
        script.Case("#GP without a selector", c =>
        {
            c.Run(user, "hlt", static a => a.hlt());
            c.Run(user, "load from a non-canonical address", static a => a.mov(rax, __qword_ptr[rcx]),
                with: [(Register64.Rcx, Addresses.NonCanonical)]);
            c.Run(user, "store to a non-canonical address", static a => a.mov(__qword_ptr[rcx], rax),
                with: [(Register64.Rcx, Addresses.NonCanonical)]);
            c.Run(user, "jump to a non-canonical address", static a => a.jmp(rcx), with: [(Register64.Rcx, Addresses.NonCanonical)]);
            c.Run(user, "16-byte access that is not aligned", static a => a.movaps(xmm0, __xmmword_ptr[rsp + 4]));
        });
        script.Case("#SS: the stack at a non-canonical address", c => c.Run(
            user, "load by rbp from a non-canonical address", static a => a.mov(rax, __qword_ptr[rbp]),
            with: [(Register64.Rbp, Addresses.NonCanonical)]));
        script.Case("#MF of an unmasked floating-point exception", c =>
        {
            ScriptBuffer control = c.Structure("control", 8, (0, 2, 0x037b));
            c.Run(user, "divide by 0 with the exception unmasked, fwait", static a =>
            {
                a.fninit();
                a.fldcw(__word_ptr[rcx]);
                a.fld1();
                a.fldz();
                a.fdivp(st1, st0);
                a.wait();
            }, with: [(Register64.Rcx, control)]);
            c.Run(user, "fninit", static a => a.fninit());
        });
        script.Case("#XM of an unmasked SIMD exception", c =>
        {
            ScriptBuffer control = c.Structure("mxcsr", 8, (0, 4, 0x1d80), (4, 4, 0x1f80));
            c.Run(user, "divide by 0 with the exception unmasked", static a =>
            {
                a.ldmxcsr(__dword_ptr[rcx]);
                a.mov(eax, 0x3f80_0000);
                a.movd(xmm0, eax);
                a.xorps(xmm1, xmm1);
                a.divss(xmm0, xmm1);
                a.ldmxcsr(__dword_ptr[rcx + 4]);
            }, with: [(Register64.Rcx, control)]);
            c.Run(user, "ldmxcsr, all masked", static a => a.ldmxcsr(__dword_ptr[rcx]), with: [(Register64.Rcx, control[4])]);
        });
        script.Case("#AC with AC set", c => c.Run(
            user, "load of eight bytes that are not aligned", static a => a.mov(rax, __qword_ptr[rsp + 1]),
            with: [(Register64.Rflags, Eflags.Fixed | Eflags.AlignmentCheck)]));
        script.Case("the flags that the handler's frame keeps, and that a fault is returned from", c => c.Run(
            user, "ud2, returned to once", static a => a.ud2(),
                with: [(Register64.Rflags, Eflags.Fixed | Eflags.Direction | Eflags.Id)], resumes: 1));
        script.Case("events masked before", c =>
        {
            c.MaskUpcalls(true);
            c.Run(user, "ud2", static a => a.ud2());
            c.MaskUpcalls(false);
        });
        script.Case("events masked before, returned to", c =>
        {
            c.MaskUpcalls(true);
            c.Run(user, "int3, resumed", static a => a.int3(), resumes: 1);
            c.Load(c.VcpuInfo() + 1, 1);
            c.MaskUpcalls(false);
        });
        script.Case("a handler that masks events, returned from", c =>
        {
            c.Install("masking", new Trap(Vectors.Breakpoint, TrapFlags.MasksEvents, c.Handler(Vectors.Breakpoint)));
            c.Run(user, "int3, resumed", static a => a.int3(), with: [(Register64.Rflags, Eflags.Usual)], resumes: 1);
            c.Load(c.VcpuInfo() + 1, 1);
            c.Install("open", new Trap(Vectors.Breakpoint, TrapFlags.UserMayRaise, c.Handler(Vectors.Breakpoint)));
        });
        script.Case("frames on a stack that is not aligned", c =>
        {
            foreach (int offset in (int[])[8, 4, 1, 15])
            {
                c.Run(user, $"sub rsp, {offset}; ud2", a =>
                {
                    a.sub(rsp, offset);
                    a.ud2();
                });
            }

            c.Run(user, "sub rsp, 8; hlt, which has an error code", static a =>
            {
                a.sub(rsp, 8);
                a.hlt();
            });
        });
        if (user)
        {
            script.Case("the kernel stack of stack_switch is cut to a multiple of 16", c =>
            {
                c.Hypercall(GuestHypercall.StackSwitch, Selectors.FlatRing3Ds, Value.Constant(ProbeLayout.EntryStack(0) - 0x100 - 5, "entry stack - 0x105"));
                c.User("ud2", static a => a.ud2());
                c.Hypercall(GuestHypercall.StackSwitch, Selectors.FlatRing3Ds, Value.Constant(ProbeLayout.EntryStack(0), "entry stack"));
                c.User("ud2", static a => a.ud2());
            });
            script.Case("a user stack that is not mapped is of no concern", c =>
                c.User("ud2", static a => a.ud2(), with: [(Register64.Rsp, Addresses.NonCanonical)]));
        }
    });

    /// <summary>Page faults.</summary>
    public static AbiScript CreatePageFaults() => new("page-faults", "exceptions", script =>
    {
        script.Case("a page that is not present: read, write, execute", c =>
        {
            c.MaskUpcalls(false);
            ScratchPage hole = c.UnmappedPage("hole");
            c.Load(hole[0x123], 1);
            c.Store(hole[0xff8], 8, 1);
            c.Kernel("jmp there", static a => a.jmp(rcx), with: [(Register64.Rcx, hole[0x10])]);
            c.Load(c.VcpuInfo() + 16);
        });
        script.Case("a page that is read-only: written, locked, executed", c =>
        {
            ScratchPage page = c.Page("readonly");
            c.Put(page.At, 1, 0xc3);
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, page.Entry(Pte.ReadOnly), Pte.InvalidatePage);
            c.Store(page[8], 8, 1);
            c.Kernel("lock inc there", static a => a.@lock.inc(__dword_ptr[rcx]), with: [(Register64.Rcx, page[8])]);
            c.Load(page[8]);
            c.Kernel("call there", static a => a.call(rcx), with: [(Register64.Rcx, page.At)]);
        });
        script.Case("a page that may not be executed", c =>
        {
            ScratchPage page = c.Page("data");
            c.Put(page.At, 1, 0xc3);
            c.Kernel("call there", static a => a.call(rcx), with: [(Register64.Rcx, page.At)]);
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, page.Entry(Pte.ReadWrite | Pte.NoExecute), Pte.InvalidatePage);
            c.Kernel("call there", static a => a.call(rcx), with: [(Register64.Rcx, page.At)]);
            c.Load(page.At, 1);
        });
        script.Case("an access that starts in one page and fails in the next", c =>
        {
            ScratchPage page = c.Page("first");
            _ = c.UnmappedPage("hole");
            c.Load(page[4092]);
            c.Store(page[4092], 8, -1);
            c.Load(page[4088]);
        });
        script.Case("an instruction that starts in one page and goes on in the next", c =>
        {
            ScratchPage page = c.Page("first");
            _ = c.UnmappedPage("hole");
            c.Put(page[4095], 1, 0x0f);
            c.Kernel("jmp there", static a => a.jmp(rcx), with: [(Register64.Rcx, page[4095])]);
        });
        script.Case("an address that no table has", c =>
        {
            c.Load(Value.Constant(Addresses.Unmapped, "unmapped"));
            c.Load(Value.Constant(0, "0"));
            c.Store(Value.Constant(0, "0"), 8, 1);
            c.Kernel("jmp to 0", static a => a.jmp(rcx), with: [(Register64.Rcx, 0)]);
        });
        script.Case("of user mode: not present, read-only, not executable", c =>
        {
            ScratchPage hole = c.UnmappedPage("hole");
            ScratchPage page = c.Page("readonly");
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, page.Entry(Pte.ReadOnly | Pte.NoExecute), Pte.InvalidatePage);
            c.User("load from hole", static a => a.mov(rax, __qword_ptr[rcx]), with: [(Register64.Rcx, hole[8])]);
            c.User("store to hole", static a => a.mov(__qword_ptr[rcx], rax), with: [(Register64.Rcx, hole[16])]);
            c.User("jmp to hole", static a => a.jmp(rcx), with: [(Register64.Rcx, hole[24])]);
            c.User("load from readonly", static a => a.mov(rax, __qword_ptr[rcx]), [Register64.Rax], [(Register64.Rcx, page.At)]);
            c.User("store to readonly", static a => a.mov(__qword_ptr[rcx], rax), with: [(Register64.Rcx, page.At)]);
            c.User("jmp to readonly", static a => a.jmp(rcx), with: [(Register64.Rcx, page.At)]);
            c.User("load from 0", static a => a.mov(rax, __qword_ptr[rcx]), with: [(Register64.Rcx, 0)]);
        });
        script.Case("a stack that is not there: push, call", c =>
        {
            ScratchPage hole = c.UnmappedPage("hole");
            c.User("push", static a => a.push(rax), with: [(Register64.Rsp, hole[64])]);
            c.User("call", static a => a.call(rax), with: [(Register64.Rsp, hole[64])]);
        });
        script.Case("the fault is mended by the handler's next step and the access made again", c =>
        {
            ScratchPage page = c.UnmappedPage("mended");
            c.Load(page.At);
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, page.Entry(Pte.ReadWrite), 0);
            c.Load(page.At);
        });
        script.Case("a fault returned to comes again", c =>
        {
            ScratchPage hole = c.UnmappedPage("hole");
            c.Kernel("load, returned to twice", static a => a.mov(rax, __qword_ptr[rcx]), with: [(Register64.Rcx, hole[8])], resumes: 2);
        });
        script.Case("with events masked by the handler's entry", c =>
        {
            ScratchPage hole = c.UnmappedPage("hole");
            c.Install("masking", new Trap(Vectors.PageFault, TrapFlags.MasksEvents, c.Handler(Vectors.PageFault)));
            c.Load(hole[8]);
            c.Install("usual", new Trap(Vectors.PageFault, 0, c.Handler(Vectors.PageFault)));
            c.Load(hole[8]);
        });
    });

    /// <summary>Kernel stacks that end the domain.</summary>
    public static IEnumerable<AbiScript> CreateEnding()
    {
        yield return Ending("kernel-stack-unmapped", "a fault on a kernel stack that is not mapped ends the domain", static c =>
        {
            ScratchPage hole = c.UnmappedPage("hole");
            c.Kernel("mov rsp, hole + 128; ud2", static a =>
            {
                a.mov(rsp, rcx);
                a.ud2();
            }, with: [(Register64.Rcx, hole[128])]);
        });
        yield return Ending("kernel-stack-readonly", "a fault on a kernel stack that is read-only ends the domain", static c =>
        {
            ScratchPage page = c.Page("readonly");
            c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, page.Entry(Pte.ReadOnly), Pte.InvalidatePage);
            c.Kernel("mov rsp, readonly + 128; ud2", static a =>
            {
                a.mov(rsp, rcx);
                a.ud2();
            }, with: [(Register64.Rcx, page[128])]);
        });
        yield return Ending("kernel-stack-hypervisor", "a fault on a kernel stack in the hypervisor's range ends the domain", static c =>
            c.Kernel("mov rsp, hypervisor; ud2", static a =>
            {
                a.mov(rsp, rcx);
                a.ud2();
            }, with: [(Register64.Rcx, Value.Constant(Addresses.Hypervisor + 0x1000, "hypervisor"))]));
        yield return Ending("stack-switch-unmapped", "an exception of user mode ends the domain where stack_switch named no stack", static c =>
        {
            c.Hypercall(GuestHypercall.StackSwitch, Selectors.FlatRing3Ds, Value.Constant(Addresses.Unmapped, "unmapped"));
            c.User("ud2", static a => a.ud2());
        });
    }

    internal static AbiScript Ending(string name, string @case, Action<AbiCase> steps) =>
        new(name, "exceptions", script => script.Case(@case, c =>
    {
        steps(c);
        c.Show(1);
    }));
}
