// What CPL 0 does for the RDMSR with which a guest's kernel reads user mode's GS base: it reads it.
using Iced.Intel;
using XenSharp.Core;
using static Iced.Intel.AssemblerRegisters;

namespace XenSharp.Kvm;

/// <summary>
/// Linux reads user mode's GS base at every switch to another task, with an RDMSR that raises #GP. In a vCPU's own interrupt table the gate of
/// #GP leads here: where the manager has found such an RDMSR before, the register is what the SYSCALL entry goes by
/// (<see cref="EntryReport.InactiveGsBase"/>). All else goes on to the monitor's stub.
/// </summary>
/// <remarks>
/// The instruction is looked at each time, as another may stand there by now, and so is the mode, by what the current root shows. Interrupted
/// before its last step the RDMSR has not been made, and can be made again.
/// </remarks>
internal sealed unsafe class GsBaseGate
{
    /// <summary>Bytes of RDMSR without prefixes.</summary>
    public const int InstructionLength = 2;

    /// <summary>0F 32, as a word.</summary>
    private const short Rdmsr = 0x320f;

    // Bytes from RSP, which is on the error code.
    private const int FrameRip = sizeof(ulong);
    private const int FrameFlags = 3 * sizeof(ulong);

    private const int TableIndex = (int)ExceptionVector.GeneralProtection * 2;

    private readonly ulong* _table;
    private readonly ulong _plainGate;
    private readonly ulong _gate;
    private readonly ulong _codeAddress;
    private readonly byte* _code;
    private readonly int _codeSize;
    private readonly ulong _stub;
    private readonly ulong _kernelMark;
    private readonly ulong _inactiveGsBase;
    private ulong _end;

    /// <summary>The instruction before which RAX is put on the stack, the one before which it is not needed any more, and the one that takes it back.</summary>
    private ulong _kept;
    private ulong _retire;
    private ulong _inUserMode;

    /// <param name="table">Host view of the vCPU's interrupt table.</param>
    /// <param name="codeAddress">Where the monitor has the memory for the code.</param>
    /// <param name="code">Host view of it.</param>
    /// <param name="stub">The monitor's stub for #GP.</param>
    /// <param name="kernelMark">A byte that is not 0 where kernel mode's root is loaded, and 0 where user mode's is.</param>
    /// <param name="inactiveGsBase">Where the monitor has <see cref="EntryReport.InactiveGsBase"/>.</param>
    public GsBaseGate(ulong* table, ulong codeAddress, Span<byte> code, ulong stub, ulong kernelMark, ulong inactiveGsBase)
    {
        _table = table;
        (_codeAddress, _codeSize) = (codeAddress, code.Length);
        fixed (byte* start = code)
            _code = start;
        (_stub, _kernelMark, _inactiveGsBase) = (stub, kernelMark, inactiveGsBase);
        _plainGate = table[TableIndex];
        (_gate, ulong high) = KvmVirtualMachine.InterruptGate(codeAddress, level: 0);
        if (high != table[TableIndex + 1])
            throw new InvalidOperationException("The monitor's code is spread over more than 4 GiB.");
    }

    /// <summary>Where the RDMSR is that is served; 0 while none is.</summary>
    public ulong Served { get; private set; }

    /// <summary>Serves the RDMSR at an address; 0 for none. The vCPU's own thread only, before an entry.</summary>
    public void Serve(ulong rip)
    {
        // An address that is no displacement is not where kernels are.
        ulong served = IsDisplacement(rip) && IsDisplacement(rip + InstructionLength) ? rip : 0;
        if (served == Served)
            return;
        Served = served;
        if (served != 0)
            Assemble();
        _table[TableIndex] = served != 0 ? _gate : _plainGate;
    }

    /// <summary>Whether an address is in the gate's code.</summary>
    public bool Contains(ulong rip) => Served != 0 && rip - _codeAddress < _end - _codeAddress;

    /// <summary>Whether RAX lies below the error code at an address of the gate's code, and the RDMSR has not been made.</summary>
    public bool KeepsRax(ulong rip) => (rip >= _kept && rip <= _retire) || rip == _inUserMode;

    private static bool IsDisplacement(ulong address) => (ulong)(int)address == address && address != 0;

    private void Assemble()
    {
        int rip = (int)Served;
        var code = new Assembler(64);
        code.cmp(ecx, unchecked((int)Msr.KernelGsBase));
        code.jne(_stub);
        code.cmp(__qword_ptr[rsp + FrameRip], rip);
        code.jne(_stub);

        // After a single step of it there would be a trap.
        code.test(__dword_ptr[rsp + FrameFlags], (int)Rflags.Trap);
        code.jne(_stub);
        code.AddInstruction(Instruction.Create(Code.Cmp_rm16_imm16, new MemoryOperand(Register.None, rip, sizeof(ulong)), Rdmsr));
        code.jne(_stub);

        // It is too far away for any other operand.
        code.push(rax);
        Label kept = MonitorCode.Here(code);
        code.AddInstruction(Instruction.Create(Code.Mov_AL_moffs8, Register.AL, new MemoryOperand(Register.None, (long)_kernelMark, sizeof(ulong))));
        code.test(al, al);
        Label inUserMode = code.CreateLabel();
        code.je(inUserMode);
        code.AddInstruction(Instruction.Create(Code.Mov_r32_rm32, Register.EAX, SyscallEntry.At(_inactiveGsBase)));
        code.AddInstruction(Instruction.Create(Code.Mov_r32_rm32, Register.EDX, SyscallEntry.At(_inactiveGsBase + sizeof(uint))));
        Label retire = MonitorCode.Here(code);
        code.add(__qword_ptr[rsp + sizeof(ulong) + FrameRip], InstructionLength);
        code.add(rsp, 2 * sizeof(ulong));
        code.iretq();
        code.Label(ref inUserMode);
        code.pop(rax);
        code.jmp(_stub);
        byte[] bytes = MonitorCode.Emit(code, _codeAddress, out AssemblerResult result);
        bytes.CopyTo(new Span<byte>(_code, _codeSize));
        _end = _codeAddress + (ulong)bytes.Length;
        (_kept, _retire, _inUserMode) = (result.GetLabelRIP(kept), result.GetLabelRIP(retire), result.GetLabelRIP(inUserMode));
    }
}
