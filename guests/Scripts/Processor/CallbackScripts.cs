// set_callbacks, callback_op, nmi_op, and the entries that they name: system calls of user mode, upcalls, NMIs.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Processor;

internal static class CallbackScripts
{
    private const int UpcallPending = 0;

    private static readonly Value NonCanonical = Value.Constant(Addresses.NonCanonical, "noncanonical");

    public static AbiScript CreateSetCallbacks() => new("set-callbacks", "set_callbacks", script =>
    {
        script.Case("all three are set", c =>
        {
            SetCallbacks(c, c.Handler((int)ProbeEntry.Syscall32));
            SystemCall(c);
            SelfMadeUpcall(c);
            SetCallbacks(c, c.Handler((int)ProbeEntry.Syscall));
            SystemCall(c);
        });
        script.Case("addresses that are not canonical are passed over, the others set", c =>
        {
            c.Hypercall(GuestHypercall.SetCallbacks, NonCanonical, NonCanonical, c.Handler((int)ProbeEntry.Sysenter));
            SystemCall(c);
            SelfMadeUpcall(c);
            SetCallbacks(c, NonCanonical);
            SystemCall(c);
            SetCallbacks(c, c.Handler((int)ProbeEntry.Syscall));
        });
        script.Case("the flags of callback_op are lost", c =>
        {
            c.RegisterCallback("masking", Callback.Syscall, Callback.MaskEvents, c.Handler((int)ProbeEntry.Syscall));
            SystemCall(c);
            c.MaskUpcalls(false);
            SetCallbacks(c, c.Handler((int)ProbeEntry.Syscall));
            SystemCall(c);
        });
    });

    public static AbiScript CreateCallbackOp() => new("callback-op", "callback_op", script =>
    {
        script.Case("every type is registered", c =>
        {
            c.RegisterCallback("event", Callback.Event, 0, c.UpcallHandler);
            c.RegisterCallback("failsafe", Callback.Failsafe, Callback.MaskEvents, c.Handler((int)ProbeEntry.Failsafe));
            c.RegisterCallback("syscall", Callback.Syscall, 0, c.Handler((int)ProbeEntry.Syscall));
            c.RegisterCallback("nmi", Callback.Nmi, 0, c.Handler((int)ProbeEntry.Nmi));
            c.RegisterCallback("sysenter", Callback.Sysenter, 0, c.Handler((int)ProbeEntry.Sysenter));
            c.RegisterCallback("syscall32", Callback.SyscallCompat, Callback.MaskEvents, c.Handler((int)ProbeEntry.Syscall32));
            SelfMadeUpcall(c);
            SystemCall(c);
        });
        script.Case("types that are unknown", c =>
        {
            foreach (int type in Callback.Unknown)
                c.RegisterCallback($"type{type}", type, 0, c.UpcallHandler);
            c.Hypercall(GuestHypercall.CallbackOp, Callback.Unregister, c.Structure("type3", 8, (0, 2, Callback.Unknown[0])));
        });
        script.Case("an address that is not canonical, of every type", c =>
        {
            foreach (int type in (int[])[.. Callback.Known, Callback.Unknown[0]])
                c.RegisterCallback($"type{type}", type, 0, NonCanonical);
            SelfMadeUpcall(c);
            SystemCall(c);
        });
        script.Case("only the NMI callback can be unregistered", c =>
        {
            foreach (int type in (int[])[.. Callback.Known, Callback.Nmi])
                c.Hypercall(GuestHypercall.CallbackOp, Callback.Unregister, c.Structure($"type{type}", 8, (0, 2, type)));
            SelfMadeUpcall(c);
            SystemCall(c);
        });
        script.Case("the mask flag of system calls", c =>
        {
            c.RegisterCallback("masking", Callback.Syscall, Callback.MaskEvents, c.Handler((int)ProbeEntry.Syscall));
            SystemCall(c);
            c.Load(c.VcpuInfo() + 1, 1);
            c.MaskUpcalls(false);
            c.RegisterCallback("usual", Callback.Syscall, 0, c.Handler((int)ProbeEntry.Syscall));
            SystemCall(c);
        });
        script.Case("flags that nobody knows are ignored", c =>
        {
            c.RegisterCallback("flags", Callback.Syscall, 0xfffe, c.Handler((int)ProbeEntry.Syscall));
            SystemCall(c);
        });
        script.Case("commands that are unknown, arguments that cannot be read", c =>
        {
            ScratchPage hole = c.UnmappedPage("hole");
            ScriptBuffer good = c.Structure("good", 16, (8, 8, c.UpcallHandler));
            c.Hypercall(GuestHypercall.CallbackOp, 2, good);
            c.Hypercall(GuestHypercall.CallbackOp, -1, good);
            c.Hypercall(GuestHypercall.CallbackOp, Callback.Register, 0);
            c.Hypercall(GuestHypercall.CallbackOp, Callback.Register, hole.At);
            c.Hypercall(GuestHypercall.CallbackOp, Callback.Register, hole[-8]);
            c.Hypercall(GuestHypercall.CallbackOp, Callback.Register, NonCanonical);
            c.Hypercall(GuestHypercall.CallbackOp, Callback.Register, Value.Constant(Addresses.Hypervisor, "hypervisor"));
            c.Hypercall(GuestHypercall.CallbackOp, Callback.Unregister, hole.At);
            c.Hypercall(GuestHypercall.CallbackOp, Callback.Unregister, NonCanonical);
        });
        script.Case("the command's upper half is not looked at", c =>
            c.Hypercall(
                GuestHypercall.CallbackOp, Value.Constant(0x1_0000_0000, "register + 2^32"),
                c.Structure("event", 16, (8, 8, c.UpcallHandler))));
    });

    public static AbiScript CreateSystemCalls() => new("system-calls", "callbacks", script =>
    {
        script.Case("a system call's frame", c =>
        {
            c.MaskUpcalls(false);
            c.User("syscall, with all flags that a process can set", static a =>
            {
                a.mov(eax, 7);
                a.syscall();
            }, with: [(Register64.Rflags, Eflags.Usual | Eflags.Carry | Eflags.Direction | Eflags.Id)]);
        });
        script.Case("RCX and R11 after it are RIP and RFLAGS, the others stay", c => c.User("syscall, resumed", static a =>
        {
            a.mov(eax, 7);
            a.syscall();
            a.mov(r8, rcx);
            a.mov(r9, r11);
        },
        [Register64.Rax, Register64.Rdx, Register64.Rsi, Register64.R8, Register64.R9],
        [(Register64.Rdx, 0x1111), (Register64.Rsi, 0x2222)], resumes: 1));
        script.Case("with the stack pointer anywhere", c => c.User("syscall", static a => a.syscall(),
            with: [(Register64.Rsp, Addresses.NonCanonical)]));
        script.Case("with events masked", c =>
        {
            c.MaskUpcalls(true);
            c.User("syscall", static a => a.syscall());
            c.MaskUpcalls(false);
        });
        script.Case("the direction flag is cleared for the handler and kept in the frame", c => c.User("std; syscall", static a =>
        {
            a.std();
            a.syscall();
        }));
        script.Case("without a callback it is an invalid opcode", c =>
        {
            c.RegisterCallback("none", Callback.Syscall, 0, 0);
            SystemCall(c);
            c.Install("masking", new Trap(Vectors.InvalidOpcode, TrapFlags.MasksEvents, c.Handler(Vectors.InvalidOpcode)));
            SystemCall(c);
            c.Install("usual", new Trap(Vectors.InvalidOpcode, 0, c.Handler(Vectors.InvalidOpcode)));
            c.RegisterCallback("usual", Callback.Syscall, 0, c.Handler((int)ProbeEntry.Syscall));
            SystemCall(c);
        });
        script.Case("a system call of user mode is no hypercall", c => c.User("xen_version(version) of user mode", static a =>
        {
            a.mov(eax, (uint)GuestHypercall.XenVersion);
            a.xor(edi, edi);
            a.syscall();
        }));
        script.Case("int 0x80 has a gate of its own", c =>
        {
            c.User("int 0x80", static a => a.@int(0x80));
            c.Install("closed", new Trap(0x80, 0, c.Handler(0x80)));
            c.User("int 0x80", static a => a.@int(0x80));
            c.Kernel("int 0x80", static a => a.@int(0x80));
            c.Install("masking", new Trap(0x80, TrapFlags.MasksEvents, c.Handler(0x80)));
            c.User("int 0x80", static a => a.@int(0x80), with: [(Register64.Rflags, Eflags.Usual)]);
            c.MaskUpcalls(false);
            c.User("int 0x80, resumed", static a =>
            {
                a.@int(0x80);
                a.mov(eax, 3);
            }, [Register64.Rax], resumes: 1);
            c.Install("open", new Trap(0x80, TrapFlags.UserMayRaise, c.Handler(0x80)));
        });
        script.Case("int n by the entry's level", c =>
        {
            // QEMU's software CPU names vector 2n where hardware names n: both have the entry, so that it does not matter.
            void Both(string name, int flags) =>
                c.Install(name, new Trap(0x30, flags, c.Handler(0x81)), new Trap(0x60, flags, c.Handler(0x81)));
            Both("level3", TrapFlags.UserMayRaise);
            c.User("int 0x30", static a => a.@int(0x30));
            c.Kernel("int 0x30", static a => a.@int(0x30));
            c.User("int 0x30, resumed", static a =>
            {
                a.@int(0x30);
                a.mov(eax, 3);
            }, [Register64.Rax], resumes: 1);
            Both("level1", TrapFlags.KernelMayRaise);
            c.Kernel("int 0x30", static a => a.@int(0x30));
            Both("masking", TrapFlags.UserMayRaise | TrapFlags.MasksEvents);
            c.User("int 0x30", static a => a.@int(0x30), with: [(Register64.Rflags, Eflags.Usual)]);
        });
        script.Case("int n that the entry's level does not allow", c =>
        {
            c.Install("level0", new Trap(0x31, 0, c.Handler(0x81)), new Trap(0x62, 0, c.Handler(0x81)));
            c.Kernel("int 0x31", static a => a.@int(0x31));
            c.User("int 0x31", static a => a.@int(0x31));
            c.Install(
                "level1", new Trap(0x31, TrapFlags.KernelMayRaise, c.Handler(0x81)),
                new Trap(0x62, TrapFlags.KernelMayRaise, c.Handler(0x81)));
            c.User("int 0x31", static a => a.@int(0x31));
        });
        script.Case("int n without an entry", c => c.User("int 0x32", static a => a.@int(0x32)));
        script.Case("int 0x82, the hypercall gate of 32-bit guests", c =>
        {
            c.Install("level3", new Trap(0x82, TrapFlags.UserMayRaise, c.Handler(0x82)));
            c.User("int 0x82", static a => a.@int(0x82));
            c.Kernel("int 0x82", static a => a.@int(0x82));
        });
    });

    public static AbiScript CreateNmi() => new("nmi", "nmi_op", script =>
    {
        script.Case("registered, sent to oneself, returned from", c =>
        {
            c.Hypercall(GuestHypercall.NmiOp, Callback.Register, c.Structure("callback", 16, (0, 8, c.Handler((int)ProbeEntry.Nmi))));
            SendNmi(c, resumes: 1);
            SendNmi(c, resumes: 1);
            c.Load(c.VcpuInfo() + 1, 1);
        });
        script.Case("while events are masked", c =>
        {
            c.MaskUpcalls(true);
            SendNmi(c, resumes: 1);
            c.Load(c.VcpuInfo() + 1, 1);
            c.MaskUpcalls(false);
        });
        script.Case("no other comes until HYPERVISOR_iret", c =>
        {
            SendNmi(c, resumes: 0);
            SendNmi(c, resumes: 0);
            c.Kernel("ud2, resumed: an iret", static a => a.ud2(), resumes: 1);
        });
        script.Case("without a callback it is lost", c =>
        {
            c.Hypercall(GuestHypercall.NmiOp, Callback.Unregister, 0);
            SendNmi(c, resumes: 1);
            c.Hypercall(GuestHypercall.NmiOp, Callback.Register, c.Structure("callback", 16, (0, 8, c.Handler((int)ProbeEntry.Nmi))));
            c.Kernel("nop", static a => a.nop(), resumes: 1);
        });
        script.Case("the trap table has the same entry", c =>
        {
            c.Install("entry2", new Trap(Vectors.Nmi, 0, c.Handler(Vectors.Nmi)));
            SendNmi(c, resumes: 1);
        });
        script.Case("what is refused", c =>
        {
            ScratchPage hole = c.UnmappedPage("hole");
            c.Hypercall(GuestHypercall.NmiOp, Callback.Register, c.Structure("bad", 16, (0, 8, NonCanonical)));
            c.Hypercall(GuestHypercall.NmiOp, Callback.Register, hole.At);
            c.Hypercall(GuestHypercall.NmiOp, Callback.Register, NonCanonical);
            c.Hypercall(GuestHypercall.NmiOp, 2, hole.At);
            c.Hypercall(GuestHypercall.NmiOp, -1, hole.At);
            c.Hypercall(GuestHypercall.VcpuOp, VcpuOperation.SendNmi, 99, 0);
        });
    });

    /// <summary>Sets the callbacks, the one of system calls among them.</summary>
    private static void SetCallbacks(AbiCase c, Value syscall)
        => c.Hypercall(GuestHypercall.SetCallbacks, c.UpcallHandler, c.Handler((int)ProbeEntry.Failsafe), syscall);

    /// <summary>An upcall without an event: the guest sets the pending flag itself, and makes a hypercall.</summary>
    private static void SelfMadeUpcall(AbiCase c)
    {
        c.MaskUpcalls(true);
        c.Put(c.VcpuInfo() + UpcallPending, 1, 1);
        c.MaskUpcalls(false);
        c.Hypercall(GuestHypercall.FpuTaskswitch, 0);
    }

    private static void SystemCall(AbiCase c) => c.User("syscall in the middle", static a =>
    {
        a.syscall();
        a.nop();
    }, with: [(Register64.Rflags, Eflags.Usual)]);

    private static void SendNmi(AbiCase c, int resumes) => c.Kernel($"vcpu_op(send_nmi, 0){(resumes == 0 ? "" : ", resumed")}", static a =>
    {
        a.mov(edi, VcpuOperation.SendNmi);
        a.xor(esi, esi);
        a.xor(edx, edx);
        ProcessorSteps.EmitHypercall(a, GuestHypercall.VcpuOp);
    }, [Register64.Rax], resumes: resumes);
}
