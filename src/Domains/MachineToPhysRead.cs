using Iced.Intel;
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains;

/// <summary>
/// Reads of the M2P table where it is on other hosts: at its classic address, for a guest that does not ask where it is, or was saved on a
/// host where that address can be used; or one slot further, for a guest that was saved where it cannot.
/// </summary>
internal sealed unsafe class MachineToPhysRead(VcpuContext* vcpu)
{
    private readonly VcpuContext* _vcpu = vcpu;
    private readonly InstructionDecoder _decoder = new(vcpu);

    /// <summary>Performs the load that faulted.</summary>
    /// <returns>False when it does not load from one entry of the table: the fault is the guest's own.</returns>
    public bool TryEmulate(VirtualAddress address, PageFaultError error)
    {
        DomainContext* domain = _vcpu->Domain;
        ulong offset = address.Value - Paging.HypervisorVirtualStart;
        if (offset >= Paging.SlotSize)
            offset -= Paging.SlotSize;
        if (_vcpu->State->KernelMode == 0 || domain->MachineToPhysStart.Value == address.Value - offset
            || (error & (PageFaultError.Write | PageFaultError.InstructionFetch)) != 0 || offset >= domain->Memory.EndFrame.Value * sizeof(ulong))
        {
            return false;
        }

        if (!_decoder.TryDecode(out Instruction instruction) || instruction.OpCount != 2
            || instruction.Op0Kind != OpKind.Register || instruction.Op1Kind != OpKind.Memory
            || !InstructionDecoder.IsGeneralPurpose(instruction.Op0Register))
        {
            return false;
        }

        ulong from = _decoder.MemoryAddress(instruction);
        int size = instruction.MemorySize.GetSize();
        if (from != address.Value || size is not (1 or 2 or 4 or 8) || (from & ((ulong)size - 1)) != 0)
            return false;
        var frame = new Mfn(offset / sizeof(ulong));
        ulong entry = domain->Memory.Contains(frame) ? domain->MachineToPhys[domain->Memory.IndexOf(frame)]
            : domain->Window.Contains(frame) ? domain->WindowToPhys[domain->Window.IndexOf(frame)]
            : Mfn.Invalid.Value;
        entry >>= (int)((offset & 7) * 8);
        if (!TryCompute(instruction, size * 8, size == sizeof(ulong) ? entry : entry & ((1UL << (size * 8)) - 1)))
            return false;
        _vcpu->Registers->Rip = instruction.NextIP;
        return true;
    }

    /// <summary>What an instruction does with the value that it loads.</summary>
    private bool TryCompute(in Instruction instruction, int bits, ulong value)
    {
        Register target = instruction.Op0Register;
        ulong left = _decoder.ReadRegister(target);
        ulong flags = _vcpu->Registers->Rflags;
        ulong? result = value;
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Mov or Mnemonic.Movzx:
                break;
            case Mnemonic.Movsx or Mnemonic.Movsxd:
                result = (ulong)((long)value << (64 - bits) >> (64 - bits));
                break;
            case Mnemonic.Cmp:
                _ = Arithmetic.Subtract(left, value, bits, ref flags);
                result = null;
                break;
            case Mnemonic.Add:
                result = Arithmetic.Add(left, value, bits, ref flags);
                break;
            case Mnemonic.Sub:
                result = Arithmetic.Subtract(left, value, bits, ref flags);
                break;
            case Mnemonic.And:
                result = Arithmetic.Logic(left & value, bits, ref flags);
                break;
            case Mnemonic.Or:
                result = Arithmetic.Logic(left | value, bits, ref flags);
                break;
            case Mnemonic.Xor:
                result = Arithmetic.Logic(left ^ value, bits, ref flags);
                break;
            default:
                return false;
        }

        if (result is { } written)
            _decoder.WriteRegister(target, written);
        _vcpu->Registers->Rflags = flags;
        return true;
    }
}
