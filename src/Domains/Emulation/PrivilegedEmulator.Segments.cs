// Segment-register loads of Xen's flat selectors, and addresses of memory operands.
using Iced.Intel;
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Emulation;

public sealed unsafe partial class PrivilegedEmulator
{
    // On hardware the monitor's GDT holds the flat segments and such a load does not trap. Where the processor's GDT is
    // somebody else's it raises #GP, and is made here: only the visible selector counts, all data segments are flat anyway.
    private EmulationResult LoadSegment(uint errorCode)
    {
        Register target;
        ushort selector;
        switch (_instruction.Code)
        {
            case Code.Mov_Sreg_rm16 or Code.Mov_Sreg_r32m16 or Code.Mov_Sreg_r64m16:
                target = _instruction.Op0Register;
                if (_instruction.Op1Kind == OpKind.Register)
                {
                    selector = (ushort)RegisterFile.Read(Registers, _instruction.Op1Register);
                    break;
                }

                if (!TryAddressOperand(sizeof(ushort), out ulong address, out EmulationResult failure)
                    || !TryRead(address, &selector, sizeof(ushort), PageFaultError.None, out failure))
                    return failure;
                break;
            default:
                return EmulationResult.NotHandled;
        }

        // The error code names the selector that was refused; anything else is not what trapped.
        if ((selector & ~3u) != errorCode || !MayLoad(target, selector))
            return EmulationResult.NotHandled;
        SegmentRegisters* segments = _vcpu->Segments;
        switch (target)
        {
            case Register.DS:
                segments->Ds = selector;
                break;
            case Register.ES:
                segments->Es = selector;
                break;
            case Register.FS:
                segments->Fs = selector;
                segments->FsBase = 0;
                break;
            case Register.GS:
                segments->Gs = selector;
                segments->GsBase = 0;
                break;
            default:
                segments->Ss = selector;
                break;
        }

        return Retire(holdsOffTraps: target == Register.SS);
    }

    // The checks of the processor at CPL 3 (Intel SDM volume 2, MOV) against the flat descriptors, all of them DPL 3.
    private static bool MayLoad(Register target, ushort selector) => target switch
    {
        Register.SS => selector == FlatSelectors.Ring3Data,
        Register.DS or Register.ES or Register.FS or Register.GS
            => selector < 4 || (ushort)(selector | 3) is FlatSelectors.Ring3Data or FlatSelectors.Ring3Cs32 or FlatSelectors.Ring3Cs64,
        _ => false,
    };

    private bool TryAddressOperand(uint bytes, out ulong address, out EmulationResult failure)
        => TryLinear(
            _instruction.MemorySegment, RegisterFile.MemoryOffset(Registers, _instruction), bytes, write: false, out address, out failure);

    // Segment and offset to linear address, with the limit where the mode has one.
    private bool TryLinear(Register segment, ulong offset, uint bytes, bool write, out ulong address, out EmulationResult failure)
    {
        SegmentRegisters* segments = _vcpu->Segments;
        address = 0;
        failure = segment == Register.SS ? EmulationResult.Raise(ExceptionVector.StackFault) : EmulationResult.GeneralProtection;
        if (_bitness == 64)
        {
            address = offset + segment switch
            {
                Register.FS => segments->FsBase,
                Register.GS => segments->GsBase,
                _ => 0,
            };
            return new VirtualAddress(address).IsGuest;
        }

        ushort selector = segment switch
        {
            Register.CS => segments->Cs,
            Register.SS => segments->Ss,
            Register.ES => segments->Es,
            Register.FS => segments->Fs,
            Register.GS => segments->Gs,
            _ => segments->Ds,
        };
        if (!SegmentDescriptor.TryRead(_vcpu, selector, out SegmentDescriptor descriptor) || !descriptor.IsPresent)
        {
            failure = EmulationResult.NotHandled;
            return false;
        }

        if (!descriptor.IsUser || (write ? !descriptor.IsWritable : !descriptor.IsReadable))
            return false;
        if (descriptor.Limit < bytes - 1 || offset > descriptor.Limit - bytes + 1)
            return false;
        address = (uint)(descriptor.Base + offset);
        return true;
    }
}
