// IN, OUT, INS and OUTS.
using Iced.Intel;
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Emulation;

public sealed unsafe partial class PrivilegedEmulator
{
    /// <summary>Most repetitions of a string instruction at once; RIP stays on it and the guest comes back for more.</summary>
    private const ulong RepetitionBudget = 4096;

    private EmulationResult ExecuteIo()
    {
        switch (_instruction.Code)
        {
            case Code.In_AL_imm8 or Code.Out_imm8_AL:
                return PortIo(_instruction.Immediate8, 1);
            case Code.In_AX_imm8 or Code.Out_imm8_AX:
                return PortIo(_instruction.Immediate8, 2);
            case Code.In_EAX_imm8 or Code.Out_imm8_EAX:
                return PortIo(_instruction.Immediate8, 4);
            case Code.In_AL_DX or Code.Out_DX_AL:
                return PortIo((ushort)Registers->Rdx, 1);
            case Code.In_AX_DX or Code.Out_DX_AX:
                return PortIo((ushort)Registers->Rdx, 2);
            case Code.In_EAX_DX or Code.Out_DX_EAX:
                return PortIo((ushort)Registers->Rdx, 4);
            case Code.Insb_m8_DX or Code.Outsb_DX_m8:
                return StringIo(1);
            case Code.Insw_m16_DX or Code.Outsw_DX_m16:
                return StringIo(2);
            case Code.Insd_m32_DX or Code.Outsd_DX_m32:
                return StringIo(4);
            default:
                return EmulationResult.NotHandled;
        }
    }

    private EmulationResult PortIo(uint port, uint bytes)
    {
        if (!MayAccessPort(port, bytes))
            return EmulationResult.NotHandled;
        Register accumulator = bytes switch { 1 => Register.AL, 2 => Register.AX, _ => Register.EAX };
        if (_instruction.Mnemonic == Mnemonic.In)
            RegisterFile.Write(Registers, accumulator, _machine.Ports.Read(port, bytes));
        else
            _machine.Ports.Write(port, bytes, (uint)RegisterFile.Read(Registers, accumulator));
        return Retire(DebugRegisters.MatchIo(State, port, bytes));
    }

    private EmulationResult StringIo(uint bytes)
    {
        uint port = (ushort)Registers->Rdx;
        if (!MayAccessPort(port, bytes))
            return EmulationResult.NotHandled;
        bool input = _instruction.Mnemonic is Mnemonic.Insb or Mnemonic.Insw or Mnemonic.Insd;
        (Register index, Register counter) = AddressRegisters(input);
        Register segment = input ? Register.ES : _instruction.MemorySegment;

        // A prefix of SS's does nothing in 64-bit code, not even to the exception.
        if (_bitness == 64 && segment == Register.SS)
            segment = Register.DS;
        bool repeats = _instruction.HasRepPrefix || _instruction.HasRepnePrefix;
        ulong left = repeats ? RegisterFile.Read(Registers, counter) : 1;
        if (left == 0)
            return SkipRepetition(index, counter);

        // A single step traps after every repetition.
        uint breakpoints = DebugRegisters.MatchIo(State, port, bytes);
        bool trapping = breakpoints != 0 || (Registers->Rflags & (ulong)Rflags.Trap) != 0;
        ulong step = (Registers->Rflags & (ulong)Rflags.Direction) != 0 ? 0UL - bytes : bytes;
        ulong budget = trapping ? 1 : RepetitionBudget;
        EmulationResult failure = EmulationResult.Done;
        ulong done = 0;
        do
        {
            ulong offset = RegisterFile.Read(Registers, index);
            if (!Transfer(input, segment, offset, port, bytes, out failure))
                break;
            RegisterFile.Write(Registers, index, offset + step);
            done++;
            left--;
            if (repeats)
                RegisterFile.Write(Registers, counter, left);
        }
        while (left != 0 && done < budget && !_vcpu->PreemptionDue);

        // As the processor does, what was transferred stays transferred and the fault finds the rest in the registers.
        if (failure.Outcome == EmulationOutcome.Exception || (failure.Outcome == EmulationOutcome.NotHandled && done == 0))
            return failure;
        return Retire(left == 0 ? NextRip : Registers->Rip, breakpoints);
    }

    private bool Transfer(bool input, Register segment, ulong offset, uint port, uint bytes, out EmulationResult failure)
    {
        uint data = 0;
        if (!TryLinear(segment, offset, bytes, input, out ulong address, out failure))
            return false;
        if (input)
        {
            // The port is not read for a destination that cannot be written.
            if (!CanAccess(address, bytes, PageFaultError.Write, out failure))
                return false;
            data = _machine.Ports.Read(port, bytes);
            return TryWrite(address, &data, bytes, out failure);
        }

        if (!TryRead(address, &data, bytes, PageFaultError.None, out failure))
            return false;
        _machine.Ports.Write(port, bytes, data);
        return true;
    }

    // No repetition at all. With 32-bit addresses in 64-bit mode the registers are still cut to 32 bits.
    private EmulationResult SkipRepetition(Register index, Register counter)
    {
        if (_bitness == 64 && counter == Register.ECX)
        {
            RegisterFile.Write(Registers, counter, 0);
            RegisterFile.Write(Registers, index, RegisterFile.Read(Registers, index));
        }

        return Retire();
    }

    private (Register Index, Register Counter) AddressRegisters(bool input)
    {
        OpKind kind = input ? _instruction.Op0Kind : _instruction.Op1Kind;
        return kind switch
        {
            OpKind.MemoryESRDI => (Register.RDI, Register.RCX),
            OpKind.MemoryESEDI => (Register.EDI, Register.ECX),
            OpKind.MemoryESDI => (Register.DI, Register.CX),
            OpKind.MemorySegRSI => (Register.RSI, Register.RCX),
            OpKind.MemorySegESI => (Register.ESI, Register.ECX),
            _ => (Register.SI, Register.CX),
        };
    }

    /// <summary>The virtual IOPL lets the current mode do I/O. The kernel counts as ring 1, or ring 0 with architectural_iopl.</summary>
    private bool IoplAllows
    {
        get
        {
            ulong level = !KernelMode ? 3UL : _vcpu->Domain->State->Has(VmAssist.ArchitecturalIopl) ? 0UL : 1UL;
            return level << 12 <= State->Iopl;
        }
    }

    // By IOPL, or by the I/O bitmap, whose bytes are read through the kernel's tables. A byte that cannot be read denies.
    private bool MayAccessPort(uint port, uint bytes)
    {
        if (IoplAllows)
            return true;
        if (port + bytes > State->IoBitmapPorts)
            return false;
        int mode = State->KernelMode;
        State->KernelMode = 1;
        ulong address = State->IoBitmap + (port >> 3);
        uint denied = ReadBitmapByte(address) | (ReadBitmapByte(address + 1) << 8);
        State->KernelMode = mode;
        return (denied & (((1u << (int)bytes) - 1) << (int)(port & 7))) == 0;
    }

    private uint ReadBitmapByte(ulong address) => GuestAccess.Read(_vcpu, address, out byte value) ? value : 0xffu;
}
