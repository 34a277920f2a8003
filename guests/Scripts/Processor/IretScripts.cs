// iret and stack_switch: what a frame may say, what of it is taken, and what becomes of a bad one.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Processor;

internal static class IretScripts
{
    /// <summary>VGCF_in_syscall.</summary>
    private const int InSyscall = 1 << 8;

    public static AbiScript CreateIret() => new("iret", "iret", script =>
    {
        script.Case("to kernel mode: registers and flags", c =>
            ToKernel(c, "", Eflags.Usual | Eflags.Carry | Eflags.Direction | Eflags.Id));
        script.Case("to kernel mode as from a system call: RCX and R11 are RIP and RFLAGS", c =>
            ToKernel(c, " VGCF_in_syscall", Eflags.Usual | Eflags.Carry, InSyscall));
        script.Case("flags words that nobody knows are ignored", c => ToKernel(c, "", Eflags.Usual, 0xfeff));
        script.Case("flags that the guest cannot have are dropped", c =>
        {
            ToKernel(c, " IOPL", Eflags.Usual | Eflags.Iopl);
            ToKernel(c, " VM", Eflags.Usual | Eflags.Virtual8086);
            ToKernel(c, " NT", Eflags.Usual | Eflags.NestedTask);
            ToKernel(c, " without the bit that is always set", Eflags.InterruptEnable);
            ToKernel(c, " RF", Eflags.Usual | Eflags.Resume);
        });
        script.Case("the upcall mask comes from IF", c =>
        {
            ToKernel(c, " without IF", Eflags.Fixed);
            c.Load(c.VcpuInfo() + 1, 1);
            ToKernel(c, " with IF", Eflags.Usual);
            c.Load(c.VcpuInfo() + 1, 1);
        });
        script.Case("an upcall that is due comes where iret leads", c =>
        {
            c.MaskUpcalls(true);
            c.Put(c.VcpuInfo(), 1, 1);
            To(c, "iret to user code with IF, an upcall due", Selectors.FlatRing3Cs64, Eflags.Usual);
        });
        script.Case("an upcall that is due does not come while the frame masks it", c =>
        {
            c.MaskUpcalls(true);
            c.Put(c.VcpuInfo(), 1, 1);
            ToKernel(c, " without IF, an upcall due", Eflags.Fixed);
            c.Load(c.VcpuInfo(), 1);
            c.Put(c.VcpuInfo(), 1, 0);
            c.MaskUpcalls(false);
        });
        script.Case("to user mode: the frame of what it does next", c =>
        {
            To(c, "iret to user code", Selectors.FlatRing3Cs64, Eflags.Usual | Eflags.Carry);
            To(c, "iret to user code, as from a system call", Selectors.FlatRing3Cs64, Eflags.Usual | Eflags.Carry, flags: InSyscall);
            To(c, "iret to user code without IF", Selectors.FlatRing3Cs64, Eflags.Fixed);
            c.MaskUpcalls(false);
        });
        script.Case("single step of the first instruction of user mode", c =>
            To(c, "iret to user code with TF", Selectors.FlatRing3Cs64, Eflags.Usual | Eflags.Trap));
        script.Case("code selectors: RPL 1 and 2 are kernel mode, the hypervisor makes 3 of them", c =>
        {
            To(c, "iret to cs 0xe031", Selectors.FlatKernelCs64 | 1, Eflags.Usual);
            To(c, "iret to cs 0xe032", Selectors.FlatKernelCs64 | 2, Eflags.Usual);
        });
        script.Case("code selectors that cannot be loaded", c =>
        {
            To(c, "iret to cs 0", 0, Eflags.Usual);
            To(c, "iret to cs 3", 3, Eflags.Usual);
            To(c, "iret to cs 0x1233", 0x1233, Eflags.Usual);
            To(c, "iret to cs 0x1230", 0x1230, Eflags.Usual);
            To(c, "iret to cs 0xe02b, a data segment", Selectors.FlatRing3Ds, Eflags.Usual);
            To(c, "iret to cs 0x17, of a table that is not there", 0x17, Eflags.Usual);
            To(c, "iret to cs 0xfff8, past the table", 0xfffb, Eflags.Usual);
        });
        script.Case("stack selectors that cannot be loaded", c =>
        {
            To(c, "iret to ss 0x1233", Selectors.FlatRing3Cs64, Eflags.Usual, ss: 0x1233);
            To(c, "iret to ss 0xe033, a code segment", Selectors.FlatRing3Cs64, Eflags.Usual, ss: Selectors.FlatRing3Cs64);
            To(c, "iret to ss 0xe02b in kernel mode, RPL 0", Selectors.FlatKernelCs64, Eflags.Usual, ss: 0xe028);
        });
        script.Case("bad selectors do not matter on the way of a system call", c =>
            To(c, "iret to cs 0x1233 ss 0x1233, as from a system call", 0x1233, Eflags.Usual, ss: 0x1233, flags: InSyscall));
        script.Case("to addresses where there is nothing", c =>
        {
            To(c, "iret to a non-canonical address", Selectors.FlatRing3Cs64, Eflags.Usual, rip: Addresses.NonCanonical);
            To(c, "iret to a non-canonical address of the kernel's", Selectors.FlatKernelCs64, Eflags.Usual, rip: Addresses.NonCanonical);
            To(c, "iret to a non-canonical address, as from a system call",
                Selectors.FlatRing3Cs64, Eflags.Usual, rip: Addresses.NonCanonical, flags: InSyscall);
            To(c, "iret to an address without a page", Selectors.FlatRing3Cs64, Eflags.Usual, rip: Addresses.Unmapped);
        });
        script.Case("with a stack pointer that is not canonical", c =>
            To(c, "iret to user code", Selectors.FlatRing3Cs64, Eflags.Usual, rsp: Addresses.NonCanonical));
        script.Case("the processor's own iret at the guest's privilege", c => c.Kernel("iretq to the next instruction", static a =>
        {
            Label next = a.CreateLabel();
            a.mov(rdx, rsp);
            a.push(Selectors.FlatRing3Ds);
            a.push(rdx);
            a.push(0x203);
            a.mov(ecx, Selectors.FlatRing3Cs64);
            a.push(rcx);
            a.lea(rcx, __[next]);
            a.push(rcx);
            a.iretq();
            a.Label(ref next);
            a.mov(eax, 9);
        }, [Register64.Rax, Register64.Rflags]));
    });

    public static AbiScript CreateStackSwitch() => new("stack-switch", "stack_switch", script =>
    {
        script.Case("another stack, and back", c =>
        {
            c.Hypercall(GuestHypercall.StackSwitch, Selectors.FlatRing3Ds, Value.Constant(ProbeLayout.EntryStack(0) - 0x200, "entry stack - 0x200"));
            c.User("ud2", static a => a.ud2());
            c.Hypercall(GuestHypercall.StackSwitch, Selectors.FlatRing3Ds, Value.Constant(ProbeLayout.EntryStack(0), "entry stack"));
            c.User("ud2", static a => a.ud2());
        });
        script.Case("any selector is taken, and the flat one is what the kernel runs with", c =>
        {
            foreach (int selector in (int[])[0, 0x1234, Selectors.FlatRing3Cs64, -1])
            {
                c.Hypercall(GuestHypercall.StackSwitch, selector, Value.Constant(ProbeLayout.EntryStack(0), "entry stack"));
                c.User("ud2", static a => a.ud2());
            }

            c.Kernel("mov eax, ss", static a => a.mov(eax, ss), [Register64.Rax]);
        });
        script.Case("addresses are not looked at", c =>
        {
            c.Hypercall(GuestHypercall.StackSwitch, Selectors.FlatRing3Ds, Value.Constant(Addresses.NonCanonical, "noncanonical"));
            c.Hypercall(GuestHypercall.StackSwitch, Selectors.FlatRing3Ds, Value.Constant(Addresses.Hypervisor, "hypervisor"));
            c.Hypercall(GuestHypercall.StackSwitch, Selectors.FlatRing3Ds, Value.Constant(Addresses.Unmapped, "unmapped"));
            c.Hypercall(GuestHypercall.StackSwitch, Selectors.FlatRing3Ds, 0);
            c.Hypercall(GuestHypercall.StackSwitch, Selectors.FlatRing3Ds, Value.Constant(ProbeLayout.EntryStack(0), "entry stack"));
            c.User("ud2", static a => a.ud2());
        });
    });

    /// <summary>Frames that end the domain.</summary>
    public static IEnumerable<AbiScript> CreateEnding()
    {
        yield return ExceptionsScript.Ending("iret-no-frame", "iret with a stack that is not mapped ends the domain", static c =>
        {
            ScratchPage hole = c.UnmappedPage("hole");
            c.Kernel("mov rsp, hole; iret", static a =>
            {
                a.mov(rsp, rcx);
                ProcessorSteps.EmitHypercall(a, GuestHypercall.Iret);
            }, with: [(Register64.Rcx, hole.At)]);
        });
    }

    /// <summary>HYPERVISOR_iret to the end of the code itself, in kernel mode.</summary>
    private static void ToKernel(AbiCase c, string what, ulong rflags, int flags = 0)
        => c.Kernel($"iret to kernel code, rflags 0x{rflags:x}{what}", static a =>
        {
            Label there = a.CreateLabel();
            a.mov(rbp, rsp);
            a.lea(rdi, __[there]);
            ProcessorSteps.EmitIret(a);
            a.ud2();
            a.Label(ref there);
        },
        [Register64.Rax, Register64.Rcx, Register64.R11, Register64.Rflags],
        [
            (Register64.Rsi, Selectors.FlatKernelCs64), (Register64.Rdx, rflags), (Register64.Rbx, Selectors.FlatRing3Ds), (Register64.R10, flags),
            (Register64.R8, 0x1111), (Register64.R9, 0x2222), (Register64.R12, 0x3333),
        ]);

    /// <summary>HYPERVISOR_iret to an UD2, or elsewhere; what comes of it is an exception.</summary>
    private static void To(
        AbiCase c, string what, int cs, ulong rflags, int ss = Selectors.FlatRing3Ds, int flags = 0, ulong? rip = null, ulong rsp = ProbeLayout.UserStackTop)
        => c.Kernel(what, a =>
        {
            Label there = a.CreateLabel();
            if (rip is null)
                a.lea(rdi, __[there]);
            ProcessorSteps.EmitIret(a);
            a.Label(ref there);
            a.nop();
            a.ud2();
        },
        with:
        [
            (Register64.Rdi, rip ?? 0), (Register64.Rsi, cs), (Register64.Rdx, rflags), (Register64.Rbx, ss), (Register64.Rbp, rsp),
            (Register64.R10, flags),
        ]);
}
