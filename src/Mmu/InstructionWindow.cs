using Iced.Intel;
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>
/// Decodes the instruction at the vCPU's RIP and reads and writes its register operands. One a vCPU, reused: nothing is
/// allocated an instruction.
/// </summary>
public sealed unsafe class InstructionWindow
{
    /// <summary>Longest x86 instruction.</summary>
    public const int MaxLength = 15;

    private readonly VcpuContext* _vcpu;
    private readonly Reader _reader = new();
    private readonly Decoder _decoder;

    public InstructionWindow(VcpuContext* vcpu)
    {
        _vcpu = vcpu;
        _decoder = Decoder.Create(64, _reader);
    }

    /// <summary>Fetches and decodes.</summary>
    /// <returns>False where the bytes cannot be read or are no instruction.</returns>
    public bool TryDecode(out Instruction instruction)
    {
        ulong rip = _vcpu->Registers->Rip;
        byte* bytes = stackalloc byte[MaxLength];
        int length = MaxLength;
        if (!GuestAccess.CopyFrom(_vcpu, rip, bytes, MaxLength))
        {
            // The instruction may end before the page that cannot be read.
            length = (int)Math.Min(MaxLength, Paging.PageSize - (rip & Paging.PageOffsetMask));
            if (length == MaxLength || !GuestAccess.CopyFrom(_vcpu, rip, bytes, (ulong)length))
            {
                instruction = default;
                return false;
            }
        }

        _reader.Load(new ReadOnlySpan<byte>(bytes, length));
        _decoder.IP = rip;
        _decoder.Decode(out instruction);
        return !instruction.IsInvalid;
    }

    /// <summary>The linear address of the instruction's memory operand.</summary>
    public ulong MemoryAddress(in Instruction instruction)
    {
        ulong address = instruction.IsIPRelativeMemoryOperand
            ? instruction.IPRelativeMemoryAddress
            : instruction.MemoryDisplacement64;
        if (!instruction.IsIPRelativeMemoryOperand)
        {
            if (instruction.MemoryBase != Register.None)
                address += ReadRegister(instruction.MemoryBase);
            if (instruction.MemoryIndex != Register.None)
                address += ReadRegister(instruction.MemoryIndex) * (ulong)instruction.MemoryIndexScale;
            if (instruction.MemoryBase.GetSize() == 4 || instruction.MemoryIndex.GetSize() == 4)
                address = (uint)address;
        }

        return address + SegmentBase(instruction.MemorySegment);
    }

    /// <summary>What a segment register adds to an address in 64-bit mode.</summary>
    public ulong SegmentBase(Register segment) => segment switch
    {
        Register.FS => _vcpu->Segments->FsBase,
        Register.GS => _vcpu->Segments->GsBase,
        _ => 0UL,
    };

    /// <summary>A general-purpose register of any width, zero-extended.</summary>
    public ulong ReadRegister(Register register)
    {
        ulong value = *Slot(register);
        return register.GetSize() switch
        {
            1 => IsHighByte(register) ? (value >> 8) & 0xff : value & 0xff,
            2 => value & 0xffff,
            4 => (uint)value,
            _ => value,
        };
    }

    /// <summary>Writes a general-purpose register as the processor does: 32-bit writes clear the upper half.</summary>
    public void WriteRegister(Register register, ulong value)
    {
        ulong* slot = Slot(register);
        *slot = register.GetSize() switch
        {
            1 => IsHighByte(register) ? (*slot & ~0xff00UL) | ((value & 0xff) << 8) : (*slot & ~0xffUL) | (value & 0xff),
            2 => (*slot & ~0xffffUL) | (value & 0xffff),
            4 => (uint)value,
            _ => value,
        };
    }

    /// <summary>Whether the register is one of the sixteen general-purpose ones.</summary>
    public static bool IsGeneralPurpose(Register register) => register.IsGPR();

    private static bool IsHighByte(Register register) => register is Register.AH or Register.BH or Register.CH or Register.DH;

    private ulong* Slot(Register register)
    {
        CpuRegisters* registers = _vcpu->Registers;
        return register.GetFullRegister() switch
        {
            Register.RAX => &registers->Rax,
            Register.RBX => &registers->Rbx,
            Register.RCX => &registers->Rcx,
            Register.RDX => &registers->Rdx,
            Register.RSI => &registers->Rsi,
            Register.RDI => &registers->Rdi,
            Register.RSP => &registers->Rsp,
            Register.RBP => &registers->Rbp,
            Register.R8 => &registers->R8,
            Register.R9 => &registers->R9,
            Register.R10 => &registers->R10,
            Register.R11 => &registers->R11,
            Register.R12 => &registers->R12,
            Register.R13 => &registers->R13,
            Register.R14 => &registers->R14,
            _ => &registers->R15,
        };
    }

    private sealed class Reader : CodeReader
    {
        private readonly byte[] _bytes = new byte[MaxLength];
        private int _length;
        private int _position;

        public void Load(ReadOnlySpan<byte> bytes)
        {
            bytes.CopyTo(_bytes);
            _length = bytes.Length;
            _position = 0;
        }

        public override int ReadByte() => _position < _length ? _bytes[_position++] : -1;
    }
}
