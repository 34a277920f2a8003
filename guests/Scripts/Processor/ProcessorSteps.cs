// Steps that several of the processor scripts take.
using Iced.Intel;
using XenSharp.Guests.Assembly;
using XenSharp.Guests.Probe;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Guests.Scripts.Processor;

/// <summary>One entry of a trap table: struct trap_info.</summary>
internal sealed record Trap(int Vector, int Flags, Value Address, int Cs = Selectors.FlatRing3Cs64);

internal static class ProcessorSteps
{
    private const int TrapInfoSize = 16;

    /// <summary>Runs the same instructions at kernel or at user privilege.</summary>
    public static RunRegisters Run(
        this AbiCase c, bool user, string text, Action<Assembler> emit, Register64[]? show = null,
        (Register64 Register, Value Value)[]? with = null, int resumes = 0)
        => user ? c.User(text, emit, show, with, resumes) : c.Kernel(text, emit, show, with, resumes);

    /// <summary>The vCPU's struct vcpu_info.</summary>
    public static Value VcpuInfo(this AbiCase c) => Value.Load(ProbeLayout.VcpuInfoPointer(0), "vcpu_info");

    /// <summary>A table for set_trap_table, closed by an entry without an address.</summary>
    public static ScriptBuffer TrapTable(this AbiCase c, string name, params Trap[] traps)
    {
        ScriptBuffer table = c.Buffer(name, (traps.Length + 1) * TrapInfoSize);
        foreach ((int index, Trap trap) in traps.Index())
            c.PutTrap(table[index * TrapInfoSize], trap);
        return table;
    }

    /// <summary>Quietly writes a struct trap_info.</summary>
    public static void PutTrap(this AbiCase c, Value at, Trap trap)
    {
        c.Put(at, 1, trap.Vector);
        c.Put(at + 1, 1, trap.Flags);
        c.Put(at + 2, 2, trap.Cs);
        c.Put(at + 8, 8, trap.Address);
    }

    /// <summary>Installs entries of the trap table.</summary>
    public static void Install(this AbiCase c, string name, params Trap[] traps)
        => c.Hypercall(GuestHypercall.SetTrapTable, c.TrapTable(name, traps));

    /// <summary>Registers a callback, with a struct callback_register of its own.</summary>
    public static void RegisterCallback(this AbiCase c, string name, int type, int flags, Value address)
        => c.Hypercall(GuestHypercall.CallbackOp, Callback.Register, c.Structure(name, 16, (0, 2, type), (2, 2, flags), (8, 8, address)));

    /// <summary>Sets the virtual IOPL.</summary>
    public static void SetIopl(this AbiCase c, string name, int level)
        => c.Hypercall(GuestHypercall.PhysdevOp, Physdev.SetIopl, c.Structure(name, 4, (0, 4, level)));

    /// <summary>RDMSR at kernel privilege; shows the whole in RAX.</summary>
    public static void ReadMsr(this AbiCase c, string name, uint number) => c.Kernel($"rdmsr {name}", static a =>
    {
        a.rdmsr();
        a.shl(rdx, 32);
        a.or(rax, rdx);
    }, [Register64.Rax], [(Register64.Rcx, number)]);

    /// <summary>WRMSR at kernel privilege.</summary>
    public static void WriteMsr(this AbiCase c, string name, uint number, Value value)
        => c.Kernel(
            $"wrmsr {name}", static a => a.wrmsr(), [], [(Register64.Rax, value), (Register64.Rcx, number), (Register64.Rdx, value >> 32)]);

    /// <summary>Makes a page of a bad mapping: not present.</summary>
    public static ScratchPage UnmappedPage(this AbiCase c, string name)
    {
        ScratchPage page = c.Page(name);
        c.Hypercall(GuestHypercall.UpdateVaMapping, page.At, 0, Pte.InvalidatePage);
        return page;
    }

    /// <summary>Emits a hypercall whose arguments are in its registers already.</summary>
    public static void EmitHypercall(Assembler a, GuestHypercall number)
    {
        a.mov(eax, (uint)number);
        a.syscall();
    }

    /// <summary>
    /// Puts struct iret_context on the stack and makes HYPERVISOR_iret of it: RDI the RIP, RSI the CS, RDX the RFLAGS, RBP the RSP,
    /// RBX the SS, R10 the flags, R8 the RAX, R9 the RCX and R12 the R11.
    /// </summary>
    public static void EmitIret(Assembler a)
    {
        a.push(rbx);
        a.push(rbp);
        a.push(rdx);
        a.push(rsi);
        a.push(rdi);
        a.push(r10);
        a.push(r9);
        a.push(r12);
        a.push(r8);
        EmitHypercall(a, GuestHypercall.Iret);
    }

    /// <summary>A far return to the next instruction, an UD2, by way of a code selector.</summary>
    public static void FarReturn(this AbiCase c, int selector) => c.Kernel($"retfq to cs 0x{selector:x}", a =>
    {
        Label there = a.CreateLabel();
        a.mov(ecx, selector);
        a.push(rcx);
        a.lea(rax, __[there]);
        a.push(rax);
        a.db(0x48, 0xcb); // retfq
        a.Label(ref there);
        a.ud2();
    });
}
