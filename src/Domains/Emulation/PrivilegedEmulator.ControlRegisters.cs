// mov to and from control and debug registers, CLTS, XSETBV, RDTSC.
using Iced.Intel;
using XenSharp.Core;
using XenSharp.Mmu;

namespace XenSharp.Domains.Emulation;

public sealed unsafe partial class PrivilegedEmulator
{
    /// <summary>CR0 as Xen runs: PG, AM, WP, NE, ET, MP, PE. The guest may change TS alone.</summary>
    private const ulong Cr0Fixed = 0x8005_0033;

    private const ulong Cr0TaskSwitched = 1 << 3;
    private const ulong Cr4TimeStampDisable = 1 << 2;
    private const ulong Cr4OsXsave = 1 << 18;

    /// <summary>CR4 bits of the hypervisor's that a guest sees: PAE, MCE, OSFXSR, OSXMMEXCPT.</summary>
    private const ulong Cr4Visible = (1 << 5) | (1 << 6) | (1 << 9) | (1 << 10);

    /// <summary>The CR4 that a guest gets to see after it wrote <paramref name="value"/>; with 0, that of a fresh vCPU.</summary>
    public static ulong GuestCr4(CpuidPolicy policy, ulong value) => (value & policy.GuestCr4Mask) | Cr4Visible;

    private EmulationResult ReadControlRegister()
    {
        ulong value;
        switch (_instruction.Op1Register)
        {
            case Register.CR0:
                value = Cr0Fixed | (State->TaskSwitched != 0 ? Cr0TaskSwitched : 0);
                break;
            case Register.CR2:
                value = State->Cr2;
                break;
            case Register.CR3:
                value = State->KernelRoot << Paging.PageShift;
                break;
            case Register.CR4:
                value = State->Cr4;
                break;
            default:
                return EmulationResult.NotHandled;
        }

        RegisterFile.Write(Registers, _instruction.Op0Register, value);
        return Retire();
    }

    private EmulationResult WriteControlRegister()
    {
        ulong value = RegisterFile.Read(Registers, _instruction.Op1Register);
        switch (_instruction.Op0Register)
        {
            case Register.CR0:
                return ((value ^ Cr0Fixed) & ~Cr0TaskSwitched) == 0
                    ? SetTaskSwitched((value & Cr0TaskSwitched) != 0)
                    : EmulationResult.NotHandled;
            case Register.CR2:
                State->Cr2 = value;
                _vcpu->Info->Cr2 = value;
                return Retire();
            case Register.CR3:
                return _machine.SetPageTableRoot(new Mfn(value >> Paging.PageShift)) switch
                {
                    Errno.None => Retire(),

                    // RIP stays: validation goes on when the guest executes the instruction again.
                    Errno.ERESTART => EmulationResult.Done,
                    _ => EmulationResult.NotHandled,
                };
            case Register.CR4:
                State->Cr4 = GuestCr4(_machine.Cpuid, value);
                _machine.SetControlRegister4(State->Cr4);
                return Retire();
            default:
                return EmulationResult.NotHandled;
        }
    }

    private EmulationResult SetTaskSwitched(bool value)
    {
        State->TaskSwitched = value ? 1 : 0;
        _machine.SetTaskSwitched(value);
        return Retire();
    }

    private EmulationResult ReadDebugRegister()
    {
        if (!DebugRegisters.TryGet(State, _instruction.Op1Register - Register.DR0, out ulong value))
            return EmulationResult.InvalidOpcode;
        RegisterFile.Write(Registers, _instruction.Op0Register, value);
        return Retire();
    }

    private EmulationResult WriteDebugRegister()
    {
        ulong value = RegisterFile.Read(Registers, _instruction.Op1Register);
        switch (DebugRegisters.Set(State, _instruction.Op0Register - Register.DR0, value, out int hardware))
        {
            case Errno.None:
                ulong loaded = hardware == 7 ? DebugRegisters.HardwareControl(State) : State->DebugRegisters[hardware];
                _machine.SetDebugRegister(hardware, loaded);
                return Retire();
            case Errno.ENODEV:
                return EmulationResult.InvalidOpcode;
            default:
                return EmulationResult.GeneralProtection;
        }
    }

    private EmulationResult SetExtendedControl()
    {
        if ((State->Cr4 & Cr4OsXsave) == 0)
            return EmulationResult.InvalidOpcode;
        ulong value = (uint)Registers->Rax | (Registers->Rdx << 32);
        if (!KernelMode || (uint)Registers->Rcx != 0 || !_machine.Cpuid.IsValidXcr0(value))
            return EmulationResult.GeneralProtection;
        State->Xcr0 = value;
        _machine.SetXcr0(value);
        return Retire();
    }

    // They trap when the guest kernel set CR4.TSD, which binds its user space and not itself.
    private EmulationResult ReadTsc(bool withAux)
    {
        if (!KernelMode && (State->Cr4 & Cr4TimeStampDisable) != 0)
            return EmulationResult.NotHandled;
        if (withAux)
        {
            if (!_msrs.TryRead(Msr.TscAux, out ulong aux))
                return EmulationResult.GeneralProtection;
            Registers->Rcx = (uint)aux;
        }

        ulong tsc = _machine.ReadTimeStampCounter();
        Registers->Rax = (uint)tsc;
        Registers->Rdx = tsc >> 32;
        return Retire();
    }
}
