// What CPL 0 does for a switch between guest-kernel and guest-user mode inside the VM: it loads the other root.
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm;

/// <summary>
/// A vCPU's own interrupt table, in which the gate of #DE looks for two instructions of its SYSCALL entry: each divides by zero in order to
/// get to the other mode's root. One goes on at the same address, where kernel mode's root shows other code; the other where kernel mode has
/// put the address at which user mode goes on, with the stack and the flags that it divided with.
/// </summary>
/// <remarks>
/// A fault and not INT3, because KVM says of a fault whether it is still to be delivered. Whoever can reach one of the two instructions is
/// in the mode that it leaves: they stand in pages that only the mode's own roots show. So nothing has to be checked but where the fault came
/// from, which takes the few instructions that a KVM that interprets CPL 0 can be asked for. What the guest wrote is taken for RIP alone: CS
/// and the flags are those that the processor pushed at CPL 3.
/// </remarks>
internal sealed unsafe class ModeGate
{
    /// <summary>Bytes from the start of the data page to the two roots.</summary>
    private const int RootsOffset = MonitorLayout.Vectors * 16;

    private readonly ulong _enter;
    private readonly ulong _leave;
    private readonly ulong _plainGate;
    private readonly ulong _gate;
    private readonly ulong* _table;
    private readonly Roots* _roots;
    private readonly ulong _start;
    private readonly ulong _end;
    private readonly ulong _return;
    private readonly Switch _toKernel;
    private readonly Switch _toUser;

    /// <summary>What CR3 is loaded with. While it is, RAX lies here.</summary>
    private struct Roots
    {
        public ulong Kernel;
        public ulong User;
    }

    /// <summary>The instructions between which RAX is not in its register: the load of CR3, and the one that ends it.</summary>
    private readonly record struct Switch(ulong Load, ulong Restore)
    {
        public bool HoldsRax(ulong rip) => rip == Load || rip == Restore;
    }

    /// <param name="dataAddress">Where the monitor has the page for the table and the roots.</param>
    /// <param name="data">Host view of it.</param>
    /// <param name="codeAddress">Where it has the memory for the code.</param>
    /// <param name="code">Host view of it.</param>
    /// <param name="table">The VM's interrupt table, whose gates this one has.</param>
    /// <param name="stub">The monitor's stub for #DE.</param>
    /// <param name="modes">The two instructions.</param>
    /// <param name="report">Where the monitor has the page that kernel mode keeps user mode's address in.</param>
    public ModeGate(ulong dataAddress, byte* data, ulong codeAddress, Span<byte> code, ReadOnlySpan<ulong> table, ulong stub, ModeSwitch modes, ulong report)
    {
        (InterruptTable, _enter, _leave) = (dataAddress, modes.Enter, modes.Leave);
        _table = (ulong*)data;
        _roots = (Roots*)(data + RootsOffset);
        table.CopyTo(new Span<ulong>(data, RootsOffset / sizeof(ulong)));

        var assembler = new Assembler(64);
        Label other = assembler.CreateLabel();

        // By halves, as there is no operand for a whole address, and no register; that of the page is the same for both.
        assembler.cmp(__dword_ptr[rsp + sizeof(int)], (int)(_enter >> 32));
        assembler.jne(stub);
        assembler.cmp(__dword_ptr[rsp], unchecked((int)_enter));
        assembler.jne(other);
        (Label loadKernel, Label restoreKernel) = EmitSwitch(assembler, RootAddress(&_roots->Kernel));
        assembler.iretq();
        assembler.Label(ref other);
        assembler.cmp(__dword_ptr[rsp], unchecked((int)_leave));
        assembler.jne(stub);
        assembler.AddInstruction(Instruction.Create(Iced.Intel.Code.Push_rm64, SyscallEntry.At(report + (ulong)modes.UserRipOffset)));
        (Label loadUser, Label restoreUser) = EmitSwitch(assembler, RootAddress(&_roots->User));

        // RSP counts as it is after the POP.
        assembler.pop(__qword_ptr[rsp]);
        Label back = MonitorCode.Here(assembler);
        assembler.iretq();
        byte[] bytes = MonitorCode.Emit(assembler, codeAddress, out AssemblerResult result);
        bytes.CopyTo(code);
        _start = codeAddress;
        _end = codeAddress + (ulong)bytes.Length;
        _toKernel = new Switch(result.GetLabelRIP(loadKernel), result.GetLabelRIP(restoreKernel));
        _toUser = new Switch(result.GetLabelRIP(loadUser), result.GetLabelRIP(restoreUser));
        _return = result.GetLabelRIP(back);
        _plainGate = _table[0];
        _gate = KvmVirtualMachine.InterruptGate(codeAddress, level: 0).Low;
        if (KvmVirtualMachine.InterruptGate(codeAddress, level: 0).High != _table[1])
            throw new InvalidOperationException("The monitor's code is spread over more than 4 GiB.");
    }

    /// <summary>The table's address.</summary>
    public ulong InterruptTable { get; }

    /// <summary>Sets what the next entry's switches lead to. The vCPU's own thread only.</summary>
    public void Open(ulong kernelRoot, ulong userRoot)
    {
        *_roots = new Roots { Kernel = kernelRoot, User = userRoot };
        _table[0] = _gate;
    }

    /// <summary>Makes #DE what it is everywhere.</summary>
    public void Close() => _table[0] = _plainGate;

    /// <summary>Whether an address is in the gate's code.</summary>
    public bool Contains(ulong rip) => rip - _start < _end - _start;

    /// <summary>Whether an address is that of an instruction that leads here.</summary>
    public bool IsAtGate(ulong rip) => rip == _enter || rip == _leave;

    /// <summary>Whether the processor, at an address of the gate's code, came from one of them.</summary>
    /// <param name="rip">The address.</param>
    /// <param name="pushed">Where it came from, as it was pushed.</param>
    public bool IsSwitch(ulong rip, ulong pushed) => Contains(rip) && (IsAtGate(pushed) || rip == _return);

    /// <summary>Whether such a switch is best taken for one in user mode: it has not left that, or has come to it.</summary>
    /// <inheritdoc cref="IsSwitch"/>
    public bool IsInUserMode(ulong rip, ulong pushed) => pushed == _enter || rip == _return;

    /// <summary>What RAX was when the processor, now at an address of the gate's code, came here.</summary>
    public ulong OriginalRax(ulong rip, ulong rax)
        => _toKernel.HoldsRax(rip) ? Volatile.Read(ref _roots->Kernel) : _toUser.HoldsRax(rip) ? Volatile.Read(ref _roots->User) : rax;

    private static (Label Load, Label Restore) EmitSwitch(Assembler code, ulong root)
    {
        MemoryOperand operand = SyscallEntry.At(root);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Xchg_rm64_r64, operand, Register.RAX));
        Label load = MonitorCode.Here(code);
        code.mov(cr3, rax);
        Label restore = MonitorCode.Here(code);
        code.AddInstruction(Instruction.Create(Iced.Intel.Code.Xchg_rm64_r64, operand, Register.RAX));
        return (load, restore);
    }

    private ulong RootAddress(ulong* root) => InterruptTable + (ulong)((byte*)root - (byte*)_table);
}
