using Iced.Intel;
using XenSharp.Core;

namespace XenSharp.Mmu;

/// <summary>
/// Decodes the instruction at the vCPU's RIP and reads and writes its register operands. One a vCPU, reused: nothing is
/// allocated an instruction.
/// </summary>
public sealed unsafe class InstructionDecoder
{
    private readonly VcpuContext* _vcpu;
    private readonly InstructionWindow _window = new();
    private readonly Decoder _decoder;

    public InstructionDecoder(VcpuContext* vcpu)
    {
        _vcpu = vcpu;
        _decoder = Decoder.Create(64, _window);
    }

    /// <summary>Fetches and decodes.</summary>
    /// <returns>False where the bytes cannot be read or are no instruction.</returns>
    public bool TryDecode(out Instruction instruction)
    {
        ulong rip = _vcpu->Registers->Rip;
        int length = InstructionWindow.Capacity;
        _window.Clear();
        fixed (byte* bytes = _window.Free)
        {
            if (!GuestAccess.CopyFrom(_vcpu, rip, bytes, (ulong)length))
            {
                // The instruction may end before the page that cannot be read.
                length = (int)Math.Min((ulong)length, Paging.PageSize - (rip & Paging.PageOffsetMask));
                if (!GuestAccess.CopyFrom(_vcpu, rip, bytes, (ulong)length))
                {
                    instruction = default;
                    return false;
                }
            }
        }

        _window.Append(length);
        _decoder.IP = rip;
        _decoder.Decode(out instruction);
        return !instruction.IsInvalid;
    }

    /// <summary>The linear address of the instruction's memory operand.</summary>
    public ulong MemoryAddress(in Instruction instruction)
    {
        ulong segment = instruction.MemorySegment switch
        {
            Register.FS => _vcpu->Segments->FsBase,
            Register.GS => _vcpu->Segments->GsBase,
            _ => 0UL,
        };
        return MemoryOffset(instruction) + segment;
    }

    /// <summary>The offset of the instruction's memory operand in its segment.</summary>
    public ulong MemoryOffset(in Instruction instruction) => RegisterFile.MemoryOffset(_vcpu->Registers, instruction);

    /// <summary>A general-purpose register of any width, zero-extended.</summary>
    public ulong ReadRegister(Register register) => RegisterFile.Read(_vcpu->Registers, register);

    /// <summary>Writes a general-purpose register as the processor does.</summary>
    public void WriteRegister(Register register, ulong value) => RegisterFile.Write(_vcpu->Registers, register, value);

    /// <summary>Whether the register is one of the sixteen general-purpose ones.</summary>
    public static bool IsGeneralPurpose(Register register) => register.IsGPR();
}
