using Iced.Intel;
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains;

/// <summary>
/// Reads of the M2P table at its classic address, for a guest that does not ask where it is, on a host where that address
/// cannot be used.
/// </summary>
internal sealed unsafe class MachineToPhysRead(VcpuContext* vcpu)
{
    private readonly VcpuContext* _vcpu = vcpu;
    private readonly InstructionDecoder _decoder = new(vcpu);

    /// <summary>Performs the load that faulted.</summary>
    /// <returns>False when it is no load of a whole entry or half of one from the table: the fault is the guest's own.</returns>
    public bool TryEmulate(VirtualAddress address, PageFaultError error)
    {
        DomainContext* domain = _vcpu->Domain;
        ulong offset = address.Value - Paging.HypervisorVirtualStart;
        if (_vcpu->State->KernelMode == 0 || domain->MachineToPhysStart.Value == Paging.HypervisorVirtualStart || (error & (PageFaultError.Write | PageFaultError.InstructionFetch)) != 0
            || offset >= domain->Memory.EndFrame.Value * sizeof(ulong))
        {
            return false;
        }

        if (!_decoder.TryDecode(out Instruction instruction) || instruction.Mnemonic != Mnemonic.Mov
            || instruction.Op0Kind != OpKind.Register || instruction.Op1Kind != OpKind.Memory
            || !InstructionDecoder.IsGeneralPurpose(instruction.Op0Register))
        {
            return false;
        }

        ulong from = _decoder.MemoryAddress(instruction);
        uint size = (uint)instruction.Op0Register.GetSize();
        if (from != address.Value || (from & (size - 1)) != 0)
            return false;
        var frame = new Mfn(offset / sizeof(ulong));
        ulong entry = domain->Memory.Contains(frame) ? domain->MachineToPhys[domain->Memory.IndexOf(frame)] : Mfn.Invalid.Value;
        _decoder.WriteRegister(instruction.Op0Register, entry >> (int)((offset & 7) * 8));
        _vcpu->Registers->Rip = instruction.NextIP;
        return true;
    }
}
